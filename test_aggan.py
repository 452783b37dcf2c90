"""Tests of aggan.py, in its order: the method, the training, the program, the documents.

No network, no GPU, seeded. Run: pytest -q
"""

import ast
import contextlib
import dataclasses
import errno
import functools
import gc
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import nn

import aggan
from aggan import ActivationDiscriminator, AttentionGuidedDiscriminator, Config, CycleGANGenerator
from aggan import GatedGenerator, GuidedGenerator, ImagePool, MaskedDiscriminator
from aggan import PatchDiscriminator, PooledDiscriminator, ResidualAttentionDiscriminator
from aggan import SchemeOneGenerator, SchemeTwoGenerator, Translation

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXERCISES = (ROOT / "data" / "exercises.md").read_text(encoding="utf-8")
MOST_LINES = 2063  # of aggan.py
CPU = torch.device("cpu")
torch.set_num_threads(1)  # small networks; and processes that are compared round alike
inspect.getsource = functools.cache(inspect.getsource)  # each command line reads Config's
gc.freeze()  # PyTorch is no garbage: collections are short

# settings of a run of a second
TINY = dict(width=4, blocks=1, masks=3, size=32, resize=36, workers=0, device="cpu")
TINY |= dict(log_every=2, save_every=2)
BATCH = [x * 2 - 1 for x in torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    aggan.WARNED.clear()  # each line once


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
    if not hasattr(os, "fork"):
        pytest.skip("needs POSIX signals")
    fork, processes = multiprocessing.get_context("fork"), []

    def start(*arguments, function=aggan.main):
        process = fork.Process(target=function, args=([*map(str, arguments)],))
        processes.append(process)
        process.start()
        return process

    yield start
    for process in processes:  # none outlives a failure
        process.kill()


@pytest.fixture
def pair(started, tmp_path):
    """Starts the command line as both of torchrun's processes, each in a folder of its own."""

    def start(*arguments, places=("first", "second")):
        port = str(random.SystemRandom().randrange(20000, 32000))

        def become(rank, arguments):
            aggan.RANK, aggan.WORLD = rank, 2
            os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=port)
            os.environ |= dict(MASTER_ADDR="127.0.0.1", LOCAL_RANK="0")
            (tmp_path / places[rank]).mkdir(exist_ok=True)
            os.chdir(tmp_path / places[rank])
            aggan.main(arguments)

        both = [functools.partial(become, rank) for rank in (0, 1)]
        return [started(*arguments, function=function) for function in both]

    return start


def ended(processes):
    """Their exit statuses."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def tiny(folders=ROOT, **changes):
    """The configuration of a tiny run on these folders; they need not be there."""
    places = dict(a=str(folders / "trainA"), b=str(folders / "trainB"), out=str(folders / "run"))
    return aggan.configure(TINY | places | changes)


FINAL, MEJJATI = tiny(objective="final"), tiny(model="mejjati")


def options(folders, **changes):
    """The same as options of the command line."""
    places = dict(a=folders / "trainA", b=folders / "trainB", out=folders / "run")
    given = TINY | places | changes
    return [str(x) for name, value in given.items() for x in (aggan.flag(name), value)]


def refusal(arguments, capsys, status=2):
    """The one line that the command line prints before it exits with `status`."""
    with pytest.raises(SystemExit) as stopped:
        aggan.main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert stopped.value.code == status, error
    assert error.count("\n") == 1 and error.startswith("aggan.py"), error
    return error


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def spoilt(monkeypatch, place, name, spoil):
    """place.name, which calls spoil(*arguments) first."""
    function = getattr(place, name)

    def called(*arguments, **named):
        spoil(*arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(place, name, called)


def raising(error):
    """In place of a function: raises this."""

    def function(*_, **__):
        raise error

    return function


def weights(run):
    return aggan.load_checkpoint(run)["parts"]["nets"]


def pixels_of(path):
    return aggan.to_tensor(aggan.load_image(path))


# ---------- 0. The module ----------


def test_the_file(capsys, tmp_path, monkeypatch):
    """Air and width; a docstring that is true; pasted into a notebook cell, it does nothing."""
    monkeypatch.chdir(tmp_path)
    source, before = (ROOT / "aggan.py").read_text(encoding="utf-8"), torch.get_rng_state()
    for world, rank in ((1, 0), (2, 1)):  # a RANK without WORLD_SIZE is no torchrun's
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2" if world == 2 else "")
        names = {"__name__": "notebook"}  # without __file__
        exec(compile(source, "<cell>", "exec"), names)
        assert (names["WORLD"], names["RANK"]) == (world, rank)
        assert names["check"](names["Config"](a="a", b="b")) and not list(tmp_path.iterdir())
    assert torch.equal(before, torch.get_rng_state()) and capsys.readouterr() == ("", "")

    for name in re.findall(r"\w+Generator|(?<=`)\w+(?=`)", aggan.__doc__):
        assert hasattr(aggan, name) or name in ("g_ab", "g_ba"), name
    for model in aggan.PRESETS:
        assert f"\n  {model} " in aggan.__doc__
    for file in (ROOT / "aggan.py", ROOT / "test_aggan.py", *ROOT.glob("data/*.py")):
        assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 100, file
    lines = source.splitlines()
    air = sum(not line.strip() or line.lstrip().startswith("#") for line in lines)
    assert air >= 0.2 * len(lines) and len(lines) <= MOST_LINES


# ---------- 1. The fusion formula ----------


def test_fuse_is_the_naive_loop():
    """A background of 1 returns the input, to the bit; two masks are scheme I."""
    x, attention = torch.rand(2, 3, 5, 6) * 2 - 1, torch.randn(2, 4, 5, 6).softmax(1)
    content = torch.rand(2, 3, 3, 5, 6) * 2 - 1
    out = aggan.fuse(x, attention, content)
    assert out.shape == x.shape
    for b, c, h, w in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        pixel = attention[b, 3, h, w] * x[b, c, h, w]
        for f in range(3):
            pixel = pixel + attention[b, f, h, w] * content[b, f, c, h, w]
        assert out[b, c, h, w].item() == pytest.approx(pixel.item(), abs=1e-6)

    attention = torch.zeros_like(attention)
    attention[:, -1] = 1
    assert torch.equal(aggan.fuse(x, attention, content), x)
    with pytest.raises(ValueError, match="4 masks"):
        aggan.fuse(x, attention, content[:, :1])  # would broadcast

    a, content = torch.rand(2, 1, 5, 6), content[:, :1]
    scheme_one = a * content[:, 0] + (1 - a) * x
    torch.testing.assert_close(aggan.fuse(x, torch.cat([a, 1 - a], 1), content), scheme_one)


def test_carry():
    """Eq. (12): the change alone is resized; where there is none, x stays to the bit."""
    x, small = torch.rand(2, 3, 48, 64) * 2 - 1, torch.rand(2, 3, 12, 16) * 2 - 1
    assert torch.equal(aggan.carry(x, small, small), x)
    half = small.clone()
    half[..., :4] += 0.25  # the left quarter: 4 of 16 columns, 16 of 64
    y = aggan.carry(x, small, half)
    assert torch.equal(y[..., 24:], x[..., 24:])  # a bicubic step ends two small pixels further
    torch.testing.assert_close(y[..., :8], (x[..., :8] + 0.25).clamp(max=1))
    own = torch.rand(2, 3, 48, 64) * 2 - 1  # at x's own size
    torch.testing.assert_close(aggan.carry(x, x, own), own)
    tiny = aggan.carry(x[..., :3, :5], small, small - 0.5)  # smaller than the scale
    torch.testing.assert_close(tiny, (x[..., :3, :5] - 0.5).clamp(min=-1))
    checked = torch.zeros(1, 1, 64, 64)
    checked[..., ::2] = 1  # a change in columns: downwards it is averaged, not sampled
    assert aggan.carry(torch.zeros(1, 1, 16, 16), checked * 0, checked).std() < 0.02


# ---------- 2. Building blocks ----------


def leaves(net):
    return [m for m in net.modules() if not list(m.children())]


def kinds(net):
    return [type(m).__name__ for m in leaves(net)]


def test_blocks():
    """Norm and ReLU after each convolution but the last; reflection; a residual block adds."""
    x, layer = torch.randn(2, 3, 32, 48), ["Conv2d", "BatchNorm2d", "ReLU"]
    *blocks, residual = encoder = aggan.Encoder(8, 1, "batch")
    features = nn.Sequential(*blocks)(x)
    assert features.shape == (2, 32, 8, 12)  # 4 * width channels, a quarter of the size
    torch.testing.assert_close(encoder(x), features + residual.body(features))
    assert kinds(encoder) == 4 * layer + layer[:2]
    ups = dict(nearest=["Upsample", *layer], transposed=["ConvTranspose2d", *layer[1:]])
    for upsample, up in ups.items():
        decoder = aggan.Decoder(7, 8, "batch", upsample)
        assert decoder(features).shape == (2, 7, 32, 48) and kinds(decoder) == 2 * up + ["Conv2d"]
        for m in leaves(encoder) + leaves(decoder):  # stride 2, down or up: zeros
            if "Conv" in type(m).__name__:
                assert m.padding_mode == ("reflect" if m.stride == (1, 1) else "zeros")
    assert not list(SchemeTwoGenerator(4, 1).buffers())  # no running statistics
    nets = aggan.build(tiny(norm="batch", width=16))
    for kind, mean in ((nn.Conv2d, 0), (nn.BatchNorm2d, 1)):  # N(0, 0.02), N(1, 0.02)
        drawn = torch.cat([m.weight.flatten() for m in nets.modules() if isinstance(m, kind)])
        assert (drawn.mean() - mean).abs() < 0.005 and 0.018 < drawn.std() < 0.022


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_doubled_and_convolved_at_once_is_one_after_the_other(norm):
    block = aggan.up_block(6, 4, norm).double()
    assert [name for name, _ in block.named_parameters()][:2] == ["1.0.weight", "1.0.bias"]
    for height, width in ((4, 4), (5, 8), (1, 2)):
        x = torch.randn(3, 6, height, width, dtype=torch.float64, requires_grad=True)
        at_once, in_turn = block(x), nn.Sequential.forward(block, x)
        assert at_once.shape == (3, 4, 2 * height, 2 * width)
        torch.testing.assert_close(at_once, in_turn, rtol=0, atol=1e-12)
        weights, seen = torch.randn_like(at_once), (x, *block.parameters())
        gradients = [torch.autograd.grad((y * weights).sum(), seen) for y in (at_once, in_turn)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


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
    with pytest.raises(ValueError, match="multiples of 4"):
        make(8, 1)(x[..., :-1])
    if "Lin" not in name:  # which fuses nothing
        torch.testing.assert_close(t.image, aggan.fuse(x, t.attention, t.content))


def test_masks_and_contents_of_equations_2_and_3():
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    one, two, net = SchemeOneGenerator(4, 1), SchemeTwoGenerator(4, 1, 3), CycleGANGenerator(4, 1)
    s = one.decoder(one.encoder(x))
    sigmoid = 1 / (1 + (-s[:, :1]).exp())
    torch.testing.assert_close(one(x).attention, torch.cat([sigmoid, 1 - sigmoid], dim=1))
    torch.testing.assert_close(one(x).content[:, 0], s[:, 1:].tanh())

    features = two.encoder(x)
    powers = two.attention_decoder(features).exp()
    torch.testing.assert_close(two(x).attention, powers / powers.sum(1, keepdim=True))
    contents = two.content_decoder(features).tanh()  # of the first mask, of the second
    torch.testing.assert_close(two(x).content, torch.stack([contents[:, :3], contents[:, 3:]], 1))

    t = net(x)  # CycleGAN's repaints everything
    assert torch.equal(t.foreground, torch.ones(1, 1, 32, 32))
    assert torch.equal(t.image, t.content[:, 0])
    torch.testing.assert_close(t.image, net.decoder(net.encoder(x)).tanh())


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


def test_what_discriminators_see():
    """A patch logit 70 pixels; the attention-guided one mask and image; norms are the papers'."""
    x, net = torch.randn(1, 3, 128, 128, requires_grad=True), PatchDiscriminator(width=4)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.LeakyReLU))]
    nn.Sequential(*layers)(x)[0, 0, 7, 7].backward()  # without norms, which see the whole image
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    assert (rows.max() - rows.min() + 1).item() == 70

    image, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)
    d = AttentionGuidedDiscriminator(4)
    assert torch.equal(d(image, mask), d.judge(torch.cat([mask, image], dim=1)))
    assert not torch.equal(d(image, mask), d(image, 1 - mask))

    patch, pooled = (kinds(net(3, 4, "batch")) for net in (PatchDiscriminator, PooledDiscriminator))
    assert patch[:3] == ["Conv2d", "LeakyReLU", "Conv2d"] and patch.count("BatchNorm2d") == 3
    assert pooled[:3] == ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert pooled.count("BatchNorm2d") == 4
    assert {m.negative_slope for m in leaves(net) if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert pooled[-4:] == ["Conv2d", "LeakyReLU", "AdaptiveAvgPool2d", "Conv2d"]


# ---------- 5. Losses ----------


def test_adversarial_loss_least_squares():
    logits = torch.tensor([[0.5, 2.0]])
    assert aggan.adversarial_loss(logits, True).item() == pytest.approx(0.625)  # (0.25 + 1) / 2
    assert aggan.adversarial_loss(logits, False).item() == pytest.approx(2.125)  # (0.25 + 4) / 2
    for shape in ((2, 1, 1, 1), (2, 1, 5, 7)):  # nothing to broadcast
        assert aggan.adversarial_loss(torch.ones(shape), True).item() == 0
        assert aggan.adversarial_loss(torch.zeros(shape), True).item() == 1


def test_adversarial_loss_log_form():
    logits = torch.tensor([0.0, math.log(3)])  # D says 1/2 and 3/4
    real = -(math.log(1 / 2) + math.log(3 / 4)) / 2
    fake = -(math.log(1 - 1 / 2) + math.log(1 - 3 / 4)) / 2
    assert aggan.adversarial_loss(logits, True, "vanilla").item() == pytest.approx(real)
    assert aggan.adversarial_loss(logits, False, "vanilla").item() == pytest.approx(fake)
    with pytest.raises(ValueError, match="wgan"):
        aggan.adversarial_loss(logits, True, "wgan")


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


def test_objective_by_hand_at_two_values_of_r():
    x, y = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)

    def fixed(value, *rows):
        image = torch.full((1, 3, 2, 2), value)
        mask = torch.tensor(rows).view(1, 1, 2, 1).expand(1, 1, 2, 2)
        return Fixed(Translation(image, torch.cat([mask, 1 - mask], 1), image[:, None]))

    g, g_back = fixed(0.5, 0.25, 0.75), fixed(-0.2, 0.0, 0.0)
    discriminators = {"gan": Fixed(torch.zeros(1, 1)), "paired": Fixed(torch.full((1, 1), 3.0))}
    names = ("gan", "paired", "cycle", "pixel", "identity", "tv")
    config = Config(**{"l_" + name: weight for name, weight in zip(names, (2, 3, 10, 4, 5, 7))})

    def total(r, **changes):
        changed = dataclasses.replace(config, **changes)
        return aggan.generator_objective(g, g_back, discriminators, x, y, r, changed)[0].item()

    # cycle |-0.2 - 0|, pixel |0.5 - 0|, identity |0.5 - 1|
    keep = 10 * 0.2 + 4 * 0.5 + 5 * 0.5
    # gan (0 - 1)^2, paired (3 - 1)^2, tv |0.75 - 0.25| in two columns
    change = 2 * 1 + 3 * 4 + 7 * 1
    assert total(0.5) == pytest.approx(0.5 * keep + 0.5 * change)
    assert total(0.01) == pytest.approx(0.01 * keep + 0.99 * change)
    assert total(0.01, curriculum="none") == pytest.approx(keep + change)


def on_real(logits, kind):
    return ((logits - 1) ** 2).mean() if kind == "lsgan" else -logits.sigmoid().log().mean()


def on_fake(logits, kind):
    return (logits**2).mean() if kind == "lsgan" else -(1 - logits.sigmoid()).log().mean()


def direction(nets, name):
    """The first arguments of `generator_objective` for "ab" or "ba"."""
    x, y = BATCH if name == "ab" else BATCH[::-1]
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
        hand, own = 0.2 * keep + 0.8 * change, [*g.parameters(), *g_back.parameters()]
        torch.testing.assert_close(total, hand)
        gradients = (torch.autograd.grad(x, own) for x in (total, hand))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
        assert not any(term.requires_grad for term in losses.values())


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("kind", ["lsgan", "vanilla"])
def test_discriminator_objective_from_its_parts(kind, norm):
    config = dataclasses.replace(FINAL, gan=kind, norm=norm, l_copy=0.3, tau=0.5)
    d = aggan.build_discriminators(config)
    d["gan"].set_progress(1)  # it looks at the mask
    real, fake, other = ((torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)) for _ in "rfo")
    total, losses = aggan.discriminator_objective(d, real, fake, other, config)

    gan = (on_real(d["gan"](*real), kind) + on_fake(d["gan"](*fake), kind)) / 2
    # the fake's mask beside the real image too
    pair = on_real(d["paired"](real[0], fake[1]), kind) + on_fake(d["paired"](*fake), kind)
    untouched = on_fake(d["gan"](*other), kind) / 2
    copy = on_real(d["gan"](*other), kind)  # what a translation that copies would get
    expected = {"d_gan": gan, "d_paired": pair / 2, "d_copy": untouched, "copy": copy}
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, gan + pair / 2 + 0.3 * untouched)


def test_terms_of_weight_zero_are_not_computed():
    config = dataclasses.replace(FINAL, l_paired=0, l_cycle=0, l_pixel=0, l_tv=0)
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


def by_hand(steps, seen, highest=0.5, trust=0.35, lowest=0.05):
    """Eq. (11) of one direction with plain numbers: r of each step, of which (e, c, m) is seen."""
    e, c, m, rs = 1.0, 1.0, 1.0, []
    for step, (new_e, new_c, new_m) in enumerate(seen):
        r = highest * step / steps * min(1, (1 - e / c) / (1 - trust))
        rs.append(max(r, min(m * m, lowest, highest)))
        share = 1 / min(step + 1, max(1, 0.02 * steps))
        e, c, m = e + share * (new_e - e), c + share * (new_c - c), m + 0.1 * (new_m - m)
    return rs


def r_of(steps, *ways, **settings):
    """The same from the class, of both directions at once."""
    curriculum, rs = aggan.AdaptiveCurriculum(steps, **settings), []
    for step, seen in enumerate(zip(*ways)):
        rs.append(curriculum(step).tolist())
        curriculum.update(step, *torch.tensor(seen).T)
    return map(list, zip(*rs))


def test_adaptive_curriculum_is_the_loop_by_hand():
    """... in each direction for itself; the second one's masks are nearly empty."""
    random.seed(0)
    others = dict(highest=0.3, trust=0.6, lowest=0.01), dict(highest=0.02)
    for steps, settings in ((300, {}), *((40, other) for other in others)):
        limits = (0.2, 1.0), (0.8, 1.2), (0.3, 1.0)  # of e, c, m
        ab = [[random.uniform(*limit) for limit in limits] for _ in range(steps)]
        ba = [[1.2 - e, c, m / 30] for e, c, m in ab]
        for rs, seen in zip(r_of(steps, ab, ba, **settings), (ab, ba)):
            assert rs == pytest.approx(by_hand(steps, seen, **settings), rel=1e-4, abs=1e-6)


def test_r_rises_while_translations_fool_the_discriminator():
    """... as the ramp does; it falls where they do not. A copy with large masks: 0.05."""
    fooled, seen_through = [(0.3, 1.0, 0.0)] * 500, [(1.0, 1.0, 0.0)] * 500
    rs, copies = r_of(1500, fooled + seen_through + fooled, [(1.0, 1.0, 0.9)] * 1500)
    assert rs[500] == pytest.approx(0.5 / 3, rel=1e-3)  # the ramp at a third of the run
    assert rs[50:500] == sorted(rs[50:500]) and rs[510] < rs[500] and rs[600] < 0.06
    assert rs[1000] < 1e-3 and rs[-1] == pytest.approx(0.5, rel=1e-3)  # and it comes back
    assert copies == pytest.approx([0.05] * 1500)


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

    images, masks = torch.rand(3, 3, 2, 2, requires_grad=True), torch.rand(3, 1, 2, 2)
    out = ImagePool(0).query(images, masks)  # returns what came in
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


@pytest.mark.parametrize("name, kind", aggan.GUIDES.items())
def test_guided_generator(name, kind):
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

    nets = aggan.build(tiny(model="guided", attention_map=name))
    assert type(nets["d_a"]["gan"]) is kind
    for g, d in (("g_ab", "d_a"), ("g_ba", "d_b")):  # that of the domain it translates from
        assert nets[g].guide.__self__ is nets[d]["gan"]


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


# ---------- 8. Configuration ----------


def test_presets_are_the_papers():
    own = dict(a="x", b="y")
    final = dict(l_gan=0.5, l_paired=0.5, l_cycle=10, l_pixel=1, l_identity=0, l_tv=1e-6, lr=1e-4)
    without = dict(final, l_gan=1, l_paired=0, r_low=0.05)
    released = dict(l_gan=1, l_paired=0, l_cycle=10, l_pixel=0, l_identity=5, l_tv=0, lr=2e-4)
    final["r_low"] = released["r_low"] = 0.01
    adaptive = dict(curriculum="adaptive", l_copy=1, r=0.5)
    plain = dict(released, curriculum="none", l_copy=0, tau=0)
    mejjati = dict(released, l_identity=0, lr=1e-4, tau=0.1, switch=0.3, r=0.8, l_copy=1)
    papers = dict(size=256, resize=286, width=64, blocks=9, masks=10, pool=50, gan="lsgan")
    papers |= dict(batch_size=1, epochs=200, steps=0, out="runs/scheme2")
    for given, expected in (
        (dict(model="scheme1"), without | adaptive),
        (dict(model="scheme2"), without | adaptive | papers),
        (dict(model="scheme1", objective="final"), final | adaptive),
        (dict(model="scheme2", objective="released"), released | adaptive),
        (dict(model="cyclegan"), plain),
        (dict(model="guided"), dict(plain, l_identity=0)),
        (dict(model="mejjati"), mejjati),
        (dict(model="mejjati", objective="final"), dict(l_paired=0.5, l_pixel=1, tau=0.1)),
        (dict(model="scheme1", l_tv=3.0), dict(l_tv=3)),  # what is asked for wins
    ):
        assert expected.items() <= vars(aggan.configure(given | own)).items(), given
    config = aggan.configure({})  # the small settings, of the drawings
    assert not config.a and (config.size, config.steps, config.l_tv) == (64, 2000, 1e-4)
    assert config.out == "runs/mini-scheme2" and aggan.configure({"epochs": 2}).steps == 0
    assert (config.objective, config.l_gan, config.l_paired, config.shift) == ("final", 0.5, 0.5, 0)
    assert config.r_low == 0.01
    assert aggan.build(tiny(model="mejjati", tau=0.0))["g_ab"].switch == 1  # never frozen
    small = aggan.configure(dict(own, objective="released", width=4), small=True)
    assert (small.size, small.lr, small.width, small.out) == (64, 4e-4, 4, "runs/scheme2")
    assert (small.shift, small.l_tv) == (0.5, 0)  # an objective without L_tv
    twice = aggan.configure(dict(own, size=128, resize=144), small=True)
    assert twice.l_tv == 1e-4 / 8  # a sum over pixels: with 1e-4 masks go to 1


# ---------- 9. The training step ----------


def test_the_step_puts_the_parts_together():
    """Its figures are those of the objectives, called by hand on the same networks and images."""
    config = dataclasses.replace(FINAL, pool=0, shift=0, lr=0.0, r=0.4, tau=2 / 3)  # nets stay
    trainer = aggan.Trainer(config, 10, CPU)
    trainer.done, nets, curriculum = 8, trainer.nets, trainer.curriculum  # D has begun to mask
    assert (curriculum.highest, curriculum.lowest, *curriculum.m) == (0.4, 0.01, 1, 1)
    for name in ("d_a", "d_b"):  # larger weights, verdicts to be told apart
        nets[name].load_state_dict(aggan.build_discriminators(config).state_dict())
    curriculum.e.copy_(torch.tensor([0.4, 0.7]))  # B -> A is nearer to a copy
    r = curriculum(8)
    figures = trainer.step(*BATCH)
    with torch.no_grad():
        _, ab, to_b = aggan.generator_objective(*direction(nets, "ab"), r[0], config)
        _, ba, to_a = aggan.generator_objective(*direction(nets, "ba"), r[1], config)
        mask_a, mask_b = to_b.foreground, to_a.foreground  # of the images that were translated
        own_a, own_b = (BATCH[0], mask_a), (BATCH[1], mask_b)
        fake_a, fake_b = (to_a.image, mask_b), (to_b.image, mask_a)
        _, a = aggan.discriminator_objective(nets["d_a"], own_a, fake_a, own_b, config)
        _, b = aggan.discriminator_objective(nets["d_b"], own_b, fake_b, own_a, config)
    expected = {k: ab[k] + ba[k] for k in ab} | {k: a[k] + b[k] for k in a}
    expected |= {"attention_ab": mask_a.mean(), "attention_ba": mask_b.mean()}
    torch.testing.assert_close(figures, expected | {"r_ab": r[0], "r_ba": r[1]})
    assert trainer.done == 9 and 0.1 < (mask_a >= 2 / 3).float().mean() < 0.9
    # e and c: of 10 steps 2 % are less than one, no running mean yet; a copy of an A is no B
    torch.testing.assert_close(curriculum.e, torch.stack([ab["gan"], ba["gan"]]))
    torch.testing.assert_close(curriculum.c, torch.stack([b["copy"], a["copy"]]))
    m = torch.stack([mask_a.mean(), mask_b.mean()])
    torch.testing.assert_close(curriculum.m, 0.9 + 0.1 * m)
    rates = [aggan.learning_rate(FINAL, progress) for progress in (0, 0.5, 0.75, 1)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 0])

    for model, l_gan in (("scheme1", 0.5), ("mejjati", 0.5), ("guided", 0.5), ("scheme2", 0.0)):
        config = tiny(model=model, objective="final", l_gan=l_gan, l_identity=1.0)
        figures = aggan.Trainer(config, 2, CPU).step(*BATCH)  # every term works with every mask
        assert {"paired", "cycle", "pixel", "identity", "tv", "d_paired"} <= set(figures)
        assert ("gan" in figures) == ("d_gan" in figures) == bool(config.l_gan)
        assert all(v.isfinite() for v in figures.values())


def test_the_step_uses_the_pools():
    """Discriminators see the pool's fake and its mask; and the rate of each step is set."""
    trainer, seen = aggan.Trainer(FINAL, 3, CPU), []
    for pool in (trainer.pool_a, trainer.pool_b):  # full of zeros, to be told from new fakes
        pool.items = [(torch.zeros(3, 32, 32), torch.zeros(1, 32, 32))] * 50
    for name in ("d_a", "d_b"):
        d = trainer.nets[name]["paired"]
        d.register_forward_hook(lambda _, inputs, __: seen.extend(zip(*inputs)))
    for _ in range(3):
        trainer.step(*BATCH)
    empty = [(not image.any(), not mask.any()) for image, mask in seen]
    assert len(seen) == 36  # beside a real image, too, is the fake's mask, an old one's perhaps
    assert set(empty) == {(True, True), (False, False), (False, True)}
    for optimizer in (trainer.opt_g, trainer.opt_d):  # after two of three steps
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 2 / 3)
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.999)


def test_discriminators_see_everything_moved_alike():
    """By hand, then in a step: whatever D judges is moved by one shift, another one each step.

    Of a side of 32 first by up to 4, an eighth, from epoch 150 on by up to 16, a half.
    """
    row = torch.tensor([[[[1.0, 2, 3, 4]]]])
    for by, expected in {0: "1234", 1: "2123", 3: "4321", -1: "2343"}.items():
        across, down = aggan.moved(row, (0, by)), aggan.moved(row.mT, torch.tensor([by, 0]))
        assert across.flatten().tolist() == down.flatten().tolist() == list(map(int, expected))

    trainer, seen, shifts = aggan.Trainer(dataclasses.replace(FINAL, pool=0), 999, CPU), [], []
    trainer.per_epoch = 3
    trainer.nets["d_b"]["paired"].register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    for epoch, most in 2 * [(0, 4), (50, 8), (100, 12), (150, 16), (300, 16)]:
        trainer.done = 3 * epoch
        fake_b, mask = trainer.nets["g_ab"](BATCH[0])[0], trainer.nets["g_ab"](BATCH[0]).foreground
        trainer.step(*BATCH)
        asked, real, fake = seen[-3:]  # by G, then by D
        far = range(-most, most + 1)
        shift = [s for s in itertools.product(far, far) if aggan.moved(mask, s).equal(asked[1])]
        shifts += shift
        assert len(shift) == 1 and asked[0].equal(aggan.moved(fake_b, shift[0]))
        for pair, image in ((real, BATCH[1]), (fake, fake_b)):
            assert pair[0].equal(aggan.moved(image, shift[0])) and pair[1].equal(asked[1])
    assert len(set(shifts)) > 4 and max(abs(by) for s in shifts for by in s) > 12


def test_each_update_leaves_the_other_networks_alone():
    trainer = aggan.Trainer(FINAL, 10, CPU)
    g, d, r = trainer.g_parameters, trainer.d_parameters, torch.tensor([0.1, 0.6])
    assert len(g) + len(d) == len(list(trainer.nets.parameters()))
    fake_a, fake_b, mask_a, mask_b, _, _ = trainer.generator_gradients(*BATCH, r)
    assert all(p.grad is None for p in d) and all(p.grad is not None for p in g)
    first, before = [p.grad.clone() for p in g], [p.clone() for p in d]
    ways = zip(("ab", "ba"), r)  # by hand
    losses = [aggan.generator_objective(*direction(trainer.nets, w), x, FINAL)[0] for w, x in ways]
    torch.testing.assert_close(first, [*torch.autograd.grad(sum(losses), g)], rtol=1e-3, atol=1e-5)
    trainer.generator_gradients(*BATCH, r)  # not added to those before
    assert all(map(torch.equal, first, (p.grad for p in g)))
    trainer.update(trainer.opt_g, g)
    assert all(map(torch.equal, before, d))
    before, first = [p.clone() for p in g], [p.grad.clone() for p in g]
    own, fakes = (BATCH[0], mask_a, BATCH[1], mask_b), (fake_a, mask_b, fake_b, mask_a)
    trainer.discriminator_gradients(*own, *fakes)
    trainer.update(trainer.opt_d, d)
    assert all(p.grad is not None for p in d)
    assert all(map(torch.equal, before, g)) and all(map(torch.equal, first, (p.grad for p in g)))


@pytest.mark.parametrize("model", aggan.PRESETS)
@pytest.mark.parametrize("precision, tolerance, wide", [("bf16", 0.05, 0.4), ("fp16", 0.01, 0.2)])
def test_reduced_precision_is_near_float32(model, precision, tolerance, wide):
    """Masks, images, logits and losses are float32, convolutions are not.

    Loss terms within 5 % (bf16) or 1 % (fp16), the generators' gradients within 40 % or 20 % (an L1
    loss has the sign of a difference).
    """
    results, types, outputs = [], [], []
    for kind in ("fp32", precision):
        trainer = aggan.Trainer(tiny(model=model, precision=kind), 10, CPU)
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
    leaves = torch.utils._pytree.tree_leaves([[*map(tuple, outputs)], reduced])
    assert {x.dtype for x in leaves} == {torch.float32}
    for name, value in terms.items():
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


class Replay:
    """Stands for a CUDA graph on the CPU: calls the function again, on the recording's tensors.

    Outputs and gradients are left in the memory of the recording.
    """

    def __init__(self, nets, recorded, fail):
        self.nets, self.recorded, self.fail = nets, recorded, fail

    @contextlib.contextmanager
    def recording(self):
        before = [x.clone() for x in self.nets.buffers()]
        yield
        for x, old in zip(self.nets.buffers(), before):
            x.copy_(old)  # CUDA would only have recorded
        self.parameters = [p for p in self.nets.parameters() if p.grad is not None]
        if self.fail:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    def replay(self):
        gradients, leaves = [p.grad for p in self.parameters], torch.utils._pytree.tree_leaves
        new = self.recorded.function(*self.recorded.inputs)
        for old, p in zip(gradients, self.parameters):
            old.copy_(p.grad)
            p.grad = old
        for old, tensor in zip(leaves(self.recorded.outputs), leaves(new), strict=True):
            old.copy_(tensor)


def recorded_trainer(config, monkeypatch, fail=False):
    """A trainer on the CPU whose gradients are recorded by the code for CUDA."""
    trainer, now = aggan.Trainer(config, 20, CPU), []
    spoilt(monkeypatch, aggan.Recorded, "record", lambda recorded, _: now.append(recorded))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Replay(trainer.nets, now[-1], fail))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.recording())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    both = trainer.generator_gradients, trainer.discriminator_gradients
    trainer.recorded = [aggan.Recorded(function) for function in both]
    trainer.generator_gradients, trainer.discriminator_gradients = trainer.recorded
    return trainer


def figures_after(trainer, count):
    """Random batches, the same at each call, and the figures of their steps."""
    torch.manual_seed(1)
    numbers = torch.Generator().manual_seed(2)
    batches = (torch.rand(2, 2, 3, 32, 32, generator=numbers) * 2 - 1 for _ in range(count))
    figures = [trainer.step(*batch.to(trainer.device)) for batch in batches]
    return [{k: v.item() for k, v in step.items()} for step in figures]  # read at the end


@pytest.mark.parametrize("how", ["", "Mejjati's switch", "fails"])
def test_a_graph_steps_as_without(monkeypatch, capsys, how):
    """It is recorded anew at the switch; without one where recording fails."""
    config = dataclasses.replace(MEJJATI if "switch" in how else FINAL, pool=3, norm="batch")
    plain = aggan.Trainer(config, 20, CPU)
    recorded = recorded_trainer(config, monkeypatch, fail=how == "fails")
    good = how != "fails"
    count = 12 if good else 6  # the switch is at the seventh step
    assert figures_after(plain, count) == figures_after(recorded, count)
    assert same(plain.nets.state_dict(), recorded.nets.state_dict())
    assert all((g.graph is not None) == good for g in recorded.recorded)
    assert ("no CUDA graph, going on without: " in capsys.readouterr().err) != good


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

    def trainer(capability, **given):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        return aggan.Trainer(tiny(**given, graph=False), 20, torch.device("cuda"))

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(nn.Module, "to", place_module)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        yield trainer


ON_H100 = [(model, (9, 0), torch.bfloat16) for model in aggan.PRESETS]
ON_T4 = [("scheme2", (7, 5), torch.float16)]


@pytest.mark.parametrize("model, capability, dtype", ON_H100 + ON_T4)
def test_nothing_leaves_the_device(pretended_cuda, model, capability, dtype):
    """Steps, before and after Mejjati's switch, checkpoint and resume; losses are float32."""
    trainer, resumed = (pretended_cuda(capability, model=model) for _ in range(2))
    assert trainer.dtype == dtype and trainer.scaler.is_enabled() == (dtype == torch.float16)
    trainer.scaler.state_dict = lambda: {}  # of numbers
    on_cpu = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor, torch.Tensor.cpu)
    for at, done in ((trainer, 0), (trainer, 6), (resumed, 7)):
        if at is resumed:
            resumed.load_state_dict(on_cpu(trainer.state_dict()))
        at.done, batch = done, torch.rand(2, 1, 3, 32, 32) * 2 - 1
        assert {value.device.type for value in at.step(*batch).values()} == {"cuda"}
        for terms in at.generator_gradients(*batch.cuda(), torch.ones(2, device="cuda"))[4:]:
            assert {term.dtype for term in terms.values()} == {torch.float32}, terms


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision, first, last", [("fp32", 1e-3, 0.05), ("bf16", 0.05, 0.1)])
@pytest.mark.parametrize("model", aggan.PRESETS)
def test_cuda(folders, monkeypatch, model, precision, first, last):
    """Graphs against eager steps: figures within `first`, means of ten later within `last`."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    given = dict(device="cuda", model=model, precision=precision, pool=3, width=8, steps=14)
    trainers = [
        aggan.Trainer(tiny(folders, **given, graph=graph), 20, aggan.pick_device("cuda"))
        for graph in (False, True)
    ]
    eager, fast = (figures_after(trainer, 20) for trainer in trainers)
    assert all(graph.graph is not None for graph in trainers[1].recorded)
    for k in eager[0]:
        assert fast[0][k] == pytest.approx(eager[0][k], rel=first, abs=1e-4), k
        means = [sum(figures[k] for figures in run[10:]) / 10 for run in (eager, fast)]
        assert means[1] == pytest.approx(means[0], rel=last, abs=1e-2), k
    run = aggan.train(tiny(folders, **given))
    aggan.train(tiny(folders, **given | dict(steps=16)), resume=True)
    assert all(weight.isfinite().all() for weight in weights(run).values())


# ---------- 10. The run ----------


def columns(run):
    """Of log.csv, all but the speed."""
    rows = [row.split(",") for row in (run / "log.csv").read_text().splitlines()]
    return [row[:2] + row[3:] for row in rows]


def figures_of(run, name):
    header, *rows = [row.split(",") for row in (run / "log.csv").read_text().splitlines()]
    return [float(row[header.index(name)]) for row in rows]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_bring_what_the_data_hold(threads):
    """Batches in order, a few ahead; an exception as itself, in its turn; and an end to it."""
    started, left = [], threading.active_count()

    class Data:
        def __getitem__(self, i):
            started.append(i)
            time.sleep(0.001 * (i % 4))  # later ones may be faster
            if i == 30:
                raise KeyError("not a string")
            return torch.full((3, 2, 2), i), torch.full((3, 2, 2), -i)

    loading = aggan.batches(Data(), iter([1, 4, *range(5, 100)]), 2, threads, pin=False)
    first = [next(loading) for _ in range(3)]
    assert [a[:, 0, 0, 0].tolist() for a, _ in first] == [[2, 3], [8, 9], [10, 11]]
    assert all(torch.equal(a, -b) and a.shape == (2, 3, 2, 2) for a, b in first)
    time.sleep(0.05)
    assert len(started) <= 2 * (4 + 2 * threads)  # no further ahead
    with pytest.raises(KeyError, match="not a string"):  # of turn 15
        assert len([next(loading) for _ in range(20)]) == 9
    loading = aggan.batches(Data(), range(9), 1, threads, pin=False)
    next(loading)
    loading.close()
    assert threading.active_count() <= left and not list(aggan.batches([], [], 2, 2, False))


@pytest.mark.parametrize("changes", [{}, dict(gan="vanilla", batch_size=2, head="pooled", pool=0)])
def test_train_leaves_a_run_folder(folders, capsys, changes):
    """Checkpoint, log of means, grids; and says what it does, in lines for a pipe."""
    config = tiny(folders, steps=3, size=64, resize=64, curriculum="ramp", **changes)
    run = aggan.train(config)
    said, batch = capsys.readouterr().out.splitlines(), config.batch_size
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.csv", "samples"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["0000002.png", "0000003.png"]
    assert said[0] == "scheme2: 64 px, width 4, 1 blocks; on 1 x cpu, float32"
    assert said[1] == f"5 images of A, 3 of B; 3 steps, {3 / (5 // batch):.3g} epochs"
    assert [line.split()[:2] for line in said[2:]] == [["step", f"{i}/3"] for i in (1, 2, 3)]
    pattern = r"step 3/3  [\d.e+]+ (steps/s|s a step)  0:00:00 left  attention \d\.\d{3} \d\.\d{3}"
    assert re.fullmatch(pattern + r"  r \d\.\d\d \d\.\d\d", said[-1])

    # rates of steps 2 and 3; means of steps 1 and 2, and of step 3
    rates = [aggan.learning_rate(config, step / 3) for step in (1, 2)]
    assert figures_of(run, "rate") == pytest.approx(rates, rel=1e-4)
    assert figures_of(run, "r_ab") == pytest.approx([(0.01 + 0.5 / 3) / 2, 1 / 3], rel=1e-4)
    trainer = aggan.Trainer(config, 3, CPU)
    data = aggan.UnpairedImages(config.a, config.b, 64, 64, config.seed)
    loading = aggan.batches(data, range(2), batch, 1, pin=False)
    cycle = [trainer.step(*images)["cycle"].item() for images in loading]
    assert figures_of(run, "cycle")[0] == pytest.approx(sum(cycle) / 2, rel=1e-4)

    # the grid's first row, of B -> A: a test image, its mask, its mean content, its translation
    grid = pixels_of(run / "samples" / "0000003.png")
    x, *shown = (grid[:, 2:66, 66 * k + 2 : 66 * k + 66] for k in (4, 5, 6, 7))
    assert grid.shape == (3, 4 * 66 + 2, 8 * 66 + 2)
    tests = aggan.UnpairedImages(folders / "testA", folders / "testB", 64, 64, config.seed)
    t = aggan.load_generators(run, CPU)[0]["g_ba"](x[None])
    content = (t.attention[0, :-1, None] * t.content[0]).sum(0) / t.foreground[0]
    drawn = tests[0][1], 2 * t.foreground[0] - 1, content, t.image[0]
    for panel, expected in zip((x, *shown), drawn):
        assert (panel - expected).abs().max() < 0.03  # after rounding to 8 bits


def test_progress_is_shown(folders, monkeypatch, capsys):
    """A line at steps 1 and 10 and each row of the log; in a terminal one line, kept in place."""
    now = [100.0]
    monkeypatch.setattr(aggan.time, "monotonic", lambda: now[0])

    def shown(steps, total, done=0, device="cpu", **changes):
        """Of steps without training, which take so many seconds."""
        trainer = aggan.Trainer(tiny(folders, **changes), total, CPU)
        trainer.counts, trainer.per_epoch, trainer.done = {"a": 5, "b": 3}, 5, done
        trainer.device = torch.device(device)
        masks = {"attention_ab": torch.tensor(0.3), "attention_ba": torch.tensor(0.4)}
        report = aggan.Report(trainer)
        for seconds in steps:
            now[0] += seconds
            trainer.done += 1
            report.after_step(masks)
        return capsys.readouterr().out

    said = shown([0.25] * 40, 40, log_every=15).splitlines()
    assert [line.split()[1] for line in said] == [f"{i}/40" for i in (1, 10, 15, 30, 40)]
    assert said[1] == "step 10/40  4 steps/s  0:00:08 left  attention 0.300 0.400"
    steps = 5, *[0.5] * 9, *[0.1] * 40  # a GPU's first ones are slow
    said = shown(steps, 1000, device="cuda", log_every=50).splitlines()
    said = [line.split("  ")[:3] for line in said]
    assert [line[1] for line in said] == ["5 s a step", "2 steps/s", "10 steps/s"]
    assert [line[2] for line in said] == ["attention 0.300 0.400"] * 2 + ["0:01:35 left"]
    said = shown([2], 2_000_000, done=1_234_566, log_every=1).splitlines()
    assert "2 s a step  17 days, 17:14:26 left" in said[0]
    assert len(said) == 2 and "--small" in said[1]
    row = (folders / "run" / "log.csv").read_text().splitlines()[-1].split(",")
    assert row[:2] == ["1234567", "246914"]  # integers are integers

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")  # a wrapped line could not be written over
    lines = [line.split("\r") for line in shown([0.5] * 20, 40, log_every=20).split("\n")]
    steps = [[part.split()[1][:-3] for part in line if part] for line in lines]
    assert steps == [["1"], ["3", "5", "7", "9", "10"], ["12", "14", "16", "18", "20"], []]
    assert {len(part) for line in lines for part in line} == {0, 59}  # over the one before


def test_what_masks_do_wrong_is_said_once(folders, capsys):
    """From e and c of Eq. (11) and the pool's masks; a small object, here 2 %, is nothing wrong."""
    spots = torch.zeros(30, 1, 32, 32)
    for i, spot in enumerate(spots):
        spot[0, i, 3 * i % 30 : 3 * i % 30 + 20] = 1  # 20 of 1024 pixels, each elsewhere
    band = torch.zeros(30, 1, 32, 32)
    band[:, :, :8] = 1
    cases = {  # words of the warning: masks, their mean, e, c
        "": (spots, 0.02, 0.4, 0.95),
        "much the same for all images": (band, 0.25, 0.4, 0.95),
        "copies its input": (spots, 0.02, 0.93, 0.95),
        "repaints everything": (spots, 0.98, 0.4, 0.95),
        "hardly tells A from B": (spots, 0.3, 0.25, 0.3),
        "hardly tells A from B, nor": (spots, 0.02, 0.48, 0.49),  # so it copies
    }
    for words, (masks, mean, e, c) in cases.items():
        trainer = aggan.Trainer(tiny(folders), 1000, CPU)
        trainer.counts, trainer.done = {"a": 5, "b": 3}, 240
        trainer.curriculum.e.fill_(e)
        trainer.curriculum.c.fill_(c)
        trainer.pool_a.items = trainer.pool_b.items = [(mask, mask) for mask in masks]
        report = aggan.Report(trainer)
        for _ in range(20):  # silent before a quarter of the run
            trainer.done += 1
            figures = {"copy": c, "attention_ab": mean, "attention_ba": mean}
            report.log(figures, 1.0)
            error = capsys.readouterr().err
            assert error.count("\n") == (2 if words and trainer.done == 250 else 0), error
            assert all(f"g_{way}" in error and words in error for way in ("ab", "ba")) or not error
        aggan.WARNED.clear()


def test_tensorboard(folders, monkeypatch, capsys):
    """A curve for each figure; what a killed run wrote after its checkpoint is hidden."""
    opened = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.Mock(SummaryWriter=opened))
    for length in (5, 6):
        run = aggan.train(tiny(folders, steps=length, tensorboard=True), resume=True)
        assert opened.return_value.close.call_count == opened.call_count
    assert [call.kwargs["purge_step"] for call in opened.call_args_list] == [1, 6]
    capsys.readouterr()
    written = [call.args for call in opened.return_value.add_scalar.call_args_list]
    for name in ("gan", "d_gan", "attention_ab", "r_ba"):
        shown = [value for tag, value, _ in written if tag == name]
        assert shown == pytest.approx(figures_of(run, name), rel=1e-4)
    assert not {"step", "epoch"} & {tag for tag, _, _ in written}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    new = ["train", *options(folders, out=folders / "new"), "--tensorboard"]
    assert "pip install tensorboard" in refusal(new, capsys) and not (folders / "new").exists()


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def interrupt(patch, what):
    """From the seventh step on, something is wrong."""
    late = []

    def before(trainer, *_):
        late.extend([True] if trainer.done == 6 else [])
        if late and what == "kill":
            raise KeyboardInterrupt
        if late and what == "gan is not finite":
            trainer.nets["g_ba"].content_decoder[-1].bias.data[0] = math.nan
        if late and "running_var" in what:  # which no loss shows
            trainer.nets["g_ba"].encoder[0][1].running_var[0] = math.inf

    spoilt(patch, aggan.Trainer, "step", before)
    for place, name, error in ((torch, "save", NO_SPACE), (aggan, "panels", NO_MEMORY)):
        if what in str(error):
            spoilt(patch, place, name, lambda *_, e=error: raising(e)() if late else None)


INTERRUPTIONS = [  # what happens, exit status, steps saved, settings
    ("kill", 130, 4, dict(workers=3)),
    ("kill", 130, 0, dict(norm="batch", save_every=99)),
    ("kill", 130, 4, dict(norm="batch", model="mejjati")),
    ("gan is not finite", 1, 4, {}),
    ("g_ba.encoder.0.1.running_var is not finite", 1, 4, dict(norm="batch")),
    ("No space left", 2, 4, {}),
    ("out of memory", 2, 11, dict(norm="batch")),  # of the grid: a warning, at last an error
]


@pytest.mark.parametrize("what, status, saved, changes", INTERRUPTIONS)
def test_resume_equals_a_whole_run(folders, monkeypatch, capsys, what, status, saved, changes):
    """... to the bit, whatever it was: a kill, an overflow, a full disk, no memory for the grid."""
    changes = dict(steps=11, pool=2, save_every=4) | changes
    whole = aggan.train(tiny(folders, **changes))
    out, file = folders / "stopped", folders / "stopped" / "checkpoint.pt"
    given = ["train", *options(folders, **changes, out=out)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(status)):
        interrupt(patch, what)
        aggan.main(given)
    error = capsys.readouterr().err
    assert what in error or what == "kill"
    if what == "No space left":  # in the middle a warning, tried again; the last time an error
        assert re.search("warning: .*checkpoint.pt: .*; tried again in 4 steps\naggan.py: ", error)
    assert (aggan.load_checkpoint(out)["step"] if file.exists() else 0) == saved
    assert not list(out.rglob(".*"))
    assert not list(out.glob("samples/*8.png"))  # the grid comes after the checkpoint

    aggan.main([*given, "--resume"])
    first, second = (aggan.load_checkpoint(run) for run in (whole, out))
    assert first["parts"]["opt_g"]["state"] and first["parts"]["opt_d"]["state"]
    for name in ("parts", "pools", "random"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert columns(whole) == columns(out)
    assert [row[0] for row in columns(whole)] == ["step", "2", "4", "6", "8", "10", "11"]


def test_a_run_goes_on_further_and_elsewhere(folders, capsys):
    """From then on it is the longer run. Folders, length, rate and machine may be typed anew."""
    out, there = folders / "run", folders / "else"
    aggan.main(["train", *options(folders, steps=4)])
    again = ["train", "--out", str(out), "--resume", "--device", "cpu", "--resize", "36"]
    for more, total in ((["--steps", "8", "--small"], 8), (["--epochs", "2"], 10)):
        aggan.main([*again, *more])  # what --small brings was not typed
        assert f"step {total}/{total}" in capsys.readouterr().out
        rate = aggan.learning_rate(aggan.load_checkpoint(out)["config"], (total - 1) / total)
        assert figures_of(out, "rate")[-1] == pytest.approx(rate, rel=1e-4)
    assert figures_of(out, "step") == [2, 4, 6, 8, 10]
    assert "6 steps, of which 10 are done" in refusal([*again, "--steps", 6], capsys)
    assert "5 steps, of which 10 are done" in refusal([*again, "--epochs", 1], capsys)
    for option, value in (("--width", 8), ("--seed", 1), ("--l-tv", 0.5), ("--norm", "batch")):
        error = refusal([*again, option, value], capsys)
        assert re.search(rf"{option} \S+ \(there \S+\): another run than .*{out}", error)
    (folders / "trainA" / "0.png").unlink()  # the run keeps its length
    aggan.main([*again, "--epochs", "2"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "{'a': 5, 'b': 3} images" in error and "'a': 4" in error

    there.mkdir()
    for name in ("trainA", "trainB", "run"):
        (folders / name).rename(there / name)
    moved = dict(a=there / "trainA", b=there / "trainB", lr=1e-3, workers=2, steps=12, log_every=1)
    moved |= dict(save_every=5, precision="fp32", out=there / "run")
    places = [str(x) for name, value in moved.items() for x in (aggan.flag(name), value)]
    aggan.main([*again, *places, "--no-graph"])
    config = aggan.load_checkpoint(there / "run")["config"]
    assert all(str(getattr(config, name)) == str(value) for name, value in moved.items())
    assert not config.graph and config.width == TINY["width"]
    capsys.readouterr()

    new = ["train", *options(there, steps=1, out=folders / "new"), "--init", there / "run"]
    for other, words in (  # a run that starts from another
        (["--width", 8], "size mismatch for g_ab.encoder.0.0.weight"),
        (["--objective", "final"], r"Missing key.*d_a.paired"),
        (["--init", folders], "no checkpoint.pt here"),
    ):
        assert re.search(words, refusal([*new, *other], capsys)) and not (folders / "new").exists()
    aggan.main([*map(str, new), "--lr", "0"])
    assert same(weights(there / "run"), weights(folders / "new"))


def test_a_run_goes_on_without_a_screen(folders, monkeypatch):
    """... in a thread, from ~, with an empty test folder, and a log that another program holds."""
    log = folders / "here" / "log.csv"
    log.mkdir(parents=True)  # as little to be written
    monkeypatch.setattr("builtins.print", raising(BrokenPipeError()))
    monkeypatch.setenv("HOME", str(folders))
    (folders / "trainA" / "0.png").write_text("not a picture")
    for path in (folders / "testA").iterdir():
        path.unlink()
    (folders / "testA" / ".gitkeep").touch()
    spoilt(monkeypatch, aggan.Trainer, "step", lambda t, *_: log.rmdir() if t.done == 5 else None)
    given = ["train", *options(folders, steps=8, a="~/trainA", out="~/here"), "--resume"]
    thread = threading.Thread(target=aggan.main, args=(given,))
    thread.start()
    thread.join()
    assert figures_of(folders / "here", "step") == [2, 4, 6, 8]
    state = aggan.load_checkpoint(folders / "here")
    assert state["step"] == 8 and state["config"].a == str(folders / "trainA")


def test_kills_lose_only_the_steps_since_the_last_checkpoint(folders, started):
    """A run of five SIGKILLs, at any moment, ends as one that was never stopped."""
    changes = dict(steps=45, save_every=3, pool=2, model="scheme1", blocks=0, l_paired=0.0)
    whole = aggan.train(tiny(folders, **changes))
    out, numbers, killed = folders / "killed", random.Random(0), 0
    run, log = ["train", *options(folders, **changes, out=out), "--resume"], out / "log.csv"
    while killed < 5:
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
    aggan.main(run)
    assert same(weights(whole), weights(out)) and columns(whole) == columns(out)
    assert {"checkpoint.pt", "log.csv", "samples"} == {path.name for path in out.iterdir()}


def test_signals_finish_the_step_and_save(folders, started, monkeypatch, capfd):
    """... and are answered at once; a second one kills, but not under torchrun, which repeats."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out = folders / f"{number}"
        if signal.getsignal(number) == signal.SIG_IGN:  # the tests may run under nohup
            continue
        given = options(folders, steps=9000, save_every=9000, workers=1, out=out)
        process = started("train", *given)
        while process.is_alive() and not (out / "log.csv").exists():
            process.join(0.02)
        os.kill(process.pid, number)
        assert ended([process]) == [128 + number]
        line = "\nstopping after this step; once more to stop without saving\naggan.py: stopped "
        line += f"after step {aggan.load_checkpoint(out)['step']}, saved; goes on with --resume\n"
        assert capfd.readouterr().err == line

    before = signal.getsignal(signal.SIGTERM)
    for world in (1, 2):
        monkeypatch.setattr(aggan, "WORLD", world)
        with aggan.stop_signals() as seen:
            for _ in range(world):
                signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM] * world
            assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == (world == 1)
        error = capfd.readouterr().err
        assert error.count("stopping after") == 1 and ("once more" in error) == (world == 1)
        assert signal.getsignal(signal.SIGTERM) is before
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a script's background job
    with aggan.stop_signals() as seen:
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, ignored)
    assert seen == [signal.SIGINT]


def test_out_of_memory(folders, monkeypatch, capsys):
    """One line; at the first step nothing is left behind that would refuse another try."""
    given, shapes = ["train", *options(folders, steps=2)], []
    cannot = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    indices = RuntimeError("input tensor must fit into 32-bit index math")  # of an H200, batch 512
    illegal = RuntimeError("CUDA error: an illegal memory access")
    for error in (NO_MEMORY, MemoryError(), cannot, indices, illegal):
        with monkeypatch.context() as patch:
            patch.setattr(aggan.Trainer, "step", raising(error))
            if error is not illegal:
                line = "out of memory, or of 32-bit indices: train needs less with"
                assert line in refusal(given, capsys)
            else:
                with pytest.raises(RuntimeError, match="illegal"):
                    aggan.main(given)
        assert not (folders / "run").exists()
    spoilt(monkeypatch, aggan, "panels", lambda _, x: shapes.append(x.shape))
    aggan.main(given)
    assert shapes == [(3, 36, 36)] * 8  # of a grid, one image at a time
    translate = ["translate", folders / "run", folders / "testA", "--to=b", "--out", folders / "x"]
    for place in (aggan.Trainer, "load_state_dict"), (torch.nn.Module, "to"):  # no fault of the run
        with monkeypatch.context() as patch:
            patch.setattr(*place, raising(NO_MEMORY))
            again = translate if "to" in place else [*given, "--resume", "--steps", 3]
            assert line in refusal([*again, "--device", "cpu"], capsys)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    """Links are followed. Windows refuses to replace a file that is being read: tried again."""
    there, link = tmp_path / "there.pt", tmp_path / "link.pt"
    there.write_bytes(b"whole")
    link.symlink_to(there)
    (tmp_path / ".there.pt.tmp").write_bytes(b"left by a kill")
    save = lambda file, error=None: file.write(b"new") and error and raising(error)()  # noqa: E731
    with pytest.raises(aggan.BadInput, match=r"there.pt: cannot be written \(unexpected pos"):
        aggan.write_whole(link, lambda file: save(file, RuntimeError("unexpected pos")))
    with pytest.raises(KeyboardInterrupt):
        aggan.write_whole(link, lambda file: save(file, KeyboardInterrupt()))
    slept, most, refuse = [], 99, raising(PermissionError("in use"))
    monkeypatch.setattr(aggan.time, "sleep", slept.append)
    spoilt(monkeypatch, os, "replace", lambda *_: refuse() if len(slept) < most else None)
    with pytest.raises(aggan.BadInput, match="in use"):
        aggan.write_whole(link, save)
    assert 2 < sum(slept) < 30
    assert there.read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 2
    most = len(slept) + 2
    aggan.write_whole(link, save)
    assert link.is_symlink() and there.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2


def mutation(content, numbers):
    """The bytes, changed in a place, or shortened, or with a part twice or of zeros."""
    content, length = bytearray(content), numbers.randrange(1, 64)
    place, kind = numbers.randrange(len(content)), numbers.randrange(4)
    old = content[place : place + length]
    new = [numbers.randbytes(length), bytes(length), old + old, b""][kind]
    content[place : len(content) if kind == 3 else place + length] = new
    return bytes(content) or b"?"


def test_bad_checkpoints_get_one_line(folders, capsys):
    """... naming the run; nothing in them is run, and they stay as they are."""
    run = aggan.train(tiny(folders, steps=2, blocks=0))
    file, evil, new = run / "checkpoint.pt", folders / "evil", folders / "new"
    whole, numbers, damaged = file.read_bytes(), random.Random(1), "not a checkpoint"
    capsys.readouterr()

    class Evil:
        def __reduce__(self):  # creates a file when it is unpickled
            return Path.touch, (evil,)

    def change(*keys, value):
        changed = torch.load(file, weights_only=True)
        functools.reduce(lambda part, key: part[key], keys[:-1], changed)[keys[-1]] = value
        return changed

    one = torch.zeros(1)  # which Adam would take to be as large as the weights
    small_pools = [[(torch.zeros(3, 8, 8), torch.zeros(1, 8, 8))], []]
    only_training = [change("parts", "opt_g", "state", 0, "exp_avg", value=one)]
    only_training += [change("pools", value=small_pools), change("step", value=-1)]
    evils = {"format": aggan.FORMAT, "config": Evil()}, Evil()
    parts = b"", whole[: len(whole) // 2], whole[:5000] + b"????" + whole[5004:]
    for state, words in (
        *((state, damaged) for state in (*only_training, *parts, *evils, [1, 2])),
        *((mutation(whole, numbers), "") for _ in range(12)),
        (change("format", value=aggan.FORMAT + 1), f"format {aggan.FORMAT + 1}"),
        (change("config", "model", value="vae"), "--model vae: must be one of"),
        (change("config", "width", value=8), "size mismatch for g_ab"),
        (change("config", "lr", value="fast"), damaged),
        (change("parts", "nets", value={}), damaged),
        (change("parts", "nets", value=7), damaged),
    ):
        file.write_bytes(state) if isinstance(state, bytes) else torch.save(state, file)
        content = file.read_bytes()
        translate = ["translate", run, folders / "testA", "--to", "b", "--out", new]
        for arguments in (translate, ["train", "--resume", "--out", run]):
            if arguments is translate and any(state is x for x in only_training):
                continue
            arguments = [*map(str, arguments), "--device", "cpu"]
            with pytest.raises(SystemExit, match="2") if words else contextlib.suppress(SystemExit):
                aggan.main(arguments)  # a mutation may have hit what nobody reads
            error = capsys.readouterr().err
            assert error.count("\n") <= 1 and (not error or words in error and str(run) in error)
            assert file.read_bytes() == content and not evil.exists()
            assert not words or not new.exists()

    file.write_bytes(whole)  # from before some options were there, with an old one
    state = change("config", "compile", value=True)
    state["parts"]["curriculum"].pop("m")
    for name, then in dict(l_copy=1.0, shift=0.0, r_low=0.01).items():
        assert state["config"].pop(name) == getattr(aggan.Config, name)
        torch.save(state, file)
        assert getattr(aggan.load_checkpoint(run)["config"], name) == then


def test_two_processes_train_as_one(folders, pair, capfd):
    """Two of torchrun's at batch 1 against one at batch 2; one of them speaks."""
    changes = dict(steps=4, l_identity=5.0, shift=0, log_every=1, save_every=2)
    one = aggan.train(tiny(folders, **changes, batch_size=2, out=str(folders / "one")))
    capfd.readouterr()
    assert ended(pair("train", *options(folders, **changes))) == [0, 0]
    said = capfd.readouterr().out
    assert said.count("on 2 x cpu") == said.count("step 4/4") == said.count("finished:") == 1
    state = aggan.load_checkpoint(folders / "run")
    assert state["world"] == 2 and len(state["pools"][0]) == 4
    initial = aggan.Trainer(state["config"], 4, CPU).nets.state_dict()
    first, second = weights(one), state["parts"]["nets"]
    for k in first:  # a bias before a norm has no gradient but rounding, which Adam magnifies
        if k.endswith("weight"):
            assert (first[k] - second[k]).norm() < 0.02 * (first[k] - initial[k]).norm(), k
    with pytest.raises(aggan.BadInput, match="a run of 2 processes, here are 1"):
        aggan.train(tiny(folders, **changes), resume=True)


def test_the_first_process_reads_the_checkpoint(folders, pair, monkeypatch, capfd):
    """A second machine without it ends with the same weights; both are refused alike."""
    given = ["train", *options(folders, steps=1, norm="batch", shift=0, out="run"), "--resume"]
    assert ended(pair(*given)) == [0, 0] and not (folders / "second" / "run").exists()
    state, buffers = aggan.load_checkpoint(folders / "first" / "run"), []
    data = aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36, 0)
    for i in range(2):  # each process has seen its own pair; running statistics are averaged
        trainer = aggan.Trainer(state["config"], 1, CPU)
        trainer.step(*(x[None] for x in data[i]))
        buffers.append({k: b for k, b in trainer.nets.named_buffers() if b.is_floating_point()})
    for k, one, other in zip(buffers[0], *(b.values() for b in buffers)):
        torch.testing.assert_close(state["parts"]["nets"][k], (one + other) / 2)
        assert not torch.equal(one, other)

    shutil.copytree(folders / "first", folders / "shared")
    assert ended(pair(*given, "--steps", 3)) == [0, 0]
    assert ended(pair(*given, "--steps", 3, places=("shared", "shared"))) == [0, 0]
    assert same(*(weights(folders / name / "run") for name in ("first", "shared")))
    capfd.readouterr()
    assert ended(pair(*given, "--width", 8)) == [2, 2]
    error = capfd.readouterr().err
    assert len(set(error.splitlines())) == 1 and "--width 8 (there 4): another run" in error

    monkeypatch.setattr(aggan, "from_first", lambda *_: {"a": 9, "b": 4})  # has other folders
    config = tiny(folders, steps=0, epochs=2)
    assert aggan.start(config, None, data, CPU).total == 18


def test_a_process_that_fails_stops_all_and_the_run_is_saved(folders, pair, monkeypatch, capfd):
    """Its images are lost; then it is told to stop, twice, as torchrun and SLURM do."""
    given = ["train", *options(folders, steps=9000, save_every=9000, out="run", workers=1)]
    gone = raising(aggan.BadInput("trainA: gone"))
    with monkeypatch.context() as patch:  # its pairs are 1, 3, 5
        lose = lambda _, i: gone() if aggan.RANK and i >= 5 else None  # noqa: E731
        spoilt(patch, aggan.UnpairedImages, "__getitem__", lose)
        assert ended(pair(*given)) == [1, 2]
    first, second = sorted(capfd.readouterr().err.splitlines())
    stopped = "another process failed, see above; stopped after step 2, saved"
    assert first == f"aggan.py: {stopped}; goes on with --resume"
    run = folders / "first" / "run"
    assert second == "aggan.py: trainA: gone" and aggan.load_checkpoint(run)["step"] == 2

    log = (run / "log.csv").stat().st_size
    processes = pair(*given, "--resume")
    while all(p.is_alive() for p in processes) and (run / "log.csv").stat().st_size == log:
        time.sleep(0.02)
    for _ in range(2):
        os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes) == [143, 143] and aggan.load_checkpoint(run)["step"] > 2
    assert "once more" not in capfd.readouterr().err


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Tiny scenes like photographs, and masks of the test ones.

    A large object on a background with texture at three scales, in colours that this has too; A's
    plain and shaded, B's striped, of little contrast.
    """
    folder, generator, size = tmp_path_factory.mktemp("scenes"), torch.Generator(), 32
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    generator.manual_seed(0)

    def noise(scale, channels=3):
        pixels = torch.rand(1, channels, scale, scale, generator=generator) * 2 - 1
        return nn.functional.interpolate(pixels, size=(size, size), mode="bicubic")[0]

    for domain in "AB":
        for part in ("train", "test", "masks"):
            (folder / f"{part}{domain}").mkdir()
        for i in range(70):
            hue, at, extent = torch.rand(3, 3, generator=generator)
            phase, scene = torch.rand((), generator=generator), hue[:, None, None] - 0.5
            scene = scene + 0.35 * noise(4) + 0.25 * noise(8) + 0.15 * noise(size)
            (y, x), (tall, wide) = size * (0.375 + 0.25 * at[:2]), size * (0.28 + 0.1 * extent[:2])
            inside = ((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 < 1
            stripes = 0.5 * torch.sign(torch.sin(1.6 * columns + 6 * phase)).expand(3, size, size)
            plain = torch.tensor([0.2, -0.1, -0.35])[:, None, None]
            coat = (plain if domain == "A" else stripes) + 0.15 * noise(5, 1)
            part = "train" if i < 60 else "test"
            pixels = torch.where(inside, coat, scene).clamp(-1, 1)
            aggan.to_image(pixels / 2 + 0.5).save(folder / f"{part}{domain}" / f"{i}.png")
            if part == "test":
                aggan.to_image(inside[None].float()).save(folder / f"masks{domain}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session", autouse=True)
def training(request):
    """The process of `found`'s half a minute: beside the other tests, from the first one on."""
    if not any("found" in item.fixturenames for item in request.session.items):
        yield None
        return
    scenes = request.getfixturevalue("scenes")
    changes = dict(resize=36, width=8, masks=4, lr=1e-3, log_every=1000, save_every=1000)
    given = options(scenes, **changes, steps=600, out=scenes / "found")
    command = [sys.executable, ROOT / "aggan.py", "train", *given]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session")
def found(scenes, training):
    """A run on the scenes, with the default objective."""
    assert training.wait() == 0
    return scenes / "found"


def test_scenes_like_photographs_are_not_copied(scenes, found):
    """The papers' curriculum ends with copies, the default finds the objects."""
    config = aggan.load_checkpoint(found)["config"]
    changes = dict(steps=80, curriculum="papers", out=str(scenes / "papers"))
    copies = aggan.evaluate(aggan.train(dataclasses.replace(config, **changes)))
    results = aggan.evaluate(found)
    for name, iou in (("a2b", 0.35), ("b2a", 0.55)):
        copied, result = copies[name], results[name]
        assert copied["mean_attention"] < 0.02 and copied["foreground_change"] < 0.01
        assert 0.1 < result["mean_attention"] < 0.7 and result["foreground_change"] > 0.1
        assert result["iou"] > iou and result["iou"] > result["iou_of_all"]


# ---------- 11. Images ----------


def test_pairs_crops_flips_and_passes(folders):
    """Red tells the column, green the row, blue the image; a pair is a function of seed and i."""
    for domain, count in (("C", 6), ("D", 4)):
        (folders / domain).mkdir()
        for i in range(count):
            image = Image.new("RGB", (16, 16))
            image.putdata([(10 * x, 10 * y, 10 * i) for y in range(16) for x in range(16)])
            image.save(folders / domain / f"{i}.png")
    places = folders / "C", folders / "D", 8, 16
    data, again, other = (aggan.UnpairedImages(*places, seed) for seed in (3, 3, 4))
    corners, flips, shown = set(), 0, [[], []]
    for i in range(60):
        for domain, x in enumerate(data[i]):
            red, green, blue = ((x + 1) * 12.75).round()
            flips += red[0, 0].item() > red[0, -1].item()
            corners.add((red.min().item(), green.min().item()))
            assert x.shape == (3, 8, 8) and red.max() - red.min() == 7
            assert (green[:, 0] == green[0, 0] + torch.arange(8)).all()
            shown[domain].append(int(blue.max()))
    assert len(data) == 6 and 40 < flips < 80
    assert {x for x, _ in corners} == {y for _, y in corners} == set(range(9))
    for images, count in zip(shown, (6, 4)):  # every pass shows every image, in another order
        passes = [images[i : i + count] for i in range(0, 60, count)]
        assert all(sorted(p) == list(range(count)) for p in passes) and passes[0] != passes[1]
    alike = aggan.UnpairedImages(folders / "C", folders / "C", 8, 16)
    orders = zip(*([int((x[2].max() + 1) * 12.75 + 0.5) for x in alike[i]] for i in range(6)))
    assert len(set(orders)) == 2  # A and B in orders of their own
    for i in (7, 0, 100):
        assert all(map(torch.equal, data[i], again[i]))
        assert not all(map(torch.equal, data[i], other[i]))


def halves(mode, left, right):
    """40 x 30 pixels."""
    image = Image.new(mode, (40, 30), left)
    image.paste(right, (20, 0, 40, 30))
    return image


def odd_images(folder):
    """Images as people have them -> {name: (size, has transparency, red of the last pixel)}."""
    colour, exif = halves("RGB", (250, 0, 0), (0, 0, 250)), Image.Exif()
    clear, exif[0x0112] = colour.convert("RGBA"), 6  # to be turned by 90 degrees
    clear.putalpha(halves("L", 0, 200))
    frames, palette = dict(save_all=True, append_images=[clear]), colour.quantize(4)
    saved = {  # name: image, red of the last pixel, options of save(); 51400 is 200 * 257
        "deep.png": (Image.new("I;16", (40, 30), 51400), 200, {}),
        "eight-in-sixteen.png": (Image.new("I;16", (40, 30), 250), 1, {}),  # 250 / 257
        "big-endian.tif": (Image.frombytes("I;16B", (40, 30), bytes([200] * 2400)), 200, {}),
        "deep.pgm": (Image.new("I", (40, 30), 51400), 200, {}),
        "grey.jpg": (Image.new("L", (40, 30), 90), 90, {}),
        "clear-la.png": (clear.convert("LA"), None, {}),
        "clear.png": (clear, 55, {}),  # blue of 200 on white: 255 - 200
        "clear.webp": (clear, None, {}),
        "clear.gif": (palette, None, dict(transparency=1)),
        "clear-palette.png": (palette, None, dict(transparency=bytes([255, 0, 128, 7]))),
        "clear-key.png": (colour, 0, dict(transparency=(250, 0, 0))),
        "cmyk.jpg": (colour.convert("CMYK"), None, {}),
        "bit.png": (halves("1", 0, 1), 255, {}),
        "pages.tif": (colour, 0, frames),
        "turned.jpg": (colour, None, dict(exif=exif)),
        "turned.png": (colour, None, dict(exif=exif)),
        "one.png": (Image.new("RGB", (1, 1), (7, 8, 9)), 7, {}),
        "narrow.bmp": (Image.new("RGB", (3, 200), (60, 70, 80)), 60, {}),
        'it\'s a "photo" $HOME; ünï 写真.PNG': (colour, 0, {}),
    }
    for name, (image, red, settings) in saved.items():
        image.save(folder / name, **settings)
        size = (30, 40) if "turned" in name else image.size
        saved[name] = size, name.startswith("clear"), red
    return saved


def test_odd_images_are_loaded(tmp_path):
    """Of 8 or 16 bits, in RGB, upright; what is transparent is laid on white."""
    odd = odd_images(tmp_path)
    (tmp_path / ".thumbnails").mkdir()
    for name in (".hidden.png", ".thumbnails/0.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"as macOS leaves them")
    assert {path.name for path in aggan.list_images(tmp_path)} == set(odd)
    for name, (size, transparent, red) in odd.items():
        image, kept = aggan.load_image(tmp_path / name), aggan.load_image(tmp_path / name, None)
        assert (image.mode, image.size, kept.size) == ("RGB", size, size), name
        assert kept.mode == ("RGBA" if transparent else "RGB"), name
        assert red is None or abs(image.getpixel((size[0] - 1, size[1] - 1))[0] - red) <= 1, name
        for at in ((0, 0), (size[0] - 1, size[1] - 1)) if transparent else ():
            *colour, alpha = kept.getpixel(at)
            laid = [255 + (c - 255) * alpha / 255 for c in colour]
            assert image.getpixel(at) == pytest.approx(laid, abs=1), name
        assert min(aggan.load_image(tmp_path / name, size=36).size) == 36
        if "turned" in name:
            assert image.getpixel((0, 0))[0] > 200 and image.getpixel((0, 39))[2] > 200

    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    image = aggan.TF.to_pil_image(levels)  # copied pixels keep their value
    assert aggan.to_image(aggan.to_tensor(image) / 2 + 0.5).tobytes() == image.tobytes()


def chunk(name, data):
    """Of a PNG."""
    check = zlib.crc32(name + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + name + data + check


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # PIL's
def test_notes_do_not_spoil_a_picture(tmp_path, capsys):
    """Texts of a PNG, huge or broken, and broken EXIF data; nothing is said of them."""
    image, path = halves("RGB", (250, 0, 0), (0, 0, 250)), tmp_path / "0.png"
    image.save(path)
    data, huge = path.read_bytes(), zlib.compress(b"x" * (3 << 20))
    notes = [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + huge), chunk(b"eXIf", b"II*\0broken")]
    notes += [chunk(b"zTXt", b"comment\0\0" + huge), chunk(b"iCCP", b"profile\0\0not compressed")]
    notes += [chunk(name, b"comment\0text")[:-4] + b"????" for name in (b"tEXt", b"eXIf")]
    for note in notes:
        path.write_bytes(data[:33] + note + data[33:])
        assert aggan.load_image(path).tobytes() == image.tobytes(), note[:40]
    image.save(tmp_path / "0.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01broken")
    assert aggan.load_image(tmp_path / "0.jpg").size == (40, 30)
    assert capsys.readouterr().err == ""


def useless_images(folder):
    """Files that are no use, by name."""

    def bomb(side):  # a PNG of a few bytes that says it is this large
        header = chunk(b"IHDR", 2 * side.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
        data = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + header + data

    Image.new("F", (40, 30), 0.8).save(folder / "float.tif")
    Image.new("I", (40, 30), 51400).save(folder / "integer.tif")
    Image.new("RGB", (40, 30)).save(folder / "cut.jpg")
    cut = (folder / "cut.jpg").read_bytes()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"
    contents = {"text.png": b"not a picture", "empty.jpg": b"", "cut.jpg": cut[: len(cut) // 2]}
    contents |= {"bomb.png": bomb(40000), "short.png": bomb(400), "program.png": program}
    header = chunk(b"IHDR", bytes([0, 0, 0, 40, 0, 0, 0, 30, 8, 3, 0, 0, 0]))  # of a palette
    palettes = {"no.png": b"", "few.png": chunk(b"PLTE", bytes(9)) + chunk(b"tRNS", bytes(257))}
    for name, palette in palettes.items():
        data = chunk(b"IDAT", zlib.compress(bytes([0, *[9] * 40] * 30))) + chunk(b"IEND", b"")
        contents[name] = b"\x89PNG\r\n\x1a\n" + header + palette + data
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted([*contents, "float.tif", "integer.tif"])


def test_useless_images_are_refused_by_name(tmp_path, monkeypatch):
    """... as masks, too; PostScript, which is a program, is not run."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    for name in useless_images(tmp_path):
        for load in (aggan.load_image, lambda path: aggan.load_mask(path, (30, 40))):
            with pytest.raises(aggan.BadInput) as error:
                load(tmp_path / name)
            assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
            deep = name in ("float.tif", "integer.tif")
            assert ("save it with 8 or 16 bits" in str(error.value)) == deep
    Image.new("RGB", (1000, 9)).save(tmp_path / "strip.png")
    with pytest.raises(aggan.BadInput, match="strip.png.*1000 x 9"):  # would be 32000 pixels long
        aggan.load_image(tmp_path / "strip.png", size=286)


def test_training_goes_on_without_useless_images(folders, capsys):
    """Each is named once; the order of the others is the same, whenever it was met."""
    names = useless_images(folders / "trainA")
    aggan.main(["train", *options(folders, workers=2, steps=15)])
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == len(names) and all("not a usable image" in line for line in lines)
    assert all(sum(f"trainA/{name}: " in line for line in lines) == 1 for name in names)
    assert "step 15/15" in output.out

    places = folders / "trainA", folders / "trainB", 32, 36
    first, second = (aggan.UnpairedImages(*places) for _ in "12")
    pairs = {i: first[i][0] for i in range(40)}
    for i in reversed(range(40)):  # as after a resume: other files have been met
        assert torch.equal(second[i][0], pairs[i])
    assert len(first.useless["a"]) == len(names) and not first.useless["b"]
    for path in (folders / "trainB").iterdir():
        path.write_text("not a picture")
    with pytest.raises(SystemExit, match="2"):
        aggan.main(["train", *options(folders, out=folders / "new")])
    assert f"aggan.py: {folders}/trainB: not one usable image\n" in capsys.readouterr().err
    assert not (folders / "new").exists()


def test_an_error_that_passes_takes_no_image_out(folders, monkeypatch, capsys):
    """Too many open files, no memory, a network drive: another image, this time."""
    data = aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36)
    whole = data[2]
    many = OSError(errno.EMFILE, "Too many open files")
    for error in (many, MemoryError(), TimeoutError(110, "x")):
        errors = [error]
        with monkeypatch.context() as patch:
            fail = lambda *_, e=errors: raising(e.pop())() if e else None  # noqa: E731
            spoilt(patch, Path, "read_bytes", fail)
            assert not torch.equal(data[2][0], whole[0])
            assert all(map(torch.equal, data[2], whole)) and not data.useless["a"]
        assert "another image in its place this time" in capsys.readouterr().err
    (folders / "trainA" / "0.png").unlink()
    assert all(data[i] for i in range(5)) and len(data.useless["a"]) == 1  # one that is gone is


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_a_profile_are_converted(tmp_path, mode):
    """One in which red is sRGB's green, and green its red; a broken one is none."""
    profile = aggan.ImageCms.ImageCmsProfile(aggan.ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")):
        profile = profile.replace(old, new, 1)
    profile = profile.replace("sRGB".encode("utf-16-be"), "odd ".encode("utf-16-be"))
    path, colour = tmp_path / "wide.png", (60, 200, 70, 90)
    image = Image.new("RGBA" if mode == "RGBA" else "RGB", (8, 8), colour)
    image = image.quantize(4) if mode == "P" else image
    for kind, expected in ((profile, (200, 60, 70, 90)), (b"no profile", colour)):
        image.save(path, icc_profile=kind)
        shown = aggan.load_image(path, mode=None)
        assert shown.mode == ("RGBA" if mode == "RGBA" else "RGB")
        assert all(abs(x - y) <= 3 for x, y in zip(shown.getpixel((0, 0)), expected))
        shown.save(tmp_path / "again.png")
        assert "icc_profile" not in Image.open(tmp_path / "again.png").info


def test_what_is_left_out_is_said(trained, folders, capsys, monkeypatch):
    """Other kinds, dead links, folders that cannot be read; links are followed, circles are not."""
    mixed, far, closed = (folders / name for name in ("mixed", "far", "mixed/closed"))
    for folder in (mixed, far, closed):
        folder.mkdir()
        Image.new("RGB", (40, 30), "green").save(folder / f"{folder.name}.png")
    for link, place in (("far", far), ("circle", mixed), ("dead.png", folders / "nowhere")):
        (mixed / link).symlink_to(place)
    for name in ("1.HEIC", "2.HEIC", "3.jxl", "none", ".hidden"):
        (mixed / name).write_bytes(b"ftypheic")
    refuse = raising(PermissionError(errno.EACCES, "Permission denied", str(closed)))
    spoilt(monkeypatch, os, "scandir", lambda at=".": refuse() if Path(at) == closed else None)
    with pytest.raises(aggan.BadInput, match="^some files were left out, see above") as stopped:
        aggan.translate(trained, [mixed], "b", folders / "new", device="cpu")
    assert stopped.value.status == 1
    done = sorted(path.name for path in (folders / "new").rglob("*.*"))
    line, *more = capsys.readouterr().err.splitlines()
    assert done == ["far.png", "mixed.png"] and line.startswith("warning: left out: ") and not more
    for part in (".heic: not read, convert it; 2 of", "3.jxl (", "none (no suffix", "a dead link"):
        assert part in line
    assert "circle (linked once more" in line and "closed (Permission denied" in line
    aggan.WARNED.clear()
    aggan.train(tiny(folders, a=str(mixed), steps=1, out=str(folders / "more")))
    assert capsys.readouterr().err == line + "\n"
    (far / "far.png").rename(far / "far.heif")
    with pytest.raises(aggan.BadInput, match="far: no images in this folder, only .*far.heif"):
        aggan.translate(trained, [far], "b", folders / "new", device="cpu")


def test_a_folder_is_of_one_domain(trained, folders):
    """One inside the other has images that are both domains'."""
    (folders / "testA" / "inner").mkdir()
    shutil.copy(folders / "testB" / "0.png", folders / "testA" / "inner")
    for name in ("testA", "testA/inner", "../" + folders.name + "/testA"):
        for a, b in ((folders / "testA", folders / name), (folders / name, folders / "testA")):
            with pytest.raises(aggan.BadInput, match="one folder for each domain"):
                aggan.check(aggan.configure(dict(a=str(a), b=str(b))))
            with pytest.raises(aggan.BadInput, match="one folder for each domain"):
                aggan.evaluate(trained, a=a, b=b, device="cpu")
    with pytest.raises(aggan.BadInput, match="which would take in its samples"):
        aggan.train(tiny(folders, out=str(folders / "trainA" / "run")))


# ---------- 12. Translate and evaluate ----------


@pytest.mark.parametrize("model", [*aggan.PRESETS, "guided --attention-map tam"])
def test_every_preset_trains_and_translates_any_size(folders, capsys, model):
    """... at the scale asked for; 0 is the image's own: what the generator makes of it, padded."""
    run, new = folders / "run", folders / "new"
    aggan.main(["train", *options(folders, steps=2), "--model", *model.split()])
    output = capsys.readouterr()
    assert "step 2/2" in output.out and output.err == ""
    assert output.out.splitlines()[-1].startswith(f"finished: grids in {run}/samples; translate")
    translate = ["translate", run, folders / "testA", "--to", "b", "--out", new, "--attention"]
    aggan.main([*map(str, translate), "--resize", "0", "--device", "cpu"])
    generator = aggan.load_generators(run, CPU)[0]["g_ab"]
    t = generator(pixels_of(folders / "testA" / "0.png")[None])
    for file, drawn in {"0.png": t.image[0] / 2 + 0.5, "0_attention.png": t.foreground[0]}.items():
        assert Image.open(new / file).tobytes() == aggan.to_image(drawn).tobytes()

    for width, height, mode in ((40, 30, "RGBA"), (7, 5, "RGB"), (300, 1, "RGB"), (1, 1, "RGB")):
        values = torch.randint(256, (4, height, width), dtype=torch.uint8)
        image = aggan.TF.to_pil_image(values).convert(mode)
        for side in (0, 16, 32, 64):
            drawn, mask = aggan.translate_image(generator, image, side, CPU)
            assert (drawn.mode, mask.mode, drawn.size, mask.size) == (mode, "L", *2 * [image.size])
            assert mode == "RGB" or drawn.getchannel(3).tobytes() == image.getchannel(3).tobytes()


def test_what_a_mask_leaves_alone_stays_as_it_is():
    """To the bit, at full resolution, in RGB and below transparency, and where it is padded."""
    x, seen = torch.rand(3, 5, 18), []
    copy = lambda x: seen.append(x) or Translation(x, x[:, :2], x[:, None])  # noqa: E731
    assert torch.equal(aggan.apply_any_size(copy, x).image[0], x)
    padded = nn.functional.pad(x[None], (0, 2, 0, 11), mode="replicate")  # to 16 x 20
    assert torch.equal(seen[0], padded)
    aggan.translate_image(copy, Image.new("RGBA", (32, 32)), 0, CPU)
    assert seen[-1].min() == 1  # what is transparent is white, whatever lies below

    def left_half_black(x):
        assert x.shape[-2:] == (24, 64)  # the scale asked for
        mask = (torch.arange(x.shape[-1]) < x.shape[-1] / 2).float().expand_as(x[:, :1])
        attention, content = torch.cat([mask, 1 - mask], 1), -torch.ones_like(x)[:, None]
        return Translation(aggan.fuse(x, attention, content), attention, content)

    values = torch.randint(256, (4, 96, 256), dtype=torch.uint8)
    for mode in ("RGB", "RGBA"):
        image = aggan.TF.to_pil_image(values).convert(mode)
        new, mask = aggan.translate_image(left_half_black, image, 24, CPU)
        for left, right in ((0, 112), (144, 256)):  # but for a bicubic step, of 4 small pixels
            part = (left, 0, right, 96)
            assert (new.crop(part).tobytes() == image.crop(part).tobytes()) == (left > 0)
            assert mask.crop(part).getextrema() == ((0, 0) if left else (255, 255))
        assert aggan.to_tensor(new.convert("RGB"))[..., :112].mean() < -0.5  # and x's detail


def test_a_large_image_is_translated_as_a_small_one(scenes, found):
    """up4(translate(x)) is translate(up4(x)); at its own size it is not: stripes get thin."""
    generator, size = aggan.load_generators(found, CPU)[0]["g_ab"], (128, 128)

    def difference(image, side):
        both = image, image.resize(size, Image.Resampling.BICUBIC)
        small, large = (aggan.translate_image(generator, x, side, CPU)[0] for x in both)
        small = small.resize(size, Image.Resampling.BICUBIC)
        return (aggan.to_tensor(small) - aggan.to_tensor(large)).abs().mean().item() / 2

    for path in aggan.list_images(scenes / "testA")[:3]:
        image = aggan.load_image(path)
        assert difference(image, 32) <= 0.02 < difference(image, 0)


def test_translate(trained, folders, capsys):
    """Odd images: names, sizes, transparency; the inputs stay as they are."""
    (folders / "odd").mkdir()
    odd = odd_images(folders / "odd")
    before = {path: path.read_bytes() for path in (folders / "odd").iterdir()}
    capsys.readouterr()
    paths = aggan.translate(trained, [folders / "odd"], "b", folders / "out")
    said = capsys.readouterr()
    assert len(paths) == len(odd) and said.err == ""
    assert said.out.splitlines() == [f"{i}/{len(odd)}  {p}" for i, p in enumerate(paths, 1)]
    for name, (size, transparent, _) in odd.items():
        kept = Path(name).suffix.lower() in aggan.WRITABLE
        written = folders / "out" / (name if kept else name + ".png")
        image, source = Image.open(written), folders / "odd" / name
        assert written in paths and image.size == size, name
        assert image.mode == ("RGBA" if transparent else "RGB"), name
        if image.mode == "RGBA":
            alpha = aggan.load_image(source, None).getchannel("A")
            assert image.getchannel("A").tobytes() == alpha.tobytes(), name
    assert all(path.read_bytes() == content for path, content in before.items())

    (nets, config), image = aggan.load_generators(trained, CPU), folders / "testA" / "0.png"
    for resize, side in (([], config.resize), (["--resize", 20], 20)):
        given = ["translate", trained, image, "--to", "a", "--out", folders / f"{side}", *resize]
        aggan.main([*map(str, given), "--attention", "--device", "cpu"])
        drawn = aggan.translate_image(nets["g_ba"], aggan.load_image(image), side, CPU)
        for name, picture in zip(("0.png", "0_attention.png"), drawn):
            assert Image.open(folders / f"{side}" / name).tobytes() == picture.tobytes()


def test_translate_names_what_it_cannot_do_and_does_the_rest(trained, folders, capsys, monkeypatch):
    names = useless_images(folders / "testA")
    wrong = {64: NO_MEMORY, 65: FloatingPointError("its translation is not finite")}
    for side in wrong:
        Image.new("RGB", (side, side)).save(folders / "testA" / f"{side}.png")

    def fail(_, image, *__):
        if image.width in wrong:
            raise wrong[image.width]

    spoilt(monkeypatch, aggan, "translate_image", fail)
    with pytest.raises(SystemExit, match="1"):
        arguments = ["translate", trained, folders / "testA", "--to", "b", "--out", folders / "new"]
        aggan.main([*map(str, arguments), "--device", "cpu"])
    *lines, last = capsys.readouterr().err.splitlines()
    count = f"{len(names) + 2} of {len(names) + 7}"
    assert last == f"aggan.py: {count} images failed, see above"
    reasons = dict.fromkeys(names, "not a usable image") | {"64.png": "CUDA out of memory"}
    for name, reason in (reasons | {"65.png": "its translation is not finite"}).items():
        assert sum(f"testA/{name}: {reason}" in line for line in lines) == 1
    assert sorted(p.name for p in (folders / "new").iterdir()) == [f"{i}.png" for i in range(5)]


@pytest.mark.filterwarnings("ignore")  # PIL's, of images that it can read nevertheless
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
    with pytest.raises(aggan.BadInput) as stopped:
        aggan.translate(trained, [folders / "damaged"], "b", folders / "o", device="cpu")
    output = capsys.readouterr()
    errors, done = output.err.splitlines(), output.out.splitlines()
    assert str(stopped.value).startswith(f"{len(errors)} of 60 images failed")
    assert len(errors) > 15 and len(done) > 15 and len(errors) + len(done) == 60
    assert all(re.match(r"warning: \S+/damaged/\d+\S*: not a usable image \(", e) for e in errors)
    written = {line.split("  ")[1] for line in done}
    assert all(Image.open(path).load() for path in written)
    assert {str(p) for p in (folders / "o").iterdir()} == written


def test_translate_never_overwrites_an_input(trained, folders):
    """... by another name either; and no output another, on a disk that ignores case."""
    a, b, out, link = (folders / name for name in ("testA", "testB", "out", "link"))
    before = (a / "0.png").read_bytes()
    link.mkdir()
    os.link(a / "0.png", link / "0.png")
    Image.new("RGB", (20, 20)).save(b / "2.PNG")
    Image.new("RGB", (20, 20)).save(a / "0.jpg")
    for inputs, attention, place, words in (
        ([a], False, a, "is an input"),
        ([a], False, link, "is an input"),
        ([a / "0.png", b / "0.png"], False, out, "both would write"),
        ([b], False, out, "both would write"),
        ([a], True, out, "both would write .*0_attention.png"),
        ([b / "0.png"], False, a / "0.png", "0.png: is a file"),
    ):
        with pytest.raises(aggan.BadInput, match=words):
            aggan.translate(trained, inputs, "b", place, attention=attention)
    assert (a / "0.png").read_bytes() == before and not out.exists()


def test_figures_by_hand():
    foreground = torch.tensor([[0.9, 0.6], [0.4, 0.1]])
    image = torch.tensor([[1.0, 0.5], [0.2, 0.0]]).expand(1, 3, 2, 2)
    mask = torch.tensor([[True, False], [True, False]])

    def figures(foreground, mask):
        attention = torch.stack([foreground, 1 - foreground])[None]
        t = Translation(image, attention, torch.zeros(1, 1, 3, 2, 2))
        return aggan.mask_figures(torch.zeros(3, 2, 2), t, mask)

    hand = figures(foreground, mask)
    assert hand["iou"] == pytest.approx(1 / 3)  # found: upper row; true: left column
    assert hand["iou_of_all"] == pytest.approx(2 / 4)
    assert hand["background_error"] == pytest.approx(0.125)  # (0.5 + 0) / 2, halved: in [0, 1]
    assert hand["foreground_change"] == pytest.approx(0.3)  # (1 + 0.2) / 2, halved
    assert hand["mean_attention"] == pytest.approx(0.5)
    nothing = figures(foreground / 2, mask & False)  # an empty mask found empty is right
    assert (nothing["iou"], nothing["iou_of_all"]) == (1, 0)
    assert math.isnan(nothing["foreground_change"]) and nothing["background_error"] > 0
    assert figures(foreground, mask & False)["iou"] == 0
    assert math.isnan(figures(foreground, mask | True)["background_error"])
    names = [name for name, value in figures(foreground, None).items() if not math.isnan(value)]
    assert names == ["mean_attention"]

    # variances at each of two pixels over two images, their mean, by that of all four values
    for first, second, share in (
        ((0, 1), (1, 0), 1),  # 1/4 and 1/4; of all 1/4
        ((0, 1), (0, 1), 0),
        ((0, 1), (1, 1), (1 / 4 + 0) / 2 / (3 / 16)),  # of all: mean 3/4, so 3/4 - 9/16
    ):
        masks = torch.tensor([first, second], dtype=torch.float).view(2, 1, 1, 2)
        assert aggan.mask_variety(masks) == pytest.approx(share)


def test_evaluate_averages_over_images(trained, folders, monkeypatch, capsys):
    """... over those that have a figure; it says how many, and writes what it says."""
    for domain in "AB":  # masks: the corner of 20 x 20 pixels
        (folders / f"masks{domain}").mkdir()
        for path in aggan.list_images(folders / f"test{domain}"):
            mask = Image.new("L", Image.open(path).size)
            mask.paste(255, (0, 0, 20, 20))
            mask.save(folders / f"masks{domain}" / path.name)
    (folders / "masksA" / "0.json").write_text("as labelme leaves them")
    Image.new("L", (40, 60), 255).save(folders / "masksB" / "2.png")  # no background
    aggan.main(["evaluate", str(trained), "--json", str(folders / "f.json"), "--device", "cpu"])
    said, figures = capsys.readouterr(), []
    results = json.loads((folders / "f.json").read_text())
    nets, _ = aggan.load_generators(trained, CPU)
    for path in aggan.list_images(folders / "testB"):  # 40 x 60 -> 36 x 54, the mask's 20 -> 18
        x = aggan.to_tensor(aggan.load_image(path, size=36))
        mask = torch.full((54, 36), path.stem == "2")
        mask[:18, :18] = True
        figures.append(aggan.mask_figures(x, aggan.apply_any_size(nets["g_ba"], x), mask))
    for name in figures[0]:
        values = [f[name] for f in figures if not math.isnan(f[name])]
        assert len(values) == (2 if name == "background_error" else 3)
        assert results["b2a"][name] == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert [results[way]["images"] for way in results] == [5, 3]
    assert f"a2b: 5 images of {folders}/testA\n" in said.out and "0.json" in said.err
    assert "b2a: background_error of 2 images\n" in said.out and "a2b: back" not in said.out
    header, *rows = said.out.splitlines()[3:]
    assert list(results) == header.split() and rows[0].split() == ["images", "5", "3"]
    assert [row.split()[0] for row in rows] == list(results["a2b"])
    assert 0 <= results["a2b"]["mask_variety"] <= 1

    (folders / "masksA" / "3.png").rename(folders / "masksA" / "3.webp.png")
    with pytest.raises(aggan.BadInput, match="masksA: no mask for 3.png"):
        aggan.evaluate(trained, device="cpu")
    shutil.rmtree(folders / "masksA")
    for i in range(1, 5):
        (folders / "testA" / f"{i}.png").unlink()
    figures = aggan.evaluate(trained, resize=20, device="cpu")["a2b"]
    assert figures["iou"] is None and 0 <= figures["mean_attention"] <= 1
    assert figures["mask_variety"] is None  # of one image
    assert "testA, without masks" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # as under pythonw
        patch.setattr(sys, "stdout", None)
        aggan.main(["evaluate", str(trained), "--device", "cpu"])


def test_figures_outlive_the_terminal(folders, monkeypatch):
    """... and are JSON, whatever the masks."""
    run, file = aggan.train(tiny(folders, steps=1, model="cyclegan")), folders / "f.json"
    monkeypatch.setattr("builtins.print", raising(OSError(5, "Input/output error")))
    aggan.main(["evaluate", str(run), "--device", "cpu", "--json", str(file)])
    figures = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert figures["a2b"]["mean_attention"] == 1


def test_what_a_mask_may_be(tmp_path):
    """Black and white, two values with 0, a palette's colours, alpha; anything else is refused."""
    path, expected = tmp_path / "mask.png", torch.zeros(32, 48, dtype=torch.bool)
    expected[4:20, 4:28] = True

    def mask(mode, black, white, border=None, palette=None):
        image = Image.new(mode.removesuffix(";16"), (48, 32), black)
        image.paste(black if border is None else border, (3, 3, 29, 21))
        image.paste(white, (4, 4, 28, 20))
        if palette:
            image.putpalette(palette)
        return image.convert(mode)

    soft, clear, white = mask("L", 3, 250), (255, 255, 255, 0), (255, 255, 255, 255)
    soft.paste(100, (40, 4, 44, 20))  # 4 % of the pixels, the darker half of the grey values
    right = [mask("L", 0, 255), mask("L", 0, 1), mask("1", 0, 1), mask("L", 29, 226), soft]
    right += [mask("RGB", (0, 0, 0), (99, 0, 0)), mask("LA", clear[2:], white[2:])]
    right += [mask("RGBA", clear, white), mask("RGBA", (0, 0, 0, 255), (255, 0, 0, 255))]
    right += [mask("I;16", 0, 65535), mask("I;16", 0, 1)]
    right += [mask("P", 1, 0, palette=[255, 255, 255, 0, 0, 0])]  # white first
    right += [mask("P", 0, 2, palette=[0, 0, 0, 9, 9, 9, 20, 0, 0])]
    for image in right:
        image.save(path)
        assert torch.equal(aggan.load_mask(path, (32, 48)), expected), image.mode
    for level in (0, 255):  # all background, all foreground
        Image.new("L", (48, 32), level).save(path)
        assert (aggan.load_mask(path, (32, 48)) == (level > 0)).all()
    assert aggan.load_mask(path, (16, 24)).shape == (16, 24)

    voc = mask("RGB", (0, 0, 0), (128, 0, 0), border=(224, 224, 192))
    labels = [mask("L", 1, 2), mask("L", 0, 2, border=1), mask("I;16", 0, 2, border=1)]
    for image in (voc, *labels, mask("L", 60, 190)):
        image.save(path)
        with pytest.raises(aggan.BadInput, match="mask.png: not black and white; save"):
            aggan.load_mask(path, (32, 48))
    mask("L", 0, 255).save(path)
    with pytest.raises(aggan.BadInput, match="mask.png: 48 x 32 pixels, for an image of 32 x 48"):
        aggan.load_mask(path, (48, 32))


def test_test_folders_are_beside_the_training_folders(folders):
    """... as they were named, also where that is a link."""
    (folders / "trainA").rename(folders / "horses")
    (folders / "new").mkdir()
    (folders / "new" / "trainA").symlink_to(folders / "horses")
    (folders / "testA").rename(folders / "new" / "testA")
    given = {name: folders / part for name, part in (("a", "new/trainA"), ("b", "trainB"))}
    trained = aggan.domain_folders(aggan.configure(given))
    tests = [aggan.sibling(folder, "train", "test") for folder in trained]
    assert tests == [folders / "new" / "testA", folders / "testB"]


def test_masks_have_the_names_of_their_images(trained, folders):
    """In folders alike, whatever their extension; ü is one letter, or two, as on a Mac."""
    for part, white in (("x", 0), ("y", 255)):
        images = {f"testA/{part}/u\u0308.1[2].webp": Image.new("RGB", (32, 32), (90, 50, 20))}
        images[f"masksA/{part}/\u00fc.1[2].png"] = Image.new("L", (32, 32), white)
        for name, image in images.items():
            path = folders / "deep" / name
            path.parent.mkdir(parents=True)
            image.save(path)
    figures = aggan.evaluate(trained, a=folders / "deep" / "testA", device="cpu")["a2b"]
    assert figures["background_error"] is not None and figures["foreground_change"] is not None


def test_evaluate_keeps_the_translations(trained, folders, monkeypatch, capsys):
    """... after all have been read: all or none; in a new folder."""
    (folders / "testA" / "more").mkdir()
    Image.new("RGB", (40, 32), (9, 90, 200)).save(folders / "testA" / "more" / "0.jpg")
    saved, broken = folders / "kept", folders / "testB" / "x.png"
    broken.write_text("not a picture")
    with pytest.raises(aggan.BadInput, match="x.png: not a usable image"):
        aggan.evaluate(trained, save=saved, device="cpu")
    broken.unlink()
    nets, config = aggan.load_generators(trained, CPU)
    with monkeypatch.context() as patch:
        nan = torch.full((1, 3, 16, 16), math.nan)
        wrong = dict.fromkeys(("g_ab", "g_ba"), Fixed(Translation(nan, nan, nan[None])))
        patch.setattr(aggan, "load_generators", lambda *_: (wrong, config))
        error = refusal(["evaluate", trained, "--save", saved, "--device", "cpu"], capsys, status=1)
        assert "testA/0.png: its translation is not finite" in error and not saved.exists()

    aggan.evaluate(trained, save=saved, device="cpu")
    names = [f"{i}.png" for i in range(5)] + ["more/0.png"]
    expected = [f"{part}/{name}" for part in ("a", "a2b") for name in names]
    expected += [f"{part}/{i}.png" for part in ("b", "b2a") for i in range(3)]
    assert sorted(p.relative_to(saved).as_posix() for p in saved.rglob("*.*")) == expected
    image = aggan.load_image(folders / "testB" / "2.png", size=config.resize)
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


# ---------- 13. The command line ----------


def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        aggan.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        name, kind = field.name.replace("_", "-"), " " + type(field.default).__name__.upper()
        kind = f", --no-{name}" if field.type is bool else kind
        found = re.search(rf"--{name}{kind} [^\[]{{4,}}\[([^\]]*)\]", text)
        assert found and ast.literal_eval(found[1]) == field.default, name


def test_aggan_alone_trains_translates_and_evaluates(folders):
    """The file, copied into an empty folder."""
    alone, run = folders / "alone", folders / "run"
    alone.mkdir()
    shutil.copy(ROOT / "aggan.py", alone)
    train, translate = ["train", *options(folders, steps=2)], ["translate", run, folders / "testA"]
    evaluate = ["evaluate", run, "--a", folders / "testA", "--b", folders / "testB"]
    lines = ["|".join(map(str, x)) for x in (train, [*translate, "--to=b", "--out=new"], evaluate)]
    code = "import runpy, sys\nfor line in sys.argv[1:]:\n    sys.argv[1:] = line.split('|')\n"
    code += "    runpy.run_path('aggan.py', run_name='__main__')"
    line = [sys.executable, "-c", code, *lines]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=alone, env=env, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0) and "mean_attention" in done.stdout
    assert len(list((alone / "new").iterdir())) == 5


def test_bundled_set_trains_without_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    aggan.main(["train", "--steps", "2", "--width", "4", "--device", "cpu"])
    output = capsys.readouterr()
    assert "300 images of A, 300 of B, the bundled drawings" in output.out and output.err == ""
    aggan.main(["evaluate", "runs/mini-scheme2", "--device", "cpu"])
    assert " - " not in capsys.readouterr().out  # masks were found


BAD_INPUT = {  # of which the line says
    "train --a nowhere --b empty": "nowhere: no such file or folder",
    "train --a empty --b nowhere": "empty: no images",
    "train --a broken/x.png --b empty": "broken/x.png: is a file",
    "train --a empty": "--a and --b",
    "train --model cyclegam": "argument --model: invalid choice: 'cyclegam'",
    "train --model cyclegan --l-paired 1": "--model cyclegan: ",
    "train --model guided --l-gan 0 --l-paired 1": "--model guided: ",
    "train --model guided --head pooled": "--model guided: ",
    "train --size 66": "--size 66: ",
    "train --resize 32": "--size 64: ",
    "train --batch-size 0": "--batch-size 0: ",
    "train --lr fast": "--lr: invalid float",
    "train --lr nan": "--lr nan: ",
    "train --r inf": "--r inf: ",
    "train --l-gan 0 --l-paired 0": "--l-gan 0 --l-paired 0",
    "train --seed 99999999999999999999": "must be at least 0, and below 2**63",
    "train --shift 0.99": "--shift 0.99: must be at most 63 of 64 pixels",
    "train --out broken/x.png": "--out broken/x.png: is a file",
    "train --steps 1 --out broken/x.png/run": "broken/x.png/run",
    "train --device meta": "--device meta",
    "evaluate nowhere": "nowhere: no checkpoint.pt",
    "evaluate nowhere --json broken": "--json broken: exists",
    "evaluate nowhere --json broken/x.png": "--json broken/x.png: exists",
    "evaluate broken/x.png": "broken/x.png: not a checkpoint",
    "translate nowhere empty --to b --out out": "empty: no images",
    "translate nowhere broken --to c --out out": "argument --to: invalid choice: 'c'",
    "translate nowhere x.png --to b --out out": "x.png: no such file or folder",
    "translate nowhere broken --to b --out out": "nowhere: no checkpoint.pt",
    "paint": "invalid choice: 'paint'",
}


def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("not a picture")
    for arguments, words in BAD_INPUT.items():
        assert words in refusal(arguments.split(), capsys), arguments
        assert {path.name for path in tmp_path.iterdir()} == {"broken", "empty"}  # nothing was made


# ---------- The documents ----------

DOCUMENTS = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("data/*.md"))
}
COMMAND = r"^    (?:\S*python|torchrun --nproc-per-node \d) aggan\.py (.*)$"


def test_documents_commands_are_understood():
    commands = [c for text in DOCUMENTS.values() for c in re.findall(COMMAND, text, re.M)]
    assert {c.split()[0] for c in commands} == {"train", "translate", "evaluate"}
    parser = aggan.make_parser()
    for line in commands:
        given = vars(parser.parse_args(shlex.split(line)))
        if given.pop("command") == "train":
            small = given.pop("small")
            given.pop("resume")
            aggan.check(aggan.configure(given, small))


def test_documents_name_what_exists():
    """Tests, classes, options, links; and tables have as many cells in each row."""
    files = (ROOT / "aggan.py", *ROOT.glob("data/*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    fields = {aggan.flag(no + f.name) for f in dataclasses.fields(Config) for no in ("", "no_")}
    foreign = "--nproc-per-node --nnodes --logdir --help --l-area --gpu --cpu --kid --fid --input1"
    foreign += " --input2 --kid-subset-size --batch-size --samples-find-deep --masks-a --masks-b"
    foreign += " --feature-extractor-weights-path"
    for path, text in DOCUMENTS.items():
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in globals(), name
        for name in re.findall(r"`([A-Z][a-z]\w+)`", text):  # classes
            assert hasattr(aggan, name), name
        for name in set(re.findall(r"--[a-z][a-z0-9-]+", text)) - fields - set(foreign.split()):
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
def test_exercises_run_and_change_something(diff):
    source = (ROOT / "aggan.py").read_text(encoding="utf-8")
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(True)
        old, new = ("".join(x[1:] for x in lines if x[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    changed = sys.modules["changed"] = type(sys)("changed")
    exec(compile(source, "changed.py", "exec"), vars(changed))
    torch.manual_seed(1)  # the first steps' translations fool this judge, so that r is not 0.01
    judge, results = AttentionGuidedDiscriminator(TINY["width"]), []
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    for module in (aggan, changed):
        config = module.configure(dict(TINY, a="a", b="b", objective="final", shift=0))
        trainer = module.Trainer(config, 2, CPU)
        trainer.nets["d_b"]["paired"].load_state_dict(judge.state_dict())
        for _ in range(2):
            assert all(term.isfinite() for term in trainer.step(x, x.flip(3)).values())
        learnt = [*trainer.nets.eval()["g_ab"](x)[:1], *trainer.nets["d_b"]["paired"].parameters()]
        results.append(torch.cat([tensor.flatten() for tensor in learnt]))
    assert not torch.equal(*results)


def test_snippets_run(trained, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shares = re.search(r"```python\n(.*?)```", EXERCISES, re.S)[1]
    exec(shares.replace("runs/mini-scheme2", str(trained)), {})
    for line in capsys.readouterr().out.splitlines()[-2:]:
        assert len(json.loads(line)) == TINY["masks"]
        assert sum(json.loads(line)) == pytest.approx(1)
    copy = re.search(r"    nets = torch.load.*?\n\n", README, re.S)[0].replace("\n    ", "\n")
    copy = copy.strip().replace("runs/mini-scheme2", str(trained))
    names = {"torch": torch, "SchemeTwoGenerator": SchemeTwoGenerator}
    exec(copy.replace("width=16, blocks=3", "width=4, blocks=1, masks=3"), names)
    generator = aggan.load_generators(trained, CPU)[0]["g_ab"]
    assert torch.equal(names["t"].image, generator(torch.zeros(1, 3, 64, 64)).image)


PIECES = README.split("## Copy these pieces")[1].split("\n## ")[0]
PIECES = re.findall(r"^\| (`.*) \| (.*)\|$", PIECES, re.M)


@pytest.mark.parametrize("pieces, needed", PIECES)
def test_pieces_run_alone(folders, pieces, needed):
    """Each row of the README's table: with what it needs, it runs without the rest of the file."""
    names, copied = (set(re.findall(r"`(\w+)`", cell)) for cell in (pieces, pieces + needed))
    source, parts = (ROOT / "aggan.py").read_text(encoding="utf-8"), []
    if "sections 1 and 2" in needed:
        first = source[: source.index("# ---------- 3.")]
        copied |= set(re.findall(r"^(?:def |class |)(\w+)(?:\(| =)", first, re.M))
    x, mask = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32)
    for part in ast.parse(source).body:
        imported = isinstance(part, (ast.Import, ast.ImportFrom))
        constant = isinstance(part, ast.Assign) and getattr(part.targets[0], "id", "") in copied
        if imported or constant or getattr(part, "name", None) in copied:
            parts.append(part)
    alone = {"__name__": "copied"}
    exec(compile(ast.Module(parts, []), "copied", "exec"), alone)
    (folders / "trainA" / "0.png").write_text("broken")
    guide = [ActivationDiscriminator(3, 4)] if "GuidedGenerator" in names else []
    tries = {
        "fuse": lambda fuse: fuse(x, mask.expand(2, 2, 32, 32), x[:, None]),
        "carry": lambda carry: carry(x, x[..., :8], x[..., 8:16]),
        "Generator": lambda make: make(*guide, 4, 1)(x).image,
        "Discriminator": lambda make: make(width=4)(x, mask),
        "adversarial_loss": lambda loss: loss(mask, True),
        "total_variation_loss": lambda loss: loss(mask),
        "loss": lambda loss: loss(mask, mask),
        "AdaptiveCurriculum": lambda make: make(100)(0),
        "ImagePool": lambda make: make().query(x, mask)[0],
        "UnpairedImages": lambda make: make(*folders.glob("train*"), 32, 36)[0][0],
    }
    for name in names:
        attempt = next(attempt for kind, attempt in tries.items() if name.endswith(kind))
        assert attempt(alone[name]).isfinite().all(), name
