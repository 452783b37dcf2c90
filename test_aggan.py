"""Tests of aggan.py, in its order. No network, no GPU, seeded. Run: pytest -q"""
import ast
import contextlib
import dataclasses
import functools
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import aggan
from aggan import (Config, CycleGANGenerator, GatedGenerator, GuidedGenerator, ImagePool, PatchDiscriminator,
                   ResidualAttentionDiscriminator, SchemeOneGenerator, SchemeTwoGenerator)

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SIZES = [(256, 256), (64, 64), (64, 96)]
TINY = dict(width=4, blocks=1, masks=3, size=32, resize=36, workers=0, log_every=2, save_every=2,
            device="cpu")
# of a process whose lines are read: a line is one write, which none from elsewhere, and no kill, can split
BY_LINES = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def parameters(module):
    return sum(p.numel() for p in module.parameters())

def random_translation(batch=2, n=4, height=5, width=6):
    x = torch.rand(batch, 3, height, width) * 2 - 1
    attention = torch.randn(batch, n, height, width).softmax(1)
    content = torch.rand(batch, n - 1, 3, height, width) * 2 - 1
    return x, attention, content

def run(*arguments, **options):
    """The command line in a process of its own, as a user calls it."""
    return subprocess.run([sys.executable, str(ROOT / "aggan.py"), *map(str, arguments)],
                          capture_output=True, text=True, timeout=100, **options)

def script(name, folder=ROOT / "data"):
    """NAME.py of the folder as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module

def sample_image(path, size):
    return aggan.to_tensor(aggan.TF.center_crop(aggan.load_image(path, size=size), size))

def command_line(fields):
    """Fields of Config as options."""
    return [x for name, value in fields.items() for x in (aggan.flag(name), value)]

# ---------------------------------------- 0. the module ----------------------------------------

def test_import_has_no_side_effects(tmp_path):
    code = ("import random, sys, torch; before = torch.get_rng_state(), random.getstate()\n"
            f"sys.path.insert(0, {str(ROOT)!r}); import aggan\n"
            "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()\n"
            "assert not torch.cuda.is_initialized() and torch.get_default_dtype() == torch.float32\n")
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())

def test_line_counts():
    lines = (ROOT / "aggan.py").read_text(encoding="utf-8").splitlines()
    banners = [i for i, line in enumerate(lines) if line.startswith("# ====")]
    assert len(banners) == 2 and banners[1] - banners[0] <= 520 and len(lines) <= 1200

def test_docstring_names_exist():
    for name in re.findall(r"`(\w+)`", aggan.__doc__):
        assert hasattr(aggan, name) or name in ("g_ab", "g_ba"), name
    for model in aggan.PRESETS:
        assert f"\n  {model} " in aggan.__doc__

# ---------------------------------------- 1. the fusion formula ----------------------------------------

def test_fuse_is_the_naive_loop():
    x, attention, content = random_translation()
    out = aggan.fuse(x, attention, content)
    assert out.shape == x.shape
    for b in range(2):
        for c in range(3):
            for h in range(5):
                for w in range(6):
                    pixel = attention[b, 3, h, w].item() * x[b, c, h, w].item()
                    for f in range(3):
                        pixel += attention[b, f, h, w].item() * content[b, f, c, h, w].item()
                    assert out[b, c, h, w].item() == pytest.approx(pixel, abs=1e-6)

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

# ---------------------------------------- 2. building blocks ----------------------------------------

@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_blocks_shapes(norm):
    x = torch.randn(2, 3, 32, 48)
    features = aggan.Encoder(8, 2, norm)(x)
    assert features.shape == (2, 32, 8, 12)
    assert aggan.ResidualBlock(32, norm)(features).shape == features.shape
    for upsample in ("nearest", "transposed"):
        assert aggan.Decoder(7, 8, norm, upsample)(features).shape == (2, 7, 32, 48)
        assert aggan.up_block(32, 5, norm, upsample)(features).shape == (2, 5, 16, 24)
    assert aggan.conv_block(3, 5, 7, norm=norm)(x).shape == (2, 5, 32, 48)

def test_nearest_upsampling_leaves_no_grid():
    """Of a flat input: a convolution after doubled pixels stays flat, a transposed one alternates."""
    flat = torch.ones(1, 8, 6, 6)
    linear = nn.Upsample, nn.Conv2d, nn.ConvTranspose2d  # without norm and ReLU
    blocks = {k: nn.Sequential(*(m for m in aggan.up_block(8, 4, upsample=k).modules()
                                 if isinstance(m, linear))) for k in ("nearest", "transposed")}
    spread = {k: block(flat)[..., 2:-2, 2:-2].std((2, 3)) for k, block in blocks.items()}
    assert spread["nearest"].max() < 1e-6 and spread["transposed"].min() > 0.01
    assert parameters(blocks["nearest"]) == parameters(blocks["transposed"]) == 8 * 4 * 9 + 4

@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
def test_norms_are_the_papers(upsample):
    modules = list(SchemeTwoGenerator(4, 1, upsample=upsample).modules())
    norms = [m for m in modules if isinstance(m, nn.InstanceNorm2d)]
    assert len(norms) == 3 + 2 + 4 and not any(m.affine or m.track_running_stats for m in norms)
    convolutions = [m for m in modules if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) == 3 + 2 + 6 and all(m.bias is not None for m in convolutions)
    for m in convolutions:  # stride 1: reflection; stride 2, down or up: zeros
        assert m.padding_mode == ("reflect" if m.stride == (1, 1) else "zeros")
    leaky = [m for m in PatchDiscriminator(width=4).modules() if isinstance(m, nn.LeakyReLU)]
    assert len(leaky) == 4 and all(m.negative_slope == 0.2 for m in leaky)

# ---------------------------------------- 3. generators ----------------------------------------

@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("make, n", [
    (SchemeOneGenerator, 2), (SchemeTwoGenerator, 10), (CycleGANGenerator, 2), (GatedGenerator, 2)])
def test_generator_shapes_and_ranges(make, n, height, width):
    x = torch.rand(2, 3, height, width) * 2 - 1
    t = make(width=8, blocks=1)(x)
    assert t.image.shape == (2, 3, height, width)
    assert t.attention.shape == (2, n, height, width)
    assert t.content.shape == (2, n - 1, 3, height, width)
    assert t.foreground.shape == (2, 1, height, width)
    torch.testing.assert_close(t.attention.sum(1), torch.ones(2, height, width))
    torch.testing.assert_close(t.foreground[:, 0], t.attention[:, :-1].sum(1))
    assert t.attention.min() >= 0 and t.attention.max() <= 1
    assert t.content.abs().max() <= 1 and t.image.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(t.image, aggan.fuse(x, t.attention, t.content))

def test_full_size_networks():
    with torch.device("meta"):  # full width at 256 x 256, without the arithmetic
        x = torch.empty(1, 3, 256, 256)
        one, two = SchemeOneGenerator(), SchemeTwoGenerator()
        assert one(x).attention.shape == (1, 2, 256, 256)
        assert two(x).content.shape == (1, 9, 3, 256, 256)
        assert GatedGenerator()(x).attention.shape == (1, 2, 256, 256)
        assert GuidedGenerator(ResidualAttentionDiscriminator())(x).attention.shape == (1, 2, 256, 256)
        assert parameters(two) == parameters(SchemeTwoGenerator(upsample="transposed")) == 11_853_669
        assert parameters(CycleGANGenerator()) == 11_378_179
        assert parameters(one) == 11_378_179 + 64 * 49 + 1  # CycleGAN's generator and one more output channel
        # c7 32, c3 64, R64, c3 64, c3 32, c7 1
        attention = 3 * 32 * 49 + 32 * 49 + (32 * 64 + 3 * 64 * 64 + 64 * 32) * 9 + (32 + 4 * 64 + 32 + 1)
        assert parameters(aggan.AttentionNetwork()) == attention
        assert parameters(GatedGenerator()) == 11_378_179 + attention
        branch = (64 * 128 + 128 * 256 + 2 * 256 * 256) * 9 + 128 + 3 * 256 + 2 * (256 * 256 + 256)
        assert parameters(ResidualAttentionDiscriminator()) == 2_764_737 + branch
        guide = PatchDiscriminator()
        assert parameters(GuidedGenerator(guide)) == 11_378_179  # without its guide
        assert parameters(PatchDiscriminator()) == 2_764_737
        assert parameters(PatchDiscriminator(4)) == 2_764_737 + 64 * 16

def test_number_of_masks():
    t = SchemeTwoGenerator(width=4, blocks=0, masks=2)(torch.zeros(1, 3, 16, 16))
    assert t.attention.shape[1] == 2 and t.content.shape[1] == 1

def test_cyclegan_repaints_everything():
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    net = CycleGANGenerator(4, 1)
    t = net(x)
    assert torch.equal(t.foreground, torch.ones(2, 1, 32, 32)) and torch.equal(t.image, t.content[:, 0])
    torch.testing.assert_close(t.image, net.decoder(net.encoder(x)).tanh())

def test_gated_generator_sees_the_foreground_alone():
    x, net = torch.rand(2, 3, 32, 32) * 2 - 1, GatedGenerator(4, 1)
    a = net.attention_network(x)
    assert a.shape == (2, 1, 32, 32) and 0 < a.min() and a.max() < 1
    inner = net.generator.decoder(net.generator.encoder(a * x)).tanh()
    t = net(x)
    torch.testing.assert_close(t.foreground, a)
    torch.testing.assert_close(t.image, a * inner + (1 - a) * x)

@pytest.mark.parametrize("kind", [PatchDiscriminator, ResidualAttentionDiscriminator])
def test_guided_generator(kind):
    x = (torch.rand(2, 3, 32, 48) * 2 - 1).requires_grad_()
    guide = kind(width=4)
    net, a = GuidedGenerator(guide, 4, 1), guide.attention(x).detach()
    inner = net.generator.decoder(net.generator.encoder(x * (1 + a))).tanh()
    t = net(x)
    assert t.image.shape == (2, 3, 32, 48) and t.content.shape == (2, 1, 3, 32, 48)
    torch.testing.assert_close(t.attention, torch.cat([a, 1 - a], 1))
    torch.testing.assert_close(t.image, inner)  # not fused with the input
    assert not any(name.startswith("guide") for name, _ in net.named_parameters())
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (t.image, inner)]
    torch.testing.assert_close(*grads)  # a is a constant to the gradient
    net(x).image.sum().backward()
    assert all(p.grad is None for p in guide.parameters())

# ---------------------------------------- 4. discriminators ----------------------------------------

@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_discriminator_shapes(height, width, norm):
    x = torch.randn(2, 4, height, width)
    assert PatchDiscriminator(4, 4, norm)(x).shape == (2, 1, height // 8 - 2, width // 8 - 2)
    assert PatchDiscriminator(4, 4, norm, head="pooled")(x).shape == (2, 1, 1, 1)
    assert ResidualAttentionDiscriminator(4, 4, norm)(x).shape == (2, 1, height // 8 - 2, width // 8 - 2)
    assert ResidualAttentionDiscriminator(4, 4, norm, head="pooled")(x).shape == (2, 1, 1, 1)

def test_a_patch_logit_sees_70_pixels():
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator = PatchDiscriminator(width=4)
    discriminator.normed = False  # norms see the whole image
    discriminator(x)[0, 0, 7, 7].backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    assert (rows.max() - rows.min() + 1).item() == 70

def test_norms_of_the_heads():
    def layers(head):
        net = PatchDiscriminator(3, 4, "batch", head)
        return [type(m).__name__ for part in (net.stem, net.trunk, net.head) for m in part]
    patch, pooled = layers("patch"), layers("pooled")
    assert patch[:3] == ["Conv2d", "LeakyReLU", "Conv2d"] and patch.count("BatchNorm2d") == 3
    assert pooled[:3] == ["Conv2d", "BatchNorm2d", "LeakyReLU"] and pooled.count("BatchNorm2d") == 4
    assert pooled[-4:] == ["Conv2d", "LeakyReLU", "AdaptiveAvgPool2d", "Conv2d"]

def test_views():
    image, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    assert aggan.whole(image, mask) is image
    seen = aggan.paired(image, mask)
    assert torch.equal(seen[:, :1], mask) and torch.equal(seen[:, 1:], image)
    assert torch.equal(aggan.masked(image, mask, 0.0), image)

def test_masked_at_a_tenth():
    image = torch.tensor([[[[-0.5, 0.25], [1.0, -1.0]]]]).expand(1, 3, 2, 2)
    mask = torch.tensor([[[[0.1, 0.0999], [0.0, 0.9]]]])
    seen = torch.tensor([[[[-0.5, 0.0], [0.0, -1.0]]]]).expand(1, 3, 2, 2)
    assert torch.equal(aggan.masked(image, mask, 0.1), seen)
    assert torch.equal(aggan.masked(image, mask), seen)

def expected_map(features):
    """Of one image: the mean over channels, stretched to [0, 1] and to the image's size."""
    small = features.mean(1, keepdim=True)
    small = (small - small.min()) / (small.max() - small.min())
    return nn.functional.interpolate(small, scale_factor=8, mode="bilinear")

def test_pha_is_where_the_third_block_responds():
    x, net = torch.rand(2, 3, 48, 64) * 2 - 1, PatchDiscriminator(width=4)
    features = nn.Sequential(*net.stem, *net.trunk)(x)
    assert features.shape == (2, 16, 6, 8)
    a = net.attention(x)
    assert a.shape == (2, 1, 48, 64)
    for i in range(2):
        torch.testing.assert_close(a[i:i + 1], expected_map(features[i:i + 1].abs()))
        assert a[i].min() < 0.1 and a[i].max() > 0.9 and a[i].min() >= 0 and a[i].max() <= 1
    flat = PatchDiscriminator(width=4).attention(torch.zeros(1, 3, 32, 32))
    assert flat.isfinite().all() and flat.abs().max() <= 1  # nothing to stretch

def test_tam_adds_a_learnt_mask_to_the_trunk():
    x, net = torch.rand(2, 3, 48, 64) * 2 - 1, ResidualAttentionDiscriminator(width=4)
    a = net.attention(x)
    assert a.shape == (2, 1, 48, 64) and 0 <= a.min() <= a.max() <= 1
    stem = net.stem(x)
    trunk, m = net.trunk(stem), net.mix(net.branch(stem))  # here the branch needs no resizing
    assert m.shape == trunk.shape == (2, 16, 6, 8) and 0 < m.min() and m.max() < 1
    torch.testing.assert_close(net(x), net.head(trunk + m * trunk))
    torch.testing.assert_close(a, torch.cat([expected_map(m[:1]), expected_map(m[1:])]))
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # the mask learns from the verdict
    assert net(torch.rand(1, 3, 36, 36)).shape == (1, 1, 2, 2)  # here it does

def test_layers_of_the_attention_branches():
    def kinds(layers):
        return [type(m).__name__ for m in layers if not list(m.children())]
    net = aggan.AttentionNetwork()
    conv, up = ["Conv2d", "InstanceNorm2d", "ReLU"], ["Upsample"]
    residual = conv + ["Conv2d", "InstanceNorm2d"]
    assert kinds(net.modules()) == 2 * conv + residual + 2 * (up + conv) + ["Conv2d"]
    assert isinstance(net[2], aggan.ResidualBlock)
    ups = [m for m in net.modules() if isinstance(m, nn.Upsample)]
    assert [(m.mode, m.scale_factor) for m in ups] == [("nearest", 2.0)] * 2
    pool = ["MaxPool2d"]
    assert kinds(ResidualAttentionDiscriminator().branch.modules()) == 2 * (pool + conv) + 2 * conv
    assert kinds(ResidualAttentionDiscriminator().mix) == ["Conv2d", "ReLU", "Conv2d", "Sigmoid"]

# ---------------------------------------- 5. losses ----------------------------------------

def test_adversarial_loss_least_squares():
    logits = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    # real: ((0.5 - 1)^2 + (-1 - 1)^2) / 2 = (0.25 + 4) / 2
    assert aggan.adversarial_loss(logits, True).item() == pytest.approx(2.125)
    # fake: (0.5^2 + (-1)^2) / 2 = (0.25 + 1) / 2
    assert aggan.adversarial_loss(logits, False).item() == pytest.approx(0.625)

def test_adversarial_loss_log_form():
    logits = torch.tensor([0.0, math.log(3)]).view(2, 1, 1, 1)  # probabilities 1/2 and 3/4
    # real: -(log 1/2 + log 3/4) / 2;  fake: -(log 1/2 + log 1/4) / 2 = 1.5 log 2
    real = -(math.log(1 / 2) + math.log(3 / 4)) / 2
    assert aggan.adversarial_loss(logits, True, "vanilla").item() == pytest.approx(real)
    assert aggan.adversarial_loss(logits, False, "vanilla").item() == pytest.approx(1.5 * math.log(2))
    with pytest.raises(ValueError, match="hinge"):
        aggan.adversarial_loss(logits, True, "hinge")

@pytest.mark.parametrize("loss", [aggan.cycle_loss, aggan.pixel_loss, aggan.identity_loss])
def test_l1_losses_are_means(loss):
    out, x = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    out[0, 0] = torch.tensor([[0.5, -1.0]])
    assert loss(out, x).item() == pytest.approx(1.5 / 6)  # |0.5| + |-1| over 6 values

def test_total_variation_of_a_step_edge():
    mask = torch.zeros(2, 1, 4, 6)
    mask[0, :, :, 3:] = 0.5  # an edge 4 high, step 0.5: 4 * 0.5 = 2; the second mask is flat: (2 + 0) / 2
    assert aggan.total_variation_loss(mask).item() == pytest.approx(1.0)
    mask[1, :, 2:] = 1.0     # an edge 6 wide, step 1: 6; (2 + 6) / 2
    assert aggan.total_variation_loss(mask).item() == pytest.approx(4.0)

# ---------------------------------------- 6. the objective ----------------------------------------

FINAL = aggan.configure(dict(TINY, objective="final", a="a", b="b"))
RELEASED = aggan.configure(dict(TINY, objective="released", a="a", b="b"))
BATCH = (torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).unbind()

def test_objective_by_hand_at_two_values_of_r():
    losses = dict(gan=0.4, paired=0.6, cycle=0.2, pixel=0.3, tv=1000.0)
    losses = {k: torch.tensor(v) for k, v in losses.items()}
    # r = 0.01: 0.01 (10 * 0.2 + 1 * 0.3) + 0.99 (0.5 * 0.4 + 0.5 * 0.6 + 1e-6 * 1000) = 0.023 + 0.49599
    assert aggan.weigh(losses, FINAL, 0.01).item() == pytest.approx(0.51899)
    # r = 0.5: 0.5 (2.3) + 0.5 (0.501)
    assert aggan.weigh(losses, FINAL, 0.5).item() == pytest.approx(1.4005)
    # as released there is no r: 0.4 + 10 * 0.2 + 5 * 0.1
    released = {k: torch.tensor(v) for k, v in dict(gan=0.4, cycle=0.2, identity=0.1).items()}
    config = dataclasses.replace(RELEASED, curriculum="none")
    assert aggan.weigh(released, config, 0.01).item() == pytest.approx(2.9)

def test_scheduled_r_and_learning_rate():
    papers, ramp = (Config(curriculum=name, r=0.4) for name in ("papers", "ramp"))
    assert [aggan.scheduled_r(papers, p) for p in (0.0, 0.0499, 0.05, 1.0)] == [0.01, 0.01, 0.4, 0.4]
    assert [aggan.scheduled_r(ramp, p) for p in (0.0, 0.0499, 0.25, 1.0)] == [0.01, 0.01, 0.1, 0.4]
    rates = [aggan.learning_rate(Config(lr=2.0), p) for p in (0.0, 0.5, 0.75, 1.0)]
    assert rates == [2.0, 2.0, 1.0, 0.0]

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
    """The same from the class."""
    curriculum, rs = aggan.AdaptiveCurriculum(steps, **settings), []
    for step, (e, c) in enumerate(losses):
        rs.append(curriculum(step).item())
        curriculum.update(step, torch.tensor(e), torch.tensor(c))
    return [*rs, curriculum(len(losses)).item()]

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
    rs = r_of(fooled + seen_through, 1000)
    assert rs[500] == pytest.approx(0.25, rel=1e-3) and rs[:500] == sorted(rs[:500])  # the ramp's middle
    assert rs[510] < rs[500] and rs[560] < 0.1 and rs[-1] == pytest.approx(0.01)
    assert min(rs) >= 0.01 - 1e-6 and max(r_of(fooled * 2, 1000)) == pytest.approx(0.5)
    assert r_of(seen_through, 500) == pytest.approx([0.01] * 501)
    half = [(0.675, 1.0)] * 500  # half-way from 0.35 to a copy
    assert r_of(half, 500)[-1] == pytest.approx(0.25, rel=1e-3)
    back = r_of(fooled + seen_through + fooled, 1500)  # and it comes back
    assert back[1000] == pytest.approx(0.01) and back[-1] == pytest.approx(0.5)

def test_short_and_long_runs_have_the_same_curriculum():
    def losses(progress):
        return 0.5 + 0.4 * math.sin(6 * progress), 1.0
    short, long = (r_of([losses(i / steps) for i in range(steps)], steps) for steps in (500, 5000))
    assert short[::50] == pytest.approx(long[::500], abs=0.02) and max(short) > 0.1

def on_real(logits, kind):
    return ((logits - 1) ** 2).mean() if kind == "lsgan" else -logits.sigmoid().log().mean()

def on_fake(logits, kind):
    return (logits ** 2).mean() if kind == "lsgan" else -(1 - logits.sigmoid()).log().mean()

def generators(nets, direction, a=BATCH[0], b=BATCH[1]):
    """The arguments of `generator_objective` that come first, for "ab" or "ba"."""
    x, y = (a, b) if direction == "ab" else (b, a)
    g, g_back = nets["g_" + direction], nets["g_" + direction[::-1]]
    return g, g_back, aggan.judges(nets, direction[1], aggan.whole), x, y

@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("kind", ["lsgan", "vanilla"])
@pytest.mark.parametrize("model", list(aggan.PRESETS))
def test_generator_objective_from_its_parts(model, kind, norm):
    config = dataclasses.replace(FINAL, model=model, l_identity=5.0, gan=kind, norm=norm)
    nets = aggan.build(config)
    for direction in ("ab", "ba"):
        g, f, judges, a, b = generators(nets, direction)
        total, losses, fake = aggan.generator_objective(g, f, judges, a, b, config, 0.2)
        d, paired = nets["d_" + direction[1]], nets["paired_" + direction[1]]
        torch.testing.assert_close(fake.image, g(a).image)
        expected = {
            "gan": on_real(d(g(a).image), kind),
            "paired": on_real(paired(torch.cat([g(a).foreground, g(a).image], 1)), kind),
            "cycle": (f(g(a).image).image - a).abs().mean(),
            "pixel": (g(a).image - a).abs().mean(),
            "identity": (g(b).image - b).abs().mean(),
            "tv": aggan.total_variation_loss(g(a).foreground)}
        assert losses.keys() == expected.keys()
        for term in expected:
            torch.testing.assert_close(losses[term], expected[term])
        torch.testing.assert_close(total, aggan.weigh(expected, config, 0.2))

@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("kind", ["lsgan", "vanilla"])
def test_discriminator_objective_from_its_parts(kind, norm):
    config = dataclasses.replace(FINAL, gan=kind, norm=norm, l_copy=0.3)
    nets = aggan.build(config)
    real, fake, other = ((torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)) for _ in "rfo")
    judges = aggan.judges(nets, "a", aggan.whole)
    total, losses, copy = aggan.discriminator_objective(judges, real, fake, other, config)

    def expected(net, real, fake):
        return (on_real(net(real), kind) + on_fake(net(fake), kind)) / 2
    gan = expected(nets["d_a"], real[0], fake[0])
    # the fake's mask beside the real image too
    pair = expected(nets["paired_a"], torch.cat([fake[1], real[0]], 1), torch.cat([fake[1], fake[0]], 1))
    untouched = on_fake(nets["d_a"](other[0]), kind) / 2
    torch.testing.assert_close(losses, {"d_gan": gan, "d_copy": untouched, "d_paired": pair})
    torch.testing.assert_close(total, gan + 0.3 * untouched + pair)
    torch.testing.assert_close(copy, on_real(nets["d_a"](other[0]), kind))  # of a translation that copies
    assert not copy.requires_grad

def test_terms_of_weight_zero_are_not_computed():
    config = dataclasses.replace(FINAL, l_paired=0, l_cycle=0, l_pixel=0, l_tv=0)
    nets = aggan.build(config)
    assert set(nets) == {"g_ab", "g_ba", "d_a", "d_b"}
    calls = []
    for name, net in nets.items():
        net.register_forward_hook(lambda *_, name=name: calls.append(name))
    _, losses, _ = aggan.generator_objective(*generators(nets, "ab"), config, 0.5)
    assert list(losses) == ["gan"] and sorted(calls) == ["d_b", "g_ab"]
    seen = (torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32))
    for curriculum, needed in (("papers", False), ("adaptive", True)):  # which compares with the untouched
        config = dataclasses.replace(config, l_copy=0, curriculum=curriculum, merge=False)
        calls.clear()
        total, losses, copy = aggan.discriminator_objective(
            aggan.judges(nets, "a", aggan.whole), seen, seen, seen, config)
        torch.testing.assert_close(total, losses["d_gan"])
        assert calls == ["d_a"] * (2 + needed) and (copy > 0) == needed

def test_masks_learn_from_the_paired_discriminator():
    config = dataclasses.replace(FINAL, l_gan=0, l_cycle=0, l_pixel=0, l_tv=0)
    nets = aggan.build(config)
    with torch.no_grad():  # a discriminator that looks at nothing but the mask
        nets["paired_b"].stem[0].weight[:, 1:] = 0
    loss, *_ = aggan.generator_objective(*generators(nets, "ab"), config, 0.5)
    loss.backward()
    assert nets["g_ab"].attention_decoder[-1].weight.grad.abs().max() > 0

def gradients(trainer, which):
    """Half a step of a trainer, without the update: the loss terms."""
    trainer.view = aggan.whole
    if which == "g":
        return trainer.generator_gradients(*BATCH)[0]
    masks = [torch.linspace(0, 1, 32).expand(2, 1, 32, 32).roll(8 * k, -1) for k in range(4)]
    return trainer.discriminator_gradients(BATCH[0], masks[0], BATCH[1], masks[1],
                                           BATCH[1], masks[2], BATCH[0], masks[3])[0]

def test_each_step_leaves_the_others_gradients_alone():
    for first, second in (("g", "d"), ("d", "g")):
        trainer = aggan.Trainer(FINAL, 10, torch.device("cpu"))
        own, others = trainer.parameters[first], trainer.parameters[second]
        assert len(own) + len(others) == len(list(trainer.nets.parameters()))
        assert all(("g_" in name) == (any(p is q for q in trainer.parameters["g"]))
                   for name, p in trainer.nets.named_parameters())
        before = [p.clone() for p in trainer.nets.parameters()]
        gradients(trainer, first)
        assert all(p.grad is None for p in others) and all(p.grad is not None for p in own)
        assert all(map(torch.equal, before, trainer.nets.parameters()))
        before = [p.clone() for p in others]
        trainer.update(first)
        assert all(map(torch.equal, before, others))
        gradients(trainer, first)
        old = [p.grad for p in own]
        gradients(trainer, first)  # not added to those before
        assert all(p.grad is not q and torch.equal(p.grad, q) for p, q in zip(own, old))

@pytest.mark.parametrize("norm, merge, passes", [
    ("instance", True, 4), ("batch", True, 6), ("instance", False, 6)])
@pytest.mark.parametrize("l_paired, l_identity", [(0, 5), (1, 5), (0, 0)])
def test_passes_of_a_step(norm, merge, passes, l_paired, l_identity):
    """With cycle and identity terms, four calls of generators and four of each kind of discriminators."""
    config = dataclasses.replace(RELEASED, norm=norm, merge=merge, l_paired=l_paired, l_identity=l_identity)
    trainer, calls = aggan.Trainer(config, 10, torch.device("cpu")), []
    for name, net in trainer.nets.items():
        net.register_forward_hook(lambda *_, name=name: calls.append(name.partition("_")[0]))
    trainer.train_step(*BATCH)
    copies = ["d"] * 2 * (passes == 6)  # in the same batch, or for itself
    generators = ["g"] * (passes if l_identity else 4)
    expected = generators + ["d"] * passes + copies + ["paired"] * passes * l_paired
    assert sorted(calls) == sorted(expected)

def test_train_step_puts_the_parts_together(monkeypatch):
    config = dataclasses.replace(FINAL, merge=False)
    trainer, seen = aggan.Trainer(config, 10, torch.device("cpu")), {"g": [], "d": []}
    trainer.step = 8
    for pool in trainer.pools.values():  # full of zeros: whatever comes out of it can be told from a fake
        pool.items = [(torch.zeros(3, 32, 32), torch.zeros(1, 32, 32))] * 50
    def record(name, function):
        def recorded(*arguments):
            seen[name[0]].append((arguments, function(*arguments)))
            return seen[name[0]][-1][1]
        monkeypatch.setattr(aggan, name, recorded)
    record("generator_objective", aggan.generator_objective)
    record("discriminator_objective", aggan.discriminator_objective)
    figures = trainer.train_step(*BATCH)
    nets, fakes = trainer.nets, {}
    for (arguments, (_, _, fake)), (source, target) in zip(seen["g"], ("ab", "ba"), strict=True):
        g, g_back, judges, x, y, config_, r = arguments
        assert g is nets["g_" + source + target] and g_back is nets["g_" + target + source]
        assert [net for _, net, _ in judges] == [nets["d_" + target], nets["paired_" + target]]
        assert [view for _, _, view in judges] == [aggan.whole, aggan.paired]
        assert x is BATCH["ab".index(source)] and y is BATCH["ab".index(target)] and config_ is config
        assert r is trainer.r[source + target]
        fakes[target] = fake
    pooled_images = []
    for (arguments, _), domain, other in zip(seen["d"], "ba", "ab", strict=True):
        judges, (real, own), pooled, untouched, config_ = arguments
        assert [net for _, net, _ in judges] == [nets["d_" + domain], nets["paired_" + domain]]
        assert real is BATCH["ab".index(domain)] and config_ is config
        assert torch.equal(own, fakes[other].foreground) and not own.requires_grad
        assert untouched[0] is BATCH["ab".index(other)]
        assert torch.equal(untouched[1], fakes[domain].foreground)
        for image, mask, new, new_mask in zip(*pooled, fakes[domain].image, fakes[domain].foreground):
            is_new = torch.equal(image, new) and torch.equal(mask, new_mask)
            assert is_new or not (image.any() or mask.any())
            pooled_images.append(image)
    assert any(not image.any() for image in pooled_images)
    for optimizer in trainer.optimizers.values():
        group, = optimizer.param_groups
        assert group["lr"] == aggan.learning_rate(FINAL, 0.8) and group["betas"] == (0.5, 0.999)
    for i, k in enumerate(("ab", "ba")):  # of 10 steps 2 % are less than one: no mean yet
        torch.testing.assert_close(trainer.curricula[k].e, seen["g"][i][1][1]["gan"].detach())
        torch.testing.assert_close(trainer.curricula[k].c, seen["d"][i][1][2])
    assert trainer.step == 9 and list(figures) == trainer.names
    torch.testing.assert_close(figures["attention_ab"], fakes["b"].foreground.mean())
    sums = {term: seen["g"][0][1][1][term] + seen["g"][1][1][1][term] for term in seen["g"][0][1][1]}
    sums |= {term: seen["d"][0][1][1][term] + seen["d"][1][1][1][term] for term in seen["d"][0][1][1]}
    assert len(sums) == 8
    for term, value in sums.items():
        torch.testing.assert_close(figures[term], value.detach())

MEJJATI = aggan.configure(dict(TINY, model="mejjati", a="a", b="b", merge=False))

def test_mejjati_switches_after_three_tenths():
    trainer = aggan.Trainer(MEJJATI, 10, torch.device("cpu"))
    seen = {}
    for name in ("d_a", "d_b"):
        trainer.nets[name].register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].detach().clone()))
    attention = [p for k in ("ab", "ba") for p in trainer.nets["g_" + k].attention_network.parameters()]
    others = [p for k in ("ab", "ba") for p in trainer.nets["g_" + k].generator.parameters()]
    for step in range(5):
        rest = [p.clone() for p in others]
        seen.clear()
        with torch.no_grad():  # some of the masks below tau
            for k in ("ab", "ba"):
                trainer.nets["g_" + k].attention_network[-1].bias.fill_(-2.2)
            before = [p.clone() for p in attention]
            t = {"b": trainer.nets["g_ab"](BATCH[0]), "a": trainer.nets["g_ba"](BATCH[1])}
        trainer.train_step(*BATCH)
        moved = [not torch.equal(p, q) for p, q in zip(before, attention)]
        assert any(not torch.equal(p, q) for p, q in zip(rest, others))
        assert any(moved) if step < 3 else not any(moved)  # 0.3 of 10 steps
        for domain, other, real in (("a", "b", BATCH[0]), ("b", "a", BATCH[1])):
            by_generator, on_real, _, untouched = seen["d_" + domain]
            fake, own = t[domain], t[other].foreground
            if step < 3:
                assert torch.equal(by_generator, fake.image) and torch.equal(on_real, real)
                assert torch.equal(untouched, BATCH["ab".index(other)])
            else:
                assert 0.05 < (own >= 0.1).float().mean() < 0.95
                assert torch.equal(by_generator, fake.image * (fake.foreground >= 0.1))
                assert torch.equal(on_real, real * (own >= 0.1))
                assert torch.equal(untouched, BATCH["ab".index(other)] * (fake.foreground >= 0.1))
            net = trainer.nets["d_" + domain]
            layers = [*net.stem, *net.trunk, *net.head]
            kept = [m for m in layers if step < 3 or not isinstance(m, nn.InstanceNorm2d)]
            torch.testing.assert_close(net(real), nn.Sequential(*kept)(real))

def test_after_the_switch_only_the_vanilla_discriminators_lose_their_norms():
    config = dataclasses.replace(MEJJATI, l_paired=1.0, norm="batch")
    nets = aggan.build(config)
    for progress, late in ((0.0, False), (0.3, True), (0.2, False)):
        nets.train()
        assert (aggan.switch(nets, config, progress) is aggan.whole) is not late
        assert [nets[k].normed for k in ("d_a", "d_b", "paired_a", "paired_b")] == [not late] * 2 + [True] * 2
        for k in ("g_ab", "g_ba"):  # frozen with their norms' running statistics
            assert nets[k].frozen is late and nets[k].attention_network.training is not late
            assert nets[k].generator.training

def test_pooled_fakes_bring_their_own_masks_to_the_masked_view():
    nets, seen = aggan.build(MEJJATI), []
    nets["d_a"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    real, fake, other, own, mask, its = (torch.rand(2, channels, 32, 32) for channels in (3, 3, 3, 1, 1, 1))
    judges = aggan.judges(nets, "a", aggan.switch(nets, MEJJATI, 0.3))
    aggan.discriminator_objective(judges, (real, own), (fake, mask), (other, its), MEJJATI)
    for image, (whole, part) in zip(seen, ((real, own), (fake, mask), (other, its)), strict=True):
        assert torch.equal(image, whole * (part >= 0.1))

def test_guides_are_the_source_domains_discriminators():
    for attention_map, kind in (("pha", PatchDiscriminator), ("tam", ResidualAttentionDiscriminator)):
        config = aggan.configure(dict(TINY, model="guided", attention_map=attention_map, a="a", b="b"))
        nets = aggan.build(config)
        assert type(nets["d_a"]) is kind
        assert nets["g_ab"].guide[0] is nets["d_a"] and nets["g_ba"].guide[0] is nets["d_b"]
        for direction, x in zip(("ab", "ba"), BATCH):
            total, losses, fake = aggan.generator_objective(*generators(nets, direction), config, 0.5)
            inner = nets["g_" + direction[::-1]].generator
            # the way back is guided by the other discriminator's map of the fake
            back = inner(fake.image * (1 + nets["d_" + direction[1]].attention(fake.image))).image
            torch.testing.assert_close(losses["cycle"], (back - x).abs().mean())
            total.backward()
        assert all(p.grad.abs().max() > 0 for p in nets["g_ab"].generator.decoder[-1].parameters())

def test_presets_are_the_papers():
    common = dict(objective="released", l_gan=1, l_cycle=10, l_paired=0, l_pixel=0, l_tv=0)
    plain = dict(curriculum="none", l_copy=0, tau=0, lr=2e-4)
    expected = {"cyclegan": dict(plain, l_identity=5), "guided": dict(plain, l_identity=0),
                "mejjati": dict(l_identity=0, tau=0.1, switch=0.3, lr=1e-4, curriculum="adaptive", l_copy=1,
                                r=0.8)}
    assert {"scheme1", "scheme2", *expected} == set(aggan.PRESETS)
    for model, fields in expected.items():
        config = aggan.configure(dict(model=model, a="a", b="b"))
        assert {**common, **fields}.items() <= dataclasses.asdict(config).items()
    final = aggan.configure(dict(model="mejjati", objective="final", a="a", b="b"))  # what is asked for wins
    assert (final.l_paired, final.l_pixel, final.curriculum, final.tau) == (0.5, 1, "adaptive", 0.1)

@pytest.mark.parametrize("model", ["scheme1", "scheme2", "mejjati", "guided"])
def test_every_term_works_with_every_mask(model):
    config = aggan.configure(dict(TINY, model=model, objective="final", l_identity=1.0, a="a", b="b"))
    trainer = aggan.Trainer(config, 2, torch.device("cpu"))
    figures = trainer.train_step(*BATCH)
    assert {"gan", "paired", "cycle", "pixel", "identity", "tv", "d_gan", "d_paired"} <= set(figures)
    assert all(v.isfinite() for v in figures.values())

def test_initial_weights():
    nets = aggan.build(Config(width=32, blocks=2, norm="batch"))
    weight = nets["g_ab"].encoder[3].body[1].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 1e-3
    norms = [m for m in nets["d_a"].modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(0.9 < m.weight.mean() < 1.1 for m in norms)

def test_pool_keeps_image_and_mask_together():
    pool, returned = ImagePool(size=5), []
    for i in range(0, 100, 2):
        ids = torch.tensor([i, i + 1.0]).view(2, 1, 1, 1)
        images, masks = pool.query(ids.expand(2, 3, 4, 4), 1000 + ids.expand(2, 1, 4, 4))
        assert images.shape == (2, 3, 4, 4) and masks.shape == (2, 1, 4, 4)
        assert torch.equal(images[:, :1] + 1000, masks)
        assert i >= 4 or torch.equal(images[:, 0, 0, 0], ids.flatten())  # while it fills, what came in
        returned += images[:, 0, 0, 0].tolist()
    assert len(pool.items) == 5 and len(set(returned[5:])) == 95         # each leaves the pool once
    assert 25 < sum(x < i for i, x in enumerate(returned)) < 75          # about half are earlier ones

def test_pool_of_size_zero_returns_what_came_in():
    images, masks = torch.rand(3, 3, 2, 2, requires_grad=True), torch.rand(3, 1, 2, 2)
    out = ImagePool(0).query(images, masks)
    assert torch.equal(out[0], images) and torch.equal(out[1], masks) and not out[0].requires_grad

# ---------------------------------------- 7. data ----------------------------------------

@pytest.fixture
def folders(tmp_path):
    """Two small folders of noise, of different lengths, the images not square."""
    for domain, count, size in (("A", 5, (48, 40)), ("B", 3, (40, 60))):
        for split in ("train", "test"):
            (tmp_path / (split + domain)).mkdir()
            for i in range(count):
                pixels = torch.randint(256, (3, size[1], size[0]), dtype=torch.uint8)
                aggan.TF.to_pil_image(pixels).save(tmp_path / (split + domain) / f"{i}.png")
    return tmp_path

def test_dataset(folders):
    data = aggan.UnpairedImages(folders / "trainA", folders / "trainB", size=32, resize=36, seed=3)
    again = aggan.UnpairedImages(folders / "trainA", folders / "trainB", size=32, resize=36, seed=3)
    other = aggan.UnpairedImages(folders / "trainA", folders / "trainB", size=32, resize=36, seed=4)
    assert len(data) == 5
    for i in (7, 0, 100):
        assert [x.shape for x in data[i]] == [(3, 32, 32)] * 2
        assert all(map(torch.equal, data[i], again[i])) and not all(map(torch.equal, data[i], other[i]))
        assert -1 <= min(x.min() for x in data[i]) and max(x.max() for x in data[i]) <= 1

def test_crops_and_flips(tmp_path):
    for domain in "AB":  # red tells the column, green the row
        (tmp_path / domain).mkdir()
        image = Image.new("RGB", (16, 16))
        image.putdata([(10 * x, 10 * y, 0) for y in range(16) for x in range(16)])
        image.save(tmp_path / domain / "0.png")
    data, corners, flips = aggan.UnpairedImages(tmp_path / "A", tmp_path / "B", size=8, resize=16), set(), 0
    for i in range(60):
        red, green, _ = ((data[i][0] + 1) * 12.75).round()
        flips += red[0, 0].item() > red[0, -1].item()
        corners.add((red.min().item(), green.min().item()))
        assert red.max() - red.min() == 7 and (green[:, 0] == green[0, 0] + torch.arange(8)).all()
    assert 15 < flips < 45 and {x for x, _ in corners} == {y for _, y in corners} == set(range(9))

def test_every_pass_shows_every_image(tmp_path):
    for domain, count in (("A", 6), ("B", 4)):
        (tmp_path / domain).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / domain / f"{i}.png")
    data = aggan.UnpairedImages(tmp_path / "A", tmp_path / "B", size=8, resize=8)
    shown = [[round((x[0, 0, 0].item() + 1) * 12.75) for x in data[i]] for i in range(12)]
    for domain, count in ((0, 6), (1, 4)):
        passes = [[s[domain] for s in shown[i:i + count]] for i in range(0, 12, count)]
        assert all(sorted(p) == list(range(count)) for p in passes) and passes[0] != passes[1]

def test_exif_orientation_grayscale_and_palette(tmp_path):
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(tmp_path / "turned.PNG", exif=exif)
    turned = aggan.load_image(tmp_path / "turned.PNG")
    assert turned.size == (2, 4) and turned.mode == "RGB" and turned.getpixel((1, 0)) == (255, 255, 255)
    deep = Image.new("I;16", (2, 1), 65535)
    deep.putpixel((0, 0), 30000)
    deep.save(tmp_path / "deep.png")
    assert [aggan.load_image(tmp_path / "deep.png").getpixel((x, 0))[0] for x in (0, 1)] == [117, 255]
    image.convert("P").save(tmp_path / "palette.gif")
    assert aggan.load_image(tmp_path / "palette.gif").mode == "RGB"
    assert len(aggan.list_images(tmp_path)) == 3
    assert aggan.to_tensor(turned).shape == (3, 4, 2) and aggan.to_tensor(turned).max() == 1

def odd_images(folder):
    """Images as people have them -> {name: (size, has transparency, red of the last pixel or None)}."""
    def halves(mode, size, left, right):
        image = Image.new(mode, size, left)
        image.paste(right, (size[0] // 2, 0, *size))
        return image
    colour = halves("RGB", (40, 30), (250, 0, 0), (0, 0, 250))
    clear = colour.convert("RGBA")
    clear.putalpha(halves("L", (40, 30), 0, 200))
    palette = colour.quantize(4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    deep = Image.new("I;16", (40, 30), 51400)  # 200 * 257
    saved = {  # name: image, options of save(), red of the last pixel
        "deep.png": (deep, {}, 200), "deep.tif": (deep, {}, 200),
        "dark.png": (Image.new("I;16", (40, 30), 250), {}, 1),
        "big-endian.tif": (Image.frombytes("I;16B", (40, 30), bytes([200, 200]) * 1200), {}, 200),
        "float.tif": (Image.new("F", (40, 30), 0.8), {}, 204),
        "float255.tiff": (Image.new("F", (40, 30), 204), {}, 204),
        "integer.tif": (Image.new("I", (40, 30), 51400), {}, 200),
        "grey.jpg": (Image.new("L", (40, 30), 90), {}, 90),
        "la.png": (clear.convert("LA"), {}, None), "clear.png": (clear, {}, 0),
        "clear.webp": (clear, {}, None),
        "clear.tif": (clear, {}, 0), "palette.gif": (palette, dict(transparency=1), 0),
        "palette.png": (palette, dict(transparency=bytes([255, 0, 128, 7])), 0),
        "key.png": (colour, dict(transparency=(250, 0, 0)), 0),
        "cmyk.jpg": (colour.convert("CMYK"), {}, None), "bit.png": (halves("1", (40, 30), 0, 1), {}, 255),
        "bit.tif": (halves("1", (40, 30), 0, 1), {}, 255),
        "frames.gif": (colour, dict(save_all=True, append_images=[Image.new("RGB", (40, 30), "green")]), 0),
        "frames.webp": (colour, dict(save_all=True, append_images=[Image.new("RGB", (40, 30))]), None),
        "turned.jpg": (colour, dict(exif=exif), None),
        "one.png": (Image.new("RGB", (1, 1), (7, 8, 9)), {}, 7),
        "long.png": (halves("RGB", (300, 30), (9, 9, 9), (90, 0, 0)), {}, 90),
        "narrow.bmp": (Image.new("RGB", (3, 200), (60, 70, 80)), {}, 60),
        "it's a \"photo\" $HOME; ünï 写真.PNG": (colour, {}, 0),
        "no extension": (colour, dict(format="PNG"), 0)}
    for name, (image, options, _) in saved.items():
        image.save(folder / name, **options)
    transparent = {"la.png", "clear.png", "clear.webp", "clear.tif", "palette.png", "palette.gif", "key.png"}
    return {name: ((30, 40) if name == "turned.jpg" else image.size, name in transparent, red)
            for name, (image, _, red) in saved.items()}

def test_odd_images_are_loaded(tmp_path):
    odd = odd_images(tmp_path)
    assert {path.name for path in aggan.list_images(tmp_path)} == set(odd)
    (tmp_path / ".hidden.png").write_bytes(b"as macOS leaves them")
    (tmp_path / ".thumbnails").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / ".thumbnails" / "0.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert len(aggan.list_images(tmp_path)) == len(odd)
    for name, (size, transparent, red) in odd.items():
        image, kept = aggan.load_image(tmp_path / name), aggan.load_image(tmp_path / name, None)
        assert (image.mode, image.size) == ("RGB", size) and kept.size == size, name
        assert kept.mode == ("RGBA" if transparent else "RGB"), name
        assert red is None or abs(image.getpixel((size[0] - 1, size[1] - 1))[0] - red) <= 1, name
        assert min(aggan.load_image(tmp_path / name, size=36).size) == 36
    assert aggan.load_image(tmp_path / "turned.jpg").getpixel((0, 0))[0] > 200  # the left half is above now
    assert aggan.load_image(tmp_path / "turned.jpg").getpixel((0, 39))[2] > 200

def test_a_large_photo_is_cropped(tmp_path):
    for domain in "AB":
        (tmp_path / domain).mkdir()
        Image.new("RGB", (8000, 6000), (10, 200, 90)).save(tmp_path / domain / "0.JPG")
    colour = torch.tensor([10, 200, 90])[:, None, None] / 127.5 - 1
    for x in aggan.UnpairedImages(tmp_path / "A", tmp_path / "B", size=32, resize=36)[0]:
        assert x.shape == (3, 32, 32) and (x - colour).abs().max() < 0.05

def bomb(width, height):
    """A PNG of a few bytes that says it is this large."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

def useless_images(folder):
    """Files that are no use, by name."""
    Image.new("RGB", (40, 30)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    contents = {"text.png": b"not a picture", "empty.jpg": b"", "cut.jpg": whole[:len(whole) // 2],
                "bomb.png": bomb(40000, 40000), "short.png": bomb(400, 400), "program.png": b"%!PS-Adobe-3.0 "
                b"EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n", "noise": bytes(range(256))}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(contents)

def test_useless_images_are_refused_by_name(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("ran a program"))
    for name in useless_images(tmp_path):
        with pytest.raises(aggan.BadInput) as error:
            aggan.load_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    Image.new("RGB", (1000, 9)).save(tmp_path / "strip.png")
    assert aggan.load_image(tmp_path / "strip.png").size == (1000, 9)
    with pytest.raises(aggan.BadInput, match="strip.png.*1000 x 9"):  # would be 286 x 32000 pixels
        aggan.load_image(tmp_path / "strip.png", size=286)

@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_useless_images(folders, capfd, workers):
    names = [f"trainA/{name}" for name in useless_images(folders / "trainA")] + ["testA/1.png"]
    (folders / "testA" / "1.png").write_text("not a picture")
    aggan.main(["train", "--out", str(folders / "run"), *map(str, command_line(dict(
        TINY, a=folders / "trainA", b=folders / "trainB", workers=workers, steps=30)))])
    output = capfd.readouterr()
    warnings = output.err.splitlines()
    assert len(warnings) == len(names) and all("not a usable image" in warning for warning in warnings)
    for name in names:
        assert sum(f"{name}: " in warning for warning in warnings) == 1
    assert "7 of 15 training images were no use" in output.out and "step 30/30" in output.out
    drawn = aggan.to_tensor(aggan.load_image(folders / "run" / "samples" / "0000030.png"))[:, 36:68, 2:34]
    assert (drawn - sample_image(folders / "testA" / "2.png", 32)).abs().max() < 0.01  # in the second row

def test_a_useless_image_that_the_grids_meet_too_is_named_once(folders, capsys):
    for domain in "AB":
        shutil.rmtree(folders / f"test{domain}")  # then the grids show training images
    (folders / "trainA" / "0.png").write_text("not a picture")
    aggan.train(tiny(folders, steps=6))
    output = capsys.readouterr()
    assert output.err.count("0.png: not a usable image") == 1
    assert "1 of 8 training images were no use" in output.out

def test_useless_images_do_not_change_the_order(folders):
    useless_images(folders / "trainA")
    first, second = (aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36) for _ in range(2))
    pairs = {i: first[i][0] for i in range(40)}
    for i in reversed(range(40)):  # as after a resume: other files have been met
        assert torch.equal(second[i][0], pairs[i])
    assert int(first.useless["a"].sum()) == 7 and int(first.useless["b"].sum()) == 0

def test_a_folder_without_one_usable_image(folders, capsys):
    for path in (folders / "trainB").iterdir():
        path.write_text("not a picture")
    data = aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36)
    for i in (0, 1):
        with pytest.raises(aggan.BadInput, match="trainB: not one usable image"):
            data[i]
    assert capsys.readouterr().err.count("not a usable image") == 3

def test_mini_set_is_what_its_script_draws(tmp_path):
    draw = script("draw")
    for name in ("first", "second"):
        draw.draw_set(tmp_path / name, train=1, test=2)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 2 * (1 + 2 + 2)
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        roots = tmp_path / "first", aggan.DATA
        drawn, committed = (aggan.to_tensor(aggan.load_image(root / file)) for root in roots)
        assert drawn.shape == (3, 128, 128)
        assert (drawn - committed).abs().mean() < 0.01  # another Pillow may round otherwise

def test_mini_set_masks_match_their_images():
    for domain in "AB":
        images, masks = (aggan.list_images(aggan.DATA / (k + domain)) for k in ("test", "masks"))
        assert [p.stem for p in images] == [p.stem for p in masks] and len(images) == 60
        assert len(aggan.list_images(aggan.DATA / ("train" + domain))) == 300
        area = torch.stack([aggan.to_tensor(aggan.load_image(p)) for p in masks]).gt(0).float().mean()
        assert 0.05 < area < 0.3

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine; its folder, and its address."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
        def copyfile(self, source, target):  # of the maps: the connection breaks half-way
            content = source.read()
            target.write(content[:len(content) // 2] if "maps" in self.path else content)
    monkeypatch.setenv("no_proxy", "*")
    root = tmp_path / "server"
    root.mkdir()
    handler = functools.partial(Handler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield root, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()

def test_download(folders, server, capsys, monkeypatch):
    root, host = server
    here, parts, timeouts = folders / "my data", ("trainA", "trainB", "testA", "testB"), []
    download = script("download")
    monkeypatch.setattr(download.socket, "setdefaulttimeout", timeouts.append)

    def get(name, *more, fails="", status=2):
        with pytest.raises(SystemExit) if fails else contextlib.nullcontext() as stopped:
            download.main([name, "--folder", str(here), "--host", host, *more])
        output = capsys.readouterr()
        assert not fails or stopped.value.code == status and fails in output.err.splitlines()[-1], output.err
        assert "usage" not in output.err
        return output.out

    def archive(name, parts, empty=()):
        path = root / f"{name}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for part in parts:
                for image in sorted((folders / part).iterdir()):
                    file.write(image, f"{name}/{part}/{image.name}")
            for part in empty:
                file.mkdir(f"{name}/{part}")
        return path
    archive("horse2zebra", parts)
    command = get("horse2zebra").split("aggan.py ")[1]
    for part in parts:
        for image in (folders / part).iterdir():
            assert (here / "horse2zebra" / part / image.name).read_bytes() == image.read_bytes()
    aggan.main([*shlex.split(command), "--out", str(folders / "run"), "--steps", "1",
                *map(str, command_line(TINY))])
    marked = here / "horse2zebra" / "mine.txt"
    marked.write_text("kept")
    get("horse2zebra", fails="exists already")
    archive("apple2orange", parts[:3], parts[3:])
    get("apple2orange", fails="has no testB")
    whole = archive("facades", parts).read_bytes()
    for place in range(50, len(whole) - 1, len(whole) // 20):  # in contents and in the list of files
        (root / "facades.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        get("facades", fails="facades.zip: ")
    archive("maps", parts)
    get("maps", fails="maps.zip: did not arrive whole")
    get("monet2photo", fails="monet2photo.zip: not downloaded (HTTP Error 404")
    get("cats2dogs", fails="invalid choice: 'cats2dogs' (choose from")
    get("ukiyoe2photo", "--host", "http://127.0.0.1:9", fails="ukiyoe2photo.zip: not downloaded (")
    get("ukiyoe2photo", "--host", "nowhere", fails="nowhere/ukiyoe2photo.zip")
    assert [p.name for p in here.iterdir()] == ["horse2zebra"] and marked.read_text() == "kept"
    assert min(timeouts) == max(timeouts) == 60

    def interrupted(name, folder, host=download.HOST):
        assert (name, Path(folder), host) == ("maps", ROOT / "data", download.HOST)
        raise KeyboardInterrupt
    monkeypatch.setattr(download, "download", interrupted)
    with pytest.raises(SystemExit, match="130"):
        download.main(["maps"])
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|.* [GM]B \|$", text, re.M)) == set(download.SETS)
    assert f"<{download.HOST}/>" in text

def test_panels():
    x, attention, content = random_translation(n=3)
    t = aggan.Translation(aggan.fuse(x, attention, content), attention, content)
    shown = aggan.panels(x, t)
    assert shown.shape == (2, 4, 3, 5, 6)
    assert torch.equal(shown[:, 0], x) and torch.equal(shown[:, 3], t.image)
    # by Eq. (1) the image is the content shown, where the foreground is, and the input elsewhere
    foreground = shown[:, 1] / 2 + 0.5
    torch.testing.assert_close(foreground * shown[:, 2] + (1 - foreground) * x, t.image, atol=1e-4, rtol=0)

# ---------------------------------------- 8. training ----------------------------------------

def tiny(folders, **changes):
    given = dict(TINY, a=str(folders / "trainA"), b=str(folders / "trainB"), out=str(folders / "run"))
    return aggan.configure(given | changes)

def weights(run):
    return aggan.load_checkpoint(run)["parts"]["nets"]

def columns(run):
    """Of log.csv, all but the speed."""
    rows = [row.split(",") for row in (run / "log.csv").read_text().splitlines()]
    return [row[:2] + row[3:] for row in rows]

def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)

@pytest.mark.parametrize("changes", [
    dict(curriculum="ramp"), dict(model="scheme1", objective="released"), dict(head="pooled", norm="batch"),
    dict(gan="vanilla", batch_size=2, pool=0, upsample="transposed")])
def test_train_leaves_a_run_folder(folders, capsys, changes):
    run = aggan.train(tiny(folders, steps=3, size=64, resize=64, **changes))
    said = capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.csv", "samples"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["0000002.png", "0000003.png"]
    assert Image.open(run / "samples" / "0000003.png").size == (8 * 66 + 2, 3 * 66 + 2)
    last = aggan.to_tensor(Image.open(run / "samples" / "0000003.png"))
    nets, config = aggan.load_generators(run, torch.device("cpu"))
    b = sample_image(folders / "testB" / "0.png", 64)
    shown, drawn = last[:, 2:66, 7 * 66 + 2:8 * 66], nets["g_ba"](b[None]).image[0]
    assert (shown - drawn).abs().max() < 0.01  # the last panel of the first row
    rows = [row.split(",") for row in (run / "log.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "2", "3"]
    rates = [float(row[rows[0].index("rate")]) for row in rows[1:]]  # of steps 2 and 3, that is after 1 and 2
    assert rates == pytest.approx([aggan.learning_rate(config, step / 3) for step in (1, 2)], rel=1e-4)
    for name in ("r_ab", "r_ba"):
        rs = [float(row[rows[0].index(name)]) for row in rows[1:]]
        if config.curriculum == "ramp":  # means of steps 1 and 2, and of step 3
            assert rs == pytest.approx([(0.01 + 0.5 / 3) / 2, 0.5 * 2 / 3], rel=1e-4)
        assert all(0.01 - 1e-6 <= r <= 0.5 for r in rs) and f"{name} {rs[1]:.3f}" in said[1]
    assert all(math.isfinite(float(value)) for row in rows[1:] for value in row)
    assert len(said) == 2 and "step 3/3" in said[1]
    for figure in ("pairs/s", "left", "gan ", "cycle ", "attention_ab ", "attention_ba "):
        assert figure in said[1]

def test_pictures(folders, monkeypatch):
    pictures = script("pictures")
    monkeypatch.setattr(Image.Image, "quantize", lambda self: self)  # to compare to the bit
    runs = {model: aggan.train(tiny(folders, steps=2, model=model, out=str(folders / model)))
            for model in ("scheme2", "cyclegan")}
    pictures.draw(runs, folders, steps=(0, 2))
    size = 2 * 32 + 2
    names = "strip", "family", "attention"
    strip, family, attention = (Image.open(folders / f"{name}.png").convert("RGB") for name in names)
    assert strip.size == (8 * size, 16 + 2 * size) and family.height == 16 + 2 * size
    assert attention.size == (3 * 34, 16 + 2 * 34)
    x = sample_image(folders / "testA" / "0.png", 32)
    def holds(picture, left, top, image):
        box = left, top, left + image.width, top + image.height
        return picture.crop(box).tobytes() == image.tobytes()
    assert holds(attention, 0, 16, aggan.to_image(x / 2 + 0.5))
    config = aggan.load_checkpoint(runs["scheme2"])["config"]
    fresh = aggan.Trainer(config, 1, torch.device("cpu")).nets["g_ab"].eval()
    trained = aggan.load_generators(runs["scheme2"], torch.device("cpu"))[0]["g_ab"]
    for left, generator in ((34, fresh), (68, trained)):  # after 0 and 2 steps
        mask = aggan.TF.to_tensor(attention.crop((left, 16, left + 32, 48)))
        assert (mask - generator(x[None]).foreground[0]).abs().max() < 0.003
    left = family.width - 6 * size
    for top, white in ((16, False), (16 + size, True)):  # CycleGAN repaints everything
        mask = aggan.TF.to_tensor(family.crop((left + size, top, left + 2 * size - 2, top + size - 2)))
        assert (mask.min() > 0.99) == white
    for picture, x0, run, row, y0, columns in (
            (strip, 0, "scheme2", 0, 16, range(8)), (strip, 0, "scheme2", 1, 16 + size, range(8)),
            (family, left, "scheme2", 2, 16, (0, 1, 3, 4, 5, 7)),
            (family, left, "cyclegan", 2, 16 + size, (0, 1, 3, 4, 5, 7))):
        grid = Image.open(runs[run] / "samples" / "0000002.png")
        for k, column in enumerate(columns):
            tile = grid.crop((2 + 34 * column, 2 + 34 * row, 34 + 34 * column, 34 + 34 * row))
            assert holds(picture, x0 + k * size, y0, tile.resize((64, 64), Image.Resampling.BICUBIC))
    assert holds(attention, 0, 50, aggan.to_image(sample_image(folders / "testB" / "0.png", 32) / 2 + 0.5))
    for picture in (strip, family, attention):  # the texts above
        assert picture.crop((0, 0, picture.width, 16)).convert("L").getextrema()[0] < 100

def test_the_pictures_runs(tmp_path, monkeypatch, capsys):
    pictures, trained, drawn = script("pictures"), [], []
    monkeypatch.setattr(aggan, "train", lambda config, resume, _: trained.append((config, resume)))
    monkeypatch.setattr(pictures, "draw", lambda runs, folder: drawn.append((runs, folder)))
    pictures.main([str(tmp_path / "new")])
    models = "scheme2", "scheme1", "mejjati", "cyclegan", "guided", "guided"
    assert [config.model for config, _ in trained] == [*models]
    assert [config.attention_map for config, _ in trained] == ["pha"] * 5 + ["tam"]
    for config, resume in trained:
        assert resume and not config.a and config.steps == pictures.STEPS[-1]
        assert all(step % config.save_every == 0 for step in pictures.STEPS)
    runs = {name: config.out for name, (config, _) in zip(pictures.MODELS, trained)}
    assert len(set(runs.values())) == 6 and drawn == [(runs, tmp_path / "new")]
    (tmp_path / "file").write_text("")
    for wrong, words in ((tmp_path / "file", "File exists"), ("--fast", "unrecognized arguments: --fast")):
        with pytest.raises(SystemExit, match="2"):
            pictures.main([str(wrong)])
        assert words in capsys.readouterr().err.strip().splitlines()[-1]

def test_tensorboard(folders, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny(folders, steps=5, tensorboard=True)
    with pytest.raises(aggan.BadInput, match="stopped after step 1"):
        aggan.train(config, signals=[signal.SIGTERM])
    early = (folders / "run" / "checkpoint.pt").read_bytes()
    aggan.train(config, resume=True)
    (folders / "run" / "checkpoint.pt").write_bytes(early)  # as if killed before its next checkpoint
    run = aggan.train(config, resume=True)
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    header, *rows = [row.split(",") for row in (run / "log.csv").read_text().splitlines()]
    for name, *column in zip(header, *rows):
        shown = events.Scalars(name)
        assert [event.step for event in shown] == [2, 4, 5], name
        assert [event.value for event in shown] == pytest.approx([*map(float, column)], rel=1e-4), name
    grids = events.Images("samples")
    assert [grid.step for grid in grids] == [1, 2, 4, 5]
    with Image.open(io.BytesIO(grids[-1].encoded_image_string)) as shown:
        drawn = Image.open(run / "samples" / "0000005.png")
        assert (aggan.to_tensor(shown.convert("RGB")) - aggan.to_tensor(drawn)).abs().max() < 0.02
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.csv", "samples", "tensorboard"]
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    def full(_):
        raise OSError("full")
    wrong = "tensorboard: cannot be written .full"
    with monkeypatch.context() as patch, pytest.raises(aggan.BadInput, match=wrong):
        patch.setattr(writer, "flush", full)
        aggan.train(dataclasses.replace(config, out=str(folders / "full")))
    aggan.main(["train", "--out", str(run), "--resume", "--no-tensorboard"])
    monkeypatch.setenv("RANK", "1")  # of several processes the first one writes
    assert list(aggan.train(dataclasses.replace(config, out=str(folders / "second"))).iterdir()) == [
        folders / "second" / "samples"]

def test_without_tensorboard(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(aggan.BadInput, match="pip install tensorboard"):
        aggan.train(tiny(folders, steps=2, tensorboard=True))
    assert not (folders / "run").exists()

def test_log_holds_means_of_the_steps(folders):
    config = tiny(folders, steps=4, log_every=4)
    aggan.train(config)
    header, row = (line.split(",") for line in (Path(config.out) / "log.csv").read_text().splitlines())
    trainer = aggan.Trainer(config, 4, torch.device("cpu"))
    data = aggan.UnpairedImages(config.a, config.b, 32, 36, config.seed)
    cycle = [trainer.train_step(*(x[None] for x in data[i]))["cycle"].item() for i in range(4)]
    assert float(row[header.index("cycle")]) == pytest.approx(sum(cycle) / 4, rel=1e-4)

def test_same_seed_same_weights(folders):
    runs = [weights(aggan.train(tiny(folders, steps=3, seed=seed, out=str(folders / name))))
            for name, seed in (("first", 5), ("second", 5), ("third", 6))]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])

@pytest.mark.parametrize("model, norm, workers, save_every", [
    ("scheme2", "instance", 1, 3), ("scheme2", "batch", 0, 3), ("scheme2", "instance", 0, 100),
    ("mejjati", "batch", 0, 3), ("guided", "batch", 0, 3)])
def test_resume_equals_the_uninterrupted_run(folders, monkeypatch, model, norm, workers, save_every):
    options = dict(steps=9, pool=2, model=model, norm=norm, save_every=save_every, workers=workers)
    whole = aggan.train(tiny(folders, **options))
    config, done = tiny(folders, **dict(options, out=str(folders / "killed"))), []
    step = aggan.Trainer.train_step

    def killed(trainer, *batch):
        if trainer.step == 5:  # after the log's row of step 4, and the checkpoint of step 3, if any
            raise KeyboardInterrupt
        done.append(trainer.step)
        return step(trainer, *batch)
    monkeypatch.setattr(aggan.Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        aggan.train(config)
    monkeypatch.setattr(aggan.Trainer, "train_step", step)
    resumed = aggan.train(config, resume=True)
    assert done == [0, 1, 2, 3, 4]
    first, second = (aggan.load_checkpoint(run) for run in (whole, resumed))
    assert same(first["parts"]["nets"], second["parts"]["nets"])
    assert same(first["parts"]["curricula"], second["parts"]["curricula"])
    assert (first["parts"]["curricula"]["ab.c"] != 1) == (model != "guided")
    for k in "gd":
        states = [state["parts"][k]["state"] for state in (first, second)]
        assert states[0] and all(same(*pair) for pair in zip(*(s.values() for s in states), strict=True))
    (first,), (second,) = first["processes"], second["processes"]
    assert torch.equal(first["random"], second["random"])
    for k in "ab":
        assert len(first["pools"][k]) == 2
        for p, q in zip(first["pools"][k], second["pools"][k], strict=True):
            assert torch.equal(p[0], q[0]) and torch.equal(p[1], q[1])
    assert columns(whole) == columns(resumed)
    assert [row[0] for row in columns(whole)] == ["step", "2", "4", "6", "8", "9"]

def test_collapse_is_reported(tmp_path, capsys):
    for model, value, curriculum, words in (
            ("scheme2", 0.001, "adaptive", "g_ab copies its input, or nearly; r_ab falls"),
            ("scheme2", 0.025, "papers", "g_ab copies its input, or nearly; try --curriculum adaptive"),
            ("scheme1", 0.999, "ramp", "g_ab repaints everything; try --curriculum adaptive"),
            ("mejjati", 0.98, "adaptive", "g_ab repaints everything; r_ab rises"),
            ("scheme2", 0.3, "adaptive", None),
            ("cyclegan", 1.0, "none", None), ("guided", 0.001, "none", None)):
        config = dataclasses.replace(FINAL, model=model, curriculum=curriculum)
        trainer = aggan.Trainer(config, 10, torch.device("cpu"))
        trainer.names = ["attention_ab", "attention_ba"]
        for step, mean in ((1, 0.2), (2, 0.4), (3, value)):
            trainer.step, trainer.rows = step, [torch.full((2,), mean)] * 3
            aggan.write_progress(trainer, tmp_path / "log.csv", 5, 0.1)
        warnings = capsys.readouterr().err.splitlines()
        assert len(warnings) == (2 if words else 0)
        if words:
            assert warnings[0].startswith(
                f"warning: attention_ab is {value:.4f} (so far 0.30 on average): {words}")
            assert warnings[1].startswith(f"warning: attention_ba is {value:.4f} (so far 0.30")

class Evil:
    """Creates a file when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))

def refusal(arguments, capsys, status=2):
    """The one line that the command line prints before it exits with `status`."""
    with pytest.raises(SystemExit) as stopped:
        aggan.main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert stopped.value.code == status and error.count("\n") == 1 and error.startswith("aggan.py"), error
    return error

@contextlib.contextmanager
def changed(path):
    """The state in the checkpoint, to be changed."""
    state = torch.load(path, weights_only=True)
    yield state
    torch.save(state, path)

def test_bad_checkpoints_get_one_line(folders, capsys, monkeypatch):
    devices, build = [], aggan.build

    def built(config):
        nets = build(config)
        devices.append({p.device.type for p in nets.parameters()})
        return nets
    monkeypatch.setattr(aggan, "build", built)
    run = aggan.train(tiny(folders, steps=2))
    capsys.readouterr()
    file, evil = run / "checkpoint.pt", folders / "evil"
    whole = file.read_bytes()
    weight = torch.load(file, weights_only=True)["parts"]["nets"]["g_ab.encoder.0.0.weight"]
    place = whole.index(weight.numpy().tobytes()[:64])

    def change(**fields):
        with changed(file) as state:
            for name, value in fields.items():
                place = next((state[k] for k in ("config", "parts") if name in state[k]), state)
                place[name] = value

    def moments():  # which Adam would take to be as large as the weights
        with changed(file) as state:
            state["parts"]["g"]["state"][0]["exp_avg"] = torch.zeros(1)

    def pools():
        with changed(file) as state:
            state["processes"][0]["pools"]["a"][0] = torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)

    def foreign(content):
        file.unlink()
        torch.save(content, file)

    def newer():
        with changed(file) as state:
            state["format"] += 1

    def archive():
        with zipfile.ZipFile(file, "w") as out:
            out.writestr("hello", "world")
    only_training = [moments, pools, lambda: change(step=-1), lambda: change(step="2")]
    for spoil, words in (
            *((spoil, "not a checkpoint") for spoil in only_training),
            (lambda: file.write_bytes(b""), "not a checkpoint"),
            (lambda: file.write_bytes(whole[:len(whole) // 2]), "not a checkpoint"),
            (lambda: file.write_bytes(whole[:-1]), "not a checkpoint"),
            (lambda: file.write_bytes(whole[:place] + b"!" + whole[place + 1:]), "damaged"),
            (archive, "not a checkpoint"), (lambda: foreign([1, 2]), "not a checkpoint"),
            (lambda: foreign({"state_dict": {"w": torch.zeros(3)}}), "not a checkpoint"),
            (newer, f"of format {aggan.FORMAT + 1}, this program's is {aggan.FORMAT}"),
            (lambda: foreign({"format": aggan.FORMAT, "config": Evil(evil)}), "not a checkpoint"),
            (lambda: foreign(Evil(evil)), "not a checkpoint"),
            (lambda: change(model="vae"), "--model vae: must be one of"),
            (lambda: change(width=2 ** 31), "not a checkpoint"), (lambda: change(blocks=2 ** 31), "--blocks"),
            (lambda: change(width=8), "size mismatch for g_ab"),
            (lambda: change(lr="fast"), "not a checkpoint"), (lambda: change(nets={}), "not a checkpoint"),
            (lambda: change(nets=7), "not a checkpoint")):
        file.write_bytes(whole)
        spoil()
        spoilt = file.read_bytes()
        for arguments in (["translate", run, folders / "testA", "--to", "b", "--out", folders / "new"],
                          ["train", "--resume", "--out", run, "--steps", 2]):
            if arguments[0] == "translate" and spoil in only_training:
                continue
            error = refusal(arguments, capsys)
            assert words in error and str(run) in error, error
        assert file.read_bytes() == spoilt and not evil.exists() and not (folders / "new").exists()
    file.write_bytes(whole)
    change(width=64, blocks=9)
    devices.clear()
    error = refusal(["translate", run, folders / "testA", "--to", "b", "--out", "o"], capsys)
    assert "not a checkpoint" in error
    assert devices == [{"meta"}]  # took no memory

LIVES = """
import multiprocessing, os, random, signal, sys, time
sys.path.insert(0, {root!r})
import aggan
scenario, seed, *command = sys.argv[1:]
numbers = random.Random(int(seed))
step, write, sync, replace = aggan.Trainer.train_step, aggan.write_whole, os.fsync, os.replace
signal.signal(signal.SIGINT, signal.default_int_handler)

def life(place="nowhere", left=0):
    "A process that trains, until it is in a write, at this place, for that time."
    process = os.fork()
    if process:
        return process
    os.setsid()
    def die(here):
        nonlocal left
        left -= here == place
        if here == place and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def train_step(trainer, *batch):
        print("step", trainer.step, flush=True)
        if scenario == "signals" and trainer.step in (1, 3, 9):
            number = signal.SIGTERM if trainer.step == 9 else signal.SIGINT
            for process in multiprocessing.active_children():
                os.system(f"kill -{{int(number)}} {{process.pid}}")  # PyTorch forgives its parent's
            time.sleep(0.2)
            if trainer.step != 1:  # then the loading process alone: the run goes on
                os.killpg(0, number)
        return step(trainer, *batch)
    def write_twice(path, save):  # half, at first
        def halves(file):
            save(file)
            file.truncate(file.tell() // 2)
            die("half")
            file.seek(0)
            file.truncate()
            save(file)
        write(path, halves)
    aggan.Trainer.train_step, aggan.write_whole = train_step, write_twice
    os.fsync = lambda file: (die("sync"), sync(file))
    os.replace = lambda *paths: (die("replace"), replace(*paths))
    code = 0
    try:
        aggan.main(["train", "--resume", *command])
    except SystemExit as stopped:
        code = stopped.code
    sys.stdout.flush()
    os._exit(code)

for i in range(15 if scenario == "kills" else 2):
    if scenario == "kills" and i % 2:
        process = life(numbers.choice(["half", "sync", "replace"]), numbers.randrange(1, 5))
    else:
        process = life()
        time.sleep(numbers.uniform(0.05, 0.3) if scenario == "kills" else 0)
        os.kill(process, signal.SIGKILL if scenario == "kills" else 0)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
os._exit(os.waitstatus_to_exitcode(os.waitpid(life(), 0)[1]))
"""

needs_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")

@needs_posix
def test_thirty_kills_and_two_signals_lose_only_the_steps_since_the_last_checkpoint(folders):
    """Two runs of fifteen SIGKILLs each, every other one inside a write; and one of SIGINT and SIGTERM, which
    reach its loading process too. All end as a run that was never stopped."""
    options = dict(TINY, steps=40, save_every=3, pool=2, model="scheme1", blocks=0, l_paired=0)
    (folders / "lives.py").write_text(LIVES.format(root=str(ROOT)))
    runs = {"0": "kills", "1": "kills", "2": "signals"}
    processes = {run: subprocess.Popen([sys.executable, *map(str, (
        folders / "lives.py", scenario, run, *command_line(dict(
            options, a=folders / "trainA", b=folders / "trainB", out=folders / run,
            workers=int(scenario == "signals")))))], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=BY_LINES) for run, scenario in runs.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = aggan.train(tiny(folders, **options))
    torch.set_num_threads(threads)
    for run, process in processes.items():
        lines, errors = map(str.splitlines, process.communicate(timeout=100))
        assert process.returncode == 0, errors
        assert same(weights(whole), weights(folders / run)) and columns(whole) == columns(folders / run)
        names, expected = (sorted(p.name for p in there.rglob("*")) for there in (folders / run, whole))
        reached, previous = 0, -1
        for line in lines:
            if line.startswith("step "):
                this = int(line[5:])
                assert this == previous + 1 or this % 3 == 0 and reached - 3 <= this <= reached, lines
                reached, previous = max(reached, this + 1), this
        assert reached == 40
        if runs[run] == "kills":
            assert not errors and lines.count("exit -9") == 15 and names == expected
        else:
            assert [line for line in lines if line.startswith("exit")] == ["exit 130", "exit 143"]
            assert [line for line in lines if line.startswith("step")] == [f"step {i}" for i in range(40)]
            assert errors == [f"aggan.py: stopped after step {i}, saved; goes on with --resume"
                              for i in (4, 10)]
            assert set(names) == {*expected, "0000004.png", "0000010.png"}

def test_a_second_signal_kills_and_handlers_return(folders, monkeypatch):
    before, seen = signal.getsignal(signal.SIGINT), []

    def train(config, resume, signals):
        signal.raise_signal(signal.SIGINT)
        seen.extend([*signals, signal.getsignal(signal.SIGINT)])
    monkeypatch.setattr(aggan, "train", train)
    aggan.run_train(False, {})
    assert seen == [signal.SIGINT, signal.SIG_DFL] and signal.getsignal(signal.SIGINT) is before

@pytest.mark.parametrize("where, log_every", [("loss", 100), ("loss", 5), ("weight", 5)])
def test_numbers_that_are_not_finite_stop_the_run(folders, capsys, monkeypatch, where, log_every):
    step = aggan.Trainer.train_step

    def spoilt(trainer, *batch):
        weight = trainer.nets["g_ba"].content_decoder[-1].bias.data
        if trainer.step == 6 and where == "loss":  # in the seventh step, F(x) is not a number
            weight[0] = math.nan
        terms = step(trainer, *batch)
        if trainer.step == 8 and where == "weight":  # that step's losses are finite still
            weight[0] = math.inf
        return terms
    monkeypatch.setattr(aggan.Trainer, "train_step", spoilt)
    error = refusal(["train", *command_line(dict(
        TINY, a=folders / "trainA", b=folders / "trainB", out=folders / "run", steps=24, log_every=log_every,
        save_every=4 if where == "weight" or log_every == 100 else 12))], capsys, status=1)
    words = "step 7: gan is nan" if where == "loss" else "step 8: weights of g_ba are not finite"
    assert words in error and "--lr" in error and "--precision fp32" in error
    assert (folders / "run" / "log.csv").exists() == (log_every == 5)
    if log_every == 5:
        assert [row[0] for row in columns(folders / "run")] == ["step", "5"]  # not the line of step 10
    if where == "weight" or log_every == 100:
        state = aggan.load_checkpoint(folders / "run")
        assert state["step"] == 4 and all(w.isfinite().all() for w in state["parts"]["nets"].values())

@pytest.mark.parametrize("error, known", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True), (MemoryError(), True),
    ("torch.empty(2 ** 60)", True), (RuntimeError("CUDA error: an illegal memory access"), False)])
def test_out_of_memory_gets_one_line(monkeypatch, capsys, error, known):
    def train(*_):
        raise error if isinstance(error, Exception) else eval(error)
    monkeypatch.setattr(aggan, "train", train)
    if known:
        line = refusal(["train"], capsys)
        assert "out of memory" in line and "--batch-size, --size" in line
    else:
        with pytest.raises(RuntimeError, match="illegal"):
            aggan.main(["train"])

@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 4 MB; skips the test where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)

def test_a_full_disk_leaves_the_old_checkpoint_whole(folders, small_disk, capsys):
    options = command_line(dict(TINY, a=folders / "trainA", b=folders / "trainB", out=small_disk / "run",
                                steps=12, save_every=4, pool=2))
    step, filler = aggan.Trainer.train_step, small_disk / "filler"

    def filling(trainer, *batch):
        if trainer.step == 6:
            with contextlib.suppress(OSError), open(filler, "wb") as file:
                while True:
                    file.write(bytes(1 << 12))
        return step(trainer, *batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggan.Trainer, "train_step", filling)
        error = refusal(["train", *options], capsys)
    assert re.search(r"run/\S+: cannot be written \(No space left on device\)", error)
    assert aggan.load_checkpoint(small_disk / "run")["step"] == 4
    rows = [line.split(",")[0] for line in (small_disk / "run" / "log.csv").read_text().splitlines()]
    assert rows[:3] == ["step", "2", "4"] and not list((small_disk / "run").rglob(".*"))
    with pytest.raises(SystemExit, match="1"):
        aggan.main(["translate", str(small_disk / "run"), str(folders / "testA"), "--to", "b", "--out",
                    str(small_disk / "new")])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 6 and "new/0.png: cannot be written (No space left on device)" in errors[0]
    assert "5 of 5 images not translated" in errors[5] and not any((small_disk / "new").iterdir())
    filler.unlink()
    aggan.main(["train", *map(str, options), "--resume"])
    whole = aggan.train(tiny(folders, steps=12, save_every=4, pool=2))
    assert same(weights(whole), weights(small_disk / "run"))

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos"),
                                   ValueError("too large for WebP")])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, error):
    def save(file):
        file.write(b"half")
        raise error
    (tmp_path / "there.pt").write_bytes(b"whole")
    (tmp_path / "link.pt").symlink_to(tmp_path / "there.pt")
    with pytest.raises(aggan.BadInput, match=r"there.pt: cannot be written \((No space|unexpected|too larg)"):
        aggan.write_whole(tmp_path / "link.pt", save)
    assert (tmp_path / "there.pt").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 2
    aggan.write_whole(tmp_path / "link.pt", lambda file: file.write(b"new"))
    assert (tmp_path / "link.pt").is_symlink() and (tmp_path / "there.pt").read_bytes() == b"new"

def test_a_run_goes_on_without_a_screen(folders, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError
    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(aggan, "UNFUSED", ())  # so that a mask of ones is reported
    (folders / "trainA" / "0.png").write_text("not a picture")
    run = aggan.train(tiny(folders, steps=4, model="cyclegan"))
    assert aggan.load_checkpoint(run)["step"] == 4 and len(columns(run)) == 3

def test_a_run_in_its_own_training_folder_is_refused(folders):
    with pytest.raises(aggan.BadInput, match="--out .*trainA/run: is in a training folder"):
        aggan.train(tiny(folders, out=str(folders / "trainA" / "run")))
    assert not (folders / "trainA" / "run").exists()

def test_a_disk_that_cannot_be_written(folders, capsys):
    for out in (folders / "testA" / "0.png" / "run", Path("/proc/aggan")):
        assert str(out) in refusal(["train", *command_line(dict(
            TINY, a=folders / "trainA", b=folders / "trainB", steps=1, out=out))], capsys)

def test_memory_and_files_stay_flat(folders):
    """Over 60 steps with lines, grids and checkpoints, after 50 that fill pools and caches."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    used, step = [], aggan.Trainer.train_step

    def watched(trainer, *batch):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append((pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir("/proc/self/fd"))))
        return step(trainer, *batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggan.Trainer, "train_step", watched)
        aggan.train(tiny(folders, steps=110, pool=5, save_every=10))
    early, late = used[30:50], used[90:]
    assert max(m for m, _ in late) < max(m for m, _ in early) + 4
    assert max(n for _, n in late) <= max(n for _, n in early)

def steps(trainer, count, size=32):
    """Random batches, the same at each call, and the figures of their steps."""
    torch.manual_seed(1)
    numbers = torch.Generator().manual_seed(2)
    batches = (torch.rand(2, 2, 3, size, size, generator=numbers) * 2 - 1 for _ in range(count))
    return [{k: v.item() for k, v in trainer.train_step(*batch).items()} for batch in batches]

def half_steps(config):
    """-> the loss terms, each network's gradient, what the networks returned, and a convolution's type."""
    trainer, outputs, types = aggan.Trainer(config, 10, torch.device("cpu")), [], []
    for name, net in trainer.nets.items():
        net.register_forward_hook(lambda _, inputs, out, name=name: outputs.extend(
            out if name.startswith("g_") else [out]))
    trainer.nets["d_a"].stem[0].register_forward_hook(lambda _, inputs, out: types.append(out.dtype))
    set_scale(trainer, 128.0)
    terms = {**gradients(trainer, "g"), **gradients(trainer, "d")}
    scale = 128.0 if trainer.scaler.is_enabled() else 1.0
    return terms, {name: torch.cat([p.grad.flatten() for p in net.parameters()]) / scale
                   for name, net in trainer.nets.items()}, outputs, types

def set_scale(trainer, scale):
    trainer.scaler.scale(torch.ones(()))
    trainer.scaler.update(scale)

@pytest.mark.parametrize("model", list(aggan.PRESETS))
@pytest.mark.parametrize("precision, tolerance, wide", [("bf16", 0.05, 0.4), ("fp16", 0.01, 0.2)])
def test_reduced_precision_is_near_float32(model, precision, tolerance, wide):
    """Loss terms within 5 % (bf16) or 1 % (fp16), each network's gradient within 40 % or 20 % (an L1 loss has
    the sign of a difference); masks, images, logits and losses are float32, convolutions are not."""
    config = aggan.configure(dict(TINY, model=model, a="a", b="b"))
    terms, expected, _, _ = half_steps(config)
    reduced, gradients, outputs, types = half_steps(dataclasses.replace(config, precision=precision))
    assert set(types) == {aggan.PRECISIONS[precision]}
    assert len(outputs) > 8 and all(x.dtype == torch.float32 for x in [*outputs, *reduced.values()])
    for k, value in terms.items():
        assert reduced[k].item() == pytest.approx(value.item(), rel=tolerance, abs=1e-4), k
    for k, gradient in expected.items():
        assert (gradients[k] - gradient).norm() < wide * gradient.norm(), k

def test_fp16_skips_a_step_that_overflows():
    trainer = aggan.Trainer(dataclasses.replace(FINAL, precision="fp16"), 10, torch.device("cpu"))
    before = [p.clone() for p in trainer.nets.parameters()]
    set_scale(trainer, 2.0 ** 40)
    steps(trainer, 1)
    assert all(map(torch.equal, before, trainer.nets.parameters())) and trainer.scaler.get_scale() == 2 ** 39
    set_scale(trainer, 128.0)
    steps(trainer, 1)
    assert sum(not torch.equal(p, q) for p, q in zip(before, trainer.nets.parameters())) > len(before) / 2

class Recording:
    """Stands for a CUDA graph on the CPU: a replay runs the function again, on the tensors that it was
    recorded with, and leaves what it returns and the gradients in the memory of the recording."""
    current = None

    def pool(self):
        pass

    def __enter__(self):
        Recording.current = self

    def __exit__(self, *_):
        Recording.current = None

    def replay(self):
        gradients = [p.grad for p in self.parameters]
        new = self.function(*self.inputs)
        for old, p in zip(gradients, self.parameters):
            old.copy_(p.grad)
            p.grad = old
        for old, tensor in zip(torch.utils._pytree.tree_leaves(self.outputs),
                               torch.utils._pytree.tree_leaves(new), strict=True):
            old.copy_(tensor)

    @classmethod
    def of(cls, trainer, which, method):
        """The trainer's method, as a graph would record it."""
        def function(*inputs):
            outputs, graph = method(*inputs), cls.current
            if graph:
                graph.function, graph.inputs, graph.outputs = method, inputs, outputs
                graph.parameters = [p for p in trainer.parameters[which] if p.grad is not None]
            return outputs
        return functools.wraps(method)(function)

@pytest.mark.parametrize("config", [dataclasses.replace(FINAL, pool=3),
                                    dataclasses.replace(MEJJATI, pool=3)])
def test_a_graph_steps_as_without(monkeypatch, config):
    """The code around a recording: inputs, outputs, pools, gradients, the switch. Not CUDA's graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *_, **__: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    plain, graphed = (aggan.Trainer(config, 40, torch.device("cpu")) for _ in "pg")
    graphed.graphs = {}
    graphed.generator_gradients = Recording.of(graphed, "g", graphed.generator_gradients)
    graphed.discriminator_gradients = Recording.of(graphed, "d", graphed.discriminator_gradients)
    assert steps(plain, 20) == steps(graphed, 20)
    plain.rows, graphed.rows = [], []  # as after a line of the log
    assert steps(plain, 5) == steps(graphed, 5)
    assert same(plain.nets.state_dict(), graphed.nets.state_dict())
    assert len(graphed.graphs) == (4 if config.tau else 2)  # before and after the switch
    assert all(type(graph[0]) is Recording for graph in graphed.graphs.values())
    assert len(plain.rows) == 5 and all(map(torch.equal, plain.rows, graphed.rows))

def test_without_a_compiler(monkeypatch, capsys):
    def missing(*_, **__):
        raise RuntimeError("Cannot find a working triton installation.\nmore")
    monkeypatch.setattr(torch, "compile", missing)
    assert not aggan.compiler_works(torch.device("cpu"))
    assert capsys.readouterr().out == ("torch.compile does not work here, going on without: "
                                       "Cannot find a working triton installation.\n")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert aggan.compiler_works(torch.device("cpu"))

def test_loading_processes_may_be_spawned(folders):
    """As on Windows and macOS."""
    data = aggan.UnpairedImages(folders / "trainA", folders / "trainB", 32, 36, 0)
    loader = torch.utils.data.DataLoader(data, batch_sampler=[range(2), range(2, 4)], num_workers=1,
                                         multiprocessing_context="spawn")
    for i, (real_a, real_b) in enumerate(loader):
        for j in range(2):
            assert torch.equal(real_a[j], data[2 * i + j][0]) and torch.equal(real_b[j], data[2 * i + j][1])
    assert i == 1

WORKER = """
import os, sys, torch
sys.path.insert(0, {root!r})
import aggan
torch.set_default_dtype(torch.float64)  # Adam's first steps, lr * sign(gradient), would magnify rounding
torch.Tensor.float = torch.Tensor.double
step, write = aggan.Trainer.train_step, aggan.write_whole
def stopped(trainer, *batch):
    assert trainer.step != 4 or "KILL" not in os.environ, "killed"
    if trainer.step == 1 and "STOP" in os.environ and trainer.rank == 1:
        os.kill(os.getpid(), 15)  # of one process alone
    return step(trainer, *batch)
def written(path, save):
    if path.name == "checkpoint.pt":
        print("saved by", os.environ.get("RANK"), file=sys.stderr)
    write(path, save)
aggan.Trainer.train_step, aggan.write_whole = stopped, written
if "FORK" in os.environ:  # two processes as torchrun's, which would import torch three times
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["FORK"])
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "01"[os.fork() == 0]
aggan.main(sys.argv[1:])
"""

def test_two_processes_train_as_one(folders, tmp_path):
    """Two at batch 1, stopped, killed and resumed, against one at batch 2: five steps, weights within 1e-5.
    Another number of processes cannot resume."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    options = command_line(dict(TINY, a=folders / "trainA", b=folders / "trainB", steps=5, l_identity=5.0,
                                log_every=1, save_every=3))

    def start(processes, out, *more, **environment):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        by_itself = processes == 1 or "FORK" in environment
        command = [sys.executable, *([] if by_itself else launcher), tmp_path / "worker.py", "train",
                   *options, "--out", tmp_path / out, *more]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, env={**BY_LINES, **environment})

    def free_port():
        with socket.create_server(("127.0.0.1", 0)) as server:
            return str(server.getsockname()[1])

    def end(process):
        return *process.communicate(timeout=100), process.returncode
    processes = start(1, "one", "--batch-size", 2), start(2, "two", STOP="1")
    _, error, status = end(processes[0])
    assert (status, error) == (0, 2 * "saved by None\n")
    output, error, status = end(processes[1])
    assert status != 0 and error.count("saved by 0") == 1 and "saved by 1" not in error
    assert error.count("stopped after step 2, saved") == 2 and "step 3" not in output
    assert aggan.load_checkpoint(tmp_path / "two")["step"] == 2
    _, error, status = end(start(2, "two", "--resume", KILL="1", FORK=free_port()))
    assert status != 0 and "AssertionError: killed" in error
    assert aggan.load_checkpoint(tmp_path / "two")["step"] == 3
    with pytest.raises(aggan.BadInput, match="a run of 2 processes, here are 1"):
        aggan.train(aggan.load_checkpoint(tmp_path / "two")["config"], resume=True)
    output, error, status = end(start(2, "two", "--resume", FORK=free_port()))
    assert status == 0 and output.count("step 5/5") == output.count("done:") == 1, error
    assert error.count("saved by 0") == 1 and "saved by 1" not in error
    state = aggan.load_checkpoint(tmp_path / "two")
    first, second = weights(tmp_path / "one"), state["parts"]["nets"]
    torch.manual_seed(0)
    initial, moved = aggan.build(state["config"]).state_dict(), 0
    assert first.keys() == second.keys()
    for k in first:
        assert first[k].dtype == torch.float64 and (first[k] - second[k]).abs().max() < 1e-5, k
        moved += (first[k] - initial[k]).abs().max() > 1e-4
    assert moved > 20  # by ten times the tolerance
    processes = [process["pools"]["a"] for process in state["processes"]]
    assert [len(pool) for pool in processes] == [5, 5]  # each with its own images
    assert not torch.equal(processes[0][0][0], processes[1][0][0])
    assert not torch.equal(*(process["random"] for process in state["processes"]))

def test_gradients_are_averaged_over_processes(monkeypatch):
    trainer = aggan.Trainer(FINAL, 10, torch.device("cpu"))
    trainer.world, shapes = 4, []
    monkeypatch.setattr(aggan.dist, "all_reduce", lambda x: shapes.append(x.shape) or x.mul_(12))
    for which in "gd":
        gradients(trainer, which)
        before = [p.grad for p in trainer.parameters[which]]
        expected = [3 * g for g in before]
        trainer.update(which)
        for p, g, value in zip(trainer.parameters[which], before, expected, strict=True):
            torch.testing.assert_close(g, value)
            assert p.grad is g  # a graph will write there again
    assert [len(shape) for shape in shapes] == [1, 1]  # one message each

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

@pytest.fixture
def cuda(monkeypatch):
    """The device, where everything compiles or fails."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = aggan.pick_device("cuda")
    assert aggan.compiler_works(device)
    return device

@needs_cuda
@pytest.mark.parametrize("model", list(aggan.PRESETS))
def test_trains_on_cuda(folders, cuda, model):
    config = dict(steps=14, device="cuda", model=model)
    run = aggan.train(tiny(folders, **config))
    state = aggan.load_checkpoint(run)
    step = aggan.Trainer.train_step
    def killed(trainer, *batch):
        assert trainer.step < 7, "killed"
        return step(trainer, *batch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="killed"):
        patch.setattr(aggan.Trainer, "train_step", killed)
        aggan.train(tiny(folders, **config, out=str(folders / "killed")))
    resumed = aggan.train(tiny(folders, **config, out=str(folders / "killed")), resume=True)
    resumed = aggan.load_checkpoint(resumed)
    assert state["step"] == resumed["step"] == 14
    for k, w in state["parts"]["nets"].items():  # a step moves a weight by the rate, 1e-4 or 2e-4, at most
        assert w.isfinite().all() and (w - resumed["parts"]["nets"][k]).abs().max() < 14 * 2 * 2e-4

def eager_and_fast(config, device):
    """The figures of 20 steps of each."""
    for compiled in (False, True):
        trainer = aggan.Trainer(dataclasses.replace(config, compile=compiled), 20, device)
        yield steps(trainer, 20)
    assert trainer.graphs and all(type(graph[0]) is torch.cuda.CUDAGraph for graph in trainer.graphs.values())

def assert_near(eager, fast, first, last):
    """Within `first`, relatively, in the first step; the means of the last ten within `last`."""
    for k in eager[0]:
        assert fast[0][k] == pytest.approx(eager[0][k], rel=first, abs=1e-4), k
        means = [sum(figures[k] for figures in run[10:]) / 10 for run in (fast, eager)]
        assert means[0] == pytest.approx(means[1], rel=last, abs=1e-2), k

@needs_cuda
@pytest.mark.parametrize("model", list(aggan.PRESETS))
def test_compiled_and_graphed_steps_agree_with_eager_ones(cuda, model):
    config = aggan.configure(dict(TINY, model=model, precision="fp32", pool=3, width=8, a="a", b="b"))
    assert_near(*eager_and_fast(config, cuda), first=1e-3, last=0.05)

@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_graphed_steps_in_reduced_precision(cuda, precision):
    config = dataclasses.replace(FINAL, precision=precision, pool=3, width=8)
    assert_near(*eager_and_fast(config, cuda), first=0.05, last=0.1)

@needs_cuda
def test_bench_on_cuda(cuda):
    results = aggan.bench(aggan.configure(dict(TINY, device="cuda"), small=False), rounds=2)
    assert len(results) == 6 and all(row["peak_gib"] > 0 for row in results.values())

def test_attention_finds_the_object(tmp_path):
    """Red discs become blue ones and back, on grey noise: IoU < 0.3 untrained (it looks everywhere, a disc is
    a fifth of the image), > 0.6 after 150 steps."""
    for domain, colour in (("A", (0.9, -0.6, -0.6)), ("B", (-0.6, -0.6, 0.9))):
        for split, count in (("train", 40), ("test", 10)):
            folder = tmp_path / (split + domain)
            folder.mkdir()
            for i in range(count):
                y, x = torch.randint(9, 23, (2,)).tolist()
                rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
                disc = (rows - y) ** 2 + (columns - x) ** 2 < 64
                noise = 0.3 * torch.rand(1, 32, 32) - 0.15
                pixels = torch.where(disc, torch.tensor(colour)[:, None, None], noise)
                aggan.TF.to_pil_image(pixels / 2 + 0.5).save(folder / f"{i}.png")
                if split == "test":
                    (tmp_path / f"masks{domain}").mkdir(exist_ok=True)
                    aggan.TF.to_pil_image(disc.float()).save(tmp_path / f"masks{domain}" / f"{i}.png")
    options = dict(size=32, resize=32, width=8, blocks=1, masks=4, lr=2e-3, log_every=50, save_every=1000,
                   objective="released")
    results = []
    for steps in (1, 150):
        run = aggan.train(tiny(tmp_path, steps=steps, out=str(tmp_path / f"run{steps}"), **options))
        results.append(aggan.evaluate(run, device="cpu"))
    for direction in ("a2b", "b2a"):
        assert results[0][direction]["iou"] < 0.3 and results[1][direction]["iou"] > 0.6

def draw_scenes(folder, size=32):
    """Tiny scenes like photographs, and masks of the test ones: a large object on a background with texture
    at three scales, in colours that this has too; A's plain and shaded, B's striped, of little contrast."""
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
            scene = hue[:, None, None] - 0.5 + 0.35 * noise(4) + 0.25 * noise(8) + 0.15 * noise(size)
            y, x, tall, wide = *(size * (0.375 + 0.25 * at[:2])), *(size * (0.28 + 0.1 * extent[:2]))
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
    """The papers' curriculum ends with copies, the default finds the objects (a third of the image)."""
    draw_scenes(tmp_path)
    options = dict(size=32, resize=36, width=8, blocks=1, masks=4, lr=1e-3, log_every=1000, save_every=1000)
    results = []
    for steps, curriculum in ((100, "papers"), (250, "adaptive")):
        options |= dict(steps=steps, curriculum=curriculum, out=str(tmp_path / curriculum))
        run = aggan.train(tiny(tmp_path, **options))
        results.append(aggan.evaluate(run, device="cpu"))
    for direction, iou in (("a2b", 0.35), ("b2a", 0.55)):
        copied, found = (result[direction] for result in results)
        assert copied["mean_attention"] < 0.02 and copied["foreground_change"] < 0.01
        assert 0.1 < found["mean_attention"] < 0.7 and found["foreground_change"] > 0.1
        assert found["iou"] > iou

# ---------------------------------------- 9. translate, evaluate ----------------------------------------

@pytest.fixture
def trained(folders):
    return aggan.train(tiny(folders, steps=1))

@pytest.mark.parametrize("height, width", [(64, 64), (37, 50), (1, 1), (3, 200)])
def test_translation_keeps_any_size(height, width):
    x = torch.rand(3, height, width) * 2 - 1
    t = aggan.apply_any_size(SchemeTwoGenerator(4, 1, 3), x)
    assert t.image.shape == (1, 3, height, width)
    assert t.attention.shape == (1, 3, height, width) and t.content.shape == (1, 2, 3, height, width)

def test_translate(trained, folders):
    single = folders / "a photo.JPG"
    Image.new("RGB", (51, 34), (90, 120, 10)).save(single)
    out = folders / "out"
    old = folders / "old.ppm"
    Image.new("RGB", (20, 20)).save(old)
    paths = aggan.translate(trained, [single, folders / "testA", old], "b", out, attention=True)
    assert [p.name for p in paths] == ["a photo.JPG", *(f"{i}.png" for i in range(5)), "old.ppm.png"]
    assert Image.open(out / "a photo.JPG").size == (51, 34)
    mask = Image.open(out / "a photo_attention.png")
    assert mask.size == (51, 34) and mask.mode == "L"
    nets, _ = aggan.load_generators(trained, torch.device("cpu"))
    x = aggan.to_tensor(aggan.load_image(folders / "testA" / "0.png"))
    path, = aggan.translate(trained, [folders / "testA" / "0.png"], "a", out)
    back = aggan.to_tensor(aggan.load_image(path))
    assert (back - aggan.apply_any_size(nets["g_ba"], x).image[0]).abs().max() < 0.5 / 127.5 + 1e-6  # 8 bits

def test_odd_images_are_translated(trained, folders, capsys):
    (folders / "odd").mkdir()
    odd = odd_images(folders / "odd")
    (folders / "odd" / "clear.png").rename(folders / "odd" / "clear.jpg")  # which could not keep alpha
    odd["clear.jpg"] = odd.pop("clear.png")
    before = {path: path.read_bytes() for path in (folders / "odd").iterdir()}
    paths = aggan.translate(trained, [folders / "odd"], "b", folders / "out")
    kept_suffixes = aggan.tools()["WRITABLE"]
    assert len(paths) == len(odd) and capsys.readouterr().err == ""
    for name, (size, transparent, _) in odd.items():
        written = folders / "out" / (name if Path(name).suffix.lower() in kept_suffixes else name + ".png")
        image = Image.open(written)
        assert written in paths and image.size == size, name
        assert image.mode == ("RGBA" if transparent and name != "clear.jpg" else "RGB"), name
        if image.mode == "RGBA":
            alpha = aggan.load_image(folders / "odd" / name, None).getchannel("A")
            assert image.getchannel("A").tobytes() == alpha.tobytes(), name
    assert all(path.read_bytes() == content for path, content in before.items())
    nets, _ = aggan.load_generators(trained, torch.device("cpu"))  # the colours below the transparency too
    x = aggan.to_tensor(aggan.load_image(folders / "odd" / "clear.tif"))
    pixels = aggan.TF.to_tensor(Image.open(folders / "out" / "clear.tif"))[:3]
    assert (pixels - aggan.apply_any_size(nets["g_ab"], x).image[0] / 2 - 0.5).abs().max() < 0.5 / 255 + 1e-5

def test_translate_names_what_it_cannot_do_and_does_the_rest(trained, folders, capsys, monkeypatch):
    names, forward = useless_images(folders / "testA"), aggan.SchemeTwoGenerator.forward
    Image.new("RGB", (64, 64)).save(folders / "testA" / "large.png")

    def limited(generator, x):  # as a small GPU does
        if x.shape[2] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return forward(generator, x)
    monkeypatch.setattr(aggan.SchemeTwoGenerator, "forward", limited)
    with pytest.raises(SystemExit) as stopped:
        aggan.main(["translate", str(trained), str(folders / "testA"), "--to", "b", "--out",
                    str(folders / "new")])
    *warnings, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and last == "aggan.py: 8 of 13 images not translated, see above"
    for name in names:
        assert sum(f"testA/{name}: not a usable image" in warning for warning in warnings) == 1
    assert sum("large.png: 64 x 64 pixels, not translated (CUDA out of memory" in w for w in warnings) == 1
    assert sorted(p.name for p in (folders / "new").iterdir()) == [f"{i}.png" for i in range(5)]

def mutations(content, numbers):
    """The bytes, changed at a few places, or shortened, or with a part twice, or a part of zeros."""
    content = bytearray(content)
    for _ in range(numbers.choice([1, 1, 2, 8])):
        place, length = numbers.randrange(len(content)), numbers.randrange(1, 64)
        kind = numbers.randrange(5)
        if kind == 0:
            content[place] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            content[place:place + length] = numbers.randbytes(length)
        elif kind == 2:
            content[place:place + length] = bytes(length)
        elif kind == 3:
            content[place:place] = content[place:place + length]
        else:
            del content[max(1, place):]
    return bytes(content)

def test_two_hundred_damaged_images(trained, folders, capsys, monkeypatch):
    """Each is translated or named; nothing else is said, and what is written is whole."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10 ** 5)  # so that none of the images is a large one
    (folders / "odd").mkdir()
    (folders / "damaged").mkdir()
    odd_images(folders / "odd")
    numbers, sources = random.Random(0), aggan.list_images(folders / "odd")
    for i in range(200):
        source = sources[i % len(sources)]
        content = mutations(source.read_bytes(), numbers)
        (folders / "damaged" / f"{i}{source.suffix}").write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
        warnings.simplefilter("ignore")  # PIL's, of images that it can read nevertheless
        aggan.main(["translate", str(trained), str(folders / "damaged"), "--to", "b", "--out",
                    str(folders / "o")])
    output = capsys.readouterr()
    *errors, last = output.err.splitlines()
    done = output.out.splitlines()
    assert stopped.value.code == 1 and len(errors) > 50 and len(done) > 50 and len(errors) + len(done) == 200
    assert last == f"aggan.py: {len(errors)} of 200 images not translated, see above"
    assert all(re.match(r"warning: \S+/damaged/\d+\S*: not a usable image \(", error) for error in errors)
    for path in done:
        Image.open(path).load()
    assert {str(p) for p in (folders / "o").iterdir()} == set(done)

def test_a_hundred_damaged_checkpoints(folders):
    """A run goes on from each, or names it and leaves it alone."""
    run = aggan.train(tiny(folders, steps=2, blocks=0, model="scheme1", l_paired=0.0))
    numbers, file, fates, out = random.Random(1), run / "checkpoint.pt", [], str(run)
    whole = file.read_bytes()
    log = (run / "log.csv").read_bytes()
    for i in range(100):
        content = mutations(whole, numbers)
        file.write_bytes(content)
        try:
            if i % 2:
                aggan.run_train(True, dict(out=out, device="cpu"))
            else:
                aggan.translate(run, [folders / "testB" / "0.png"], "a", folders / "new", device="cpu")
            fates.append("used")
        except aggan.BadInput as error:
            assert error.status == 2 and out in str(error) and "\n" not in str(error)
            fates.append("refused")
        assert file.read_bytes() == content and (run / "log.csv").read_bytes() == log
    assert fates.count("refused") > 80

def test_copied_pixels_keep_their_value():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    image = aggan.TF.to_pil_image(levels)
    assert aggan.to_image(aggan.to_tensor(image) / 2 + 0.5).tobytes() == image.tobytes()

def test_translate_never_overwrites_an_input(trained, folders):
    before = (folders / "testA" / "0.png").read_bytes()
    with pytest.raises(aggan.BadInput, match="is an input"):
        aggan.translate(trained, [folders / "testA"], "b", folders / "testA")
    with pytest.raises(aggan.BadInput, match="both would write"):
        pair = [folders / "testA" / "0.png", folders / "testB" / "0.png"]
        aggan.translate(trained, pair, "b", folders / "out")
    Image.new("RGB", (20, 20)).save(folders / "testA" / "0.jpg")
    with pytest.raises(aggan.BadInput, match="both would write .*0_attention.png"):
        aggan.translate(trained, [folders / "testA"], "b", folders / "out", attention=True)
    with pytest.raises(aggan.BadInput, match="--out .*0.png: is a file"):
        aggan.translate(trained, [folders / "testB"], "a", folders / "testA" / "0.png")
    assert (folders / "testA" / "0.png").read_bytes() == before and not (folders / "out").exists()

def test_mask_figures_by_hand():
    x = torch.zeros(1, 3, 2, 2)
    foreground = torch.tensor([[0.9, 0.6], [0.4, 0.1]])
    attention = torch.stack([foreground, 1 - foreground])[None]
    image = torch.tensor([[1.0, 0.5], [0.2, 0.0]]).expand(1, 3, 2, 2)
    mask = torch.tensor([[True, False], [True, False]])
    t = aggan.Translation(image, attention, torch.zeros(1, 1, 3, 2, 2))
    figures = aggan.tools()["mask_figures"](x, t, mask)
    assert figures["iou"] == pytest.approx(1 / 3)                # found: upper row; true: left column
    assert figures["background_error"] == pytest.approx(0.125)   # (0.5 + 0) / 2 pixels, halved: in [0, 1]
    assert figures["foreground_change"] == pytest.approx(0.3)    # (1 + 0.2) / 2, halved
    assert figures["mean_attention"] == pytest.approx(0.5)

def test_evaluate_averages_over_images(trained, folders):
    for domain in "AB":
        (folders / f"masks{domain}").mkdir()
        for path in aggan.list_images(folders / f"test{domain}"):
            mask = Image.new("L", Image.open(path).size)
            mask.paste(255, (0, 0, 20, 20))
            mask.save(folders / f"masks{domain}" / path.name)
    results = aggan.evaluate(trained)
    nets, config = aggan.load_generators(trained, torch.device("cpu"))
    figures = []
    for path in aggan.list_images(folders / "testB"):  # 40 x 60 -> 32 x 48: the mask's corner becomes 16 x 16
        x = aggan.to_tensor(aggan.load_image(path, size=32))
        mask = torch.zeros(48, 32, dtype=torch.bool)
        mask[:16, :16] = True
        figures.append(aggan.tools()["mask_figures"](x[None], aggan.apply_any_size(nets["g_ba"], x), mask))
    assert results["b2a"].keys() == figures[0].keys()
    for name, value in results["b2a"].items():
        assert value == pytest.approx(sum(f[name] for f in figures) / 3, abs=1e-6)

def test_masks_in_folders_like_their_images(trained, folders):
    for k, white in (("x", 0), ("y", 255)):
        for name, mode, colour in (("testA", "RGB", (90, 50, 20)), ("masksA", "L", white)):
            (folders / "deep" / name / k).mkdir(parents=True)
            Image.new(mode, (32, 32), colour).save(folders / "deep" / name / k / "1.png")
    (folders / "deep" / "masksA" / "x" / "1.png").rename(folders / "deep" / "masksA" / "x" / "1.webp.png")
    with pytest.raises(aggan.BadInput, match="no mask for x/1.png"):
        aggan.evaluate(trained, a=folders / "deep" / "testA")
    (folders / "deep" / "masksA" / "x" / "1.webp.png").rename(folders / "deep" / "masksA" / "x" / "1.png")
    figures = aggan.evaluate(trained, a=folders / "deep" / "testA")["a2b"]
    assert figures["background_error"] is not None and figures["foreground_change"] is not None

def test_evaluate_without_masks(trained):
    for figures in aggan.evaluate(trained).values():
        assert figures["iou"] is None and figures["background_error"] is None
        assert 0 <= figures["mean_attention"] <= 1

def test_evaluate_keeps_the_translations(trained, folders):
    (folders / "testA" / "more").mkdir()
    Image.new("RGB", (40, 32), (9, 90, 200)).save(folders / "testA" / "more" / "0.jpg")
    aggan.evaluate(trained, save=folders / "kept")
    kept = sorted(str(p.relative_to(folders / "kept")) for p in (folders / "kept").rglob("*.*"))
    expected = [f"a2b/{i}.png" for i in range(5)] + ["a2b/more/0.png"] + [f"b2a/{i}.png" for i in range(3)]
    assert kept == expected
    nets, config = aggan.load_generators(trained, torch.device("cpu"))
    x = aggan.to_tensor(aggan.load_image(folders / "testB" / "2.png", size=config.size))
    image = aggan.to_image(aggan.apply_any_size(nets["g_ba"], x).image[0] / 2 + 0.5)
    assert Image.open(folders / "kept" / "b2a" / "2.png").tobytes() == image.tobytes()
    for place in ("kept", "testA/new", "testB/new/er"):  # where it would overwrite, or be measured itself
        with pytest.raises(aggan.BadInput, match=f"--save .*{place}"):
            aggan.evaluate(trained, save=folders / place)
    assert not (folders / "testA" / "new").exists()
    Image.new("RGB", (40, 32)).save(folders / "testA" / "0.jpg")
    with pytest.raises(aggan.BadInput, match="two images of .*testA would both be .*a2b/0.png"):
        aggan.evaluate(trained, save=folders / "again")

@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """The file of an Inception with random weights, and the network."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as module
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # it cannot be made without weights
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)  # else its features are all alike
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path, net

def test_kid_and_fid(trained, folders, inception, capsys):
    weights, net = inception
    with pytest.raises(aggan.BadInput, match="testB has fewer than four"):
        aggan.evaluate(trained, kid=weights)
    Image.new("RGB", (44, 40), (200, 90, 0)).save(folders / "testB" / "3.png")
    results = aggan.evaluate(trained, kid=weights, save=folders / "kept")
    assert "subsets of 2 from 5 translations, 4 real" in capsys.readouterr().out

    def features(folder):
        images = (aggan.load_image(path, size=32) for path in aggan.list_images(folder))
        return torch.cat([net(aggan.TF.pil_to_tensor(image)[None])[0] for image in images]).double()
    for direction in ("a2b", "b2a"):
        x, y = features(folders / "kept" / direction), features(folders / f"test{direction[-1].upper()}")
        xx, xy, yy = ((u @ v.T / 2048 + 1) ** 3 for u, v in ((x, x), (x, y), (y, y)))
        within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
        kid = (within - 2 * xy.mean()).item()  # of all images: what the subsets' mean estimates
        found = results[direction]
        assert found["kid_std"] > 0 and abs(found["kid"] - kid) < 4 * found["kid_std"] / 10
        x0, y0 = x - x.mean(0), y - y.mean(0)
        cross = torch.linalg.matrix_norm(x0 @ y0.T, "nuc") / math.sqrt((len(x) - 1) * (len(y) - 1))
        spread = (x0 ** 2).sum() / (len(x) - 1) + (y0 ** 2).sum() / (len(y) - 1) - 2 * cross
        assert found["fid"] == pytest.approx((((x.mean(0) - y.mean(0)) ** 2).sum() + spread).item(), rel=1e-2)

def test_inception_weights_run_no_code(trained, tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    bad, evil = tmp_path / "weights.pth", Evil(tmp_path / "evil")
    for content in (evil, {"fc.weight": evil}, {"other": torch.zeros(1)}, torch.zeros(3)):
        torch.save(content, bad)
        with pytest.raises(aggan.BadInput, match="no Inception weights in .*weights.pth; download https"):
            aggan.evaluate(trained, kid=bad)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(aggan.BadInput, match="no Inception weights in nowhere.pth; download https"):
        aggan.evaluate(trained, kid="nowhere.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # nothing kept: nothing is downloaded
    with pytest.raises(aggan.BadInput, match="no Inception weights in .*checkpoints.weights-inception"):
        aggan.evaluate(trained, kid="")

def test_kid_without_torch_fidelity(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(aggan.BadInput, match="pip install torch-fidelity"):
        aggan.evaluate(trained, kid="")

# ---------------------------------------- 10. command line ----------------------------------------

def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        aggan.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        name, kind = field.name.replace("_", "-"), " " + type(field.default).__name__.upper()
        kind = f", --no-{name}" if field.type is bool else kind
        assert re.search(rf"--{name}{kind} [^\[]{{4,}}\[{field.default}\]", text), name

def test_bench(tmp_path, capsys):
    aggan.main(["bench", "--json", str(tmp_path / "b.json"), "--precision", "bf16", "--batch-size", "2",
                *map(str, command_line({k: v for k, v in TINY.items() if k != "masks"}))])
    results, output = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    assert list(results) == ["plain fp32", "one batch", "precision", "(channels_last)"]
    trainer = aggan.Trainer(aggan.configure(dict(TINY, batch_size=2, masks=10, merge=False), small=False), 1,
                            torch.device("cpu"))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        trainer.train_step(*BATCH)
    for name, row in results.items():
        assert name in output and row["wait_ms"] > 0 and 0 < row["share"] < 2
        assert (row["peak_gib"] is None) == (not Path("/proc/self/clear_refs").exists())
        assert row["pairs_a_second"] * row["ms_a_step"] == pytest.approx(2000)
        assert row["tflop_a_second"] * row["ms_a_step"] == pytest.approx(counter.get_total_flops() / 1e9)

def test_readme_commands_are_understood(monkeypatch):
    called = []
    commands = re.findall(r"^    (?:\S*python|torchrun --nproc-per-node \d) aggan\.py (.*)$", README, re.M)
    def run_train(resume, given, small):
        aggan.check(aggan.configure(given, small))
        called.append("run_train")
    monkeypatch.setattr(aggan, "run_train", run_train)
    monkeypatch.setattr(aggan, "tools", lambda: {"run": lambda command, given: called.append(command)})
    for command in commands:
        aggan.main(shlex.split(command))
    assert {c.split()[0] for c in commands} == {"train", "translate", "evaluate", "bench"}
    assert called.count("run_train") >= 2 and {"translate", "evaluate", "bench"} <= set(called)

def test_readme_names_exist():
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in globals(), name
    for name in re.findall(r"`([A-Z][a-z]\w+)`", README):  # classes
        assert hasattr(aggan, name), name
    for name in re.findall(r"`(\w+)`", README.split("## The equations")[1].split("## The papers")[0]):
        assert hasattr(aggan, name) or name in globals(), name
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "aggan.py", *ROOT.glob("data/*.py")))
    options = {aggan.flag(no + field.name) for field in dataclasses.fields(Config) for no in ("", "no_")}
    others = {"--nproc-per-node", "--nnodes", "--logdir", "--help", "--masks-a", "--masks-b", "--l-area"}
    for name in set(re.findall(r"--[a-z][a-z-]+", README)) - options - others:
        assert f'"{name}"' in code, name
    for name in re.findall(r"\baggan\.(\w+)\b(?<!\.py)", README):
        assert hasattr(aggan, name), name
    assert (len(PIECES), README.count("```diff"), README.count("<details>")) == (11, 6, 10)
    for path in re.findall(r"\]\(([\w/.-]+)\)", README) + re.findall(r"python (data/\w+\.py)", README):
        assert (ROOT / path).exists(), path
    sections = [re.sub(r"[^\w -]", "", s).lower() for s in re.findall(r"^##+ (.*)$", README, re.M)]
    for anchor in re.findall(r"\]\(#([\w-]+)\)", README):
        assert anchor.replace("-", " ") in sections, anchor
    for table in re.findall(r"(?:^\|.*\n)+", README, re.M):  # header, rule, rows: a gap would end it
        assert len(set(row.count("|") for row in table.splitlines())) == 1 < table.count("\n") - 1, table

@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", README, re.S))
def test_exercises_run_and_change_something(folders, diff):
    source = (ROOT / "aggan.py").read_text(encoding="utf-8")
    for hunk in diff.split("@@\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] in kept)
                    for kept in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folders / "changed.py").write_text(source)
    changed = script("changed", folders)
    judge = aggan.PatchDiscriminator(4, TINY["width"])
    results, x, y = [], *(sample_image(folders / f"test{k}" / "0.png", 32)[None] for k in "AB")
    for module in (aggan, changed):
        config = module.configure(dict(TINY, a=str(folders / "trainA"), b=str(folders / "trainB"), steps=2))
        trainer = module.Trainer(config, 2, torch.device("cpu"))
        trainer.nets["paired_b"].load_state_dict(judge.state_dict())
        assert all(term.isfinite() for term in trainer.train_step(x, y).values())
        learnt = [trainer.nets.eval()["g_ab"](x).image, *trainer.nets["paired_b"].parameters()]
        results.append(torch.cat([tensor.flatten() for tensor in learnt]))
    assert not torch.equal(*results)

def test_readme_snippets_for_a_trained_run(trained, monkeypatch, capsys):
    shares, copy = (code.replace("runs/mini-scheme2", str(trained)) for code in (
        re.search(r"```python\n(.*?)```", README, re.S)[1],
        textwrap.dedent(re.search(r"    nets = torch.load.*?\n\n", README, re.S)[0])))
    monkeypatch.chdir(ROOT)
    exec(shares, {})
    for line in capsys.readouterr().out.splitlines()[-2:]:
        assert len(json.loads(line)) == TINY["masks"] and sum(json.loads(line)) == pytest.approx(1)
    names = {"torch": torch, "SchemeTwoGenerator": SchemeTwoGenerator}
    exec(copy.replace("width=16, blocks=3", "width=4, blocks=1, masks=3"), names)
    nets, _ = aggan.load_generators(trained, torch.device("cpu"))
    assert torch.equal(names["t"].image, nets["g_ab"](torch.zeros(1, 3, 64, 64)).image)

def test_readme_equations_are_the_docstrings():
    block = re.search(r"```\n( \(1\).*?)```", README, re.S)[1]
    assert textwrap.indent(block, "   ") in aggan.__doc__ and "(10)" in block

PIECES = re.findall(r"^\| (`.*) \| (.*)\|$", README.split("## Copy these pieces")[1].split("\n## ")[0], re.M)

@pytest.mark.parametrize("pieces, needed", PIECES)
def test_pieces_run_alone(folders, pieces, needed):
    names, copied = (set(re.findall(r"`(\w+)`", cell)) for cell in (pieces, pieces + needed))
    if "sections 1 and 2" in needed:
        copied |= {"Translation", "fuse", "NORMS", "conv_block", "ResidualBlock", "Encoder", "up_block",
                   "Decoder"}
    source, x = (ROOT / "aggan.py").read_text(encoding="utf-8"), torch.rand(2, 3, 32, 32) * 2 - 1
    parts = [part for part in ast.parse(source).body if isinstance(part, (ast.Import, ast.ImportFrom))
             or getattr(part, "name", None) in copied
             or isinstance(part, ast.Assign) and part.targets[0].id in copied]
    alone = {"__name__": "copied"}
    exec(compile(ast.Module(parts, []), "copied", "exec"), alone)
    for name in names:
        piece, mask = alone[name], torch.rand(2, 1, 32, 32)
        if name == "fuse":
            assert piece(x, mask.expand(2, 2, 32, 32), x[:, None]).shape == x.shape
        elif "Generator" in name:
            more = [aggan.PatchDiscriminator(3, 4)] if name == "GuidedGenerator" else []
            t = piece(*more, 4, 1)(x)
            assert t.image.shape == x.shape and t.foreground.shape == mask.shape
        elif "Discriminator" in name:
            assert piece(3, 4)(x).shape == (2, 1, 2, 2) and piece(3, 4).attention(x).shape == mask.shape
        elif name in ("whole", "paired", "masked"):
            assert piece(x, mask).shape[2:] == x.shape[2:]
        elif name == "adversarial_loss":
            assert piece(mask, True).shape == ()
        elif name.endswith("loss"):
            assert piece(*(mask, mask)[:1 + (name != "total_variation_loss")]).shape == ()
        elif name == "AdaptiveCurriculum":
            assert piece(100)(0) == pytest.approx(0.01)
        elif name == "ImagePool":
            assert piece().query(x, mask)[0].shape == x.shape
        else:
            assert name == "UnpairedImages"
            (folders / "trainA" / "0.png").write_text("broken")
            data = piece(folders / "trainA", folders / "trainB", 32, 36)
            assert all(data[i][0].shape == (3, 32, 32) for i in range(5))

def test_configure_layers():
    config = aggan.configure({})
    assert not config.a and config.size == 64 and config.out == "runs/mini-scheme2"
    assert aggan.configure({"epochs": 2}).steps == 0 and config.steps > 0
    curricula = {model: aggan.configure({"model": model}).curriculum for model in aggan.PRESETS}
    assert curricula == dict(scheme1="adaptive", scheme2="adaptive", mejjati="adaptive", cyclegan="none",
                             guided="none")
    own = aggan.configure(dict(a="x", b="y", model="scheme1", l_tv=3.0))
    assert (own.size, own.out, own.l_tv) == (256, "runs/scheme1", 3.0)
    common = dict(l_cycle=10, l_copy=1, curriculum="adaptive", r=0.5)
    final = dict(common, l_gan=0.5, l_paired=0.5, l_pixel=1, l_identity=0, l_tv=1e-6, lr=1e-4)
    released = dict(common, l_gan=1, l_paired=0, l_pixel=0, l_identity=5, l_tv=0, lr=2e-4)
    for given in (dict(objective="released"), dict(model="cyclegan"), dict(model="mejjati")):
        assert aggan.configure(given).l_tv == aggan.configure(given, small=True).l_tv == 0
        assert aggan.configure(dict(given, l_tv=3.0)).l_tv == 3
    for name, weights in (("final", final), ("released", released)):
        config = dataclasses.asdict(aggan.configure(dict(a="x", b="y", objective=name)))
        assert weights.items() <= config.items()

@pytest.mark.parametrize("model", [*([name] for name in aggan.PRESETS), ["guided", "--attention-map", "tam"]])
def test_every_preset_by_the_command_line(folders, capsys, model):
    out, new = folders / "run", folders / "new"
    aggan.main(["train", "--a", str(folders / "trainA"), "--b", str(folders / "trainB"), "--out", str(out),
                "--steps", "2", "--model", *model, *map(str, command_line(TINY))])
    output = capsys.readouterr()
    assert "step 2/2" in output.out and output.err == ""
    aggan.main(["translate", str(out), str(folders / "testA"), "--to", "b", "--out", str(new), "--attention"])
    nets, _ = aggan.load_generators(out, torch.device("cpu"))
    x = aggan.to_tensor(aggan.load_image(folders / "testA" / "0.png"))
    for file, expected in (("0.png", nets["g_ab"](x[None]).image[0] / 2 + 0.5),
                           ("0_attention.png", nets["g_ab"](x[None]).foreground[0])):
        pixels = aggan.TF.to_tensor(Image.open(new / file))
        assert pixels.shape[1:] == (40, 48) and (pixels - expected).abs().max() < 0.5 / 255 + 1e-5
    x = sample_image(folders / "testA" / "0.png", 32)
    shown = aggan.to_tensor(Image.open(out / "samples" / "0000002.png"))[:, 2:34, 3 * 34 + 2:4 * 34]
    assert (shown - nets["g_ab"](x[None]).image[0]).abs().max() < 0.01  # what the training process drew

def test_command_line_end_to_end(folders, capsys):
    small, out = command_line(TINY), folders / "runs" / "one"
    command = ["train", "--a", folders / "trainA", "--b", folders / "trainB", "--out", out, *small]

    def here(*arguments, fails=False):
        """As `run`, in this process: what it says."""
        if fails:
            with pytest.raises(SystemExit) as stopped:
                aggan.main(list(map(str, arguments)))
            assert stopped.value.code == 2
            return capsys.readouterr().err
        aggan.main(list(map(str, arguments)))
        output = capsys.readouterr()
        assert output.err == ""
        return output.out
    assert "epoch 1  step 5/5" in here(*command, "--epochs", 1)
    assert "--resume" in here(*command, "--epochs", 1, fails=True)
    wrong = here(*command, "--epochs", 1, "--resume", "--lr", 1, "--model", "scheme1", fails=True)
    assert f"--lr 1.0 (there 0.0001), --model scheme1 (there scheme2): another run than {out}" in wrong
    assert "resuming" in here("train", "--out", out, "--resume", "--no-compile", "--workers", 1)
    assert "resuming" in here("train", "--out", out, "--resume", "--size", 32)  # the mini set's is 64 of 72
    for there in (folders, out / "checkpoint.pt"):
        assert "exists, and is no .json" in here("evaluate", out, "--json", there, fails=True)
    done = run("translate", out, folders / "testA", "--to", "b", "--out", folders / "new", "--attention")
    assert (done.returncode, done.stderr) == (0, "") and len(list((folders / "new").iterdir())) == 10
    assert "A -> B" in here("evaluate", out, "--a", folders / "testA", "--b", folders / "testB", "--json",
                            folders / "f")
    results = json.loads((folders / "f").read_text())
    assert list(results) == ["a2b", "b2a"]
    for figures in results.values():
        assert list(figures) == ["iou", "background_error", "foreground_change", "mean_attention"]

def test_small_settings_on_own_folders(folders, capsys):
    a, b, out = (str(folders / name) for name in ("trainA", "trainB", "small"))
    given = ["train", "--a", a, "--b", b, "--out", out, "--small", "--width", "4", "--device", "cpu"]
    aggan.main([*given, "--steps", "1"])
    assert "step 1/1" in capsys.readouterr().out
    config = aggan.load_checkpoint(out)["config"]
    expected = dict(aggan.MINI, a=a, b=b, width=4, steps=1, l_paired=0.5)  # what is given beside it wins
    assert expected.items() <= dataclasses.asdict(config).items()
    aggan.main([*given, "--steps", "1", "--resume"])
    tiny_one = map(str, command_line(dict(TINY, steps=1)))
    aggan.main([*given[:5], "--out", f"{out}-2", *tiny_one])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        aggan.main([*given[:5], "--out", f"{out}-2", "--resume", "--small"])  # that one is not
    assert "--size 64 (there 32)" in capsys.readouterr().err
    for more, steps in ((["--epochs", "3"], 0), ([], 2000)):
        with pytest.MonkeyPatch.context() as patch:
            configs = []
            patch.setattr(aggan, "train", lambda config, *_: configs.append(config))  # noqa: B023
            aggan.main(["train", "--a", a, "--b", b, "--small", *more])
        assert (configs[0].steps, configs[0].out) == (steps, "runs/scheme2")

def test_an_error_in_a_loading_process_gets_one_line(folders):
    for path in (folders / "trainA").iterdir():
        path.write_text("not a picture")
    done = run("train", *command_line(dict(TINY, workers=1, a=folders / "trainA", b=folders / "trainB",
                                           out=folders / "run")))
    assert done.returncode == 2 and done.stderr.count("not a usable image") == 5
    assert done.stderr.splitlines()[-1] == f"aggan.py: {folders}/trainA: not one usable image"

def test_bundled_set_trains_without_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "")
    aggan.main(["train", "--steps", "2", "--width", "4", "--device", "cpu"])
    output = capsys.readouterr()
    assert "bundled mini set" in output.out.splitlines()[0] and output.err == ""
    aggan.main(["evaluate", "runs/mini-scheme2", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "-" not in output.split("->")[1].splitlines()[0]  # masks were found

@pytest.mark.parametrize("arguments, words", [
    (["train", "--a", "nowhere", "--b", "empty"], "nowhere: no such file or folder"),
    (["train", "--a", "empty", "--b", "nowhere"], "empty: no images"),
    (["train", "--a", "broken/x.png", "--b", "empty"], "broken/x.png: no such file or folder"),
    (["train", "--a", "empty", "--b", "broken/../empty"], "--a and --b are the same folder"),
    (["train", "--a", "empty"], "--a and --b go together"),
    (["train", "--model", "cyclegam"], "argument --model: invalid choice: 'cyclegam' (choose from"),
    (["train", "--model", "cyclegan", "--l-paired", "1"], "--model cyclegan: has no mask"),
    (["train", "--model", "guided", "--l-gan", "0", "--l-paired", "1"], "needs --l-gan"),
    (["train", "--model", "guided", "--attention-map", "cam"], "--attention-map: invalid choice: 'cam'"),
    (["train", "--model", "mejjati", "--tau", "2"], "--tau 2.0: must be between 0 and 1"),
    (["train", "--size", "66"], "--size 66: must be a multiple of 4"),
    (["train", "--batch-size", "0"], "--batch-size 0: must be between 1"),
    (["train", "--lr", "fast"], "--lr: invalid float"),
    (["train", "--lr", "nan"], "--lr nan: must be between 0"),
    (["train", "--seed", "-1"], "--seed -1: must be between 0"),
    (["train", "--l-gan", "0", "--l-paired", "0"], "leaves no discriminator"),
    (["train", "--r", "2"], "--r 2.0: must be between 0.01 and 0.99"),
    (["train", "--curriculum", "steep"], "--curriculum: invalid choice: 'steep' (choose from"),
    (["train", "--resize", "32"], "--resize 32: must be at least --size 64"),
    (["train", "--out", "broken/x.png"], "--out broken/x.png: is a file"),
    (["train", "--device", "meta"], "--device meta"),
    (["train", "--device", "gpu"], "--device gpu"),
    (["train", "--width", "100000000"], "--width 100000000: must be between 1 and 2048"),
    (["train", "--size", "4000000", "--resize", "4000000"], "--size 4000000: must be between 32 and"),
    (["train", "--steps", "9" * 99], "must be between 0"), (["train", "--masks", "1"], "--masks 1: must be"),
    (["bench", "--model", "scheme3"], "argument --model: invalid choice"),
    (["evaluate", "nowhere"], "nowhere: no checkpoint.pt"),
    (["translate", "nowhere", "empty", "--to", "b", "--out", "out"], "empty: no images"),
    (["translate", "nowhere", "broken", "--to", "c", "--out", "out"], "argument --to: invalid choice: 'c'"),
    (["translate", "nowhere", "x.png", "--to", "b", "--out", "out"], "x.png: no such file or folder"),
    (["translate", "nowhere", "broken", "--to", "b", "--out", "out"], "nowhere: no checkpoint.pt"),
    (["evaluate", "broken/x.png"], "not a checkpoint"),
    (["paint"], "invalid choice: 'paint'")])
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("not a picture")
    with pytest.raises(SystemExit) as stopped:
        aggan.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "empty"]  # nothing was made
