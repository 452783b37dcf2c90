"""Draw the mini set: brown animals (A), striped ones (B), and the true masks of the test images.

    python data/draw.py [FOLDER] [--train 300] [--test 60] [--textured] [--size 128]

Same bytes on every run: each scene has its own seed. A and B share one scene generator; only the
coat differs. Nothing in a background is brown, white or black: only the animal tells A from B.
--textured makes the same scenes look like photographs: grass, fur, uneven light, grain. --size
draws the same scenes larger, with a finer outline.
"""

import argparse
import colorsys
import math
from pathlib import Path
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

SIZE = 128  # side of the finished images
SCALE = 4  # drawn this much larger, then reduced: smooth edges
FULL = SIZE * SCALE

# hue, saturation, value
SKIES = [
    (205, 0.45, 0.92),
    (190, 0.35, 0.90),
    (222, 0.40, 0.85),
    (285, 0.25, 0.85),
    (322, 0.28, 0.93),
]
GROUNDS = [
    (105, 0.50, 0.68),
    (85, 0.52, 0.74),
    (130, 0.42, 0.60),
    (64, 0.42, 0.86),
    (165, 0.35, 0.68),
    (300, 0.22, 0.72),
]


def hsv(hue, saturation, value):
    """Hue in degrees, the others in [0, 1] -> an RGB tuple of bytes."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def blend(colour, other, t):
    return tuple(round(a + (b - a) * t) for a, b in zip(colour, other))


def gradient(top, bottom, size):
    """A vertical colour gradient of `size` (width, height)."""
    ramp = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), ramp)


def draw_background(rng):
    """Sky, hills, ground, plants. Green, blue, violet, pink, yellow: no brown, white, black."""
    horizon = round(FULL * rng.uniform(0.30, 0.52))

    # sky
    hue, saturation, value = rng.choice(SKIES)
    top = hsv(
        hue + rng.uniform(-8, 8),
        saturation + rng.uniform(0, 0.15),
        value - rng.uniform(0, 0.15),
    )
    low = blend(top, hsv(hue - 15, 0.14, 0.96), rng.uniform(0.3, 0.8))
    cloud = blend(top, hsv(hue, 0.18, 0.97), 0.7)
    image = gradient(top, low, (FULL, FULL))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:  # a low sun
        x, r = rng.uniform(0.1, 0.9) * FULL, rng.uniform(0.04, 0.08) * FULL
        y = horizon - rng.uniform(0.4, 2.5) * r
        draw.ellipse((x - r, y - r, x + r, y + r), fill=hsv(rng.uniform(44, 54), 0.45, 0.98))
    for _ in range(rng.randint(0, 3)):  # clouds, tinted with the sky
        x, y = rng.uniform(0, FULL), rng.uniform(0.03, 0.6) * horizon
        r = rng.uniform(0.03, 0.06) * FULL
        for k in range(4):
            cx, cy = x + (k - 1.5) * r * 1.1, y + rng.uniform(-0.3, 0.3) * r
            cr = r * rng.uniform(0.6, 1)
            box = (cx - cr * 1.3, cy - cr * 0.7, cx + cr * 1.3, cy + cr * 0.7)
            draw.ellipse(box, fill=cloud)

    # hills
    hill_hue = rng.choice([135, 165, 205, 235, 265])
    for layer in range(rng.randint(1, 3)):
        colour = hsv(hill_hue + rng.uniform(-8, 8), 0.25 + 0.10 * layer, 0.76 - 0.09 * layer)
        base = horizon - (2 - layer) * 0.04 * FULL
        phase, waves = rng.uniform(0, 6.3), rng.uniform(0.8, 2.2)
        height = rng.uniform(0.03, 0.09) * FULL
        line = [
            (x, base - height * (1 + math.sin(phase + waves * 6.3 * x / FULL)) / 2)
            for x in range(0, FULL + 1, 8)
        ]
        draw.polygon([(0, FULL), *line, (FULL, FULL)], fill=colour)

    # ground
    hue, saturation, value = rng.choice(GROUNDS)
    hue, saturation = hue + rng.uniform(-6, 6), saturation + rng.uniform(-0.05, 0.05)
    ground = hsv(hue, saturation, value + rng.uniform(-0.05, 0.05))
    near = blend(ground, hsv(hue, saturation, 0.45), rng.uniform(0.3, 0.7))
    image.paste(gradient(ground, near, (FULL, FULL - horizon)), (0, horizon))

    for _ in range(rng.randint(0, 3)):  # trees stand on the horizon
        x, y = rng.uniform(0, FULL), horizon + rng.uniform(0, 0.05) * FULL
        h = rng.uniform(0.12, 0.26) * FULL
        leaf_hue = rng.choice([100, 125, 150, 175, 275]) + rng.uniform(-8, 8)
        leaf = hsv(leaf_hue, 0.45, rng.uniform(0.42, 0.65))
        trunk = blend(leaf, hsv(250, 0.4, 0.35), 0.6)
        draw.rectangle((x - 0.05 * h, y - 0.5 * h, x + 0.05 * h, y), fill=trunk)
        if rng.random() < 0.4:
            for k in range(3):
                w, t = (0.32 - 0.07 * k) * h, y - (0.25 + 0.22 * k) * h
                draw.polygon([(x - w, t), (x + w, t), (x, t - 0.36 * h)], fill=leaf)
        else:
            for _ in range(6):
                cx, cy = x + rng.uniform(-0.22, 0.22) * h, y - rng.uniform(0.5, 0.9) * h
                r = rng.uniform(0.14, 0.22) * h
                colour = blend(leaf, ground, rng.uniform(0, 0.25))
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)

    for _ in range(rng.randint(30, 90)):  # tufts of grass, larger when nearer
        y = horizon + (FULL - horizon) * rng.random() ** 0.8
        x, r = rng.uniform(0, FULL), (0.01 + 0.03 * (y - horizon) / FULL) * FULL
        dark = hsv(hue + rng.uniform(-15, 15), saturation, 0.42)
        colour = blend(ground, dark, rng.uniform(0.2, 0.7))
        for k in (-1, 0, 1):
            blade = [(x - 0.3 * r, y), (x + 0.3 * r, y), (x + k * r, y - 1.4 * r)]
            draw.polygon(blade, fill=colour)

    for _ in range(rng.randint(0, 10)):  # flowers
        y, x = rng.uniform(horizon + 0.05 * FULL, FULL), rng.uniform(0, FULL)
        r = rng.uniform(0.006, 0.012) * FULL
        colour = hsv(rng.choice([52, 330, 285, 215]), 0.55, 0.95)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return image


def capsule(draw, points, widths, fill):
    """A limb: discs of changing radius along straight pieces."""
    for (x0, y0), (x1, y1), w0, w1 in zip(points, points[1:], widths, widths[1:]):
        steps = max(2, round(math.hypot(x1 - x0, y1 - y0) / 2))
        for i in range(steps + 1):
            t = i / steps
            x, y, r = x0 + (x1 - x0) * t, y0 + (y1 - y0) * t, w0 + (w1 - w0) * t
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def draw_animal(rng, image, mask, striped, place_x, ground_y, length):
    """Paint an animal into `image`, its silhouette into `mask`; `length` is that of the trunk."""
    flip = rng.random() < 0.5
    x = round(0.42 * FULL)  # drawn here, facing right, then moved: the neck needs room in front
    centre = round(place_x + (0.2 if flip else -0.2) * length)
    body, far, hair = (Image.new("L", image.size) for _ in range(3))
    near_draw, far_draw, hair_draw = map(ImageDraw.Draw, (body, far, hair))
    u = length

    # legs and trunk
    leg, fat = rng.uniform(0.44, 0.56) * u, rng.uniform(0.22, 0.27) * u
    back, front = x - 0.38 * u, x + 0.38 * u
    y = ground_y - leg - 0.7 * fat
    for hip, bend in ((back, -0.04), (front, 0.04)):
        for painter, offset in ((near_draw, -0.03), (far_draw, 0.05)):
            swing, top = rng.uniform(-0.20, 0.20) * u, hip + offset * u
            knee = (top + 0.35 * swing + bend * u, y + 0.55 * (ground_y - y))
            hoof = (top + swing, ground_y - 0.045 * u)
            capsule(painter, [(top, y), knee, hoof], [0.14 * u, 0.09 * u, 0.072 * u], 255)
    spine = [(back, y - 0.02 * u), (x, y + 0.03 * u), (front, y)]
    capsule(near_draw, spine, [fat, 0.97 * fat, fat], 255)

    # neck, head, ears
    angle = rng.uniform(-0.55, 1.25)  # of the neck: grazing to proud
    neck = rng.uniform(0.42, 0.52) * u
    root = (front + 0.06 * u, y - 0.06 * u)
    poll = (root[0] + neck * math.cos(angle), root[1] - neck * math.sin(angle))
    tilt = min(angle - rng.uniform(1.2, 1.6), -0.25)
    muzzle = (poll[0] + 0.27 * u * math.cos(tilt), poll[1] - 0.27 * u * math.sin(tilt))
    capsule(near_draw, [root, poll], [0.18 * u, 0.12 * u], 255)
    capsule(near_draw, [poll, muzzle], [0.12 * u, 0.08 * u], 255)
    for shift in (-0.05, 0.04):
        ear = (poll[0] + shift * u - 0.03 * u, poll[1] - 0.09 * u)
        corners = [
            (ear[0] - 0.04 * u, ear[1] + 0.03 * u),
            (ear[0] + 0.04 * u, ear[1] + 0.03 * u),
            (ear[0] - 0.01 * u, ear[1] - 0.12 * u),
        ]
        near_draw.polygon(corners, fill=255)

    # mane and tail
    normal = (-math.sin(angle), -math.cos(angle))
    mane = [
        (root[0] + 0.13 * u * normal[0], root[1] + 0.13 * u * normal[1]),
        (poll[0] + 0.09 * u * normal[0], poll[1] + 0.09 * u * normal[1]),
    ]
    capsule(hair_draw, mane, [0.05 * u, 0.045 * u], 255)
    rump = (back - 0.85 * fat, y - 0.10 * u)
    sway = rng.uniform(-0.16, 0.02) * u
    middle = (rump[0] - 0.08 * u + sway, rump[1] + 0.2 * u)
    tip = (rump[0] + sway, rump[1] + 0.42 * u)
    capsule(hair_draw, [rump, middle, tip], [0.04 * u, 0.055 * u, 0.04 * u], 255)

    # coat
    if striped:
        light = hsv(45, rng.uniform(0, 0.05), rng.uniform(0.93, 1))
        dark = hsv(260, 0.1, rng.uniform(0.06, 0.16))
        coat = Image.new("RGB", image.size, light)
        stripes = ImageDraw.Draw(coat)
        period, slant = rng.uniform(0.15, 0.19) * u, rng.uniform(-0.12, 0.3)
        position = x - 1.5 * u
        while position < x + 1.8 * u:  # upright bands over trunk, neck and head
            points = [
                (position + slant * (t - y) + 0.02 * u * math.sin(t / (0.1 * u)), t)
                for t in range(0, FULL + 8, 8)
            ]
            stripes.line(points, fill=dark, width=round(period * rng.uniform(0.42, 0.55)))
            position += period * rng.uniform(0.9, 1.1)
        legs = Image.new("RGB", image.size, light)
        rings, band = ImageDraw.Draw(legs), 0.13 * u
        for k in range(math.ceil(1.2 * leg / band)):  # rings on the legs
            top = ground_y - k * band
            rings.rectangle((0, top - 0.5 * band, FULL, top), fill=dark)
        waist = round(y + 0.95 * fat)
        coat.paste(legs.crop((0, waist, FULL, FULL)), (0, waist))
        tail = dark
    else:
        base = hsv(rng.uniform(16, 28), rng.uniform(0.55, 0.78), rng.uniform(0.40, 0.68))
        light, belly = blend(base, hsv(28, 0.5, 0.8), 0.25), blend(base, hsv(18, 0.8, 0.2), 0.25)
        tail = blend(base, hsv(32, 0.5, 0.85), 0.6)  # light: were it dark, B could keep it
        coat = Image.new("RGB", image.size, belly)
        coat.paste(light, (0, 0, FULL, round(y - 1.1 * fat)))
        coat.paste(gradient(light, belly, (FULL, round(2.2 * fat))), (0, round(y - 1.1 * fat)))

    shadow = Image.new("L", image.size)
    box = (centre - 0.75 * u, ground_y - 0.05 * u, centre + 0.75 * u, ground_y + 0.07 * u)
    ImageDraw.Draw(shadow).ellipse(box, fill=90)
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.03 * u))
    silhouette = ImageChops.lighter(ImageChops.lighter(body, far), hair)

    def place(layer):
        """Moved, and mirrored, to where the animal stands."""
        matrix = (-1, 0, x + centre, 0, 1, 0) if flip else (1, 0, x - centre, 0, 1, 0)
        return layer.transform(layer.size, Image.Transform.AFFINE, matrix)

    # all of it into the image, from the back to the front
    image.paste(hsv(235, 0.45, 0.25), mask=shadow)
    image.paste(place(coat.point(lambda v: round(0.82 * v))), mask=place(far))
    image.paste(Image.new("RGB", image.size, tail), mask=place(hair))
    image.paste(place(coat), mask=place(body))
    eye = Image.new("L", image.size)
    ex = poll[0] + 0.07 * u * math.cos(tilt)
    ey = poll[1] - 0.07 * u * math.sin(tilt) - 0.02 * u
    r = 0.022 * u
    ImageDraw.Draw(eye).ellipse((ex - r, ey - r, ex + r, ey + r), fill=255)
    image.paste((25, 20, 25), mask=place(eye))
    mask.paste(255, mask=place(silhouette))


def noise(rng, size, across, down, contrast, octaves=4):
    """An RGB image of grey, 128 on average: blobs, `across` x `down` of them, and finer ones."""
    total = Image.new("L", size, 128)
    for octave in range(octaves):
        cells = across << octave, down << octave
        layer = Image.frombytes("L", cells, rng.randbytes(cells[0] * cells[1]))
        total = Image.blend(total, layer.resize(size, Image.Resampling.BICUBIC), 0.5)
    total = total.point(lambda v: round(128 + contrast * (v - 128)))
    return Image.merge("RGB", [total] * 3)


def add_textures(rng, image, mask, horizon=0.45):
    """A drawn scene as if photographed; nothing moves, so that the mask stays true."""
    size = image.size
    sky = ImageChops.soft_light(image, noise(rng, size, 3, 6, 0.45))
    grass = ImageChops.overlay(image, noise(rng, size, 48, 12, 0.9))
    fur = ImageChops.overlay(image, noise(rng, size, 14, 40, 0.8))
    edge = round(horizon * size[1])
    ground = Image.new("L", size)
    ground.paste(255, (0, edge, *size))
    ground = ground.filter(ImageFilter.GaussianBlur(0.02 * size[1]))
    image = Image.composite(fur, Image.composite(grass, sky, ground), mask)

    # duller colours, light and shade over all of it, darker corners
    image = ImageEnhance.Color(image).enhance(0.65)
    image = ImageChops.soft_light(image, noise(rng, size, 2, 2, 1.2, octaves=2))
    corners = Image.radial_gradient("L").resize(size).point(lambda v: 255 - v * v // 900)
    return ImageChops.multiply(image, Image.merge("RGB", [corners] * 3))


def draw_scene(seed, striped, textured=False, size=SIZE):
    """One scene -> (RGB image, black-and-white mask), both size x size."""
    global FULL
    FULL = size * SCALE
    rng = Random(seed)
    image = draw_background(rng)
    mask = Image.new("L", image.size)
    if rng.random() < 0.75:
        places, shortest, longest = [rng.uniform(0.40, 0.60)], 0.36, 0.47
    else:
        places, shortest, longest = [rng.uniform(0.22, 0.28), rng.uniform(0.72, 0.78)], 0.25, 0.29

    for place in places:
        length = rng.uniform(shortest, longest) * FULL
        ground_y = rng.uniform(0.72, 0.95) * FULL
        draw_animal(rng, image, mask, striped, place * FULL, ground_y, length)

    if textured:
        rng = Random(f"{seed} textures")
        image = add_textures(rng, image, mask.filter(ImageFilter.GaussianBlur(3)))
    small = [layer.resize((size, size), Image.Resampling.BOX) for layer in (image, mask)]
    if textured:  # a camera's: not quite sharp, with grain
        grain = noise(rng, small[0].size, size, size, 0.35, octaves=1)
        small[0] = ImageChops.overlay(small[0].filter(ImageFilter.GaussianBlur(0.5)), grain)
    return small[0], small[1].point(lambda v: 255 * (v >= 128)).convert("1")


def draw_set(folder, train=300, test=60, textured=False, size=SIZE):
    for domain, striped in (("A", False), ("B", True)):
        for split, count in (("train", train), ("test", test)):
            images, masks = Path(folder, split + domain), Path(folder, "masks" + domain)
            images.mkdir(parents=True, exist_ok=True)
            if split == "test":
                masks.mkdir(exist_ok=True)

            for i in range(count):
                image, mask = draw_scene(f"{split}{domain}{i}", striped, textured, size)
                image.save(images / f"{i:03}.jpg", quality=88, subsampling=0)
                if split == "test":
                    mask.save(masks / f"{i:03}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help = "default: this script's; textured: the folder textured in it"
    parser.add_argument("folder", nargs="?", help=help)
    parser.add_argument("--train", type=int, default=300, help="training images a domain")
    parser.add_argument("--test", type=int, default=60, help="test images a domain")
    parser.add_argument("--textured", action="store_true", help="as if photographed")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images, pixels")
    parser.error = lambda line: parser.exit(2, f"{parser.prog}: error: {line}\n")
    options = parser.parse_args()
    if options.size < 8 or min(options.train, options.test) < 0:
        parser.error("--size: must be at least 8; --train, --test: at least 0")
    if options.folder and Path(options.folder, "trainA").exists():
        parser.error(f"{options.folder}: has a folder trainA; name a new one")
    if options.size != SIZE and not options.folder:
        parser.error("--size: name a folder too; the bundled drawings have 128 pixels")
    default = Path(__file__).parent / ("textured" if options.textured else "")
    settings = options.train, options.test, options.textured, options.size
    try:
        draw_set(options.folder or default, *settings)
    except OSError as error:
        parser.error(str(error))
