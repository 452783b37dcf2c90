"""Draws the README's pictures: python data/pictures.py

    strip.png      the default model: input, attention, content, translation, in both directions
    family.png     the same inputs through every model
    attention.png  where scheme II looks, from before its first step to after its last
    chart.png      its mean attention and its r over the steps, from log.csv
    large.png      scenes of 512 pixels through the default model: input, mask, translation
    textured.png   as strip.png, of the scenes that draw.py --textured draws

They show runs of the mini set in runs/pictures, one a model. What is missing there is trained
first, which takes half an hour on two cores; remove that folder to have it trained anew. Needs
matplotlib.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import aggan  # noqa: E402
import draw as drawings  # noqa: E402
import page  # noqa: E402

MODELS = {
    "scheme2": {},
    "scheme1": {},
    "mejjati": {},
    "cyclegan": {},
    "guided, pha": dict(model="guided"),
    "guided, tam": dict(model="guided", attention_map="tam"),
}
STEPS = 0, 100, 200, 400, 600, 800, 1200, 1600, 2000
EDGE = 14  # pixels of a line of text
CURVES = "attention_ab", "attention_ba", "r_ab", "r_ba"


def grid(run, step):
    """The run's sample grid after `step` steps; that of step 0 is drawn anew, from the seed."""
    path = Path(run, "samples", f"{step:07}.png")
    if step:
        return Image.open(path).convert("RGB")

    config = aggan.load_checkpoint(run)["config"]
    shown = aggan.sample_images(config)
    nets = aggan.Trainer(config, 1, aggan.pick_device("cpu")).nets
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "0.png")
        aggan.save_samples(path, nets, *shown)
        return Image.open(path).convert("RGB")


def table(rows, above=(), left=()):
    """Rows of images of one size -> one image, with texts over the columns and before the rows."""
    font, (width, height) = ImageFont.load_default(EDGE - 2), rows[0][0].size
    x0 = 4 + round(max((font.getlength(text) for text in left), default=-4))
    y0 = EDGE + 2 if above else 0
    size = x0 + len(rows[0]) * (width + 2), y0 + len(rows) * (height + 2)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    # texts
    for k, text in enumerate(above):
        draw.text((x0 + k * (width + 2) + width // 2, y0 // 2), text, "black", font, anchor="mm")
    for k, text in enumerate(left):
        draw.text((0, y0 + k * (height + 2) + height // 2), text, "black", font, anchor="lm")

    # images
    for k, row in enumerate(rows):
        for n, image in enumerate(row):
            picture.paste(image, (x0 + n * (width + 2), y0 + k * (height + 2)))
    return picture.quantize()  # to 256 colours: a third of the bytes


def tiles(picture, row, columns, scale=1):
    """Panels of one row of a sample grid, enlarged.

    Columns 0 to 3 are A -> B's input, attention, content, translation, columns 4 to 7 B -> A's.
    """
    side = (picture.width - 2) // 8 - 2
    found = []
    for k in columns:
        x, y = 2 + k * (side + 2), 2 + row * (side + 2)
        tile = picture.crop((x, y, x + side, y + side))
        found.append(tile.resize((side * scale,) * 2, Image.Resampling.BICUBIC))
    return found


def strip(picture):
    """The first two rows of a sample grid."""
    rows = [tiles(picture, row, range(8), scale=2) for row in (0, 1)]
    return table(rows, above=page.PANELS * 2)


def large(run, seeds=("testA7", "testB3"), size=512):
    """A scene of each domain, larger than what the run was trained on: input, mask, translation."""
    device, rows = aggan.pick_device("cpu"), []
    nets, config = aggan.load_generators(run, device)
    for generator, seed in zip(("g_ab", "g_ba"), seeds):
        image, _ = drawings.draw_scene(seed, striped=generator == "g_ba", size=size)
        new, mask = aggan.translate_image(nets[generator], image, config.resize, device)
        rows.append([image, mask, new])
    return table(rows, above=("input", "mask", "translation"))


def draw(runs, folder, steps=STEPS):
    """runs: name of a model -> its run folder, the default first. Writes the pictures."""
    last = {name: grid(run, steps[-1]) for name, run in runs.items()}
    default = next(iter(runs))
    log = page.read_log(Path(runs[default], "log.csv"))
    page.chart({default: log}, CURVES, size=(6.5, 2.3)).savefig(Path(folder, "chart.png"))
    strip(last[default]).save(Path(folder, "strip.png"))
    large(runs[default]).save(Path(folder, "large.png"))
    columns = 0, 1, 3, 4, 5, 7  # all but the contents
    rows = [tiles(picture, 2, columns, scale=2) for picture in last.values()]
    above = [page.PANELS[k % 4] for k in columns]
    table(rows, above, left=list(last)).save(Path(folder, "family.png"))

    # an input, then its attention over the steps
    grids, rows = [grid(runs[default], step) for step in steps], []
    for column in (0, 4):
        masks = [tiles(picture, 0, [column + 1])[0] for picture in grids]
        rows.append([*tiles(grids[0], 0, [column]), *masks])
    table(rows, above=["step", *map(str, steps)]).save(Path(folder, "attention.png"))


def main(argv=None):
    parser = aggan.Parser(description=__doc__.splitlines()[0])
    parser.epilog = "Runs that runs/pictures lacks are trained first: half an hour on two cores."
    parser.add_argument("folder", nargs="?", default=HERE, help="default: this script's")
    folder, runs = Path(parser.parse_args(argv).folder), {}

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, options in MODELS.items():
            runs[name] = "runs/pictures/" + name.replace(", ", "-")
            given = {"model": name, **options, "out": runs[name], "save_every": 100}
            aggan.run_train(resume=True, **given)  # does nothing where it is done
        draw(runs, folder)

        scenes, run = Path("runs/pictures/textured-images"), "runs/pictures/textured"
        if not scenes.exists():
            drawings.draw_set(scenes, textured=True)
        a, b = scenes / "trainA", scenes / "trainB"
        given = dict(a=str(a), b=str(b), objective="final", shift=0.0, out=run, save_every=100)
        aggan.run_train(resume=True, small=True, **given)
        strip(grid(run, STEPS[-1])).save(Path(folder, "textured.png"))
    except (aggan.BadInput, OSError) as error:
        parser.exit(getattr(error, "status", 2), f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
