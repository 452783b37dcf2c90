"""Tests of aggan.py, in its order: first the method, then the machinery.

No network, no GPU, seeded. Run: pytest -q
"""

import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import http.server
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from torch import nn

import aggan
from aggan import (
    ActivationDiscriminator,
    AttentionGuidedDiscriminator,
    Config,
    CycleGANGenerator,
    GatedGenerator,
    GuidedGenerator,
    ImagePool,
    MaskedDiscriminator,
    PatchDiscriminator,
    PooledDiscriminator,
    ResidualAttentionDiscriminator,
    SchemeOneGenerator,
    SchemeTwoGenerator,
    Translation,
)

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXERCISES = (ROOT / "data" / "exercises.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
torch.set_num_threads(1)  # small networks; and processes that are compared round alike
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # of processes side by side

needs_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")

# settings of a run of a second
TINY = dict(width=4, blocks=1, masks=3, size=32, resize=36, workers=0, device="cpu")
TINY |= dict(log_every=2, save_every=2)
FINAL = aggan.configure(dict(TINY, a="a", b="b"))
RELEASED = aggan.configure(dict(TINY, a="a", b="b", objective="released"))
MEJJATI = aggan.configure(dict(TINY, a="a", b="b", model="mejjati"))
BATCH = [x * 2 - 1 for x in torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def folders(tmp_path):
    """Two small domains of noise, of different sizes, the images not square."""
    for domain, count, size in (("A", 5, (48, 40)), ("B", 3, (40, 60))):
        for part in ("train", "test"):
            (tmp_path / (part + domain)).mkdir()
            for i in range(count):
                pixels = torch.randint(256, (3, size[1], size[0]), dtype=torch.uint8)
                image = aggan.TF.to_pil_image(pixels)
                image.save(tmp_path / (part + domain) / f"{i}.png")
    return tmp_path


@pytest.fixture
def trained(folders):
    return aggan.train(tiny(folders, steps=1))


@pytest.fixture
def started():
    """Starts the command line in a copy of this process, which needs no time to import PyTorch."""
    fork, processes = multiprocessing.get_context("fork"), []

    def start(*arguments):
        processes.append(fork.Process(target=aggan.main, args=([*map(str, arguments)],)))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:  # none outlives a failure
        process.kill()


def tiny(folders, **changes):
    """The configuration of a tiny run on these folders."""
    places = dict(a=str(folders / "trainA"), b=str(folders / "trainB"), out=str(folders / "run"))
    return aggan.configure(TINY | places | changes)


def options(folders, **changes):
    """The same as options of the command line."""
    places = dict(a=folders / "trainA", b=folders / "trainB", out=folders / "run")
    given = TINY | places | changes
    return [str(x) for name, value in given.items() for x in (aggan.flag(name), value)]


def command(*arguments):
    """The command line, in a process of its own, as a user calls it."""
    return [sys.executable, str(ROOT / "aggan.py"), *map(str, arguments)]


def refusal(arguments, capsys, status=2):
    """The one line that the command line prints before it exits with `status`."""
    with pytest.raises(SystemExit) as stopped:
        aggan.main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert stopped.value.code == status, error
    assert error.count("\n") == 1 and error.startswith("aggan.py"), error
    return error


def script(name, folder=ROOT / "data"):
    """NAME.py of the folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def weights(run):
    return aggan.load_checkpoint(run)["parts"]["nets"]


def pixels_of(path):
    return aggan.to_tensor(aggan.load_image(path))


# ---------- 0. The module ----------


def test_import_has_no_side_effects(tmp_path):
    code = (
        "import random, sys, torch; before = torch.get_rng_state(), random.getstate()\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import aggan\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    run = [sys.executable, "-B", "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_docstring_is_true():
    """It names what exists, and a line for every model."""
    for name in re.findall(r"`(\w+)`", aggan.__doc__):
        assert hasattr(aggan, name) or name in ("g_ab", "g_ba"), name
    for name in re.findall(r"\w+Generator", aggan.__doc__):
        assert hasattr(aggan, name), name
    for model in aggan.PRESETS:
        assert f"\n  {model} " in aggan.__doc__


def test_style():
    """Air and width, in which the file is projected."""
    for file in ("aggan.py", "test_aggan.py", *map(str, ROOT.glob("data/*.py"))):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 100, file
        air = sum(not line.strip() or line.lstrip().startswith("#") for line in lines)
        if file == "aggan.py":
            assert air >= 0.2 * len(lines) and len(lines) <= 1973


# ---------- 1. The fusion formula ----------


def random_translation(batch=2, n=4, height=5, width=6):
    x = torch.rand(batch, 3, height, width) * 2 - 1
    attention = torch.randn(batch, n, height, width).softmax(1)
    content = torch.rand(batch, n - 1, 3, height, width) * 2 - 1
    return x, attention, content


def test_fuse_is_the_naive_loop():
    x, attention, content = random_translation()
    out = aggan.fuse(x, attention, content)
    assert out.shape == x.shape
    for b, c, h, w in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        pixel = attention[b, 3, h, w] * x[b, c, h, w]
        for f in range(3):
            pixel = pixel + attention[b, f, h, w] * content[b, f, c, h, w]
        assert out[b, c, h, w].item() == pytest.approx(pixel.item(), abs=1e-6)


def test_background_mask_of_one_returns_the_input_to_the_bit():
    x, attention, content = random_translation()
    attention = torch.zeros_like(attention)
    attention[:, -1] = 1
    assert torch.equal(aggan.fuse(x, attention, content), x)


def test_two_masks_are_scheme_one():
    x, _, content = random_translation(n=2)
    a = torch.rand(2, 1, 5, 6)
    scheme_one = a * content[:, 0] + (1 - a) * x
    torch.testing.assert_close(aggan.fuse(x, torch.cat([a, 1 - a], 1), content), scheme_one)


def test_fuse_refuses_masks_that_do_not_meet_contents():
    x, attention, content = random_translation()
    with pytest.raises(ValueError, match="4 masks"):
        aggan.fuse(x, attention, content[:, :1])  # would broadcast


# ---------- 2. Building blocks ----------


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_blocks_shapes(norm):
    x = torch.randn(2, 3, 32, 48)
    features = aggan.Encoder(8, 2, norm)(x)
    assert features.shape == (2, 32, 8, 12)  # 4 * width channels, a quarter of the size
    assert aggan.ResidualBlock(32, norm)(features).shape == features.shape
    assert aggan.conv_block(3, 5, 7, norm=norm)(x).shape == (2, 5, 32, 48)
    for upsample in ("nearest", "transposed"):
        assert aggan.up_block(32, 5, norm, upsample)(features).shape == (2, 5, 16, 24)
        assert aggan.Decoder(7, 8, norm, upsample)(features).shape == (2, 7, 32, 48)


def test_nearest_upsampling_leaves_no_grid():
    """Of a flat input: a convolution of doubled pixels stays flat, a transposed one alternates."""
    flat, linear = torch.ones(1, 8, 6, 6), (nn.Upsample, nn.Conv2d, nn.ConvTranspose2d)
    spread = {}
    for upsample in ("nearest", "transposed"):
        modules = aggan.up_block(8, 4, upsample=upsample).modules()
        block = nn.Sequential(*(m for m in modules if isinstance(m, linear)))  # no norm, no ReLU
        spread[upsample] = block(flat)[..., 2:-2, 2:-2].std((2, 3))
        assert parameters(block) == 8 * 4 * 9 + 4
    assert spread["nearest"].max() < 1e-6 and spread["transposed"].min() > 0.01


@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
def test_norms_and_paddings_are_the_papers(upsample):
    modules = list(SchemeTwoGenerator(4, 1, upsample=upsample).modules())
    norms = [m for m in modules if isinstance(m, nn.InstanceNorm2d)]
    assert len(norms) == 3 + 2 + 4
    assert not any(m.affine or m.track_running_stats for m in norms)
    convolutions = [m for m in modules if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) == 3 + 2 + 6 and all(m.bias is not None for m in convolutions)
    for m in convolutions:  # stride 1: reflection; stride 2, down or up: zeros
        assert m.padding_mode == ("reflect" if m.stride == (1, 1) else "zeros")


# ---------- 3. Generators (and those of section 7) ----------

GENERATORS = {
    "scheme I": (SchemeOneGenerator, 2),
    "scheme II, n = 2": (functools.partial(SchemeTwoGenerator, masks=2), 2),
    "scheme II, n = 10": (SchemeTwoGenerator, 10),
    "CycleGAN": (CycleGANGenerator, 2),
    "Mejjati": (GatedGenerator, 2),
    "Lin, PHA": (lambda *size: GuidedGenerator(ActivationDiscriminator(3, 4), *size), 2),
    "Lin, TAM": (lambda *size: GuidedGenerator(ResidualAttentionDiscriminator(3, 4), *size), 2),
}


@pytest.mark.parametrize("height, width", [(256, 256), (64, 64), (64, 96)])
@pytest.mark.parametrize("name", GENERATORS)
def test_generator_shapes_and_ranges(name, height, width):
    make, n = GENERATORS[name]
    x = torch.rand(2, 3, height, width) * 2 - 1
    with torch.no_grad():
        t = make(8, 1)(x)
    assert t.image.shape == (2, 3, height, width)
    assert t.attention.shape == (2, n, height, width)
    assert t.content.shape == (2, n - 1, 3, height, width)
    assert t.foreground.shape == (2, 1, height, width)

    torch.testing.assert_close(t.attention.sum(1), torch.ones(2, height, width))
    torch.testing.assert_close(t.foreground[:, 0], t.attention[:, :-1].sum(1))
    assert t.attention.min() >= 0 and t.attention.max() <= 1
    assert t.content.abs().max() <= 1 and t.image.abs().max() <= 1 + 1e-6
    if "Lin" not in name:  # which fuses nothing
        torch.testing.assert_close(t.image, aggan.fuse(x, t.attention, t.content))


def test_masks_and_contents_of_equations_2_and_3():
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    one, two = SchemeOneGenerator(4, 1), SchemeTwoGenerator(4, 1, masks=3)
    s = one.decoder(one.encoder(x))
    sigmoid = 1 / (1 + (-s[:, :1]).exp())
    torch.testing.assert_close(one(x).attention, torch.cat([sigmoid, 1 - sigmoid], dim=1))
    torch.testing.assert_close(one(x).content[:, 0], s[:, 1:].tanh())

    features = two.encoder(x)
    powers = two.attention_decoder(features).exp()
    torch.testing.assert_close(two(x).attention, powers / powers.sum(1, keepdim=True))
    contents = two.content_decoder(features).tanh()  # of the first mask, of the second
    torch.testing.assert_close(two(x).content, torch.stack([contents[:, :3], contents[:, 3:]], 1))


def test_full_size_networks():
    with torch.device("meta"):  # full width, without the arithmetic
        cyclegan = parameters(CycleGANGenerator())
        assert cyclegan == 11_378_179
        assert parameters(SchemeTwoGenerator()) == 11_853_669
        assert parameters(SchemeTwoGenerator(upsample="transposed")) == 11_853_669
        assert parameters(SchemeOneGenerator()) == cyclegan + 64 * 49 + 1  # one more channel
        assert SchemeTwoGenerator()(torch.empty(1, 3, 256, 256)).content.shape[:3] == (1, 9, 3)

        patch = parameters(PatchDiscriminator())
        assert patch == 2_764_737
        assert parameters(AttentionGuidedDiscriminator()) == patch + 64 * 16  # and the mask

        # c7 32, c3 64, R64, c3 64, c3 32, c7 1
        attention = 3 * 32 * 49 + 32 * 49 + (32 * 64 + 3 * 64 * 64 + 64 * 32) * 9
        attention += 32 + 4 * 64 + 32 + 1
        assert parameters(GatedGenerator()) == cyclegan + attention
        branch = (64 * 128 + 128 * 256 + 2 * 256 * 256) * 9 + 128 + 3 * 256
        mix = 2 * (256 * 256 + 256)
        assert parameters(ResidualAttentionDiscriminator()) == patch + branch + mix
        assert parameters(GuidedGenerator(ActivationDiscriminator())) == cyclegan  # no guide's


def test_cyclegan_repaints_everything():
    x, net = torch.rand(2, 3, 32, 32) * 2 - 1, CycleGANGenerator(4, 1)
    t = net(x)
    assert torch.equal(t.foreground, torch.ones(2, 1, 32, 32))
    assert torch.equal(t.image, t.content[:, 0])
    torch.testing.assert_close(t.image, net.decoder(net.encoder(x)).tanh())


# ---------- 4. Discriminators (and those of section 7) ----------

DISCRIMINATORS = {
    "patch": PatchDiscriminator,
    "pooled": PooledDiscriminator,
    "attention-guided": lambda _, *size: AttentionGuidedDiscriminator(*size),
    "attention-guided, pooled": lambda _, *size: AttentionGuidedDiscriminator(*size, head="pooled"),
    "masked": lambda _, *size: MaskedDiscriminator(*size),
    "masked, pooled": lambda _, *size: MaskedDiscriminator(*size, head="pooled"),
    "PHA": ActivationDiscriminator,
    "TAM": ResidualAttentionDiscriminator,
}


@pytest.mark.parametrize("height, width", [(256, 256), (64, 64), (64, 96)])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminator_shapes(name, norm, height, width):
    d = DISCRIMINATORS[name](3, 4, norm)
    image, mask = torch.rand(2, 3, height, width) * 2 - 1, torch.rand(2, 1, height, width)
    pooled = (2, 1, 1, 1)
    expected = pooled if "pooled" in name else (2, 1, height // 8 - 2, width // 8 - 2)
    with torch.no_grad():
        assert d(image, mask).shape == expected
        if "masked" in name:  # after its switch
            d.set_progress(0.9)
            assert d(image, mask).shape == expected
        if name in ("PHA", "TAM"):
            assert d.attention(image).shape == mask.shape


def test_a_patch_logit_sees_70_pixels():
    x, net = torch.randn(1, 3, 128, 128, requires_grad=True), PatchDiscriminator(width=4)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.LeakyReLU))]
    nn.Sequential(*layers)(x)[0, 0, 7, 7].backward()  # without norms, which see the whole image
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    assert (rows.max() - rows.min() + 1).item() == 70


def test_norms_of_the_heads():
    def kinds(net):
        return [type(m).__name__ for m in net.modules() if not list(m.children())]

    patch, pooled = (
        kinds(PatchDiscriminator(3, 4, "batch")),
        kinds(PooledDiscriminator(3, 4, "batch")),
    )
    assert patch[:3] == ["Conv2d", "LeakyReLU", "Conv2d"] and patch.count("BatchNorm2d") == 3
    assert pooled[:3] == ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert pooled.count("BatchNorm2d") == 4
    assert pooled[-4:] == ["Conv2d", "LeakyReLU", "AdaptiveAvgPool2d", "Conv2d"]


def test_attention_guided_discriminator_sees_mask_and_image():
    image, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)
    d = AttentionGuidedDiscriminator(4)
    assert torch.equal(d(image, mask), d.judge(torch.cat([mask, image], dim=1)))
    assert not torch.equal(d(image, mask), d(image, 1 - mask))


# ---------- 5. Losses ----------


def test_adversarial_loss_least_squares():
    logits = torch.tensor([[0.5, 2.0]])
    # ((0.5 - 1)^2 + (2 - 1)^2) / 2 = (0.25 + 1) / 2
    assert aggan.adversarial_loss(logits, True).item() == pytest.approx(0.625)
    # (0.5^2 + 2^2) / 2 = (0.25 + 4) / 2
    assert aggan.adversarial_loss(logits, False).item() == pytest.approx(2.125)


def test_adversarial_loss_log_form():
    logits = torch.tensor([0.0, math.log(3)])  # D says 1/2 and 3/4
    real = -(math.log(1 / 2) + math.log(3 / 4)) / 2
    fake = -(math.log(1 - 1 / 2) + math.log(1 - 3 / 4)) / 2
    assert aggan.adversarial_loss(logits, True, "vanilla").item() == pytest.approx(real)
    assert aggan.adversarial_loss(logits, False, "vanilla").item() == pytest.approx(fake)
    with pytest.raises(ValueError, match="wgan"):
        aggan.adversarial_loss(logits, True, "wgan")


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 1, 5, 7)])
def test_adversarial_loss_has_nothing_to_broadcast(shape):
    assert aggan.adversarial_loss(torch.ones(shape), True).item() == 0
    assert aggan.adversarial_loss(torch.zeros(shape), True).item() == 1


def test_l1_losses_are_means():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[0, 0] = 3  # 16 of 96 numbers: 16 * 3 / 96
    for loss in (aggan.cycle_loss, aggan.pixel_loss, aggan.identity_loss):
        assert loss(y, x).item() == pytest.approx(0.5) and loss(y, x).shape == ()


def test_total_variation_of_a_step_edge():
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :, 3:] = 0.5  # an edge across 4 rows: 4 * 0.5
    assert aggan.total_variation_loss(mask).item() == pytest.approx(2)
    mask[1] = 0  # mean over the batch
    assert aggan.total_variation_loss(mask).item() == pytest.approx(1)
    two = mask[:1].expand(1, 2, 4, 6)  # a sum over masks
    assert aggan.total_variation_loss(two).item() == pytest.approx(4)


# ---------- 6. The objective ----------


class Fixed(nn.Module):
    """A network that says this, whatever it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *_):
        return self.answer


def fixed_translation(value, mask):
    image, mask = torch.full((1, 3, 2, 2), value), torch.full((1, 1, 2, 2), mask)
    return Translation(image, torch.cat([mask, 1 - mask], 1), image[:, None])


def test_objective_by_hand_at_two_values_of_r():
    x, y = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    g, g_back = Fixed(fixed_translation(0.5, 0.25)), Fixed(fixed_translation(-0.2, 0.0))
    discriminators = nn.ModuleDict(
        {"gan": Fixed(torch.zeros(1, 1)), "paired": Fixed(torch.ones(1, 1))}
    )
    names = ("gan", "paired", "cycle", "pixel", "identity", "tv")
    config = Config(**{"l_" + name: weight for name, weight in zip(names, (2, 3, 10, 4, 5, 7))})

    def total(r, **changes):
        changed = dataclasses.replace(config, **changes)
        return aggan.generator_objective(g, g_back, discriminators, x, y, r, changed)[0].item()

    # cycle |-0.2 - 0|, pixel |0.5 - 0|, identity |0.5 - 1|
    keep = 10 * 0.2 + 4 * 0.5 + 5 * 0.5
    # gan (0 - 1)^2, paired (1 - 1)^2, tv of an even mask 0
    change = 2 * 1 + 3 * 0 + 7 * 0
    assert total(0.5) == pytest.approx(0.5 * keep + 0.5 * change)
    assert total(0.01) == pytest.approx(0.01 * keep + 0.99 * change)
    assert total(0.01, curriculum="none") == pytest.approx(keep + change)


def on_real(logits, kind):
    return ((logits - 1) ** 2).mean() if kind == "lsgan" else -logits.sigmoid().log().mean()


def on_fake(logits, kind):
    return (logits**2).mean() if kind == "lsgan" else -(1 - logits.sigmoid()).log().mean()


def direction(nets, name, a=BATCH[0], b=BATCH[1]):
    """The first arguments of `generator_objective` for "ab" or "ba"."""
    x, y = (a, b) if name == "ab" else (b, a)
    return nets["g_" + name], nets["g_" + name[::-1]], nets["d_" + name[1]], x, y


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("kind", ["lsgan", "vanilla"])
@pytest.mark.parametrize("model", aggan.PRESETS)
def test_generator_objective_from_its_parts(model, kind, norm):
    config = dataclasses.replace(FINAL, model=model, l_identity=5.0, gan=kind, norm=norm)
    nets = aggan.build(config)
    for name in ("ab", "ba"):
        g, g_back, d, x, y = direction(nets, name)
        total, losses, fake = aggan.generator_objective(g, g_back, d, x, y, 0.2, config)
        torch.testing.assert_close(fake.image, g(x).image)
        expected = {
            "gan": on_real(d["gan"](g(x).image, g(x).foreground), kind),
            "paired": on_real(d["paired"](g(x).image, g(x).foreground), kind),
            "cycle": (g_back(g(x).image).image - x).abs().mean(),
            "pixel": (g(x).image - x).abs().mean(),
            "identity": (g(y).image - y).abs().mean(),
            "tv": aggan.total_variation_loss(g(x).foreground),
        }
        assert losses.keys() == expected.keys()
        for term in expected:
            torch.testing.assert_close(losses[term], expected[term].detach())
        keep = 10 * expected["cycle"] + expected["pixel"] + 5 * expected["identity"]
        change = 0.5 * expected["gan"] + 0.5 * expected["paired"] + 1e-6 * expected["tv"]
        torch.testing.assert_close(total, 0.2 * keep + 0.8 * change)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("kind", ["lsgan", "vanilla"])
def test_discriminator_objective_from_its_parts(kind, norm):
    config = dataclasses.replace(FINAL, gan=kind, norm=norm, l_copy=0.3)
    d = aggan.build(config)["d_a"]
    real, fake, other = ((torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)) for _ in "rfo")
    total, losses = aggan.discriminator_objective(d, real, fake, other, config)

    gan = (on_real(d["gan"](real[0]), kind) + on_fake(d["gan"](fake[0]), kind)) / 2
    # the fake's mask beside the real image too
    pair = on_real(d["paired"](real[0], fake[1]), kind) + on_fake(d["paired"](*fake), kind)
    untouched = on_fake(d["gan"](other[0]), kind) / 2
    copy = on_real(d["gan"](other[0]), kind)  # what a translation that copies would get
    expected = {"d_gan": gan, "d_paired": pair / 2, "d_copy": untouched, "copy": copy}
    assert losses.keys() == expected.keys()
    for term in expected:
        torch.testing.assert_close(losses[term], expected[term].detach())
    torch.testing.assert_close(total, gan + pair / 2 + 0.3 * untouched)


def test_terms_of_weight_zero_are_not_computed():
    zeros = dict(l_paired=0, l_cycle=0, l_pixel=0, l_tv=0)
    config = dataclasses.replace(FINAL, **zeros)
    nets, calls = aggan.build(config), []
    assert list(nets["d_a"]) == list(nets["d_b"]) == ["gan"]
    for name in ("g_ab", "g_ba"):
        nets[name].register_forward_hook(lambda *_, name=name: calls.append(name))
    for name in ("d_a", "d_b"):
        nets[name]["gan"].register_forward_hook(lambda *_, name=name: calls.append(name))
    _, losses, _ = aggan.generator_objective(*direction(nets, "ab"), 0.5, config)
    assert list(losses) == ["gan"] and sorted(calls) == ["d_b", "g_ab"]

    seen = (torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32))
    for curriculum, needed in (("papers", 0), ("adaptive", 1)):  # which compares with a copy
        config = dataclasses.replace(config, l_copy=0, curriculum=curriculum)
        calls.clear()
        total, losses = aggan.discriminator_objective(nets["d_a"], seen, seen, seen, config)
        torch.testing.assert_close(total.detach(), losses["d_gan"])
        assert calls == ["d_a"] * (2 + needed) and ("copy" in losses) == needed


def test_masks_learn_from_the_paired_discriminator():
    config = dataclasses.replace(FINAL, l_gan=0, l_cycle=0, l_pixel=0, l_tv=0)
    nets = aggan.build(config)
    with torch.no_grad():  # a discriminator that looks at nothing but the mask
        nets["d_b"]["paired"].judge.features[0][0].weight[:, 1:] = 0
    aggan.generator_objective(*direction(nets, "ab"), 0.5, config)[0].backward()
    assert nets["g_ab"].attention_decoder[-1].weight.grad.abs().max() > 0


def by_hand(losses, steps, highest=0.5, trust=0.35):
    """Eq. (11) with plain numbers: r of each step, and of the one after."""
    e, c, rs = 1.0, 1.0, [0.01]
    for step, (new_e, new_c) in enumerate(losses):
        share = 1 / min(step + 1, max(1, 0.02 * steps))
        e, c = e + share * (new_e - e), c + share * (new_c - c)
        ramp = max(0.01, highest * (step + 1) / steps)
        rs.append(min(max(ramp * (1 - e / c) / (1 - trust), 0.01), ramp))
    return rs


def r_of(losses, steps, **settings):
    """The same from the class, which has both directions: B -> A copies all along."""
    curriculum, rs = aggan.AdaptiveCurriculum(steps, **settings), []
    for step, (e, c) in enumerate([*losses, (1, 1)]):
        r = curriculum(step)
        assert r[1].item() == pytest.approx(0.01)
        rs.append(r[0].item())
        curriculum.update(step, torch.tensor([e, 1.0]), torch.tensor([c, 1.0]))
    return rs


def test_adaptive_curriculum_is_the_loop_by_hand():
    random.seed(0)
    for steps, settings in ((300, {}), (40, dict(highest=0.3, trust=0.6))):
        losses = [(random.uniform(0.2, 1.0), random.uniform(0.8, 1.2)) for _ in range(steps)]
        rs = r_of(losses, steps, **settings)
        assert rs == pytest.approx(by_hand(losses, steps, **settings), rel=1e-4)
        assert max(rs) > 0.1


def test_r_rises_while_translations_fool_the_discriminator():
    """... as the ramp does; it falls where they do not, and stays within its bounds."""
    fooled, seen_through = [(0.3, 1.0)] * 500, [(1.0, 1.0)] * 500
    rs = r_of(fooled + seen_through + fooled, 1500)
    assert rs[500] == pytest.approx(0.5 / 3, rel=1e-3)  # the ramp at a third of the run
    assert rs[:500] == sorted(rs[:500]) and rs[510] < rs[500] and rs[600] < 0.06
    assert rs[1000] == pytest.approx(0.01) and rs[-1] == pytest.approx(0.5)  # and it comes back
    assert min(rs) >= 0.01 - 1e-6 and max(rs) <= 0.5
    half = [(0.675, 1.0)] * 500  # half-way between 0.35 and a copy
    assert r_of(half, 500)[-1] == pytest.approx(0.25, rel=1e-3)


def test_short_and_long_runs_have_the_same_curriculum():
    curves = []
    for steps in (500, 5000):
        losses = [(0.5 + 0.4 * math.sin(6 * i / steps), 1.0) for i in range(steps)]
        curves.append(r_of(losses, steps)[:: steps // 10])
    assert curves[0] == pytest.approx(curves[1], abs=0.02) and max(curves[0]) > 0.1


def test_scheduled_r():
    papers = dataclasses.replace(FINAL, curriculum="papers", r=0.4)
    ramp = dataclasses.replace(FINAL, curriculum="ramp", r=0.4)
    assert [aggan.scheduled_r(papers, p) for p in (0, 0.049, 0.05, 1)] == [0.01, 0.01, 0.4, 0.4]
    assert aggan.scheduled_r(ramp, 0.0) == 0.01
    assert aggan.scheduled_r(ramp, 0.5) == pytest.approx(0.2)


def test_pool_keeps_image_and_mask_together():
    pool, returned = ImagePool(size=5), []
    for i in range(0, 100, 2):
        ids = torch.tensor([i, i + 1.0]).view(2, 1, 1, 1)
        images, masks = pool.query(ids.expand(2, 3, 4, 4), 1000 + ids.expand(2, 1, 4, 4))
        assert images.shape == (2, 3, 4, 4) and masks.shape == (2, 1, 4, 4)
        assert torch.equal(images[:, :1] + 1000, masks)
        assert i >= 4 or torch.equal(images[:, 0, 0, 0], ids.flatten())  # while it fills
        returned += images[:, 0, 0, 0].tolist()
    assert len(pool.items) == 5 and len(set(returned[5:])) == 95  # each leaves it once
    assert 25 < sum(x < i for i, x in enumerate(returned)) < 75  # about half are earlier ones
    assert pool.items[0][0].untyped_storage().nbytes() == 3 * 4 * 4 * 4  # not the batch's memory


def test_pool_of_size_zero_returns_what_came_in():
    images, masks = torch.rand(3, 3, 2, 2, requires_grad=True), torch.rand(3, 1, 2, 2)
    out = ImagePool(0).query(images, masks)
    assert torch.equal(out[0], images) and torch.equal(out[1], masks)
    assert not out[0].requires_grad


# ---------- 7. The neighbours ----------


def test_gated_generator_sees_the_foreground_alone():
    x, net = torch.rand(2, 3, 32, 32) * 2 - 1, GatedGenerator(4, 1)
    a = net.attention_network(x)
    assert a.shape == (2, 1, 32, 32) and 0 < a.min() and a.max() < 1
    inner = net.generator.decoder(net.generator.encoder(a * x)).tanh()
    t = net(x)
    torch.testing.assert_close(t.foreground, a)
    torch.testing.assert_close(t.image, a * inner + (1 - a) * x)


def test_masked_discriminator_after_its_switch():
    image, mask = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32) * 0.2
    d = MaskedDiscriminator(4, tau=0.1, switch=0.3)
    assert not d.set_progress(0.29) and torch.equal(d(image, mask), d.judge(image))
    assert d.set_progress(0.3)
    layers = [m for m in d.judge.modules() if isinstance(m, (nn.Conv2d, nn.LeakyReLU))]
    foreground = torch.where(mask >= 0.1, image, torch.zeros(()))  # the rest is grey
    assert 0.2 < (mask >= 0.1).float().mean() < 0.8
    torch.testing.assert_close(d(image, mask), nn.Sequential(*layers)(foreground))


def test_mejjati_switches_after_three_tenths():
    trainer = aggan.Trainer(MEJJATI, 10, CPU)
    for step in range(5):
        networks = [trainer.nets[name] for name in ("g_ab", "g_ba")]
        attention = [p for net in networks for p in net.attention_network.parameters()]
        others = [p for net in networks for p in net.generator.parameters()]
        before, rest = [p.clone() for p in attention], [p.clone() for p in others]
        trainer.step(*BATCH)
        late = step >= 3  # of 10 steps
        moved = [not torch.equal(p, q) for p, q in zip(before, attention)]
        assert not any(moved) if late else any(moved)
        assert any(not torch.equal(p, q) for p, q in zip(rest, others))
        assert all(trainer.nets[name]["gan"].masked == late for name in ("d_a", "d_b"))
        assert all(net.attention_network.training != late for net in networks)


@pytest.mark.parametrize("kind", [ActivationDiscriminator, ResidualAttentionDiscriminator])
def test_guided_generator(kind):
    x = (torch.rand(2, 3, 32, 48) * 2 - 1).requires_grad_()
    guide = kind(width=4)
    net, a = GuidedGenerator(guide, 4, 1), guide.attention(x).detach()
    inner = net.generator.decoder(net.generator.encoder(x * (1 + a))).tanh()
    t = net(x)
    torch.testing.assert_close(t.attention, torch.cat([a, 1 - a], 1))
    torch.testing.assert_close(t.image, inner)  # not fused with the input
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (t.image, inner)]
    torch.testing.assert_close(*grads)  # a is a constant to the gradient
    net(x).image.sum().backward()
    assert all(p.grad is None for p in guide.parameters())


def test_guides_are_the_source_domains_discriminators():
    for name, kind in aggan.GUIDES.items():
        config = aggan.configure(dict(TINY, model="guided", attention_map=name, a="a", b="b"))
        nets = aggan.build(config)
        assert type(nets["d_a"]["gan"]) is kind
        assert nets["g_ab"].guide[0] is nets["d_a"]["gan"]
        assert nets["g_ba"].guide[0] is nets["d_b"]["gan"]


def expected_map(features):
    """Of one image: the mean over channels, stretched to [0, 1] and to the image's size."""
    small = features.mean(1, keepdim=True)
    small = (small - small.min()) / (small.max() - small.min())
    return nn.functional.interpolate(small, scale_factor=8, mode="bilinear")


def test_pha_is_where_the_third_block_responds():
    x, net = torch.rand(2, 3, 48, 64) * 2 - 1, ActivationDiscriminator(width=4)
    features = net.features(x)
    assert features.shape == (2, 16, 6, 8)
    a = net.attention(x)
    for i in range(2):
        torch.testing.assert_close(a[i : i + 1], expected_map(features[i : i + 1].abs()))
        assert 0 <= a[i].min() < 0.1 and 0.9 < a[i].max() <= 1
    assert net.attention(torch.zeros(1, 3, 32, 32)).isfinite().all()  # nothing to stretch


def test_tam_adds_a_learnt_mask_to_the_trunk():
    x, net = torch.rand(2, 3, 48, 64) * 2 - 1, ResidualAttentionDiscriminator(width=4)
    stem = net.features[0](x)
    trunk = net.features[2](net.features[1](stem))
    mask = nn.functional.interpolate(net.branch(stem), size=(6, 8), mode="bilinear")
    mask = net.mix(mask)
    assert mask.shape == trunk.shape == (2, 16, 6, 8) and 0 < mask.min() and mask.max() < 1
    torch.testing.assert_close(net(x), net.head((1 + mask) * trunk))
    torch.testing.assert_close(net.attention(x)[:1], expected_map(mask[:1]))


# ---------- 8. Configuration, and the training step ----------


def test_presets_are_the_papers():
    own = dict(a="x", b="y")
    final = dict(l_gan=0.5, l_paired=0.5, l_cycle=10, l_pixel=1, l_identity=0, l_tv=1e-6, lr=1e-4)
    released = dict(l_gan=1, l_paired=0, l_cycle=10, l_pixel=0, l_identity=5, l_tv=0, lr=2e-4)
    adaptive = dict(curriculum="adaptive", l_copy=1, r=0.5)
    plain = dict(released, curriculum="none", l_copy=0, tau=0)
    mejjati = dict(released, l_identity=0, lr=1e-4, tau=0.1, switch=0.3, r=0.8, l_copy=1)
    for given, expected in (
        (dict(model="scheme1"), final | adaptive),
        (dict(model="scheme2"), final | adaptive | dict(size=256, out="runs/scheme2")),
        (dict(model="scheme2", objective="released"), released | adaptive),
        (dict(model="cyclegan"), plain),
        (dict(model="guided"), dict(plain, l_identity=0)),
        (dict(model="mejjati"), mejjati),
        (dict(model="mejjati", objective="final"), dict(l_paired=0.5, l_pixel=1, tau=0.1)),
        (dict(model="scheme1", l_tv=3.0), dict(l_tv=3)),  # what is asked for wins
    ):
        assert expected.items() <= vars(aggan.configure(given | own)).items(), given


def test_small_settings():
    config = aggan.configure({})
    assert not config.a and (config.size, config.steps) == (64, 2000)
    assert (config.out, config.l_tv) == ("runs/mini-scheme2", 1e-4)
    assert aggan.configure({"epochs": 2}).steps == 0
    small = aggan.configure(dict(a="x", b="y", objective="released", width=4), small=True)
    assert (small.size, small.width, small.out) == (64, 4, "runs/scheme2")
    assert small.l_tv == 0  # an objective without it


def test_initial_weights():
    nets = aggan.build(Config(width=32, blocks=2, norm="batch"))
    weight = nets["g_ab"].encoder[3].body[1].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean()) < 1e-3
    norms = [m for m in nets["d_a"].modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(0.9 < m.weight.mean() < 1.1 for m in norms)


@pytest.mark.parametrize("model", ["scheme1", "scheme2", "mejjati", "guided"])
def test_every_term_works_with_every_mask(model):
    given = dict(TINY, model=model, objective="final", l_identity=1.0, a="a", b="b")
    figures = aggan.Trainer(aggan.configure(given), 2, CPU).step(*BATCH)
    assert {"gan", "paired", "cycle", "pixel", "identity", "tv", "d_gan", "d_paired"} <= set(
        figures
    )
    assert all(v.isfinite() for v in figures.values())


def test_the_step_puts_the_parts_together():
    """Its figures are those of the objectives, called by hand on the same networks and images."""
    config = dataclasses.replace(FINAL, pool=0, lr=0.0)  # networks stay as they are
    trainer = aggan.Trainer(config, 10, CPU)
    trainer.done = 8
    r = trainer.curriculum(8)
    figures, nets, expected, fakes = trainer.step(*BATCH), trainer.nets, {}, {}
    for name in ("ab", "ba"):
        _, terms, t = aggan.generator_objective(*direction(nets, name), 0.5, config)
        fakes[name[1]] = t.image.detach(), t.foreground.detach()
        expected = {k: expected.get(k, 0) + v for k, v in terms.items()} | {
            k: v for k, v in expected.items() if k not in terms
        }
    own = {"a": (BATCH[0], fakes["b"][1]), "b": (BATCH[1], fakes["a"][1])}
    copies = {}
    for domain, other in ("ab", "ba"):
        d = nets["d_" + domain]
        seen = own[domain], fakes[domain], own[other]
        _, terms = aggan.discriminator_objective(d, *seen, config)
        copies[domain] = terms["copy"]
        expected |= {k: expected.get(k, 0) + v for k, v in terms.items()}
    expected |= {"attention_ab": fakes["b"][1].mean(), "attention_ba": fakes["a"][1].mean()}
    expected |= {"r_ab": r[0], "r_ba": r[1]}
    assert figures.keys() == expected.keys() and trainer.done == 9
    for name, value in expected.items():
        torch.testing.assert_close(figures[name], value)
    # of 10 steps 2 % are less than one: no running mean yet
    torch.testing.assert_close(trainer.curriculum.c, torch.stack([copies["b"], copies["a"]]))


def test_the_step_uses_the_pools():
    """Discriminators see the pool's fake; real images keep the masks of their own translation."""
    trainer, seen = aggan.Trainer(FINAL, 10, CPU), []
    for pool in (trainer.pool_a, trainer.pool_b):  # full of zeros, to be told from new fakes
        pool.items = [(torch.zeros(3, 32, 32), torch.zeros(1, 32, 32))] * 50
    for name in ("d_a", "d_b"):
        d = trainer.nets[name]["paired"]
        d.register_forward_hook(lambda _, inputs, __: seen.append([x.detach() for x in inputs]))
    for _ in range(3):
        trainer.step(*BATCH)
    fakes = [image for step in range(3) for i in (3, 5) for image in seen[6 * step + i][0]]
    old = [not image.any() for image in fakes]
    assert len(seen) == 18 and any(old) and not all(old)


def test_each_update_leaves_the_other_networks_alone():
    trainer = aggan.Trainer(FINAL, 10, CPU)
    g, d = trainer.g_parameters, trainer.d_parameters
    assert len(g) + len(d) == len(list(trainer.nets.parameters()))
    r = torch.full((2,), 0.3)
    fake_a, fake_b, mask_a, mask_b, _, _ = trainer.generator_gradients(*BATCH, r)
    assert all(p.grad is None for p in d) and all(p.grad is not None for p in g)
    first = [p.grad.clone() for p in g]
    trainer.generator_gradients(*BATCH, r)  # not added to those before
    assert all(map(torch.equal, first, (p.grad for p in g)))

    before = [p.clone() for p in d]
    trainer.update(trainer.opt_g, g)
    assert all(map(torch.equal, before, d))
    before, first = [p.clone() for p in g], [p.grad.clone() for p in g]
    pairs = [*zip(BATCH, (mask_a, mask_b)), (fake_a, mask_b), (fake_b, mask_a)]
    trainer.discriminator_gradients(*pairs)
    trainer.update(trainer.opt_d, d)
    assert all(map(torch.equal, before, g))
    assert all(map(torch.equal, first, (p.grad for p in g)))


def test_the_rate_falls_over_the_second_half():
    rates = [aggan.learning_rate(FINAL, progress) for progress in (0, 0.5, 0.75, 1)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 0])


@pytest.mark.parametrize("model", aggan.PRESETS)
@pytest.mark.parametrize("precision, tolerance, wide", [("bf16", 0.05, 0.4), ("fp16", 0.01, 0.2)])
def test_reduced_precision_is_near_float32(model, precision, tolerance, wide):
    """Masks, images, logits and losses are float32, convolutions are not.

    Loss terms within 5 % (bf16) or 1 % (fp16), the generators' gradients within 40 % or 20 % (an L1
    loss has the sign of a difference).
    """
    results, types, outputs = [], [], []
    for kind in ("fp32", precision):
        given = dict(TINY, model=model, precision=kind, a="a", b="b")
        trainer = aggan.Trainer(aggan.configure(given), 10, CPU)
        convolution = next(m for m in trainer.nets["d_b"].modules() if isinstance(m, nn.Conv2d))
        convolution.register_forward_hook(lambda _, __, out: types.append(out.dtype))
        for net in trainer.nets["g_ab"], trainer.nets["d_b"]["gan"]:
            net.register_forward_hook(lambda _, __, out: outputs.append(out))
        trainer.scaler.scale(torch.ones(()))
        trainer.scaler.update(128.0)
        *_, ab, _ = trainer.generator_gradients(*BATCH, torch.full((2,), 0.3))
        scale = 128.0 if trainer.scaler.is_enabled() else 1.0
        results.append((ab, torch.cat([p.grad.flatten() for p in trainer.g_parameters]) / scale))
    (terms, gradient), (reduced, other) = results
    assert types[0] == torch.float32 and types[-1] == aggan.PRECISIONS[precision]
    for out in outputs:
        assert all(x.dtype == torch.float32 for x in (out if isinstance(out, tuple) else [out]))
    for name, value in terms.items():
        assert reduced[name].dtype == torch.float32
        assert reduced[name].item() == pytest.approx(value.item(), rel=tolerance, abs=1e-4), name
    assert (other - gradient).norm() < wide * gradient.norm()


def test_fp16_skips_a_step_that_overflows():
    trainer = aggan.Trainer(dataclasses.replace(FINAL, precision="fp16"), 10, CPU)
    before = [p.clone() for p in trainer.nets.parameters()]
    for scale, moves in ((2.0**40, False), (128.0, True)):
        trainer.scaler.scale(torch.ones(()))
        trainer.scaler.update(scale)
        trainer.step(*BATCH)
        moved = [not torch.equal(p, q) for p, q in zip(before, trainer.nets.parameters())]
        assert (sum(moved) > len(moved) / 2) if moves else not any(moved)
    assert trainer.scaler.get_scale() == 128


# ---------- 9. Data ----------


def test_dataset(folders):
    def dataset(seed):
        return aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36, seed)

    data, again, other = dataset(3), dataset(3), dataset(4)
    assert len(data) == 5
    for i in (7, 0, 100):  # a pair is a function of the seed and i
        assert [x.shape for x in data[i]] == [(3, 32, 32)] * 2
        assert all(map(torch.equal, data[i], again[i]))
        assert not all(map(torch.equal, data[i], other[i]))
        assert all(x.min() >= -1 and x.max() <= 1 for x in data[i])


def test_crops_flips_and_passes(tmp_path):
    """Red tells the column, green the row, blue the image."""
    for domain, count in (("A", 6), ("B", 4)):
        (tmp_path / domain).mkdir()
        for i in range(count):
            image = Image.new("RGB", (16, 16))
            image.putdata([(10 * x, 10 * y, 10 * i) for y in range(16) for x in range(16)])
            image.save(tmp_path / domain / f"{i}.png")
    data = aggan.UnpairedImages(tmp_path / "A", tmp_path / "B", size=8, resize=16)
    corners, flips, shown = set(), 0, [[], []]
    for i in range(60):
        for domain, x in enumerate(data[i]):
            red, green, blue = ((x + 1) * 12.75).round()
            flips += red[0, 0].item() > red[0, -1].item()
            corners.add((red.min().item(), green.min().item()))
            assert red.max() - red.min() == 7
            assert (green[:, 0] == green[0, 0] + torch.arange(8)).all()
            shown[domain].append(int(blue.max()))
    assert 40 < flips < 80
    assert {x for x, _ in corners} == {y for _, y in corners} == set(range(9))
    for images, count in zip(shown, (6, 4)):  # every pass shows every image, in another order
        passes = [images[i : i + count] for i in range(0, 60, count)]
        assert all(sorted(p) == list(range(count)) for p in passes) and passes[0] != passes[1]


def odd_images(folder):
    """Images as people have them -> {name: (size, has transparency, red of the last pixel)}."""

    def halves(mode, size, left, right):
        image = Image.new(mode, size, left)
        image.paste(right, (size[0] // 2, 0, *size))
        return image

    colour = halves("RGB", (40, 30), (250, 0, 0), (0, 0, 250))
    clear, deep, exif = colour.convert("RGBA"), Image.new("I;16", (40, 30), 51400), Image.Exif()
    clear.putalpha(halves("L", (40, 30), 0, 200))
    exif[0x0112] = 6  # to be turned by 90 degrees
    big = Image.frombytes("I;16B", (40, 30), bytes([200, 200]) * 1200)
    saved = {  # name: image, options of save(), red of the last pixel, 51400 is 200 * 257
        "deep.png": (deep, {}, 200),
        "eight-in-sixteen.png": (Image.new("I;16", (40, 30), 250), {}, 250),
        "big-endian.tif": (big, {}, 200),
        "float.tif": (Image.new("F", (40, 30), 0.8), {}, 204),
        "sharpened.tif": (Image.new("F", (40, 30), 1.05), {}, 255),
        "float255.tiff": (Image.new("F", (40, 30), 204), {}, 204),
        "integer.tif": (Image.new("I", (40, 30), 51400), {}, 200),
        "grey.jpg": (Image.new("L", (40, 30), 90), {}, 90),
        "la.png": (clear.convert("LA"), {}, None),
        "clear.png": (clear, {}, 0),
        "clear.webp": (clear, {}, None),
        "clear.tif": (clear, {}, 0),
        "palette.gif": (colour.quantize(4), dict(transparency=1), 0),
        "palette.png": (colour.quantize(4), dict(transparency=bytes([255, 0, 128, 7])), 0),
        "key.png": (colour, dict(transparency=(250, 0, 0)), 0),
        "cmyk.jpg": (colour.convert("CMYK"), {}, None),
        "bit.png": (halves("1", (40, 30), 0, 1), {}, 255),
        "turned.jpg": (colour, dict(exif=exif), None),
        "one.png": (Image.new("RGB", (1, 1), (7, 8, 9)), {}, 7),
        "narrow.bmp": (Image.new("RGB", (3, 200), (60, 70, 80)), {}, 60),
        'it\'s a "photo" $HOME; ünï 写真.PNG': (colour, {}, 0),
    }
    for name, (image, settings, _) in saved.items():
        image.save(folder / name, **settings)
    alpha = {
        "la.png",
        "clear.png",
        "clear.webp",
        "clear.tif",
        "palette.png",
        "palette.gif",
        "key.png",
    }
    return {
        name: ((30, 40) if name == "turned.jpg" else image.size, name in alpha, red)
        for name, (image, _, red) in saved.items()
    }


def test_odd_images_are_loaded(tmp_path):
    odd = odd_images(tmp_path)
    (tmp_path / ".hidden.png").write_bytes(b"as macOS leaves them")
    (tmp_path / ".thumbnails").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / ".thumbnails" / "0.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert {path.name for path in aggan.list_images(tmp_path)} == set(odd)
    for name, (size, transparent, red) in odd.items():
        image, kept = aggan.load_image(tmp_path / name), aggan.load_image(tmp_path / name, None)
        assert (image.mode, image.size, kept.size) == ("RGB", size, size), name
        assert kept.mode == ("RGBA" if transparent else "RGB"), name
        assert red is None or abs(image.getpixel((size[0] - 1, size[1] - 1))[0] - red) <= 1, name
        assert min(aggan.load_image(tmp_path / name, size=36).size) == 36
    turned = aggan.load_image(tmp_path / "turned.jpg")
    assert turned.getpixel((0, 0))[0] > 200 and turned.getpixel((0, 39))[2] > 200


def useless_images(folder):
    """Files that are no use, by name."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    def bomb(side):  # a PNG of a few bytes that says it is this large
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        data = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + header + data

    Image.new("RGB", (40, 30)).save(folder / "cut.jpg")
    cut = (folder / "cut.jpg").read_bytes()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"
    contents = {"text.png": b"not a picture", "empty.jpg": b"", "cut.jpg": cut[: len(cut) // 2]}
    contents |= {"bomb.png": bomb(40000), "short.png": bomb(400), "program.png": program}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(contents)


def test_numbers_of_no_known_scale_are_refused(tmp_path):
    """Stretching each image by itself would make a dark one bright."""
    ramp = [x / 63 for _ in range(8) for x in range(64)]
    for name, mode, values in (
        ("twelve bits", "I;16", [round(4095 * v) for v in ramp]),
        ("metres", "F", [8.9 * v for v in ramp]),
        ("signed", "F", [2 * v - 1 for v in ramp]),
        ("nan", "F", [math.nan, *ramp[1:]]),
        ("infinity", "F", [math.inf, *ramp[1:]]),
        ("labels", "I", [round(v) for v in ramp]),
    ):
        image = Image.new("I" if mode[0] == "I" else "F", (64, 8))
        image.putdata(values)
        image.convert(mode).save(tmp_path / f"{name}.tif")
        with pytest.raises(aggan.BadInput, match=f"{name}.tif: not a usable image .values "):
            aggan.load_image(tmp_path / f"{name}.tif")


def swapped_profile():
    """A colour profile in which red is sRGB's green, and green its red."""
    srgb = aggan.ImageCms.ImageCmsProfile(aggan.ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")):
        srgb = srgb.replace(old, new, 1)
    return srgb.replace("sRGB".encode("utf-16-be"), "odd ".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_a_profile_are_converted(tmp_path, mode):
    path, colour = tmp_path / "wide.png", (60, 200, 70, 90)
    image = Image.new("RGBA" if mode == "RGBA" else "RGB", (8, 8), colour)
    image = image.quantize(4) if mode == "P" else image
    image.save(path, icc_profile=swapped_profile())
    for shown in (aggan.load_image(path), aggan.load_image(path, mode=None)):
        expected = (200, 60, 70, 90)[: len(shown.getpixel((0, 0)))]
        assert all(abs(x - y) <= 3 for x, y in zip(shown.getpixel((0, 0)), expected))
        shown.save(tmp_path / "again.png")
        assert "icc_profile" not in Image.open(tmp_path / "again.png").info
    assert aggan.load_image(path, mode=None).mode == ("RGBA" if mode == "RGBA" else "RGB")
    image.save(path, icc_profile=b"no profile")
    assert aggan.load_image(path).getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0))


def test_what_is_left_out_is_said(trained, folders, capsys):
    """Other kinds, dead links, further pages; links are followed, circles are not."""
    mixed, far = folders / "mixed", folders / "far"
    for folder in (mixed, far):
        folder.mkdir()
        Image.new("RGB", (40, 30), "green").save(folder / f"{folder.name}.png")
    for link, place in (("far", far), ("circle", mixed), ("dead.png", folders / "nowhere")):
        (mixed / link).symlink_to(place)
    pages = [Image.new("RGB", (40, 30), (20 * i, 0, 0)) for i in range(3)]
    pages[0].save(mixed / "pages.tif", save_all=True, append_images=pages[1:])
    for name in ("1.HEIC", "2.HEIC", "3.jxl", "none"):
        (mixed / name).write_bytes(b"ftypheic")
    (mixed / ".hidden").write_bytes(b"")
    names = [path.name for path in aggan.list_images(mixed)]
    assert names == ["far.png", "mixed.png", "pages.tif"]

    capsys.readouterr()
    with pytest.raises(aggan.BadInput, match="^7 files left out, see above") as stopped:
        aggan.translate(trained, [mixed], "b", folders / "new", device="cpu")
    assert stopped.value.status == 1 and len(list((folders / "new").rglob("*.*"))) == 3
    line, *more = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: left out: ") and not more
    for part in (
        "HEIC, not read by Pillow: convert it; 2",
        "3.jxl",
        "none (no suffix",
        "dead link",
    ):
        assert part in line
    for part in ("pages.tif (all but the first", "circle (linked once more"):
        assert part in line
    aggan.train(tiny(folders, a=str(mixed), steps=1, out=str(folders / "more")))
    assert capsys.readouterr().err == line + "\n"
    for path in aggan.list_images(far):
        path.rename(path.with_suffix(".heif"))
    with pytest.raises(aggan.BadInput, match="far: no images in this folder, only .heif"):
        aggan.translate(trained, [far], "b", folders / "new", device="cpu")


def test_useless_images_are_refused_by_name(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    ran = lambda *_, **__: pytest.fail("ran a program")  # noqa: E731
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ran)
    for name in useless_images(tmp_path):
        with pytest.raises(aggan.BadInput) as error:
            aggan.load_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    Image.new("RGB", (1000, 9)).save(tmp_path / "strip.png")
    with pytest.raises(aggan.BadInput, match="strip.png.*1000 x 9"):  # would be 32000 pixels long
        aggan.load_image(tmp_path / "strip.png", size=286)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_useless_images(folders, capfd, workers):
    names = useless_images(folders / "trainA")
    aggan.main(["train", *options(folders, workers=workers, steps=30)])
    output = capfd.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == len(names) and all("not a usable image" in line for line in lines)
    for name in names:
        assert sum(f"trainA/{name}: " in line for line in lines) == 1
    assert f"{len(names)} training images were no use" in output.out and "step 30/30" in output.out


def test_useless_images_do_not_change_the_order(folders):
    names = useless_images(folders / "trainA")
    first, second = (
        aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36) for _ in "12"
    )
    pairs = {i: first[i][0] for i in range(40)}
    for i in reversed(range(40)):  # as after a resume: other files have been met
        assert torch.equal(second[i][0], pairs[i])
    assert int(first.useless["a"].sum()) == len(names) and int(first.useless["b"].sum()) == 0


def test_a_folder_without_one_usable_image(folders, capfd):
    """The error of a loading process gets one line, too."""
    for path in (folders / "trainB").iterdir():
        path.write_text("not a picture")
    with pytest.raises(SystemExit, match="2"):
        aggan.main(["train", *options(folders, workers=1)])
    *lines, last = capfd.readouterr().err.splitlines()
    assert last == f"aggan.py: {folders}/trainB: not one usable image"
    assert len(lines) == 3 and all("not a usable image" in line for line in lines)


def test_mini_set_is_what_its_script_draws(tmp_path):
    draw = script("draw")
    draw.draw_set(tmp_path / "first", train=1, test=1)
    draw.draw_set(tmp_path / "second", train=1, test=1)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 2 * (1 + 1 + 1)
    for file in files:
        first, second = (tmp_path / name / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        drawn, committed = pixels_of(first), pixels_of(aggan.DATA / file)
        assert drawn.shape == (3, 128, 128)
        assert (drawn - committed).abs().mean() < 0.01  # another Pillow may round otherwise

    scenes = [draw.draw_scene("testA0", False, textured=kind) for kind in (False, True, True)]
    (plain, mask), (textured, same_mask), (again, _) = scenes
    assert textured.tobytes() == again.tobytes() and mask.tobytes() == same_mask.tobytes()
    assert (aggan.to_tensor(plain) - aggan.to_tensor(textured)).abs().mean() > 0.1


def test_mini_set_masks_match_their_images():
    for domain in "AB":
        images, masks = (aggan.list_images(aggan.DATA / (k + domain)) for k in ("test", "masks"))
        assert [p.stem for p in images] == [p.stem for p in masks] and len(images) == 60
        assert len(aggan.list_images(aggan.DATA / ("train" + domain))) == 300
        area = torch.stack([pixels_of(path) for path in masks]).gt(0).float().mean()
        assert 0.05 < area < 0.3


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine; its folder and its address. It breaks off in the maps."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def copyfile(self, source, target):
            content = source.read()
            target.write(content[: len(content) // 2] if "maps" in self.path else content)

    monkeypatch.setenv("no_proxy", "*")
    root = tmp_path / "server"
    root.mkdir()
    handler = functools.partial(Handler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield root, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_download(folders, server, capsys):
    root, host = server
    here, parts, download = (
        folders / "my data",
        ("trainA", "trainB", "testA", "testB"),
        script("download"),
    )

    def get(name, *more, fails=""):
        with pytest.raises(SystemExit) if fails else contextlib.nullcontext() as stopped:
            download.main([name, "--folder", str(here), "--host", host, *more])
        output = capsys.readouterr()
        assert not fails or stopped.value.code == 2 and fails in output.err.splitlines()[-1]
        return output.out

    def archive(name, parts):
        with zipfile.ZipFile(root / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for part in parts:
                for image in sorted((folders / part).iterdir()):
                    file.write(image, f"{name}/{part}/{image.name}")
        return root / f"{name}.zip"

    archive("horse2zebra", parts)
    said = get("horse2zebra").split("aggan.py ")[1]
    for part in parts:
        for image in (folders / part).iterdir():
            copy = here / "horse2zebra" / part / image.name
            assert copy.read_bytes() == image.read_bytes()
    a, b = shlex.split(said)[2::2]
    aggan.main([*shlex.split(said), *options(folders, a=a, b=b, steps=1)])
    (here / "horse2zebra" / "mine.txt").write_text("kept")
    get("horse2zebra", fails="exists already")
    archive("apple2orange", parts[:3])
    get("apple2orange", fails="has no testB")
    whole = archive("facades", parts).read_bytes()
    for place in range(50, len(whole) - 1, len(whole) // 10):  # in contents, in the list of files
        spoilt = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        (root / "facades.zip").write_bytes(spoilt)
        get("facades", fails="facades.zip: ")
    archive("maps", parts)
    get("maps", fails="maps.zip: did not arrive whole")
    get("monet2photo", fails="monet2photo.zip: not downloaded (HTTP Error 404")
    get("cats2dogs", fails="invalid choice: 'cats2dogs' (choose from")
    get("ukiyoe2photo", "--host", "http://127.0.0.1:9", fails="ukiyoe2photo.zip: not downloaded (")
    assert [p.name for p in here.iterdir()] == ["horse2zebra"]
    assert (here / "horse2zebra" / "mine.txt").read_text() == "kept"
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|.* [GM]B \|$", text, re.M)) == set(download.SETS)


# ---------- 10. Training ----------


def columns(run):
    """Of log.csv, all but the speed."""
    rows = [row.split(",") for row in (run / "log.csv").read_text().splitlines()]
    return [row[:2] + row[3:] for row in rows]


def figures_of(run, name):
    header, *rows = [row.split(",") for row in (run / "log.csv").read_text().splitlines()]
    return [float(row[header.index(name)]) for row in rows]


@pytest.mark.parametrize(
    "changes",
    [
        dict(curriculum="ramp"),
        dict(model="scheme1", objective="released"),
        dict(head="pooled", norm="batch"),
        dict(gan="vanilla", batch_size=2, pool=0, upsample="transposed"),
    ],
)
def test_train_leaves_a_run_folder(folders, capsys, changes):
    run = aggan.train(tiny(folders, steps=3, size=64, resize=64, **changes))
    said = capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.csv", "samples"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["0000002.png", "0000003.png"]
    assert said[0] == "5 images of A, 3 of B; in an epoch each of A comes 1 x, each of B 1.67 x"
    assert len(said) == 3 and "step 3/3" in said[2]
    for figure in ("pairs/s", "left", "gan ", "cycle ", "attention_ab ", "attention_ba "):
        assert figure in said[2]

    config, rates = aggan.load_checkpoint(run)["config"], figures_of(run, "rate")
    expected = [aggan.learning_rate(config, step / 3) for step in (1, 2)]  # of steps 2 and 3
    assert rates == pytest.approx(expected, rel=1e-4) and figures_of(run, "step") == [2, 3]
    rs = figures_of(run, "r_ab")
    assert all(0.01 - 1e-6 <= r <= 0.5 for r in rs)
    if config.curriculum == "ramp":  # means of steps 1 and 2, and of step 3
        assert rs == pytest.approx([(0.01 + 0.5 / 3) / 2, 0.5 * 2 / 3], rel=1e-4)
    for name in (run / "log.csv").read_text().splitlines()[0].split(","):
        assert all(map(math.isfinite, figures_of(run, name)))

    # the grid's last panel is the translation of the input beside it
    grid = pixels_of(run / "samples" / "0000003.png")
    assert grid.shape == (3, 4 * 66 + 2, 8 * 66 + 2)
    x, shown = (grid[:, 2:66, 66 * k + 2 : 66 * k + 66] for k in (4, 7))
    drawn = aggan.load_generators(run, CPU)[0]["g_ba"](x[None]).image[0]
    assert (shown - drawn).abs().max() < 0.03  # after rounding both to 8 bits


def test_panels():
    x, attention, content = random_translation(n=3)
    t = Translation(aggan.fuse(x, attention, content), attention, content)
    shown = aggan.panels(Fixed(t), x)
    assert shown.shape == (2, 4, 3, 5, 6)
    assert torch.equal(shown[:, 0], x) and torch.equal(shown[:, 3], t.image)
    # by Eq. (1) the image is the content shown where the foreground is, elsewhere the input
    foreground = shown[:, 1] / 2 + 0.5
    fused = foreground * shown[:, 2] + (1 - foreground) * x
    torch.testing.assert_close(fused, t.image, atol=1e-4, rtol=0)


def test_log_holds_means_of_the_steps(folders):
    config = tiny(folders, steps=4, log_every=4)
    run = aggan.train(config)
    trainer = aggan.Trainer(config, 4, CPU)
    data = aggan.UnpairedImages(config.a, config.b, 32, 36, config.seed)
    cycle = [trainer.step(*(x[None] for x in data[i]))["cycle"].item() for i in range(4)]
    assert figures_of(run, "cycle") == pytest.approx([sum(cycle) / 4], rel=1e-4)


def test_same_seed_same_weights(folders):
    runs = [
        weights(aggan.train(tiny(folders, steps=3, seed=seed, out=str(folders / name))))
        for name, seed in (("first", 5), ("second", 5), ("third", 6))
    ]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.parametrize(
    "model, norm, workers, save_every",
    [("scheme2", "instance", 1, 3), ("scheme2", "batch", 0, 100), ("mejjati", "batch", 0, 3)],
)
def test_resume_equals_the_uninterrupted_run(
    folders, monkeypatch, model, norm, workers, save_every
):
    changes = dict(steps=9, pool=2, model=model, norm=norm, save_every=save_every, workers=workers)
    whole = aggan.train(tiny(folders, **changes))
    config = tiny(folders, **changes, out=str(folders / "killed"))
    step = aggan.Trainer.step

    def killed(trainer, *batch):
        if trainer.done == 5:  # after the log's row of step 4, the checkpoint of step 3, if any
            raise KeyboardInterrupt
        return step(trainer, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(aggan.Trainer, "step", killed)
        aggan.train(config)
    resumed = aggan.train(config, resume=True)
    first, second = (aggan.load_checkpoint(run) for run in (whole, resumed))
    for name in ("nets", "curriculum"):
        assert same(first["parts"][name], second["parts"][name])
    for name in ("opt_g", "opt_d"):
        states = [state["parts"][name]["state"].values() for state in (first, second)]
        assert states[0] and all(same(*pair) for pair in zip(*states, strict=True))
    assert torch.equal(first["random"], second["random"])
    for one, other in zip(first["pools"], second["pools"]):
        assert len(one) == 2
        assert all(torch.equal(x, y) for p, q in zip(one, other) for x, y in zip(p, q))
    assert columns(whole) == columns(resumed)
    assert [row[0] for row in columns(whole)] == ["step", "2", "4", "6", "8", "9"]


def test_a_run_goes_on_further(folders, capsys):
    """From then on it is the longer run: rate and r are those of its step there."""
    out, given = folders / "run", options(folders, steps=4)
    aggan.main(["train", *given])
    for more, total in ((("--steps", 8), 8), (("--epochs", 2), 10)):
        aggan.main(["train", "--out", str(out), "--resume", *map(str, more), "--device", "cpu"])
        assert f"step {total}/{total}" in capsys.readouterr().out
        rate = aggan.learning_rate(aggan.load_checkpoint(out)["config"], (total - 1) / total)
        assert figures_of(out, "rate")[-1] == pytest.approx(rate, rel=1e-4)
    assert figures_of(out, "step") == [2, 4, 6, 8, 10]
    again = ["train", "--out", out, "--resume", "--device", "cpu"]
    assert "6 steps, of which 10 are done" in refusal([*again, "--steps", 6], capsys)
    assert "5 steps, of which 10 are done" in refusal([*again, "--epochs", 1], capsys)
    for image in ("0.png", "1.png"):  # the run keeps its length
        (folders / "trainA" / image).unlink()
    aggan.main([*map(str, again), "--epochs", "2"])
    assert "trainA: 2 names are not as in" in capsys.readouterr().err


def test_a_run_goes_on_elsewhere(folders, capsys):
    new = [folders / "else" / f"train{domain}" for domain in "AB"]
    aggan.main(["train", *options(folders, steps=2, out=folders / "old")])
    (folders / "else").mkdir()
    for place in new:
        (folders / place.name).rename(place)
    (folders / "old").rename(folders / "else" / "run")
    given = ["train", "--out", folders / "else" / "run", "--resume", "--steps", 4]
    given += ["--device", "cpu", "--a", new[0], "--b"]
    aggan.main([*map(str, given), str(new[1])])
    output = capsys.readouterr()
    assert f"the same images, now in {new[0]} and {new[1]}" in output.out and output.err == ""
    (new[1] / "2.png").rename(new[1] / "other.png")
    new[1].rename(new[1].with_name("B"))
    error = refusal([*given, new[1].with_name("B"), "--steps", 6], capsys)
    assert "else/B: 2 names are not as in" in error and "such as 2.png" in error


def test_a_run_starts_from_another(trained, folders, capsys):
    given = ["train", *options(folders, steps=1, out=folders / "new"), "--init", trained]
    aggan.main([*map(str, given), "--lr", "0"])
    assert same(weights(trained), weights(folders / "new"))
    shutil.rmtree(folders / "new")
    capsys.readouterr()
    for other, words in (
        (["--width", 8], "size mismatch for g_ab.encoder.0.0.weight"),
        (["--objective", "released"], r"Unexpected key.*d_a.paired"),
        (["--init", folders], "no checkpoint.pt here"),
    ):
        assert re.search(words, refusal([*given, *other], capsys))
    assert not (folders / "new").exists()


@needs_posix
def test_two_runs_in_one_folder(folders, started, capsys):
    """The second is refused; a killed one stops nobody, though its loading process lives on."""
    again = ["train", *options(folders, steps=9000, workers=1), "--resume"]
    process = started(*again)
    while not (folders / "run" / "checkpoint.pt").exists():
        process.join(0.05)
        assert process.is_alive()
    assert "another process trains there" in refusal(again, capsys)
    process.kill()
    process.join()
    done = aggan.load_checkpoint(folders / "run")["step"]
    aggan.main([*again, "--workers", "0", "--steps", str(done + 1)])


def test_a_log_that_is_held_is_written_later(folders, monkeypatch, capsys):
    log, step = folders / "run" / "log.csv", aggan.Trainer.step
    log.mkdir(parents=True)  # as little to be written as one that a spreadsheet holds

    def freed(trainer, *batch):
        if trainer.done == 5:
            log.rmdir()
        return step(trainer, *batch)

    monkeypatch.setattr(aggan.Trainer, "step", freed)
    config = tiny(folders, steps=8)
    aggan.train(config, resume=True)
    assert figures_of(folders / "run", "step") == [2, 4, 6, 8]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("log.csv: cannot be written" in line for line in errors)


def test_train_in_a_thread(folders):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        run = pool.submit(aggan.train, tiny(folders, steps=2, workers=1)).result()
    assert aggan.load_checkpoint(run)["step"] == 2


@needs_posix
def test_a_lost_loading_process_is_reported_and_the_run_saved(folders, started, capfd):
    given = options(folders, steps=9000, save_every=9000, workers=1)
    process = started("train", *given)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.is_alive() and not (folders / "run" / "log.csv").exists():
        process.join(0.05)
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc")
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGKILL)
    process.join(60)
    error = capfd.readouterr().err
    assert aggan.load_checkpoint(folders / "run")["step"] > 1
    assert process.exitcode == 1 and error.count("\n") == 1, error
    line, reason = error.strip().split(" --workers: ")
    assert "a loading process is lost, --resume goes on, with fewer" in line
    assert re.match(r"DataLoader|\[Errno \d", reason)  # which depends on the moment of the kill


def test_home_and_an_empty_test_folder(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders))
    for path in (folders / "testA").iterdir():
        path.unlink()
    (folders / "testA" / ".gitkeep").touch()
    aggan.main(["train", *options(folders, steps=1, a="~/trainA", out="~/here")])
    assert aggan.load_checkpoint(folders / "here")["config"].a == str(folders / "trainA")


def test_collapse_is_reported(folders, capsys, monkeypatch):
    for model, value, words in (
        ("scheme2", 0.001, "g_ab copies its input, or nearly"),
        ("mejjati", 0.98, "g_ab repaints everything, or nearly"),
        ("scheme2", 0.3, None),
        ("cyclegan", 1.0, None),
        ("guided", 0.001, None),
    ):
        trainer = aggan.Trainer(dataclasses.replace(FINAL, model=model), 10, CPU)
        trainer.names = ["attention_ab", "attention_ba"]
        trainer.done, trainer.rows = 3, [torch.full((2,), value)] * 3
        aggan.write_progress(trainer, folders, 5, 0.1)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (2 if words else 0)
        if words:
            assert lines[0].startswith(f"warning: attention_ab is {value:.4f}: {words}")


def test_pictures(folders):
    pictures, length = script("pictures"), dict(steps=2, log_every=1)
    runs = {
        model: aggan.train(tiny(folders, model=model, out=str(folders / model), **length))
        for model in ("scheme2", "cyclegan")
    }
    pictures.draw(runs, folders, steps=(0, 2))
    side = 2 * 32 + 2  # tiles at twice the size
    strip, family, attention, chart = (
        Image.open(folders / f"{name}.png").convert("RGB")
        for name in ("strip", "family", "attention", "chart")
    )
    assert strip.size == (8 * side, 16 + 2 * side) and family.height == 16 + 2 * side
    assert attention.size == (3 * 34, 16 + 2 * 34)
    grid = Image.open(runs["scheme2"] / "samples" / "0000002.png").convert("RGB")
    tile = grid.crop((2, 2, 34, 34)).resize((64, 64), Image.Resampling.BICUBIC)
    drawn = strip.crop((0, 16, 64, 80))  # quantised to 256 colours
    assert (aggan.to_tensor(tile) - aggan.to_tensor(drawn)).abs().mean() < 0.1
    end = pictures.place(1, figures_of(runs["scheme2"], "attention_ab")[-1])  # of its curve
    colour = ImageColor.getrgb(pictures.CURVES["attention_ab"])
    assert chart.getpixel((round(end[0]) - 1, round(end[1]))) == colour
    left = family.width - 6 * side  # the masks: CycleGAN's is white
    masks = [
        family.crop((left + side, top, left + 2 * side - 2, top + side - 2)).convert("L")
        for top in (16, 16 + side)
    ]
    assert masks[0].getextrema()[0] < 250 and masks[1].getextrema()[0] > 250


def test_tensorboard(folders, monkeypatch):
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name)
    run = aggan.train(tiny(folders, steps=5, tensorboard=True))
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("step", "gan", "attention_ab"):
        shown = events.Scalars(name)
        assert [event.step for event in shown] == [2, 4, 5]
        values = [event.value for event in shown]
        assert values == pytest.approx(figures_of(run, name), rel=1e-4)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(aggan.BadInput, match="pip install tensorboard"):
        aggan.train(tiny(folders, steps=2, tensorboard=True, out=str(folders / "new")))


@needs_posix
def test_kills_lose_only_the_steps_since_the_last_checkpoint(folders, started):
    """A run of eight SIGKILLs, at any moment, ends as one that was never stopped."""
    changes = dict(steps=90, save_every=3, pool=2, model="scheme1", blocks=0, l_paired=0.0)
    whole = aggan.train(tiny(folders, **changes))
    out, numbers, killed = folders / "killed", random.Random(0), 0
    run = ["train", *options(folders, **changes, out=out), "--resume"]
    log = out / "log.csv"
    while killed < 8:
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = started(*run)
        while process.is_alive() and (not log.exists() or log.stat().st_mtime_ns == before):
            process.join(0.02)  # until it trains
        process.join(numbers.uniform(0, 0.3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it was faster: from the start
            shutil.rmtree(out)
    assert aggan.load_checkpoint(out)["step"] > 0
    aggan.main(run)
    assert same(weights(whole), weights(out)) and columns(whole) == columns(out)
    names = [sorted(p.name for p in there.rglob("*")) for there in (whole, out)]
    assert names[0] == names[1]


@needs_posix
def test_signals_finish_the_step_and_save(folders, started, capfd):
    """... though they reach the loading process too, as a terminal's do."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # the tests may run under nohup
    for number in numbers:
        out = folders / f"{number}"
        given = options(folders, steps=9000, save_every=9000, workers=1, out=out)
        process = started("train", *given)
        os.setpgid(process.pid, process.pid)
        while process.is_alive() and not (out / "log.csv").exists():
            process.join(0.02)
        os.killpg(process.pid, number)
        process.join(60)
        assert process.exitcode == 128 + number
        done = aggan.load_checkpoint(out)["step"]
        line = f"aggan.py: stopped after step {done}, saved; goes on with --resume\n"
        assert capfd.readouterr().err == line


def test_handlers_return(folders):
    before = signal.getsignal(signal.SIGINT)
    with aggan.stop_signals() as seen:
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_numbers_that_are_not_finite_stop_the_run(folders, capsys, monkeypatch, where):
    step = aggan.Trainer.step

    def spoilt(trainer, *batch):
        bias = trainer.nets["g_ba"].content_decoder[-1].bias.data
        if trainer.done == 6 and where == "loss":  # in the seventh step, F(x) is not a number
            bias[0] = math.nan
        figures = step(trainer, *batch)
        if trainer.done == 8 and where == "weight":  # that step's losses are finite still
            bias[0] = math.inf
        return figures

    monkeypatch.setattr(aggan.Trainer, "step", spoilt)
    error = refusal(["train", *options(folders, steps=24, save_every=4)], capsys, status=1)
    words = "gan is not finite" if where == "loss" else "g_ba.content_decoder.2.bias is not finite"
    assert words in error and "--lr" in error and "--precision fp32" in error
    state = aggan.load_checkpoint(folders / "run")
    assert state["step"] == 4 and all(w.isfinite().all() for w in state["parts"]["nets"].values())
    assert [row[0] for row in columns(folders / "run")][-1] in ("4", "6")


@pytest.mark.parametrize(
    "error, known",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("index 5 is out of bounds for dimension 0 with size 3"), False),
        (RuntimeError("CUDA error: an illegal memory access"), False),
    ],
)
def test_out_of_memory_gets_one_line(monkeypatch, capsys, error, known):
    def train(*_):
        raise error

    monkeypatch.setattr(aggan, "train", train)
    if known:
        assert "out of memory: train needs less with" in refusal(["train"], capsys)
    else:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            aggan.main(["train"])


def test_a_run_from_before_an_option_was_there(trained):
    file = trained / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    assert state["config"].pop("l_copy") == 1.0
    torch.save(state, file)
    assert aggan.load_checkpoint(trained)["config"].l_copy == 1.0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 4 MB; skips the test where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_whole(folders, small_disk, capsys, monkeypatch):
    changes = dict(steps=12, save_every=4, pool=2)
    given = options(folders, **changes, out=small_disk / "run")
    step, filler = aggan.Trainer.step, small_disk / "filler"

    def filling(trainer, *batch):
        if trainer.done == 6:
            with contextlib.suppress(OSError), open(filler, "wb") as file:
                while True:
                    file.write(bytes(1 << 12))
        return step(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(aggan.Trainer, "step", filling)
        with pytest.raises(SystemExit, match="2"):
            aggan.main(["train", *given])
    error = capsys.readouterr().err.splitlines()[-1]  # after warnings of the log and the grid
    assert re.search(r"run/checkpoint.pt: cannot be written \(.*No space left on device", error)
    assert aggan.load_checkpoint(small_disk / "run")["step"] == 4
    assert not list((small_disk / "run").rglob(".*"))
    filler.unlink()
    aggan.main(["train", *given, "--resume"])
    whole = aggan.train(tiny(folders, **changes))
    assert same(weights(whole), weights(small_disk / "run"))


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    def save(file):
        file.write(b"half")
        raise RuntimeError("unexpected pos")

    (tmp_path / "there.pt").write_bytes(b"whole")
    (tmp_path / "link.pt").symlink_to(tmp_path / "there.pt")
    with pytest.raises(aggan.BadInput, match=r"there.pt: cannot be written \(unexpected pos"):
        aggan.write_whole(tmp_path / "link.pt", save)
    assert (tmp_path / "there.pt").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 2
    aggan.write_whole(tmp_path / "link.pt", lambda file: file.write(b"new"))
    assert (tmp_path / "link.pt").is_symlink() and (tmp_path / "there.pt").read_bytes() == b"new"


def test_a_run_goes_on_without_a_screen(folders, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    (folders / "trainA" / "0.png").write_text("not a picture")
    run = aggan.train(tiny(folders, steps=4))
    assert aggan.load_checkpoint(run)["step"] == 4 and len(columns(run)) == 3


def test_memory_and_files_stay_flat(folders, monkeypatch):
    """Over 30 steps with lines, grids and checkpoints, after 50 that fill pools and caches."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    used, step = [], aggan.Trainer.step

    def watched(trainer, *batch):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))))
        return step(trainer, *batch)

    monkeypatch.setattr(aggan.Trainer, "step", watched)
    aggan.train(tiny(folders, steps=80, pool=5, save_every=10))
    (early, files), (late, more) = (map(max, zip(*used[k:])) for k in (30, 60))
    early = max(memory for memory, _ in used[30:50])
    assert late < early + 4 and more <= files


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_bad_checkpoints_get_one_line(folders, capsys):
    run = aggan.train(tiny(folders, steps=2))
    capsys.readouterr()
    file, evil, new = run / "checkpoint.pt", folders / "evil", folders / "new"
    whole = file.read_bytes()

    def change(where, name, value):
        def spoil():
            state = torch.load(file, weights_only=True)
            (state[where] if where else state)[name] = value
            torch.save(state, file)

        return spoil

    def moments():  # which Adam would take to be as large as the weights
        state = torch.load(file, weights_only=True)
        state["parts"]["opt_g"]["state"][0]["exp_avg"] = torch.zeros(1)
        torch.save(state, file)

    small_pools = [[(torch.zeros(3, 8, 8), torch.zeros(1, 8, 8))], []]
    only_training = [moments, change("", "pools", small_pools), change("", "step", -1)]
    version = f"of format {aggan.FORMAT + 1}, this program's is {aggan.FORMAT}"
    for spoil, words in (
        *((spoil, "not a checkpoint") for spoil in only_training),
        (lambda: file.write_bytes(b""), "not a checkpoint"),
        (lambda: file.write_bytes(whole[: len(whole) // 2]), "not a checkpoint"),
        (lambda: file.write_bytes(whole[:5000] + b"????" + whole[5004:]), "not a checkpoint"),
        (lambda: torch.save([1, 2], file), "not a checkpoint"),
        (lambda: torch.save({"format": aggan.FORMAT, "config": Evil(evil)}, file), "not a check"),
        (lambda: torch.save(Evil(evil), file), "not a checkpoint"),
        (change("", "format", aggan.FORMAT + 1), version),
        (change("config", "model", "vae"), "--model vae: must be one of"),
        (change("config", "blocks", 2**31), "--blocks"),
        (change("config", "width", 8), "size mismatch for g_ab"),
        (change("config", "lr", "fast"), "not a checkpoint"),
        (change("parts", "nets", {}), "not a checkpoint"),
        (change("parts", "nets", 7), "not a checkpoint"),
    ):
        file.write_bytes(whole)
        spoil()
        spoilt = file.read_bytes()
        translate = ["translate", run, folders / "testA", "--to", "b", "--out", new]
        for arguments in (translate, ["train", "--resume", "--out", run]):
            if arguments is translate and spoil in only_training:
                continue
            error = refusal([*arguments, "--device", "cpu"], capsys)
            assert words in error and str(run) in error, error
        assert file.read_bytes() == spoilt and not evil.exists() and not new.exists()


def mutation(content, numbers):
    """The bytes, changed in a place, or shortened, or with a part twice or of zeros."""
    content, length = bytearray(content), numbers.randrange(1, 64)
    place, kind = numbers.randrange(len(content)), numbers.randrange(4)
    if kind == 0:
        content[place : place + length] = numbers.randbytes(length)
    elif kind == 1:
        content[place : place + length] = bytes(length)
    elif kind == 2:
        content[place:place] = content[place : place + length]
    else:
        del content[max(1, place) :]
    return bytes(content)


def test_thirty_damaged_checkpoints(folders):
    """A run goes on from each, or names it; and leaves it alone."""
    run = aggan.train(tiny(folders, steps=2, blocks=0, model="scheme1", l_paired=0.0))
    numbers, file, refused = random.Random(1), run / "checkpoint.pt", 0
    whole = file.read_bytes()
    for i in range(30):
        file.write_bytes(mutation(whole, numbers))
        content = file.read_bytes()
        try:
            if i % 2:
                aggan.run_train(resume=True, out=str(run), device="cpu")
            else:
                image = folders / "testB" / "0.png"
                aggan.translate(run, [image], "a", folders / "new", device="cpu")
        except aggan.BadInput as error:
            assert error.status == 2 and str(run) in str(error) and "\n" not in str(error)
            refused += 1
        assert file.read_bytes() == content
    assert refused > 20


class Replay:
    """Stands for a CUDA graph on the CPU.

    A replay runs the function again, on the tensors that it was recorded with, and leaves outputs
    and gradients in the memory of the recording.
    """

    def pool(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def replay(self):
        gradients = [p.grad for p in self.parameters]
        new = self.function(*self.inputs)
        for old, p in zip(gradients, self.parameters):
            old.copy_(p.grad)
            p.grad = old
        leaves = torch.utils._pytree.tree_leaves
        for old, tensor in zip(leaves(self.outputs), leaves(new), strict=True):
            old.copy_(tensor)


def recorded_trainer(config, monkeypatch, fail=False):
    """A trainer on the CPU whose gradients are recorded by the code for CUDA."""
    current = []

    def graph():
        current.append(Replay())
        return current[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *_, **__: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    trainer = aggan.Trainer(config, 40, CPU)

    def recording(function, parameters):
        def called(*inputs):
            outputs = function(*inputs)
            if current and not hasattr(current[-1], "function"):  # this call is the recording
                current[-1].function = function
                if fail:
                    raise RuntimeError("operation not permitted\nwhen stream is capturing")
                graph = current[-1]
                graph.inputs, graph.outputs = inputs, outputs
                graph.parameters = [p for p in parameters if p.grad is not None]
            return outputs

        return aggan.Recorded(called, trainer.nets.buffers())

    g, d = trainer.generator_gradients, trainer.discriminator_gradients
    trainer.generator_gradients = recording(g, trainer.g_parameters)
    trainer.discriminator_gradients = recording(d, trainer.d_parameters)
    trainer.graphs = [trainer.generator_gradients, trainer.discriminator_gradients]
    return trainer


def steps(trainer, count):
    """Random batches, the same at each call, and the figures of their steps."""
    torch.manual_seed(1)
    numbers = torch.Generator().manual_seed(2)
    batches = (torch.rand(2, 2, 3, 32, 32, generator=numbers) * 2 - 1 for _ in range(count))
    return [
        {k: v.item() for k, v in trainer.step(*batch.to(trainer.device)).items()}
        for batch in batches
    ]


@pytest.mark.parametrize("config, graphs", [(FINAL, 2), (MEJJATI, 2)])
def test_a_graph_steps_as_without(monkeypatch, config, graphs):
    """The code around a recording: inputs, outputs, pools, gradients, Mejjati's switch."""
    config = dataclasses.replace(config, pool=3)
    plain, recorded = aggan.Trainer(config, 40, CPU), recorded_trainer(config, monkeypatch)
    assert steps(plain, 18) == steps(recorded, 18)
    assert same(plain.nets.state_dict(), recorded.nets.state_dict())
    assert all(isinstance(g.graph, Replay) for g in recorded.graphs)
    assert all(map(torch.equal, plain.rows, recorded.rows))  # replays have not overwritten them


def test_a_recording_that_fails_goes_on_eagerly(monkeypatch, capsys):
    plain, recorded = aggan.Trainer(FINAL, 40, CPU), recorded_trainer(FINAL, monkeypatch, fail=True)
    assert steps(plain, 8) == steps(recorded, 8)
    error = capsys.readouterr().err
    assert error.count("no CUDA graph, going on without: ") == error.count("\n") == 2


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_replay_that_differs_is_not_used(monkeypatch, capsys, norm):
    config = dataclasses.replace(FINAL, norm=norm)
    plain, recorded = aggan.Trainer(config, 40, CPU), recorded_trainer(config, monkeypatch)
    replay = Replay.replay

    def wrong(graph):
        replay(graph)
        graph.outputs[-1]["gan" if "gan" in graph.outputs[-1] else "d_gan"] += 1

    monkeypatch.setattr(Replay, "replay", wrong)
    assert steps(plain, 8) == steps(recorded, 8)
    assert same(plain.nets.state_dict(), recorded.nets.state_dict())
    assert capsys.readouterr().err.count("no CUDA graph, going on without: ") == 2


class Broken(torch.autograd.Function):
    """A backward that a compiler got wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("the compiled backward\nfails")


@pytest.mark.parametrize("place", ["first forward", "later shape", "backward"])
def test_a_compiler_that_fails_is_left(monkeypatch, capsys, place):
    """After one line a run goes on from the same step."""
    config = dataclasses.replace(RELEASED, model="cyclegan", l_copy=0.0, curriculum="none")
    plain, compiled = aggan.Trainer(config, 40, CPU), aggan.Trainer(config, 40, CPU)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        if place == "first forward" or place == "later shape" and len(graphs) > 1:
            raise RuntimeError("the compiler\nfails")
        if place == "backward":
            return lambda *x: [Broken.apply(out) for out in graph(*x)]
        return graph

    torch.compiler.set_stance("default")
    compiled.nets["g_ab"].compile(backend=backend)
    compiled.generator_gradients = functools.partial(aggan.or_eager, compiled.generator_gradients)
    try:
        if place == "later shape":
            compiled.nets["g_ab"](torch.zeros(1, 3, 16, 16))
        assert steps(plain, 2) == steps(compiled, 2)
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("torch.compile failed, going on without: ")
    assert same(plain.nets.state_dict(), compiled.nets.state_dict()) and graphs


def place_module(module, device):
    """What module.to(device) does; that cannot do it with tensors that are only pretended."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(p.detach().to(device)))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    return module


@pytest.fixture
def pretended_cuda(monkeypatch):
    """CUDA tensors of which only shape, type and device exist: -> a trainer of a capability.

    A tensor on the wrong device raises, and so does all that would wait for the GPU. There is no
    backward without a device: it checks its loss, and every parameter gets an empty gradient.
    """

    def backward(loss, inputs):
        assert loss.device.type == "cuda" and loss.shape == () and loss.requires_grad
        for p in inputs:
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(nn.Module, "to", place_module)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    def trainer(capability, **given):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        config = aggan.configure(TINY | dict(given, a="a", b="b", graph=False))
        return aggan.Trainer(config, 20, torch.device("cuda"))

    with torch._subclasses.fake_tensor.FakeTensorMode():
        yield trainer


def pretended_step(trainer):
    """A step; every figure and loss must be float32 on the device."""
    batch = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    figures = trainer.step(*batch)
    assert {value.device.type for value in figures.values()} == {"cuda"}
    for terms in trainer.generator_gradients(*batch.cuda(), torch.ones(2, device="cuda"))[4:]:
        assert {term.dtype for term in terms.values()} == {torch.float32}, terms


ON_H100 = [(model, (9, 0), torch.bfloat16) for model in aggan.PRESETS]
ON_T4 = [(model, (7, 5), torch.float16) for model in ("scheme2", "mejjati")]


@pytest.mark.parametrize("model, capability, dtype", ON_H100 + ON_T4)
def test_nothing_leaves_the_device(pretended_cuda, monkeypatch, model, capability, dtype):
    """Steps, checkpoint, resume and sample grid."""
    trainer, resumed = (pretended_cuda(capability, model=model) for _ in range(2))
    assert trainer.dtype == dtype and trainer.scaler.is_enabled() == (dtype == torch.float16)
    for trainer.done in (0, 6):  # before and after Mejjati's switch
        pretended_step(trainer)

    def on_cpu(x):
        return x.cpu() if isinstance(x, torch.Tensor) else x

    trainer.scaler.state_dict = lambda: {}  # of numbers
    resumed.load_state_dict(torch.utils._pytree.tree_map(on_cpu, trainer.state_dict()))
    pretended_step(resumed)
    monkeypatch.setattr(aggan, "write_whole", lambda path, save: None)
    shown = torch.rand(2, 4, 3, 32, 32).cuda()
    assert aggan.save_samples(Path("grid"), trainer.nets, *shown).device.type == "cuda"


@pytest.mark.parametrize("fault", ["CPU tensor", "wait", "half"])
def test_faults_of_a_device_are_found(pretended_cuda, monkeypatch, fault):
    loss = aggan.adversarial_loss

    def faulty(logits, real, kind):
        if fault == "CPU tensor":
            return (logits - torch.ones(logits.shape)).square().mean()
        if fault == "wait":
            return loss(logits, real, kind) / max(1.0, logits.mean().item())
        return loss(logits, real, kind).half()

    trainer = pretended_cuda((9, 0))
    pretended_step(trainer)
    monkeypatch.setattr(aggan, "adversarial_loss", faulty)
    found = torch._subclasses.fake_tensor
    errors = AssertionError, RuntimeError, found.DataDependentOutputException
    with pytest.raises(errors, match="float16|device|_local_scalar_dense"):
        pretended_step(trainer)


def test_loading_processes_may_be_spawned(folders):
    """As on Windows and macOS."""
    data = aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36, 0)
    settings = dict(
        num_workers=1, multiprocessing_context="spawn", worker_init_fn=aggan.start_worker
    )
    loader = torch.utils.data.DataLoader(data, batch_sampler=[range(2), range(2, 4)], **settings)
    for i, batch in enumerate(loader):
        for j in range(2):
            assert all(torch.equal(x[j], y) for x, y in zip(batch, data[2 * i + j]))
    assert i == 1


def test_two_processes_train_as_one(folders):
    """Two of torchrun's at batch 1, stopped half-way, against one at batch 2."""
    changes = dict(steps=4, l_identity=5.0, log_every=1, save_every=2)
    one = aggan.train(tiny(folders, **changes, batch_size=2, out=str(folders / "one")))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [sys.executable, *launcher, str(ROOT / "aggan.py"), "train", *options(folders, **changes)]
    process = subprocess.run(run, capture_output=True, text=True, env=ONE_THREAD)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("step 4/4") == process.stdout.count("done:") == 1
    state = aggan.load_checkpoint(folders / "run")
    assert state["world"] == 2 and len(state["pools"][0]) == 4
    initial = aggan.Trainer(state["config"], 4, CPU).nets.state_dict()
    first, second = weights(one), state["parts"]["nets"]
    for k in first:  # a bias before a norm has no gradient but rounding, which Adam magnifies
        if k.endswith("weight"):
            assert (first[k] - second[k]).norm() < 0.02 * (first[k] - initial[k]).norm(), k
    with pytest.raises(aggan.BadInput, match="a run of 2 processes, here are 1"):
        aggan.train(tiny(folders, **changes), resume=True)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return aggan.pick_device("cuda")


@needs_cuda
@pytest.mark.parametrize("model", aggan.PRESETS)
def test_trains_on_cuda(folders, cuda, model, capsys):
    changes = dict(device="cuda", model=model, save_every=7)
    run = aggan.train(tiny(folders, **changes, steps=14))
    resumed = folders / "resumed"
    aggan.train(tiny(folders, **changes, steps=14, out=str(resumed)))
    (resumed / "checkpoint.pt").unlink()
    aggan.train(tiny(folders, **changes, steps=14, out=str(resumed)), resume=True)
    first, second = weights(run), weights(resumed)
    for k in first:  # a step moves a weight by the rate, 1e-4 or 2e-4, at most
        assert first[k].isfinite().all() and (first[k] - second[k]).abs().max() < 14 * 2 * 2e-4
    assert "no CUDA graph" not in capsys.readouterr().err


@needs_cuda
@pytest.mark.parametrize(
    "precision, first, last", [("fp32", 1e-3, 0.05), ("bf16", 0.05, 0.1), ("fp16", 0.05, 0.1)]
)
@pytest.mark.parametrize("model", aggan.PRESETS)
def test_graphs_agree_with_eager_steps(cuda, model, precision, first, last):
    """The first step's figures within `first`, the means of the last ten within `last`."""
    given = dict(TINY, model=model, precision=precision, pool=3, width=8, a="a", b="b")
    runs = []
    for graph in (False, True):
        trainer = aggan.Trainer(aggan.configure(dict(given, graph=graph)), 20, cuda)
        runs.append(steps(trainer, 20))
    assert all(graph.graph is not None for graph in trainer.graphs)
    eager, fast = runs
    for k in eager[0]:
        assert fast[0][k] == pytest.approx(eager[0][k], rel=first, abs=1e-4), k
        means = [sum(figures[k] for figures in run[10:]) / 10 for run in runs]
        assert means[1] == pytest.approx(means[0], rel=last, abs=1e-2), k


@needs_cuda
def test_compiled_steps_agree_with_eager_ones(cuda):
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        given = dict(TINY, precision="fp32", pool=3, width=8, a="a", b="b")
        eager, fast = (
            steps(aggan.Trainer(aggan.configure(dict(given, compile=compiled)), 20, cuda), 12)
            for compiled in (False, True)
        )
    for k in eager[0]:
        assert fast[0][k] == pytest.approx(eager[0][k], rel=1e-3, abs=1e-4), k


def draw_discs(folder):
    """Red discs, a fifth of the image, become blue ones and back, on grey noise."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    for domain, colour in (("A", (0.9, -0.6, -0.6)), ("B", (-0.6, -0.6, 0.9))):
        for part in ("train", "test", "masks"):
            (folder / (part + domain)).mkdir()
        for i in range(50):
            y, x = torch.randint(9, 23, (2,)).tolist()
            disc = (rows - y) ** 2 + (columns - x) ** 2 < 64
            noise = 0.3 * torch.rand(1, 32, 32) - 0.15
            pixels = torch.where(disc, torch.tensor(colour)[:, None, None], noise)
            part = "train" if i < 40 else "test"
            aggan.to_image(pixels / 2 + 0.5).save(folder / (part + domain) / f"{i}.png")
            if part == "test":
                aggan.to_image(disc[None].float()).save(folder / f"masks{domain}" / f"{i}.png")


def test_attention_finds_the_object(tmp_path):
    """IoU < 0.3 untrained, when it looks everywhere, > 0.6 after 150 steps."""
    draw_discs(tmp_path)
    changes = dict(size=32, resize=32, width=8, blocks=1, masks=4, lr=2e-3, objective="released")
    changes |= dict(log_every=50, save_every=1000)
    before, after = (
        aggan.evaluate(aggan.train(tiny(tmp_path, **changes, steps=n, out=str(tmp_path / f"{n}"))))
        for n in (1, 150)
    )
    for name in ("a2b", "b2a"):
        assert before[name]["iou"] < 0.3 and after[name]["iou"] > 0.6


def draw_scenes(folder, size=32):
    """Tiny scenes like photographs, and masks of the test ones.

    A large object on a background with texture at three scales, in colours that this has too; A's
    plain and shaded, B's striped, of little contrast.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def noise(scale, channels=3):
        pixels = torch.rand(1, channels, scale, scale, generator=generator) * 2 - 1
        return nn.functional.interpolate(pixels, size=(size, size), mode="bicubic")[0]

    for domain in "AB":
        for part in ("train", "test", "masks"):
            (folder / f"{part}{domain}").mkdir()
        for i in range(70):
            hue, at, extent = torch.rand(3, 3, generator=generator)
            phase = torch.rand((), generator=generator)
            scene = (
                hue[:, None, None] - 0.5 + 0.35 * noise(4) + 0.25 * noise(8) + 0.15 * noise(size)
            )
            y, x = size * (0.375 + 0.25 * at[:2])
            tall, wide = size * (0.28 + 0.1 * extent[:2])
            inside = ((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 < 1
            stripes = 0.5 * torch.sign(torch.sin(1.6 * columns + 6 * phase)).expand(3, size, size)
            plain = torch.tensor([0.2, -0.1, -0.35])[:, None, None]
            coat = (plain if domain == "A" else stripes) + 0.15 * noise(5, 1)
            part = "train" if i < 60 else "test"
            pixels = torch.where(inside, coat, scene).clamp(-1, 1)
            aggan.to_image(pixels / 2 + 0.5).save(folder / f"{part}{domain}" / f"{i}.png")
            if part == "test":
                aggan.to_image(inside[None].float()).save(folder / f"masks{domain}" / f"{i}.png")


def test_scenes_like_photographs_are_not_copied(tmp_path):
    """The papers' curriculum ends with copies, the default finds the objects."""
    draw_scenes(tmp_path)
    changes = dict(size=32, resize=36, width=8, blocks=1, masks=4, lr=1e-3)
    changes |= dict(log_every=1000, save_every=1000)
    results = []
    for count, curriculum in ((80, "papers"), (250, "adaptive")):
        changes |= dict(steps=count, curriculum=curriculum, out=str(tmp_path / curriculum))
        results.append(aggan.evaluate(aggan.train(tiny(tmp_path, **changes))))
    for name, iou in (("a2b", 0.35), ("b2a", 0.55)):
        copied, found = (result[name] for result in results)
        assert copied["mean_attention"] < 0.02 and copied["foreground_change"] < 0.01
        assert 0.1 < found["mean_attention"] < 0.7 and found["foreground_change"] > 0.1
        assert found["iou"] > iou


# ---------- 11. Translate and evaluate ----------


@pytest.mark.parametrize("height, width", [(64, 64), (37, 50), (1, 1), (3, 200)])
def test_translation_keeps_any_size(height, width):
    t = aggan.apply_any_size(SchemeTwoGenerator(4, 1, 3), torch.rand(3, height, width))
    assert t.image.shape == (1, 3, height, width) and t.attention.shape == (1, 3, height, width)
    assert t.content.shape == (1, 2, 3, height, width)


def test_translate(trained, folders, capsys):
    """Odd images too: names, sizes, transparency; the inputs stay as they are."""
    (folders / "odd").mkdir()
    odd = odd_images(folders / "odd")
    (folders / "odd" / "old.ppm").write_bytes(b"P6 2 1 255 abcdef")
    odd["old.ppm"] = (2, 1), False, None
    before = {path: path.read_bytes() for path in (folders / "odd").iterdir()}
    capsys.readouterr()
    paths = aggan.translate(trained, [folders / "odd"], "b", folders / "out")
    assert len(paths) == len(odd) and capsys.readouterr().err == ""
    nets, _ = aggan.load_generators(trained, CPU)
    for name, (size, transparent, _) in odd.items():
        kept = Path(name).suffix.lower() in aggan.WRITABLE
        written = folders / "out" / (name if kept else name + ".png")
        image, source = Image.open(written), folders / "odd" / name
        assert written in paths and image.size == size, name
        assert image.mode == ("RGBA" if transparent else "RGB"), name
        if image.mode == "RGBA":
            alpha = aggan.load_image(source, None).getchannel("A")
            assert image.getchannel("A").tobytes() == alpha.tobytes(), name
        if name == "clear.tif":  # the colours below the transparency too, rounded to 8 bits
            t = aggan.apply_any_size(nets["g_ab"], pixels_of(source))
            drawn = aggan.TF.to_tensor(image)[:3]
            assert (drawn - t.image[0] / 2 - 0.5).abs().max() < 0.5 / 255 + 1e-5
    assert all(path.read_bytes() == content for path, content in before.items())
    turned = folders / "odd" / "turned.jpg"
    aggan.translate(trained, [turned], "b", folders / "masks", attention=True)
    mask = Image.open(folders / "masks" / "turned_attention.png")
    assert (mask.size, mask.mode) == ((30, 40), "L")


def test_translate_names_what_it_cannot_do_and_does_the_rest(trained, folders, capsys, monkeypatch):
    names, forward = useless_images(folders / "testA"), SchemeTwoGenerator.forward
    Image.new("RGB", (64, 64)).save(folders / "testA" / "large.png")

    def limited(generator, x):  # as a small GPU does
        if x.shape[2] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return forward(generator, x)

    monkeypatch.setattr(SchemeTwoGenerator, "forward", limited)
    with pytest.raises(SystemExit, match="1"):
        arguments = ["translate", trained, folders / "testA", "--to", "b", "--out", folders / "new"]
        aggan.main([*map(str, arguments), "--device", "cpu"])
    *lines, last = capsys.readouterr().err.splitlines()
    count = f"{len(names) + 1} of {len(names) + 6}"
    assert last == f"aggan.py: {count} images not translated, see above"
    for name in names:
        assert sum(f"testA/{name}: not a usable image" in line for line in lines) == 1
    assert sum("large.png: 64 x 64 pixels, not translated (CUDA out of m" in x for x in lines) == 1
    assert sorted(p.name for p in (folders / "new").iterdir()) == [f"{i}.png" for i in range(5)]


def test_sixty_damaged_images(trained, folders, capsys, monkeypatch):
    """Each is translated or named; nothing else is said, and what is written is whole."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)  # so that none of them is a large one
    for name in ("odd", "damaged"):
        (folders / name).mkdir()
    odd_images(folders / "odd")
    capsys.readouterr()
    numbers, sources = random.Random(0), aggan.list_images(folders / "odd")
    for i in range(60):
        source = sources[i % len(sources)]
        damaged = folders / "damaged" / f"{i}{source.suffix}"
        damaged.write_bytes(mutation(source.read_bytes(), numbers))
    with warnings.catch_warnings(), pytest.raises(aggan.BadInput) as stopped:
        warnings.simplefilter("ignore")  # PIL's, of images that it can read nevertheless
        aggan.translate(trained, [folders / "damaged"], "b", folders / "o", device="cpu")
    output = capsys.readouterr()
    errors, done = output.err.splitlines(), output.out.splitlines()
    assert str(stopped.value).startswith(f"{len(errors)} of 60 images not translated")
    assert len(errors) > 15 and len(done) > 15 and len(errors) + len(done) == 60
    assert all(re.match(r"warning: \S+/damaged/\d+\S*: not a usable image \(", e) for e in errors)
    for path in done:
        Image.open(path).load()
    assert {str(p) for p in (folders / "o").iterdir()} == set(done)


def test_copied_pixels_keep_their_value():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    image = aggan.TF.to_pil_image(levels)
    assert aggan.to_image(aggan.to_tensor(image) / 2 + 0.5).tobytes() == image.tobytes()


def test_translate_never_overwrites_an_input(trained, folders):
    a, b, out = folders / "testA", folders / "testB", folders / "out"
    before = (a / "0.png").read_bytes()
    with pytest.raises(aggan.BadInput, match="is an input"):
        aggan.translate(trained, [a], "b", a)
    with pytest.raises(aggan.BadInput, match="both would write"):
        aggan.translate(trained, [a / "0.png", b / "0.png"], "b", out)
    Image.new("RGB", (20, 20)).save(a / "0.jpg")
    with pytest.raises(aggan.BadInput, match="both would write .*0_attention.png"):
        aggan.translate(trained, [a], "b", out, attention=True)
    with pytest.raises(aggan.BadInput, match="0.png"):
        aggan.translate(trained, [b], "a", a / "0.png")
    assert (a / "0.png").read_bytes() == before and not out.exists()


def test_mask_figures_by_hand():
    foreground = torch.tensor([[0.9, 0.6], [0.4, 0.1]])
    attention = torch.stack([foreground, 1 - foreground])[None]
    image = torch.tensor([[1.0, 0.5], [0.2, 0.0]]).expand(1, 3, 2, 2)
    mask = torch.tensor([[True, False], [True, False]])
    t = Translation(image, attention, torch.zeros(1, 1, 3, 2, 2))
    figures = aggan.mask_figures(torch.zeros(3, 2, 2), t, mask)
    assert figures["iou"] == pytest.approx(1 / 3)  # found: upper row; true: left column
    assert figures["background_error"] == pytest.approx(0.125)  # (0.5 + 0) / 2, halved: in [0, 1]
    assert figures["foreground_change"] == pytest.approx(0.3)  # (1 + 0.2) / 2, halved
    assert figures["mean_attention"] == pytest.approx(0.5)


def test_evaluate_averages_over_images(trained, folders):
    for domain in "AB":
        (folders / f"masks{domain}").mkdir()
        for path in aggan.list_images(folders / f"test{domain}"):
            mask = Image.new("L", Image.open(path).size)
            mask.paste(255, (0, 0, 20, 20))
            mask.save(folders / f"masks{domain}" / path.name)
    results, figures = aggan.evaluate(trained, device="cpu"), []
    nets, _ = aggan.load_generators(trained, CPU)
    for path in aggan.list_images(folders / "testB"):  # 40 x 60 -> 32 x 48, the mask's 20 -> 16
        x = aggan.to_tensor(aggan.load_image(path, size=32))
        mask = torch.zeros(48, 32, dtype=torch.bool)
        mask[:16, :16] = True
        figures.append(aggan.mask_figures(x, aggan.apply_any_size(nets["g_ba"], x), mask))
    for name, value in results["b2a"].items():
        assert value == pytest.approx(sum(f[name] for f in figures) / 3, abs=1e-6)

    (folders / "masksA" / "3.png").rename(folders / "masksA" / "3.webp.png")
    with pytest.raises(aggan.BadInput, match="masksA: no mask for 3.png"):
        aggan.evaluate(trained)
    shutil.rmtree(folders / "masksA")
    figures = aggan.evaluate(trained)["a2b"]
    assert figures["iou"] is None and 0 <= figures["mean_attention"] <= 1


@pytest.mark.parametrize("kind", ["0 and 255", "0 and 1", "palette", "bits", "soft", "colour"])
def test_masks_may_be_labels(folders, kind):
    box, mode = (4, 4, 28, 20), {"palette": "P", "bits": "1", "colour": "RGB"}.get(kind, "L")
    mask = Image.new(mode, (48, 32))
    white = {"0 and 1": 1, "palette": 2, "colour": (99, 0, 0), "bits": 1}.get(kind, 255)
    mask.paste(white, box)
    if kind == "palette":
        mask.putpalette([0, 0, 0, 9, 9, 9, 20, 0, 0])
    if kind == "soft":
        mask.paste(100, (40, 4, 48, 20))  # the darker half of the grey values
    mask.save(folders / "0[1].png")  # not a pattern
    found = aggan.load_mask(folders, Path("0[1].jpg"), (32, 48), CPU)
    expected = torch.zeros(32, 48, dtype=torch.bool)
    expected[4:20, 4:28] = True
    assert torch.equal(found, expected)


def test_masks_that_do_not_fit(folders):
    grey = Image.new("L", (48, 32), 1)
    grey.paste(2, (0, 0, 9, 9))
    grey.paste(0, (20, 0, 29, 9))
    grey.save(folders / "0.png")
    with pytest.raises(aggan.BadInput, match="0.png.*grey values to 2 only"):
        aggan.load_mask(folders, Path("0.jpg"), (32, 48), CPU)
    with pytest.raises(aggan.BadInput, match="0.png.*48 x 32 pixels; 0.jpg has 32 x 48"):
        aggan.load_mask(folders, Path("0.jpg"), (48, 32), CPU)


def test_masks_in_folders_like_their_images(trained, folders):
    deep = folders / "deep"
    for part, white in (("x", 0), ("y", 255)):
        for name, mode, colour in (("testA", "RGB", (90, 50, 20)), ("masksA", "L", white)):
            (deep / name / part).mkdir(parents=True)
            Image.new(mode, (32, 32), colour).save(deep / name / part / "1.png")
    figures = aggan.evaluate(trained, a=deep / "testA")["a2b"]
    assert figures["background_error"] is not None and figures["foreground_change"] is not None


def test_evaluate_keeps_the_translations(trained, folders):
    (folders / "testA" / "more").mkdir()
    Image.new("RGB", (40, 32), (9, 90, 200)).save(folders / "testA" / "more" / "0.jpg")
    saved = folders / "kept"
    aggan.evaluate(trained, save=saved)
    names = [f"{i}.png" for i in range(5)] + ["more/0.png"]
    expected = [f"a/{name}" for name in names] + [f"a2b/{name}" for name in names]
    expected += [f"{part}/{i}.png" for part in ("b", "b2a") for i in range(3)]
    assert sorted(p.relative_to(saved).as_posix() for p in saved.rglob("*.*")) == expected
    nets, config = aggan.load_generators(trained, CPU)
    image = aggan.load_image(folders / "testB" / "2.png", size=config.size)
    assert Image.open(saved / "b" / "2.png").tobytes() == image.tobytes()
    t = aggan.apply_any_size(nets["g_ba"], aggan.to_tensor(image))
    drawn = aggan.to_image(t.image[0] / 2 + 0.5)
    assert Image.open(saved / "b2a" / "2.png").tobytes() == drawn.tobytes()
    for place in ("kept", "testA/new", "testB/new/er"):  # to overwrite, or be measured itself
        with pytest.raises(aggan.BadInput, match=f"--save .*{place}"):
            aggan.evaluate(trained, save=folders / place)
    Image.new("RGB", (40, 32)).save(folders / "testA" / "0.jpg")
    with pytest.raises(aggan.BadInput, match="two images of .*testA would both be .*a2b/0.png"):
        aggan.evaluate(trained, save=folders / "again")


def test_torch_fidelity_scores_what_evaluate_saves(trained, folders, tmp_path):
    """By its own command, here with random Inception weights."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:  # it cannot be made without weights
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    aggan.evaluate(trained, save=folders / "kept")
    given = {"input1": folders / "kept" / "b2a", "input2": folders / "kept" / "b"}
    given |= {"feature-extractor-weights-path": tmp_path / "weights.pth", "kid-subset-size": 2}
    run = [sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--kid", "--fid", "--json"]
    run += [str(x) for name, value in given.items() for x in ("--" + name, value)]
    run += ["--samples-find-deep"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernel_inception_distance_mean" in done.stdout


# ---------- 12. The command line ----------


def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        aggan.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        name, kind = field.name.replace("_", "-"), " " + type(field.default).__name__.upper()
        kind = f", --no-{name}" if field.type is bool else kind
        found = re.search(rf"--{name}{kind} [^\[]{{4,}}\[([^\]]*)\]", text)
        assert found and ast.literal_eval(found[1]) == field.default, name


@pytest.mark.parametrize(
    "model", [*([m] for m in aggan.PRESETS), ["guided", "--attention-map", "tam"]]
)
def test_every_preset_by_the_command_line(folders, capsys, model):
    out, new = folders / "run", folders / "new"
    aggan.main(["train", *options(folders, steps=2), "--model", *model])
    output = capsys.readouterr()
    assert "step 2/2" in output.out and output.err == ""
    translate = ["translate", out, folders / "testA", "--to", "b", "--out", new, "--attention"]
    aggan.main([*map(str, translate), "--device", "cpu"])
    t = aggan.load_generators(out, CPU)[0]["g_ab"](pixels_of(folders / "testA" / "0.png")[None])
    expected = {"0.png": t.image[0] / 2 + 0.5, "0_attention.png": t.foreground[0]}
    for file, tensor in expected.items():
        drawn = aggan.TF.to_tensor(Image.open(new / file))
        assert drawn.shape[1:] == (40, 48) and (drawn - tensor).abs().max() < 0.5 / 255 + 1e-5


def test_command_line_end_to_end(folders, capsys):
    out = folders / "runs" / "one"
    given = ["train", *options(folders, out=out)]

    def said(*arguments):
        aggan.main(list(map(str, arguments)))
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    assert "epoch 1  step 5/5" in said(*given, "--epochs", 1)
    assert "--resume" in refusal([*given, "--epochs", 1], capsys)
    wrong = refusal([*given, "--epochs", 1, "--resume", "--lr", 1], capsys)
    assert f"--lr 1.0 (there 0.0001): another run than {out}" in wrong
    assert "resuming" in said("train", "--out", out, "--resume", "--no-graph", "--workers", 1)
    for there in (folders, out / "checkpoint.pt"):
        assert "exists, and is no .json" in refusal(["evaluate", out, "--json", there], capsys)
    tests = ["--a", folders / "testA", "--b", folders / "testB"]
    table = said("evaluate", out, *tests, "--json", folders / "f.json", "--device", "cpu")
    results = json.loads((folders / "f.json").read_text())
    header, *rows = table.splitlines()[2:]  # after two that say there are no masks
    assert list(results) == ["a2b", "b2a"] == header.split()
    for figures in results.values():
        assert list(figures) == [row.split()[0] for row in rows]


def test_small_settings_on_own_folders(folders, capsys):
    out = folders / "small"
    given = ["train", "--a", folders / "trainA", "--b", folders / "trainB", "--out", out, "--small"]
    given = [*map(str, given), "--width", "4", "--device", "cpu", "--steps", "1"]
    aggan.main(given)
    config = aggan.load_checkpoint(out)["config"]
    assert dict(aggan.SMALL, width=4, steps=1, l_paired=0.5).items() <= vars(config).items()
    aggan.main([*given, "--resume"])
    aggan.train(tiny(folders, steps=1))
    capsys.readouterr()
    run = ["train", "--out", str(folders / "run"), "--resume", "--small"]  # that one is not
    assert re.search(r"--[\w-]+ \S+ \(there \S+\): another run", refusal(run, capsys))


def test_aggan_alone_trains_translates_and_evaluates(folders):
    """The file, copied into an empty folder."""
    alone = folders / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "aggan.py", alone)
    run, pipe, stages = folders / "run", subprocess.PIPE, []
    translate = ["translate", run, folders / "testA", "--to", "b", "--out", "new"]
    evaluate = ["evaluate", run, "--a", folders / "testA", "--b", folders / "testB"]
    for stage in ([["train", *options(folders, steps=2)]], [translate, evaluate]):
        processes = []
        for arguments in stage:
            line = [sys.executable, "aggan.py", *map(str, arguments)]
            processes.append(subprocess.Popen(line, cwd=alone, stdout=pipe, stderr=pipe))
        stages += [(*process.communicate(), process.returncode) for process in processes]
    assert [(error, status) for _, error, status in stages] == [(b"", 0)] * 3, stages
    assert len(list((alone / "new").iterdir())) == 5


def test_bundled_set_trains_without_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    aggan.main(["train", "--steps", "2", "--width", "4", "--device", "cpu"])
    output = capsys.readouterr()
    assert "bundled drawings" in output.out.splitlines()[0] and output.err == ""
    aggan.main(["evaluate", "runs/mini-scheme2", "--device", "cpu"])
    assert " - " not in capsys.readouterr().out  # masks were found


def test_bench(tmp_path, capsys):
    names = ("width", "blocks", "masks", "size", "resize", "device")
    given = [str(x) for name in names for x in (aggan.flag(name), TINY[name])]
    given += ["--precision", "bf16", "--json", str(tmp_path / "b.json")]
    script("bench").main(given)
    results, said = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    assert list(results) == ["eager float32", "eager, bf16"]
    for name, row in results.items():
        assert name in said and all(v is None or v > 0 for v in row.values())
        assert row["pairs_a_second"] * row["ms_a_step"] == pytest.approx(1000)


def test_measure(folders, tmp_path, capsys, monkeypatch):
    measure, row = script("measure"), {"tiny": "--width 4 --blocks 1 --steps 1"}
    monkeypatch.setattr(measure, "TABLES", {"short": row, "photographs": row})
    given = ["--runs", str(tmp_path), "--seeds", "1"]
    measure.main(given)
    trained = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| tiny \| `--width 4 .*` \| 0 \| 0\.\d{3} \| 0\.\d{3} \|.*", trained)
    measure.main([*given, "--print"])
    assert capsys.readouterr().out.splitlines()[-1] == trained  # it is there
    own = ["--a", str(folders / "trainA"), "--b", str(folders / "trainB")]
    measure.main(["photographs", *own, "--runs", str(tmp_path / "own"), "--seeds", "1"])
    trained = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| tiny \| `--width 4 .*` \| 0 \| 0\.\d\d \| 0\.\d\d \|", trained)
    assert len(list((tmp_path / "own").glob("*-scored/b2a/*.png"))) == 3  # for KID
    (tmp_path / "1x1-0").write_text("not a run folder")
    with pytest.raises(aggan.BadInput):
        measure.measure("1x1", 0, tmp_path)
    assert aggan.SchemeTwoGenerator is SchemeTwoGenerator  # no other row has its last layer
    figures = [
        {"a2b": dict(iou=iou, background_error=0.01, foreground_change=0.2)}
        for iou in (0.5, 0.6, 0.9)
    ]
    assert measure.cell(figures[:2], "iou", "a2b") == "0.550 ± 0.071"  # sqrt(2 x 0.05^2)
    assert measure.cell(figures, "iou", "a2b") == "0.500, 0.600, 0.900"
    assert measure.cell(figures, "background_error", "a2b") == "0.0100, 0.0100, 0.0100"


BAD_INPUT = [
    ("train --a nowhere --b empty", "nowhere: no such file or folder"),
    ("train --a empty --b nowhere", "empty: no images"),
    ("train --a broken/x.png --b empty", "broken/x.png: is a file; name its folder"),
    ("train --a empty --b broken/../empty", "--a and --b go together"),
    ("train --a empty", "--a and --b go together"),
    ("train --model cyclegam", "argument --model: invalid choice: 'cyclegam' (choose from"),
    ("train --model cyclegan --l-paired 1", "--model cyclegan: has no mask"),
    ("train --model guided --l-gan 0 --l-paired 1", "needs --l-gan"),
    ("train --model guided --head pooled", "and --head patch"),
    ("train --model guided --attention-map cam", "--attention-map: invalid choice: 'cam'"),
    ("train --model mejjati --tau 2", "--tau 2.0: must be between 0 and 1"),
    ("train --size 66", "--size 66: must be a multiple of 4"),
    ("train --batch-size 0", "--batch-size 0: must be between 1"),
    ("train --lr fast", "--lr: invalid float"),
    ("train --lr nan", "--lr nan: must be between 0"),
    ("train --seed -1", "--seed -1: must be between 0"),
    ("train --l-gan 0 --l-paired 0", "leaves no discriminator"),
    ("train --r 2", "--r 2.0: must be between 0.01 and 0.99"),
    ("train --curriculum steep", "--curriculum: invalid choice: 'steep' (choose from"),
    ("train --resize 32", "--size 64: must be a multiple of 4, and at most --resize 32"),
    ("train --out broken/x.png", "--out broken/x.png: is a file"),
    ("train --device meta", "--device meta"),
    ("train --device gpu", "--device gpu"),
    ("train --width 100000000", "--width 100000000: must be between 1 and 2048"),
    ("train --steps " + "9" * 99, "must be between 0"),
    ("train --masks 1", "--masks 1: must be"),
    ("evaluate nowhere", "nowhere: no checkpoint.pt"),
    ("evaluate broken/x.png", "not a checkpoint"),
    ("translate nowhere empty --to b --out out", "empty: no images"),
    ("translate nowhere broken --to c --out out", "argument --to: invalid choice: 'c'"),
    ("translate nowhere x.png --to b --out out", "x.png: no such file or folder"),
    ("translate nowhere broken --to b --out out", "nowhere: no checkpoint.pt"),
    ("paint", "invalid choice: 'paint'"),
]


@pytest.mark.parametrize("arguments, words", BAD_INPUT)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("not a picture")
    assert words in refusal(arguments.split(), capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "empty"]  # nothing was made


# ---------- The documents ----------

DOCUMENTS = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("data/*.md"))
}
COMMAND = r"^    (?:\S*python|torchrun --nproc-per-node \d) aggan\.py (.*)$"


def test_documents_commands_are_understood():
    commands = [c for text in DOCUMENTS.values() for c in re.findall(COMMAND, text, re.M)]
    assert {c.split()[0] for c in commands} == {"train", "translate", "evaluate"}
    for line in commands:
        given = vars(aggan.make_parser().parse_args(shlex.split(line)))
        if given.pop("command") == "train":
            small = given.pop("small")
            given.pop("resume")
            aggan.check(aggan.configure(given, small))


def test_documents_name_what_exists():
    files = (ROOT / "aggan.py", *ROOT.glob("data/*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    fields = {aggan.flag(no + f.name) for f in dataclasses.fields(Config) for no in ("", "no_")}
    foreign = {"--nproc-per-node", "--nnodes", "--logdir", "--help", "--l-area", "--gpu", "--cpu"}
    foreign |= {"--kid", "--fid", "--input1", "--input2", "--kid-subset-size", "--batch-size"}
    foreign |= {"--samples-find-deep", "--masks-a", "--masks-b"}
    foreign |= {"--feature-extractor-weights-path"}
    for path, text in DOCUMENTS.items():
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in globals(), name
        for name in re.findall(r"`([A-Z][a-z]\w+)`", text):  # classes
            assert hasattr(aggan, name), name
        for name in set(re.findall(r"--[a-z][a-z0-9-]+", text)) - fields - foreign:
            assert f'"{name}"' in code, name
        for link, anchor in re.findall(r"\]\(([\w/.-]*)(?:#([\w-]+))?\)", text):
            target = path.parent / link if link else path
            assert target.exists(), (path, link)
            titles = re.findall(r"^#+ (.*)$", DOCUMENTS.get(target.resolve(), ""), re.M)
            slugs = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
            assert not anchor or anchor in slugs, (path, anchor)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):  # header, rule, rows
            assert len({row.count("|") for row in table.splitlines()}) == 1, table
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", EXERCISES, re.S))
def test_exercises_run_and_change_something(folders, diff):
    source = (ROOT / "aggan.py").read_text(encoding="utf-8")
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(True)
        old, new = ("".join(x[1:] for x in lines if x[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folders / "changed.py").write_text(source, encoding="utf-8")
    changed, judge = script("changed", folders), AttentionGuidedDiscriminator(TINY["width"])
    results, x = [], torch.rand(1, 3, 32, 32) * 2 - 1
    for module in (aggan, changed):
        config = module.configure(dict(TINY, a="a", b="b"))
        trainer = module.Trainer(config, 2, CPU)
        trainer.nets["d_b"]["paired"].load_state_dict(judge.state_dict())
        for _ in range(2):
            assert all(term.isfinite() for term in trainer.step(x, x.flip(3)).values())
        learnt = [*trainer.nets.eval()["g_ab"](x)[:1], *trainer.nets["d_b"]["paired"].parameters()]
        results.append(torch.cat([tensor.flatten() for tensor in learnt]))
    assert not torch.equal(*results)


def test_snippets_run(trained, monkeypatch, capsys):
    shares = re.search(r"```python\n(.*?)```", EXERCISES, re.S)[1]
    copy = (
        re.search(r"    nets = torch.load.*?\n\n", README, re.S)[0].replace("\n    ", "\n").strip()
    )
    monkeypatch.chdir(ROOT)
    exec(shares.replace("runs/mini-scheme2", str(trained)), {})
    for line in capsys.readouterr().out.splitlines()[-2:]:
        assert len(json.loads(line)) == TINY["masks"]
        assert sum(json.loads(line)) == pytest.approx(1)
    copy = copy.replace("runs/mini-scheme2", str(trained))
    names = {"torch": torch, "SchemeTwoGenerator": SchemeTwoGenerator}
    exec(copy.replace("width=16, blocks=3", "width=4, blocks=1, masks=3"), names)
    generator = aggan.load_generators(trained, CPU)[0]["g_ab"]
    assert torch.equal(names["t"].image, generator(torch.zeros(1, 3, 64, 64)).image)

    export = re.search(r"    class OneWay.*?\n\n", README, re.S)[0].replace("\n    ", "\n").strip()
    assert export.count("\n") < 6
    monkeypatch.chdir(trained)
    names = {"torch": torch, "aggan": aggan}
    exec(export.replace("runs/mini-scheme2", str(trained)), names)
    t, again = generator(torch.zeros(1, 3, 32, 80)), torch.export.load("a2b.pt2").module()
    assert torch.equal(names["image"], t.image) and torch.equal(names["mask"], t.foreground)
    x = torch.rand(1, 3, 64, 24) * 2 - 1
    torch.testing.assert_close(again(x)[0], generator(x).image)


PIECES = README.split("## Copy these pieces")[1].split("\n## ")[0]
PIECES = re.findall(r"^\| (`.*) \| (.*)\|$", PIECES, re.M)


@pytest.mark.parametrize("pieces, needed", PIECES)
def test_pieces_run_alone(folders, pieces, needed):
    names, copied = (set(re.findall(r"`(\w+)`", cell)) for cell in (pieces, pieces + needed))
    if "sections 1 and 2" in needed:
        copied |= {"Translation", "fuse", "NORMS", "conv_block", "up_block"}
        copied |= {"ResidualBlock", "Encoder", "Decoder"}
    source, x = (ROOT / "aggan.py").read_text(encoding="utf-8"), torch.rand(2, 3, 32, 32) * 2 - 1
    parts = []
    for part in ast.parse(source).body:
        imported = isinstance(part, (ast.Import, ast.ImportFrom))
        constant = isinstance(part, ast.Assign) and getattr(part.targets[0], "id", "") in copied
        if imported or constant or getattr(part, "name", None) in copied:
            parts.append(part)
    alone = {"__name__": "copied"}
    exec(compile(ast.Module(parts, []), "copied", "exec"), alone)
    for name in names:
        piece, mask = alone[name], torch.rand(2, 1, 32, 32)
        if name == "fuse":
            assert piece(x, mask.expand(2, 2, 32, 32), x[:, None]).shape == x.shape
        elif "Generator" in name:
            guide = [ActivationDiscriminator(3, 4)] if name == "GuidedGenerator" else []
            t = piece(*guide, 4, 1)(x)
            assert t.image.shape == x.shape and t.foreground.shape == mask.shape
        elif "Discriminator" in name:
            d = piece(width=4)
            assert d(x, mask).shape == ((2, 1, 1, 1) if "Pooled" in name else (2, 1, 2, 2))
            assert not hasattr(d, "attention") or d.attention(x).shape == mask.shape
        elif name == "adversarial_loss":
            assert piece(mask, True).shape == ()
        elif name == "total_variation_loss":
            assert piece(mask).shape == ()
        elif name.endswith("loss"):
            assert piece(mask, mask).shape == ()
        elif name == "AdaptiveCurriculum":
            assert piece(100)(0).tolist() == pytest.approx([0.01, 0.01])
        elif name == "ImagePool":
            assert piece().query(x, mask)[0].shape == x.shape
        else:
            assert name == "UnpairedImages"
            (folders / "trainA" / "0.png").write_text("broken")
            data = piece(folders / "trainA", folders / "trainB", 32, 36)
            assert all(data[i][0].shape == (3, 32, 32) for i in range(5))
