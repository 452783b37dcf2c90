"""Attention-guided unpaired image-to-image translation, in one file: AGGAN and AttentionGAN.

Two folders of images, A and B, without pairs. A generator G: A -> B learns to change what makes an
A an A and to leave the rest alone: beside new pixels (content, C) it predicts where to use them
(attention, a). A second generator G' does the converse, and discriminators judge the results. For x
of A and y of B, and the same with A and B exchanged (G is `g_ab` and G', which the papers call F,
is `g_ba`; D judges images of B; the numbers are this file's own):

  (1) fusion      G(x) = sum_{f=1}^{n-1} a_f * C_f + a_n * x        sum_f a_f = 1; a_n: background
  (2) scheme I    n = 2, a = (s, 1 - s), s = sigmoid(.), C = tanh(.)
  (3) scheme II   a = softmax over n masks, C = tanh(.)
  (4) L_GAN       (D(y) - 1)^2 + D(G(x))^2, or, the papers', -log D(y) - log(1 - D(G(x))), D then
                  a sigmoid; D's is halved; G's is that of G(x) called real, (D(G(x)) - 1)^2
                  D's alone, not in the papers: + l_copy D(x)^2 / 2: an untouched x is a fake too;
                  and D sees everything shifted, by new amounts each step, growing (`moved`)
  (5) L_AGAN      the same, without l_copy, of another D: D([m, y]), D([m, G(x)]); m = 1 - a_n of x
  (6) L_cycle     |G'(G(x)) - x|, a mean, as (7) and (8)
  (7) L_pixel     |G(x) - x|
  (8) L_identity  |G(y) - y|
  (9) L_tv        sum of |m[h+1, w] - m[h, w]| + |m[h, w+1] - m[h, w]|
 (10) objective   r (l_cycle L_cycle + l_pixel L_pixel + l_identity L_identity)
                  + (1 - r) (l_gan L_GAN + l_paired L_AGAN + l_tv L_tv)
                  G's; of D's only the copy has a weight; without a curriculum both factors are 1
 (11) r           r_max t min(1, (1 - e / c) / 0.65), at least min(m^2, r_low); r_max: --r
                  t: progress; e, c, m: running means of (D(G(x)) - 1)^2, (D(x) - 1)^2, the mask;
                  e / c is 1 where G copies; not in the papers: their r is a step, 0.01 to 0.5
 (12) any size    out = x + up(G(z) - z), z: x at the scale of the training; not in the papers

  --model   paper                                             generator           attention
  scheme1   AGGAN, Tang et al. 2019, arXiv 1903.12296         SchemeOneGenerator  one sigmoid mask
  scheme2   AttentionGAN, Tang et al. 2021, arXiv 1911.11897  SchemeTwoGenerator  softmax over n
  cyclegan  CycleGAN, Zhu et al. 2017, arXiv 1703.10593       CycleGANGenerator   none: all is new
  mejjati   Mejjati et al. 2018, arXiv 1806.02311             GatedGenerator      a network's
  guided    Lin et al. 2021, spatial guidance, WACV           GuidedGenerator     a discriminator's

Shapes: B batch, H x W image size (multiples of 4), n masks, the last one the background's.
Images are (B, 3, H, W) in [-1, 1], masks (B, n, H, W) in [0, 1].

    python aggan.py train                                          the bundled drawings
    python aggan.py train --a trainA --b trainB --out runs/NAME    your folders
    python aggan.py translate runs/NAME photo.jpg folder/ --to b --out translated/
    python aggan.py evaluate runs/NAME --a testA --b testB

The first takes about four minutes on two CPU cores. Its masks then match the drawn animals with an
intersection over union of 0.87 (A -> B) and 0.87 (B -> A), means of seeds 0, 1, 2.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

# ==================== Part I: the method; tensors in, tensors out ====================

# ---------- 1. The fusion formula ----------


class Translation(NamedTuple):
    """What every generator returns."""

    image: Tensor      # (B, 3, H, W) in [-1, 1]
    attention: Tensor  # (B, n, H, W) in [0, 1], sums to 1 over n; the last mask is the background
    content: Tensor    # (B, n-1, 3, H, W) in [-1, 1]

    @property
    def foreground(self) -> Tensor:
        """(B, 1, H, W) in [0, 1]: how much of each pixel is new."""
        return 1 - self.attention[:, -1:]


def fuse(x: Tensor, attention: Tensor, content: Tensor) -> Tensor:
    """Eq. (1): new content where the foreground masks look, elsewhere the input itself.

    x (B, 3, H, W), attention (B, n, H, W), content (B, n-1, 3, H, W) -> (B, 3, H, W).
    ValueError unless there is one mask more than there are contents.
    """
    masks, contents = attention.shape[1], content.shape[1]
    if masks != contents + 1:
        raise ValueError(f"{masks} masks need {masks - 1} contents, not {contents}")

    foreground = attention[:, :-1, None]                   # (B, n-1, 1, H, W)
    background = attention[:, -1:]                         # (B, 1, H, W)
    return (foreground * content).sum(1) + background * x  # (B, 3, H, W)


def carry(x: Tensor, small: Tensor, changed: Tensor) -> Tensor:
    """Eq. (12): the change of a resized x, from `small` to `changed`, made to x itself.

    x (B, C, H, W), small, changed (B, C, h, w) -> (B, C, H, W) in [-1, 1]. Networks know things at
    one scale only; what a mask leaves alone there keeps every pixel of x.
    """
    change = F.interpolate(changed - small, size=x.shape[-2:], mode="bicubic", antialias=True)
    return change.add_(x).clamp_(-1, 1)  # in place: photographs are large


# ---------- 2. Building blocks ----------

# Names as in CycleGAN's paper: c7s1-k, a 7x7 convolution of stride 1 to k channels; dk, 3x3 of
# stride 2; Rk, a residual block; uk, upsampling. Numbers in names such as d128 are for width 64.

NORMS = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}  # instance: no learnt scale, shift


def conv_block(in_channels, out_channels, kernel, stride=1, norm="instance"):
    """Convolution, norm, ReLU: c7s1-k and 3x3 (reflection padded), or dk of stride 2 (zero padded).

    (B, in_channels, H, W) -> (B, out_channels, H/stride, W/stride), rounded up.
    """
    padding = dict(padding=kernel // 2, padding_mode="reflect" if stride == 1 else "zeros")
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, **padding),
        NORMS[norm](out_channels),
        nn.ReLU(),
    )


def up_block(in_channels, out_channels, norm="instance", upsample="nearest"):
    """uk: twice the height and width. (B, in_channels, H, W) -> (B, out_channels, 2H, 2W).

    upsample: "nearest", pixels doubled and a 3x3 convolution (Odena et al. 2016), or "transposed",
    the papers' transposed convolution, which leaves a grid in the image. Equally many parameters.
    """
    if upsample == "nearest":
        return DoublingBlock(
            nn.Upsample(scale_factor=2),
            conv_block(in_channels, out_channels, 3, norm=norm),
        )
    return nn.Sequential(
        nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1),
        NORMS[norm](out_channels),
        nn.ReLU(),
    )


class DoublingBlock(nn.Sequential):
    """What nn.Upsample and the 3x3 `conv_block` give, at once: 16 products for a pixel, not 36.

    Taps of the kernel that meet copies of one pixel are summed first. The sums are a 4x4 kernel,
    with which one transposed convolution does both; self[0] never runs. Shapes of `up_block`.
    """

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, relu = self[1]
        sums = 4 * F.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1)  # (out, in, 4, 4)
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")  # once doubled, the same as reflection
        x = F.conv_transpose2d(x, sums.transpose(0, 1), conv.bias, stride=2, padding=3)
        return relu(norm(x))


class ResidualBlock(nn.Module):
    """Rk (He et al. 2016, as in CycleGAN): two 3x3 convolutions, nothing after the sum."""

    def __init__(self, channels, norm="instance"):
        super().__init__()
        self.body = nn.Sequential(
            conv_block(channels, channels, 3, norm=norm),
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"),
            NORMS[norm](channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Encoder(nn.Sequential):
    """c7s1-64 d128 d256 R256 x blocks: (B, 3, H, W) -> (B, 4*width, H/4, W/4)."""

    def __init__(self, width=64, blocks=9, norm="instance"):
        super().__init__(
            conv_block(3, width, 7, norm=norm),
            conv_block(width, 2 * width, 3, stride=2, norm=norm),
            conv_block(2 * width, 4 * width, 3, stride=2, norm=norm),
            *(ResidualBlock(4 * width, norm) for _ in range(blocks)),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_sides(x)
        return super().forward(x)


def check_sides(x: Tensor):
    """ValueError unless they are multiples of 4: halved twice, they must double back."""
    if x.shape[-2] % 4 or x.shape[-1] % 4:
        raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} pixels: sides must be multiples of 4")


class Decoder(nn.Sequential):
    """u128 u64 c7s1-k, k without norm and ReLU: (B, 4*width, H/4, W/4) -> (B, k, H, W)."""

    def __init__(self, out_channels, width=64, norm="instance", upsample="nearest"):
        super().__init__(
            up_block(4 * width, 2 * width, norm, upsample),
            up_block(2 * width, width, norm, upsample),
            nn.Conv2d(width, out_channels, 7, padding=3, padding_mode="reflect"),
        )


def init_weights(net: nn.Module):
    """Weights N(0, 0.02), a norm's N(1, 0.02), biases 0, as in DCGAN (Radford et al. 2016)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            nn.init.normal_(module.weight, mean, 0.02)
            nn.init.zeros_(module.bias)


# ---------- 3. Generators ----------

# Each one's forward: (B, 3, H, W) in [-1, 1] -> `Translation`; H and W multiples of 4, at least 16.
# .float(): under autocast the convolutions' results are bf16 or fp16; masks and fusion are float32.


class SchemeOneGenerator(nn.Module):
    """Scheme I (Tang 2019; Eq. 2): one decoder gives one attention mask and one content; n = 2."""

    def __init__(self, width=64, blocks=9, norm="instance", upsample="nearest"):
        super().__init__()
        self.encoder = Encoder(width, blocks, norm)
        self.decoder = Decoder(1 + 3, width, norm, upsample)

    def forward(self, x: Tensor) -> Translation:
        decoded = self.decoder(self.encoder(x)).float()  # (B, 4, H, W)
        mask = decoded[:, :1].sigmoid()                  # (B, 1, H, W)
        attention = torch.cat([mask, 1 - mask], dim=1)   # (B, 2, H, W)
        content = decoded[:, None, 1:].tanh()            # (B, 1, 3, H, W)
        return Translation(fuse(x, attention, content), attention, content)


class SchemeTwoGenerator(nn.Module):
    """Scheme II (Tang 2021; Eq. 3): shared encoder, a decoder for masks, a decoder for contents."""

    def __init__(self, width=64, blocks=9, masks=10, norm="instance", upsample="nearest"):
        super().__init__()
        self.encoder = Encoder(width, blocks, norm)                             # G_E
        self.attention_decoder = Decoder(masks, width, norm, upsample)          # G_A
        self.content_decoder = Decoder(3 * (masks - 1), width, norm, upsample)  # G_C

    def forward(self, x: Tensor) -> Translation:
        features = self.encoder(x)                                          # (B, 4*width, H/4, W/4)
        attention = self.attention_decoder(features).float().softmax(dim=1)  # (B, n, H, W)
        content = self.content_decoder(features).float().tanh()             # (B, 3(n-1), H, W)
        content = content.unflatten(1, (-1, 3))                             # (B, n-1, 3, H, W)
        return Translation(fuse(x, attention, content), attention, content)


class CycleGANGenerator(nn.Module):
    """Zhu 2017, the baseline: no attention, its masks are the constants 1 and 0; n = 2."""

    def __init__(self, width=64, blocks=9, norm="instance", upsample="nearest"):
        super().__init__()
        self.encoder = Encoder(width, blocks, norm)
        self.decoder = Decoder(3, width, norm, upsample)

    def forward(self, x: Tensor) -> Translation:
        image = self.decoder(self.encoder(x)).float().tanh()  # (B, 3, H, W)
        ones = torch.ones_like(image[:, :1])                  # (B, 1, H, W)
        attention = torch.cat([ones, 1 - ones], dim=1)        # (B, 2, H, W)
        return Translation(image, attention, image[:, None])


# ---------- 4. Discriminators ----------

# Every one is called d(image, mask), with an image (B, 3, H, W) and a foreground mask (B, 1, H, W),
# whether it looks at the mask or not, and returns logits: what is real scores high.


def leaky_block(in_channels, out_channels, stride, norm="instance"):
    """Ck of the discriminators: 4x4 convolution, norm (None: none), LeakyReLU of slope 0.2."""
    layers = [nn.Conv2d(in_channels, out_channels, 4, stride, padding=1)]
    if norm is not None:
        layers.append(NORMS[norm](out_channels))
    return nn.Sequential(*layers, nn.LeakyReLU(0.2))


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of 70 x 70 pixels of an image (Isola et al. 2017).

    C64 C128 C256 of stride 2, C512 of stride 1, convolution to one map; no norm in C64.
    (B, in_channels, H, W) -> (B, 1, H//8 - 2, W//8 - 2); H and W at least 24.
    """

    def __init__(self, in_channels=3, width=64, norm="instance"):
        super().__init__()
        self.features = nn.Sequential(
            leaky_block(in_channels, width, 2, norm=None),
            leaky_block(width, 2 * width, 2, norm),
            leaky_block(2 * width, 4 * width, 2, norm),
        )
        self.head = nn.Sequential(
            leaky_block(4 * width, 8 * width, 1, norm),
            nn.Conv2d(8 * width, 1, 4, padding=1),
        )

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.features(image)).float()


class PooledDiscriminator(nn.Module):
    """Judges an image as a whole (Tang 2019).

    C64 C128 C256 C512 of stride 2, C512 of stride 1 without norm, average, linear.
    (B, in_channels, H, W) -> (B, 1, 1, 1); H and W at least 32.
    """

    def __init__(self, in_channels=3, width=64, norm="instance"):
        super().__init__()
        self.body = nn.Sequential(
            leaky_block(in_channels, width, 2, norm),
            leaky_block(width, 2 * width, 2, norm),
            leaky_block(2 * width, 4 * width, 2, norm),
            leaky_block(4 * width, 8 * width, 2, norm),
            leaky_block(8 * width, 8 * width, 1, norm=None),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8 * width, 1, 1),
        )

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.body(image).float()


HEADS = {"patch": PatchDiscriminator, "pooled": PooledDiscriminator}


class AttentionGuidedDiscriminator(nn.Module):
    """Eq. (5): judges an image and a foreground mask together; shapes: its head's."""

    def __init__(self, width=64, norm="instance", head="patch"):
        super().__init__()
        self.judge = HEADS[head](1 + 3, width, norm)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.judge(torch.cat([mask, image], dim=1))  # of (B, 1 + 3, H, W)


def moved(x: Tensor, shift=()) -> Tensor:
    """x (B, C, H, W), moved by shift (2,), pixels down and right; what is missing is mirrored.

    D sees everything so, farther in later epochs (Zhao et al. 2020): else masks drift to the edges.
    """
    for dim, by in zip((2, 3), shift):
        last = x.shape[dim] - 1
        source = (torch.arange(last + 1, device=x.device) - by).abs()
        x = x.index_select(dim, last - (last - source).abs())
    return x


# ---------- 5. Losses ----------


def adversarial_loss(logits: Tensor, real: bool, kind: str = "lsgan") -> Tensor:
    """Eqs. (4), (5): how far logits, of any shape, are from the verdict "real" or "fake"; a scalar.

    kind: "lsgan" (Mao et al. 2017), mean (logit - target)^2, or "vanilla", the papers' log form,
    mean cross-entropy; ValueError for another. A generator asks for real=True (non-saturating).
    """
    target = torch.ones_like(logits) if real else torch.zeros_like(logits)  # nothing to broadcast
    if kind == "lsgan":
        return F.mse_loss(logits, target)
    if kind == "vanilla":
        return F.binary_cross_entropy_with_logits(logits, target)
    raise ValueError(f"unknown GAN loss {kind!r}: lsgan or vanilla")


def cycle_loss(reconstructed: Tensor, real: Tensor) -> Tensor:
    """Eq. (6), Zhu et al. 2017: mean |G'(G(x)) - x|. Two (B, 3, H, W) -> a scalar."""
    return F.l1_loss(reconstructed, real)


def pixel_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Eq. (7), Tang 2019: mean |G(x) - x|. Two (B, 3, H, W) -> a scalar."""
    return F.l1_loss(fake, real)


def identity_loss(same: Tensor, real: Tensor) -> Tensor:
    """Eq. (8), Taigman et al. 2017: mean |G(y) - y|. Two (B, 3, H, W) -> a scalar."""
    return F.l1_loss(same, real)


def total_variation_loss(mask: Tensor) -> Tensor:
    """Eq. (9), Tang 2019: sum of steps between neighbours, mean over B. (B, n, H, W) -> scalar."""
    down = (mask[:, :, 1:] - mask[:, :, :-1]).abs().sum()
    across = (mask[..., 1:] - mask[..., :-1]).abs().sum()
    return (down + across) / mask.shape[0]


# ---------- 6. The objective ----------


def generator_objective(g, g_back, discriminators, x, y, r, config: "Config", shift=()):
    """Eq. (10) of one direction: g translates x, g_back translates that back, y is of the target.

    x, y (B, 3, H, W), r a scalar -> the total, its terms (detached), the `Translation` of x.
    discriminators: the target's, "gan" of Eq. (4), "paired" of Eq. (5); one whose weight is 0 is
    not there. Other terms of weight 0 are not computed. shift: of what discriminators see.
    """
    fake = g(x)
    mask = fake.foreground  # (B, 1, H, W), not detached: L_AGAN and L_tv train it too
    terms = {}

    # change: what asks for x to become a y, and, as in the papers, L_tv
    change = {"gan": config.l_gan, "paired": config.l_paired, "tv": config.l_tv}
    seen = moved(fake.image, shift), moved(mask, shift)
    for name, discriminator in discriminators.items():
        terms[name] = adversarial_loss(discriminator(*seen), True, config.gan)
    if config.l_tv:
        terms["tv"] = total_variation_loss(mask)

    # keep: what asks for x to stay
    keep = {"cycle": config.l_cycle, "pixel": config.l_pixel, "identity": config.l_identity}
    if config.l_cycle:
        terms["cycle"] = cycle_loss(g_back(fake.image).image, x)
    if config.l_pixel:
        terms["pixel"] = pixel_loss(fake.image, x)
    if config.l_identity:
        terms["identity"] = identity_loss(g(y).image, y)

    changed = sum(weight * terms[name] for name, weight in change.items() if weight)
    kept = sum(weight * terms[name] for name, weight in keep.items() if weight)
    total = kept + changed if config.curriculum == "none" else r * kept + (1 - r) * changed
    return total, {name: term.detach() for name, term in terms.items()}, fake


def discriminator_objective(discriminators, real, fake, untouched, config: "Config"):
    """Eqs. (4) and (5) for the discriminators of one domain, halved -> total, terms by name.

    Each an image (B, 3, H, W) and a mask (B, 1, H, W), detached:
    real       an image of the domain; the mask of its own translation
    fake       a translation into the domain, or an earlier one; the mask that made it
    untouched  an image of the other domain; the mask of its own translation
    The term "copy" is not in the total: what L_GAN of G would be if it copied, c of Eq. (11).
    """
    (real_image, real_mask), (fake_image, fake_mask) = real, fake
    total, terms = 0, {}
    for name, discriminator in discriminators.items():
        # Eq. (5): the fake's mask beside the real image too, a misfit; real_mask is for --tau alone
        mask = fake_mask if name == "paired" else real_mask
        on_real = adversarial_loss(discriminator(real_image, mask), True, config.gan)
        on_fake = adversarial_loss(discriminator(fake_image, fake_mask), False, config.gan)
        terms["d_" + name] = (on_real + on_fake) / 2
        total = total + terms["d_" + name]

    # not in the papers: an untouched input is a fake as well, so that a copy is no way out
    if config.l_copy or config.curriculum == "adaptive":
        logits = discriminators["gan" if config.l_gan else "paired"](*untouched)
        terms["d_copy"] = adversarial_loss(logits, False, config.gan) / 2
        terms["copy"] = adversarial_loss(logits, True, config.gan)
        total = total + config.l_copy * terms["d_copy"]
    return total, {name: term.detach() for name, term in terms.items()}


class AdaptiveCurriculum(nn.Module):
    """Eq. (11): r of both directions, a ramp over the run, held back as far as a direction copies.

        e, c  <-  running means of L_GAN for G(x) and for x, over about 2 % of the run
        m     <-  the same of the mask's mean, over about 10 steps
        r      =  ramp * min(1, (1 - e / c) / (1 - trust)), at least min(m^2, lowest)

    Where G copies, e / c is 1; the better G(x) fools D, the smaller it is. Up to e / c = trust, r
    is the ramp's, and masks shrink to what has to change. Where they shrink too far, D sees
    through G(x), and r falls. Before the ramp has come, `lowest` holds large masks back.
    """

    def __init__(self, steps, highest=0.5, trust=0.35, lowest=0.05):
        super().__init__()
        self.steps, self.trust = steps, trust
        self.highest, self.lowest = highest, min(lowest, highest)
        for name in "ecm":
            self.register_buffer(name, torch.ones(2))  # of A -> B, of B -> A

    def forward(self, step: int) -> Tensor:
        """r of the step, the first of which is 0: (2,)."""
        ramp = self.highest * step / self.steps
        fooled = 1 - self.e / self.c.clamp(min=1e-6)
        least = self.m.square().clamp(max=self.lowest)
        return torch.maximum((ramp * fooled / (1 - self.trust)).clamp(max=ramp), least)

    @torch.no_grad()
    def update(self, step: int, e: Tensor, c: Tensor, m: Tensor):
        """Takes in L_GAN for G(x) and for x, and the mask's mean, of the step: (2,) each."""
        share = 1 / min(step + 1, max(1, 0.02 * self.steps))  # at first the mean of all steps
        self.e.lerp_(e, share)
        self.c.lerp_(c, share)
        self.m.lerp_(m, 0.1)


def scheduled_r(config: "Config", progress: float) -> float:
    """r of Eq. (10) by progress in [0, 1] alone: 0.01, from 0.05 on config.r, or its ramp."""
    if progress < 0.05:
        return 0.01
    return config.r if config.curriculum == "papers" else max(0.01, config.r * progress)


class ImagePool:
    """Up to `size` earlier fakes, each with its mask (Shrivastava et al. 2017)."""

    def __init__(self, size=50):
        self.size = size
        self.items = []

    def query(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), (B, 1, H, W) -> the same shapes, detached.

        Each pair itself, or, half of the time once the pool is full, an earlier one in its place.
        """
        chosen = []
        for image, mask in zip(images.detach(), masks.detach()):
            pair = image.clone(), mask.clone()  # each its own memory: the batch's may be reused
            if len(self.items) < self.size:
                self.items.append(pair)
            elif self.size and torch.rand(()) < 0.5:
                i = int(torch.randint(self.size, ()))
                pair, self.items[i] = self.items[i], pair
            chosen.append(pair)
        return tuple(torch.stack(part) for part in zip(*chosen))


# ---------- 7. The neighbours ----------

# Methods that the papers compare with, in the same shapes. Those that change in the course of a run
# have set_progress(progress) -> whether they are in their late phase; the loop calls it each step.


class AttentionNetwork(nn.Sequential):
    """Mejjati 2018: what is to be changed? (B, 3, H, W) -> (B, 1, H, W) in [0, 1]."""

    def __init__(self, width=32, norm="instance"):
        super().__init__(
            conv_block(3, width, 7, stride=2, norm=norm),
            conv_block(width, 2 * width, 3, stride=2, norm=norm),
            ResidualBlock(2 * width, norm),
            up_block(2 * width, 2 * width, norm),
            up_block(2 * width, width, norm),
            nn.Conv2d(width, 1, 7, padding=3, padding_mode="reflect"),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_sides(x)
        return super().forward(x).float().sigmoid()


class GatedGenerator(nn.Module):
    """Mejjati 2018: CycleGAN's generator, g, sees the foreground: a g(a x) + (1 - a) x; n = 2.

    From `switch` on, a fraction of the run, the attention network is frozen.
    """

    def __init__(self, width=64, blocks=9, norm="instance", upsample="nearest", switch=0.3):
        super().__init__()
        self.attention_network = AttentionNetwork(max(1, width // 2), norm)
        self.generator = CycleGANGenerator(width, blocks, norm, upsample)
        self.switch = switch
        self.frozen = False

    def set_progress(self, progress: float) -> bool:
        self.frozen = progress >= self.switch
        self.attention_network.train(self.training and not self.frozen)  # batch norms rest too
        return self.frozen

    def forward(self, x: Tensor) -> Translation:
        mask = self.attention_network(x)  # (B, 1, H, W)
        if self.frozen:
            mask = mask.detach()
        attention = torch.cat([mask, 1 - mask], dim=1)  # (B, 2, H, W)
        content = self.generator(mask * x).content      # (B, 1, 3, H, W)
        return Translation(fuse(x, attention, content), attention, content)


class MaskedDiscriminator(nn.Module):
    """Mejjati 2018: from `switch` on it sees an image only where mask >= tau, the rest grey (0).

    Then its norm layers are left out, as their statistics would include the blank background.
    With --tau for any model whose masks are its own. Shapes: the head's.
    """

    def __init__(self, width=64, norm="instance", head="patch", tau=0.1, switch=0.3):
        super().__init__()
        self.judge = HEADS[head](3, width, norm)
        self.tau, self.switch = tau, switch
        self.masked = False

    def set_progress(self, progress: float) -> bool:
        self.masked = progress >= self.switch
        return self.masked

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        if not self.masked:
            return self.judge(image)
        x = image * (mask >= self.tau)
        for layer in self.judge.modules():  # in their order; only the innermost compute
            if not isinstance(layer, tuple(NORMS.values())) and not list(layer.children()):
                x = layer(x)
        return x.float()


class GuidedGenerator(nn.Module):
    """Lin 2021: CycleGAN's generator sees x (1 + a), a from the discriminator of x's own domain.

    n = 2. Not fused: the image is the generator's, (a, 1 - a) is only reported. a has no gradient.
    """

    def __init__(self, guide, width=64, blocks=9, norm="instance", upsample="nearest"):
        super().__init__()
        self.generator = CycleGANGenerator(width, blocks, norm, upsample)
        self.guide = guide.attention  # the method alone: the module is saved and trained elsewhere

    def forward(self, x: Tensor) -> Translation:
        mask = self.guide(x).detach()                   # (B, 1, H, W)
        attention = torch.cat([mask, 1 - mask], dim=1)  # (B, 2, H, W)
        image, _, content = self.generator(x * (1 + mask))
        return Translation(image, attention, content)


def attention_map(features: Tensor, like: Tensor) -> Tensor:
    """Mean over channels, stretched to [0, 1], as large as `like`: (B, C, h, w) -> (B, 1, H, W)."""
    a = features.float().mean(1, keepdim=True)
    low, high = a.amin((2, 3), keepdim=True), a.amax((2, 3), keepdim=True)
    a = (a - low) / (high - low).clamp(min=1e-6)
    return F.interpolate(a, size=like.shape[-2:], mode="bilinear")


class ActivationDiscriminator(PatchDiscriminator):
    """Lin 2021, PHA: attends where its third block responds. Shapes of `PatchDiscriminator`."""

    def attention(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H, W) in [0, 1]."""
        return attention_map(self.features(image).abs(), like=image)


class ResidualAttentionDiscriminator(PatchDiscriminator):
    """Lin 2021, TAM (after Wang et al. 2017): a learnt mask m; the head reads (1 + m) * trunk."""

    def __init__(self, in_channels=3, width=64, norm="instance"):
        super().__init__(in_channels, width, norm)
        wide = 4 * width
        self.branch = nn.Sequential(
            nn.MaxPool2d(3, 2, padding=1),
            conv_block(width, 2 * width, 3, norm=norm),
            nn.MaxPool2d(3, 2, padding=1),
            conv_block(2 * width, wide, 3, norm=norm),
            conv_block(wide, wide, 3, norm=norm),
            conv_block(wide, wide, 3, norm=norm),
        )
        self.mix = nn.Sequential(
            nn.Conv2d(wide, wide, 1), nn.ReLU(), nn.Conv2d(wide, wide, 1), nn.Sigmoid()
        )

    def trunk_and_mask(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> twice (B, 4*width, H//8, W//8), the mask in [0, 1]."""
        stem = self.features[0](image)   # (B, width, H/2, W/2)
        trunk = self.features[1:](stem)  # (B, 4*width, H//8, W//8)
        mask = F.interpolate(self.branch(stem), size=trunk.shape[-2:], mode="bilinear")
        return trunk, self.mix(mask)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        trunk, own_mask = self.trunk_and_mask(image)
        return self.head((1 + own_mask) * trunk).float()

    def attention(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H, W) in [0, 1]."""
        return attention_map(self.trunk_and_mask(image)[1], like=image)


GUIDES = {"pha": ActivationDiscriminator, "tam": ResidualAttentionDiscriminator}

# ==================== Part II: training ====================

# ---------- 8. Configuration ----------


@dataclasses.dataclass
class Config:
    """One run; each field, on one line, is an option of `train`, its comment the help text.

    Later ones win: defaults, SMALL_TV, OBJECTIVES, DRAWINGS, PRESETS, SMALL, the command line.
    """

    # data
    a: str = ""        # folder of domain A; without --a and --b: the bundled drawings
    b: str = ""        # folder of domain B
    size: int = 256    # side of the training crops, a multiple of 4
    resize: int = 286  # shorter side of the images before cropping
    workers: int = 4   # threads that load images

    # model
    model: str = "scheme2"      # scheme1, scheme2, cyclegan, mejjati or guided
    width: int = 64             # channels of the first layers
    blocks: int = 9             # residual blocks of a generator
    masks: int = 10             # n of scheme II: n - 1 foreground masks and the background
    upsample: str = "nearest"   # of the decoders: nearest or transposed (the papers')
    norm: str = "instance"      # instance or batch
    head: str = "patch"         # of the discriminators: patch or pooled
    attention_map: str = "pha"  # of guided's discriminators: pha or tam
    tau: float = 0.0            # from --switch on, D sees only where mask >= tau; 0: everywhere
    switch: float = 0.3         # fraction of the run before tau acts and mejjati's masks freeze

    # objective
    objective: str = "own"        # weights, rate: own, final (the papers'; drawings) or released
    gan: str = "lsgan"            # adversarial loss: lsgan or vanilla
    l_gan: float = 1.0            # weight of L_GAN, Eq. 4; final: 0.5
    l_paired: float = 0.0         # weight of L_AGAN, Eq. 5; final: 0.5
    l_cycle: float = 10.0         # weight of L_cycle, Eq. 6
    l_pixel: float = 1.0          # weight of L_pixel, Eq. 7
    l_identity: float = 0.0       # weight of L_identity, Eq. 8
    l_tv: float = 1e-6            # weight of L_tv, Eq. 9; small settings: 1e-4 (64 / size)^3
    l_copy: float = 1.0           # weight of the untouched input among D's fakes, Eq. 4
    shift: float = 0.5            # highest shift of what D sees, a share of the side; drawings: 0
    curriculum: str = "adaptive"  # of r: adaptive (Eq. 11), papers (a step), ramp or none
    r: float = 0.5                # its highest value: papers and ramp end there, adaptive may
    r_low: float = 0.05           # its lowest, or m^2 if less; final, released: 0.01

    # optimisation
    batch_size: int = 1  # pairs a step, of each process
    epochs: int = 200    # passes over the larger folder, in whole batches
    steps: int = 0       # length of the run in steps, in place of --epochs
    lr: float = 1e-4     # Adam's rate, constant for half of the run, then linearly to 0
    pool: int = 50       # earlier fakes kept for the discriminators
    seed: int = 0        # of weights, order, crops, flips and pools
    init: str = ""       # a run, or its checkpoint, whose networks this one starts from

    # machine
    out: str = ""              # run folder; default runs/MODEL, on the drawings runs/mini-MODEL
    device: str = "auto"       # auto (cuda, else mps, else cpu) or a PyTorch device
    precision: str = "auto"    # fp32, bf16, fp16, or auto: fp32, on CUDA what its age allows
    graph: bool = True         # on CUDA: record the step as a CUDA graph
    log_every: int = 100       # steps between progress lines, each a row of log.csv
    save_every: int = 1000     # steps between checkpoints, each with a sample grid
    tensorboard: bool = False  # curves for TensorBoard too, in the run folder


RELEASED = dict(l_identity=5.0, l_pixel=0.0, l_tv=0.0, r_low=0.01, lr=2e-4)
OBJECTIVES = {"own": {}, "final": dict(l_gan=0.5, l_paired=0.5, r_low=0.01), "released": RELEASED}
# To add a method: a class in section 3 or 7 holding all its networks; its name in PRESETS (options
# that it needs whatever the objective; SMALL still wins), build_generator, Config.model, the table
# on top, and if unmasked UNFUSED, check. A loss: section 5, generator_objective, Config (weight 0).
CYCLEGAN_LOSSES = dict(objective="released", curriculum="none", l_copy=0.0, shift=0.0)
PRESETS = {
    "scheme1": {},
    "scheme2": {},
    "cyclegan": CYCLEGAN_LOSSES,
    # r and (a default) l_copy are not of its paper: without them its masks fall to 0 here
    "mejjati": dict(objective="released", l_identity=0.0, lr=1e-4, tau=0.1, r=0.8, shift=0.0),
    "guided": dict(CYCLEGAN_LOSSES, l_identity=0.0),
}
SMALL = dict(size=64, resize=72, width=16, blocks=3, steps=2000, lr=4e-4)
SMALL |= dict(log_every=50, save_every=400)
SMALL_TV = 1e-4                   # at 64 px, by trial; as much at 128 drives masks to 1, for good
DRAWINGS = dict(objective="final", shift=0.0)  # they are flat: with a shift D wins
UNFUSED = ("cyclegan", "guided")  # models without a mask of their own that could collapse
PRECISIONS = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = dict(model=PRESETS, objective=OBJECTIVES, norm=NORMS, head=HEADS, attention_map=GUIDES)
CHOICES |= dict(upsample=("nearest", "transposed"), gan=("lsgan", "vanilla"))
CHOICES |= dict(curriculum=("adaptive", "papers", "ramp", "none"), precision=PRECISIONS)
# what --resume may change: folders, length, rate, machine
FREE = {"a", "b", "epochs", "steps", "lr", "init", "out", "device", "precision", "workers", "graph"}
FREE |= {"log_every", "save_every", "tensorboard"}
LEAST = dict(width=1, masks=2, size=32, r=0.01, batch_size=1, epochs=1, log_every=1, save_every=1)


class BadInput(Exception):
    """Input that is no use, or a run that ends early: one line, and the exit status."""

    def __init__(self, line, status=2):
        super().__init__(line)
        self.status = status


def flag(name):
    return "--" + name.replace("_", "-")


def configure(given: dict, small=None) -> Config:
    """Options given -> the configuration. small: with SMALL; None: where no folders are given."""
    model, bundled = given.get("model", "scheme2"), not given.get("a")
    settings = (DRAWINGS if bundled else {}) | PRESETS[model]
    settings = OBJECTIVES[(settings | given).get("objective", "own")] | settings
    small = bundled if small is None else small
    if small:
        tv = SMALL_TV * (SMALL["size"] / max(1, (SMALL | given)["size"])) ** 3
        settings = dict(l_tv=tv) | settings | SMALL
    settings["out"] = f"runs/mini-{model}" if small and bundled else f"runs/{model}"
    if "epochs" in given:
        settings["steps"] = 0
    folders = {name: os.path.abspath(given[name]) for name in "ab" if given.get(name)}
    return Config(**(settings | given | folders))


def check(c: Config) -> Config:
    """The same configuration; BadInput names the first option whose value cannot be used."""
    for name, value in vars(c).items():
        least, choices = LEAST.get(name, 0), CHOICES.get(name)
        if not isinstance(value, str) and not least <= value < 2**63:
            raise BadInput(f"{flag(name)} {value}: must be at least {least}, and below 2**63")
        if choices and value not in choices:
            raise BadInput(f"{flag(name)} {value}: must be one of {', '.join(choices)}")
    if bool(c.a) != bool(c.b):
        raise BadInput("--a and --b go together: one folder for each domain")
    a, b = Path(c.a).resolve(), Path(c.b).resolve()
    if c.a and (a == b or a in b.parents or b in a.parents):
        raise BadInput(f"--a {a} --b {b}: one folder for each domain, neither in the other")
    if c.size % 4 or not c.size <= c.resize <= 2**15:
        raise BadInput(f"--size {c.size}: must be a multiple of 4, and at most --resize {c.resize}")
    if c.shift > 1 - 1 / c.size:
        raise BadInput(f"--shift {c.shift}: must be at most {c.size - 1} of {c.size} pixels")
    if not c.l_gan and not c.l_paired:
        raise BadInput("--l-gan 0 --l-paired 0: leaves no discriminator")
    if c.model == "cyclegan" and (c.l_paired or c.l_tv or c.tau):
        raise BadInput("--model cyclegan: has no mask, needs --l-paired 0, --l-tv 0 and --tau 0")
    if c.model == "guided" and (c.tau or not c.l_gan or c.head != "patch"):
        raise BadInput("--model guided: needs --l-gan, --tau 0 and --head patch")
    return c


def build_generator(c: Config, own: nn.ModuleDict) -> nn.Module:
    """The generator of --model; own: the discriminators of its input's domain, for guided."""
    generator, more = {
        "scheme1": (SchemeOneGenerator, {}),
        "scheme2": (SchemeTwoGenerator, {"masks": c.masks}),
        "cyclegan": (CycleGANGenerator, {}),
        "mejjati": (GatedGenerator, {"switch": c.switch if c.tau else 1.0}),
        "guided": (GuidedGenerator, {"guide": own["gan"] if c.l_gan else None}),
    }[c.model]
    return generator(width=c.width, blocks=c.blocks, norm=c.norm, upsample=c.upsample, **more)


def build_discriminators(c: Config) -> nn.ModuleDict:
    """Those of one domain: "gan" judges images, Eq. (4), "paired" masks and images, Eq. (5)."""
    discriminators = nn.ModuleDict()
    judge = GUIDES[c.attention_map] if c.model == "guided" else HEADS[c.head]
    if c.l_gan and c.tau:
        discriminators["gan"] = MaskedDiscriminator(c.width, c.norm, c.head, c.tau, c.switch)
    elif c.l_gan:
        discriminators["gan"] = judge(3, c.width, c.norm)
    if c.l_paired:
        discriminators["paired"] = AttentionGuidedDiscriminator(c.width, c.norm, c.head)
    return discriminators


def build(config: Config) -> nn.ModuleDict:
    """All networks: g_ab, g_ba, and the discriminators of images of A and of B, d_a and d_b."""
    d_a, d_b = build_discriminators(config), build_discriminators(config)
    g_ab, g_ba = build_generator(config, d_a), build_generator(config, d_b)
    nets = nn.ModuleDict({"g_ab": g_ab, "g_ba": g_ba, "d_a": d_a, "d_b": d_b})
    init_weights(nets)
    return nets


# ---------- 9. The training step ----------

# torchrun's: how many processes train this run, and which of them this is
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0


class Trainer:
    """Networks, optimisers, pools, curriculum and position of a run; `step` trains.

    Under torchrun one of several processes, each with images of its own; gradients are averaged.
    """

    def __init__(self, config: Config, total: int, device: torch.device):
        self.config, self.total, self.device = config, total, device
        self.done = 0  # steps

        # networks and what trains them
        torch.manual_seed(config.seed)
        self.nets = build(config).to(device)
        torch.manual_seed(config.seed + RANK)
        self.g_parameters = [p for k in ("g_ab", "g_ba") for p in self.nets[k].parameters()]
        self.d_parameters = [p for k in ("d_a", "d_b") for p in self.nets[k].parameters()]
        adam = dict(betas=(0.5, 0.999), fused=True)
        self.opt_g = torch.optim.Adam(self.g_parameters, config.lr, **adam)
        self.opt_d = torch.optim.Adam(self.d_parameters, config.lr, **adam)
        self.curriculum = AdaptiveCurriculum(total, config.r, lowest=config.r_low).to(device)
        self.pool_a, self.pool_b = ImagePool(config.pool), ImagePool(config.pool)
        self.changing = [net for net in self.nets.modules() if hasattr(net, "set_progress")]
        self.phase = None

        # precision and speed
        self.dtype = dtype = pick_precision(config, device)
        self.autocast = functools.partial(torch.autocast, device.type, dtype, enabled=bool(dtype))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        self.recorded = []
        if device.type == "cuda" and config.graph:
            g, d = Recorded(self.generator_gradients), Recorded(self.discriminator_gradients)
            self.generator_gradients, self.discriminator_gradients = self.recorded = [g, d]

        # for the log: figures since its last row, their names, lines not written yet, bytes written
        self.rows, self.names, self.log, self.logged = [], [], [], 0
        self.counts, self.per_epoch = {}, 1  # images of each domain, steps; `start` sets them
        self.parts = {"nets": self.nets, "opt_g": self.opt_g, "opt_d": self.opt_d}
        self.parts |= {"curriculum": self.curriculum, "scaler": self.scaler}

    def step(self, real_a: Tensor, real_b: Tensor) -> dict[str, Tensor]:
        """One update of the generators, then one of the discriminators, on images (B, 3, H, W).

        -> scalars: the losses, the mean attention, r; they stay on the device.
        """
        pinned = self.device.type == "cuda"  # elsewhere it would not be safe
        real_a, real_b = (x.to(self.device, non_blocking=pinned) for x in (real_a, real_b))
        r = self.begin()  # (2,): of A -> B, of B -> A
        share = min(1, 0.25 + self.done / self.per_epoch / 200)  # all from epoch 150 on
        far = share * self.config.shift * self.config.size       # pixels
        shift = [((2 * torch.rand(2) - 1) * far).round().long().to(self.device)] if far else []

        # generators: gradients of both directions, one update
        fake_a, fake_b, mask_a, mask_b, ab, ba = self.generator_gradients(real_a, real_b, r, *shift)
        self.update(self.opt_g, self.g_parameters)

        # discriminators: fakes of this step and of earlier ones, each with the mask that made it
        old_a = self.pool_a.query(fake_a, mask_b)  # a fake of A was made of a B
        old_b = self.pool_b.query(fake_b, mask_a)
        seen = [moved(x, *shift) for x in (real_a, mask_a, real_b, mask_b, *old_a, *old_b)]
        a, b = self.discriminator_gradients(*seen)
        self.update(self.opt_d, self.d_parameters)
        self.scaler.update()

        # e, c and m of Eq. (11), for r or warnings; a copy of an A is judged as a B
        attention = mask_a.mean(), mask_b.mean()
        if "copy" in a:
            judge = "gan" if self.config.l_gan else "paired"
            ecm = [ab[judge], ba[judge]], [b["copy"], a["copy"]], attention
            self.curriculum.update(self.done, *average(torch.stack([*map(torch.stack, ecm)])))
        self.done += 1

        figures = {name: ab[name] + ba[name] for name in ab}
        figures |= {name: a[name] + b[name] for name in a}
        figures |= {"attention_ab": attention[0], "attention_ba": attention[1]}
        if self.config.curriculum != "none":
            figures |= {"r_ab": r[0], "r_ba": r[1]}
        values = torch.stack(list(figures.values()))  # replays overwrite the figures
        return dict(zip(figures, values))

    def generator_gradients(self, real_a: Tensor, real_b: Tensor, r: Tensor, shift=()):
        """Gradients of Eq. (10) -> fakes of A and B, masks of real_a, real_b, terms of both ways.

        One direction at a time, for memory. inputs=: no gradients for discriminators here.
        """
        g_ab, g_ba, d_a, d_b = self.nets.values()
        objective = functools.partial(generator_objective, config=self.config, shift=shift)
        self.opt_g.zero_grad()
        with self.autocast():
            loss, ab, to_b = objective(g_ab, g_ba, d_b, real_a, real_b, r[0])
        self.scaler.scale(loss).backward(inputs=self.g_parameters)
        fake_b, mask_a = to_b.image.detach(), to_b.foreground.detach()
        del loss, to_b  # their memory, before the other direction needs as much

        with self.autocast():
            loss, ba, to_a = objective(g_ba, g_ab, d_a, real_b, real_a, r[1])
        self.scaler.scale(loss).backward(inputs=self.g_parameters)
        fake_a, mask_b = to_a.image.detach(), to_a.foreground.detach()
        return fake_a, fake_b, mask_a, mask_b, ab, ba

    def discriminator_gradients(self, real_a, mask_a, real_b, mask_b, *fakes):
        """Gradients, Eqs. (4), (5), -> terms of d_a, d_b. fakes: of A, mask, of B, mask."""
        _, _, d_a, d_b = self.nets.values()
        a, b, fake_a, fake_b = (real_a, mask_a), (real_b, mask_b), fakes[:2], fakes[2:]
        self.opt_d.zero_grad()
        with self.autocast():
            loss, terms_b = discriminator_objective(d_b, b, fake_b, a, self.config)
        self.scaler.scale(loss).backward(inputs=self.d_parameters)
        with self.autocast():
            loss, terms_a = discriminator_objective(d_a, a, fake_a, b, self.config)
        self.scaler.scale(loss).backward(inputs=self.d_parameters)
        return terms_a, terms_b

    def update(self, optimizer, parameters):
        """One Adam step, on the mean gradient of all processes."""
        if WORLD > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            mean = average(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, new in zip(gradients, mean.split([g.numel() for g in gradients])):
                gradient.copy_(new.view_as(gradient))
        optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.done / self.total)
        self.scaler.step(optimizer)

    def begin(self) -> Tensor:
        """Tells the networks how far the run is -> r of this step, Eq. (10): (2,)."""
        progress = self.done / self.total
        phase = [net.set_progress(progress) for net in self.changing]
        if phase != self.phase:  # what was recorded is void
            for function in self.recorded:
                function.forget()
        self.phase = phase
        if self.config.curriculum == "adaptive":
            return self.curriculum(self.done)
        return torch.full((2,), scheduled_r(self.config, progress), device=self.device)

    def state_dict(self) -> dict:
        """All that the run needs to go on, but the other processes' pools and random numbers."""
        plain = "total", "rows", "names", "log", "logged", "counts"
        return {name: getattr(self, name) for name in plain} | {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "world": WORLD,
            "step": self.done,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "pools": [self.pool_a.items, self.pool_b.items],
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict):
        """ValueError for another number of processes, or whatever a damaged state raises."""
        if state["world"] != WORLD:
            raise ValueError(f"a run of {state['world']} processes, here are {WORLD}")
        self.done = state["step"]
        self.rows = [row.to(self.device) for row in state["rows"]]
        self.names, self.log, self.logged = state["names"], state["log"], int(state["logged"])
        for name, part in self.parts.items():
            if name != "scaler" or state["parts"][name]:  # one that was not needed is empty
                part.load_state_dict(state["parts"][name])
        for p, moments in [*self.opt_g.state.items(), *self.opt_d.state.items()]:
            if not p.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
                raise ValueError("Adam's means of another shape")  # Adam does not look

        shapes = [(channels, self.config.size, self.config.size) for channels in (3, 1)]
        for pool, items in zip((self.pool_a, self.pool_b), state["pools"], strict=True):
            items = [(image.reshape(shapes[0]), mask.reshape(shapes[1])) for image, mask in items]
            pool.items = [(image.to(self.device), mask.to(self.device)) for image, mask in items]
        if RANK == 0:
            torch.set_rng_state(state["random"])


class Recorded:
    """A function of CUDA tensors: the fourth call records it as a CUDA graph.

    From then on it is replayed, one launch in place of thousands; what a replay returns, the next
    overwrites. Where recording fails, the function goes on as it is.
    """

    def __init__(self, function):
        self.function = function
        self.forget()

    def forget(self):
        self.calls, self.graph, self.inputs, self.outputs = 0, None, None, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == 4:  # by now libraries have settled
            self.record(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for static, new in zip(self.inputs, inputs):
            static.copy_(new)
        self.graph.replay()
        return self.outputs

    def record(self, inputs):
        inputs = [x.clone() for x in inputs]
        gc.collect()  # memory that is freed in the middle would spoil it
        try:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # thread_local: loaders pin memory meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = self.function(*inputs)
            self.graph, self.inputs, self.outputs = graph, inputs, outputs
        except Exception as error:  # CUDA's, the allocator's, a library's
            warn(f"no CUDA graph, going on without: {brief(error)}")


def average(x: Tensor) -> Tensor:
    """The mean over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
        x /= WORLD
    return x


def learning_rate(config: Config, progress: float) -> float:
    """Constant for the first half of the run, then linearly to 0 at progress = 1."""
    return config.lr * min(1.0, 2 - 2 * progress)


def pick_precision(config: Config, device: torch.device) -> torch.dtype | None:
    """The convolutions' type; None: float32. auto: on CUDA bf16, or fp16 if it has no bf16."""
    if config.precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    return PRECISIONS[config.precision]


# ---------- 10. The run ----------

FORMAT = 8    # of the checkpoints
FAILED = 128  # what a failed process tells the others, where a signal's number would be


def from_first(function, *arguments):
    """function(*arguments), in the first process alone -> its result, in all; or all end."""
    if WORLD == 1:
        return function(*arguments)
    if not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()  # Windows has none
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    try:
        result = [function(*arguments) if RANK == 0 else None]
    except Exception as error:
        result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0] if RANK == 0 else SystemExit(2)  # one says why
    return result[0]


def load_checkpoint(run) -> dict:
    """A run folder or its checkpoint.pt -> the state. Never runs code from the file. BadInput."""
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise BadInput(f"{run}: no checkpoint.pt here; name a run folder, such as runs/NAME")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load looks at no checksum
                raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"of format {state['format']}, this program's is {FORMAT}")
        if not 0 <= int(state["step"]) <= int(state["total"]):
            raise ValueError(f"step {state['step']} of {state['total']}")
        saved = dict(shift=0.0, r_low=0.01) | state["config"]  # as runs before these options
        values = (f.type(saved.get(f.name, f.default)) for f in dataclasses.fields(Config))
        state["config"] = check(Config(*values))
        state["parts"]["curriculum"].setdefault("m", torch.ones(2))
    except Exception as error:
        raise unusable(path, error) from None
    return state


def unusable(path, error) -> Exception:
    line = f"{path}: not a checkpoint that this can use ({brief(error)})"
    return error if isinstance(error, torch.OutOfMemoryError) else BadInput(line)


def find_run(config: Config, resume: bool, typed: set | None) -> tuple[Config, dict | None]:
    """The configuration, a saved run's but for options of FREE typed anew; its state, or None."""
    out, file = Path(config.out), Path(config.out, "checkpoint.pt")
    if out.is_file():
        raise BadInput(f"--out {out}: is a file; name a folder")
    if not resume and out.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: not empty; name another folder, or --resume")
    for folder in domain_folders(config):
        if folder.resolve() in (out / "samples").resolve().parents:
            raise BadInput(f"--out {out}: is in {folder}, which would take in its samples")
    if resume:
        say(f"resuming {file}" if file.exists() else f"starting anew: not there yet is {file}")
    if not resume or not file.exists():
        return config, None

    state = load_checkpoint(file)
    if typed is None:
        return config, state
    # options of the saved run, but for those of FREE that were typed
    asked, saved = vars(config), vars(state["config"])
    for name in sorted(typed - FREE):
        if asked[name] != saved[name]:
            line = f"{flag(name)} {asked[name]} (there {saved[name]})"
            raise BadInput(f"{line}: another run than the one in {out}")
    anew = typed & FREE | {"out"} | ({"steps"} if "epochs" in typed else set())
    return Config(**(saved | {name: asked[name] for name in anew})), state


def start(config: Config, state: dict | None, data: "UnpairedImages", device) -> Trainer:
    """The run as saved, or a new one, from another's networks (--init) if asked for. BadInput."""
    counts = from_first(lambda: {domain: len(paths) for domain, paths in data.paths.items()})
    per_epoch = max(1, max(counts.values()) // (config.batch_size * WORLD))
    total = config.steps or config.epochs * per_epoch
    if state:
        saved, done = state["config"], state["step"]
        if (saved.steps, saved.epochs) == (config.steps, config.epochs):
            total = state["total"]  # though the folders may have changed
        if done > total:
            raise BadInput(f"--epochs, --steps: {total} steps, of which {done} are done; name more")
        if state.get("counts", counts) != counts:
            warn(f"{config.out} was saved with {state['counts']} images, here are {counts}")

    trainer = Trainer(config, total, device)
    trainer.counts, trainer.per_epoch = counts, per_epoch
    try:
        if state:
            trainer.load_state_dict(state)
        elif config.init:
            other = from_first(load_checkpoint, config.init)
            trainer.nets.load_state_dict(other["parts"]["nets"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unusable(config.out if state else config.init, error) from None

    # what is trained, on what
    networks = f"{config.size} px, width {config.width}, {config.blocks} blocks"
    precision = str(trainer.dtype or torch.float32).removeprefix("torch.")
    say(f"{config.model}: {networks}; on {WORLD} x {device.type}, {precision}")
    images = "{a} images of A, {b} of B".format(**counts)
    images += "" if config.a else ", the bundled drawings"
    say(f"{images}; {total} steps, {total / per_epoch:.3g} epochs")
    return trainer


def batches(data, turns, size: int, threads: int, pin: bool):
    """Batches of the pairs of `data`, in order, loaded by threads some batches ahead.

    turns: numbers of batches of `size` pairs -> real_a, real_b (size, 3, H, W). pin: into memory
    that CUDA can copy from while it computes. What a thread raises is raised here.
    """

    def load(turn):
        pairs = [data[i] for i in range(turn * size, (turn + 1) * size)]
        batch = [torch.stack(images) for images in zip(*pairs)]
        return [images.pin_memory() for images in batch] if pin else batch

    pool, turns = ThreadPoolExecutor(max(1, threads)), iter(turns)
    try:
        ahead = deque(pool.submit(load, turn) for turn in itertools.islice(turns, 2 * threads + 1))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(load, turn) for turn in itertools.islice(turns, 1))
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def stop_signals():
    """Within, SIGINT, SIGTERM, SIGHUP are noted in the list given; a second one kills.

    Under torchrun, which repeats them, it does not. A SIGHUP ignored before, as by nohup, stays so.
    """
    seen = []

    def note(number, _frame):
        if WORLD == 1:
            signal.signal(number, signal.SIG_DFL)
        if RANK == 0 and not seen:
            again = "" if WORLD > 1 else "; once more to stop without saving"
            with contextlib.suppress(OSError):  # print, at work perhaps, cannot be called here
                os.write(2, f"\nstopping after this step{again}\n".encode())
        seen.append(number)

    numbers = {signal.SIGINT, signal.SIGTERM}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.add(signal.SIGHUP)  # Windows has none
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        numbers = set()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mean_figures(trainer: Trainer) -> dict[str, float]:
    """Means since the last row, over processes. BadInput where one, or a weight, is not finite."""
    means = {}
    if trainer.rows:
        means = dict(zip(trainer.names, average(torch.stack(trainer.rows).mean(0)).tolist()))
    names, weights = zip(*trainer.nets.state_dict().items())
    finite = torch.stack([weight.isfinite().all() for weight in weights]).tolist()  # waits once
    wrong = [name for name, mean in means.items() if not math.isfinite(mean)]
    wrong += [name for name, fine in zip(names, finite) if not fine]
    if wrong:
        cure = "try a new run with a lower --lr, or --precision fp32"
        raise BadInput(f"step {trainer.done}: {wrong[0]} is not finite; not saved; {cure}", 1)
    return means


class Report:
    """What a run says of itself: on the screen, in log.csv and, if asked for, to TensorBoard."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.board = trainer, None
        self.first = self.since = trainer.done
        self.clock = self.printed = time.monotonic()
        if trainer.config.tensorboard and RANK == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput("--tensorboard needs a package: pip install tensorboard") from None
            folder = Path(trainer.config.out, "tensorboard")  # purge: a killed run's later steps
            self.board = SummaryWriter(str(folder), purge_step=trainer.done + 1)

    def after_step(self, figures: dict[str, Tensor]):
        """Takes in a step's figures; every so often, a row of the log, a line on the screen."""
        trainer, config, cpu = self.trainer, self.trainer.config, self.trainer.device.type == "cpu"
        trainer.names = list(figures)
        trainer.rows.append(torch.stack(list(figures.values())))
        done, total, steps = trainer.done, trainer.total, trainer.done - self.first
        row = done % config.log_every == 0 or done == total
        stays, terminal = row or steps in (1, 10), sys.stdout.isatty()
        if stays:
            figures["attention_ab"].item()  # waits for the device, then looks at the clock
        now = time.monotonic()
        seconds = max(now - self.clock, 1e-3) / (done - self.since)  # some clocks stand still
        if row:
            figures, trainer.rows = mean_figures(trainer), []
            if RANK == 0:
                self.log(figures, config.batch_size * WORLD / seconds)

        # in a terminal one line, kept in place, between those that stay
        if stays or terminal and now - self.printed >= 1:
            pace = f"{seconds:.2g} s a step" if seconds >= 1 else f"{1 / seconds:.3g} steps/s"
            if cpu or steps > 10:  # a GPU's first steps choose kernels and record the graph
                pace += f"  {timedelta(seconds=round((total - done) * seconds))} left"
            line = f"step {done}/{total}  {pace}"
            line += f"  attention {figures['attention_ab']:.3f} {figures['attention_ba']:.3f}"
            if "r_ab" in figures:
                line += f"  r {figures['r_ab']:.2f} {figures['r_ba']:.2f}"
            width = shutil.get_terminal_size().columns - 1  # a longer line would not stay in place
            say(f"\r{line[:width]:<{width}}" if terminal else line, end="\n" if stays else "")
            self.printed = now
        if stays:
            self.since, self.clock = done, now
        if steps == 1 and cpu and seconds * total > 6 * 3600:
            say("that is long on a CPU: --small takes minutes, for a first look")

    def log(self, means: dict[str, float], pairs_per_second: float):
        """A row of log.csv, which waits for the next one where it cannot be written."""
        trainer, path = self.trainer, Path(self.trainer.config.out, "log.csv")
        row = {"step": trainer.done, "epoch": (trainer.done - 1) // trainer.per_epoch + 1}
        rate = learning_rate(trainer.config, (trainer.done - 1) / trainer.total)
        row |= {"pairs_per_second": pairs_per_second, "rate": rate} | means
        trainer.log.append(",".join(f"{v:.6g}" if v % 1 else f"{v:.0f}" for v in row.values()))
        if not trainer.logged:  # early, not after hours: an error where there can be no folder
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "ab") as file:
                end = min(trainer.logged, file.tell())
                file.truncate(end)  # a killed run's rows after the checkpoint
                lines = trainer.log if end else [",".join(row), *trainer.log]
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                trainer.log, trainer.logged = [], file.tell()
        except OSError as error:
            warn(f"{path}: cannot be written, kept for the next row ({brief(error)})")

        for name, value in means.items() if self.board else ():
            with contextlib.suppress(OSError):  # a full disk
                self.board.add_scalar(name, value, trainer.done)
        if trainer.config.model not in UNFUSED and trainer.done >= max(100, trainer.total / 4):
            for way, pool in (("ab", trainer.pool_b), ("ba", trainer.pool_a)):
                self.warn_of_masks(way, [mask for _, mask in pool.items], means)

    def warn_of_masks(self, way: str, masks: list[Tensor], means: dict[str, float]):
        """Says once what a direction's last masks do wrong. Small ones may be right."""
        curriculum, n = self.trainer.curriculum, ("ab", "ba").index(way)
        e, c = curriculum.e[n].item(), curriculum.c[n].item()  # of Eq. (11)
        see = "see README.md, The log, and when it goes wrong"
        copies = "copy" in means and e > 0.9 * c  # else both are 1 still
        if self.trainer.config.gan == "lsgan" and c < (0.6 if copies else 0.45):  # 4/9 if D guesses
            warn(f"g_{way}: the discriminator hardly tells A from B, nor where they differ; {see}")
        elif copies:
            warn(f"g_{way} copies its input, or nearly; {see}")
        elif means[f"attention_{way}"] > 0.97:
            warn(f"g_{way} repaints everything, or nearly; {see}")
        elif len(masks) >= 25 and mask_variety(torch.stack(masks)) < 0.2:
            warn(f"g_{way}: its masks are much the same for all images; {see}")


def panels(generator: nn.Module, x: Tensor) -> Tensor:
    """(3, H, W) -> (4, 3, H, W): input, attention, content (weighted mean), translation."""
    t = apply_any_size(generator, x)
    weight = t.attention[0, :-1, None] + 1e-6                 # (n-1, 1, H, W)
    content = (weight * t.content[0]).sum(0) / weight.sum(0)  # (3, H, W)
    attention = (t.foreground[0] * 2 - 1).expand_as(x)        # (3, H, W)
    return torch.stack([x.cpu(), attention, content, t.image[0]])


def save_samples(path: Path, nets: nn.ModuleDict, real_a: Tensor, real_b: Tensor):
    """A PNG, a row for each pair: four panels of A -> B, four of B -> A."""
    nets.eval()
    rows = []
    try:
        for a, b in zip(real_a, real_b):  # one image at a time: training needs the memory
            rows += [panels(nets["g_ab"], a), panels(nets["g_ba"], b)]
    finally:
        nets.train()
    grid = make_grid(torch.cat(rows) / 2 + 0.5, nrow=8, pad_value=1)
    write_whole(path, lambda file: to_image(grid).save(file, "PNG"))


def save(trainer: Trainer, shown, last=True):
    """Checkpoint, grid of `shown`; what cannot be written: BadInput if `last`, else a warning."""
    mean_figures(trainer)  # BadInput where one is not finite
    for buffer in trainer.nets.buffers():
        if buffer.is_floating_point():  # running statistics of batch norms
            average(buffer)
    if RANK:
        return
    out, every, state = Path(trainer.config.out), trainer.config.save_every, trainer.state_dict()
    try:
        write_whole(out / "checkpoint.pt", functools.partial(torch.save, state))
        save_samples(out / "samples" / f"{trainer.done:07}.png", trainer.nets, *shown)
    except (BadInput, OSError, ArithmeticError, torch.OutOfMemoryError) as error:
        if last:
            raise
        warn(f"step {trainer.done}: {brief(error)}; tried again in {every} steps")


def train(config: Config, resume: bool = False, typed: set | None = None) -> Path:
    """Trains; leaves checkpoint.pt, log.csv and samples/*.png in the run folder, and returns it.

    resume: goes on from the checkpoint there, if any, with its options but those `typed`, if given.
    If not resume: BadInput where the folder is not empty. SIGINT, SIGTERM, SIGHUP, or a failure to
    load images, finish the step and save; then BadInput of status 128 + the number, or the failure.
    """
    config, state = from_first(find_run, config, resume, typed)
    device = pick_device(check(config).device)
    data = UnpairedImages(*domain_folders(config), config.size, config.resize, config.seed)
    trainer = start(config, state, data, device)
    del state  # as large as the checkpoint
    shown = [images.to(device) for images in sample_images(config)]

    # batches, from where the run is; every process takes its turn
    turns = range(trainer.done * WORLD + RANK, trainer.total * WORLD, WORLD)
    loading = batches(data, turns, config.batch_size, config.workers, device.type == "cuda")
    failure, stop, report = None, 0, Report(trainer)
    with contextlib.closing(loading), stop_signals() as signals:
        while trainer.done < trainer.total:
            try:
                batch = next(loading)
            except Exception as error:
                failure = error
            # whichever process was told to stop, or failed: all stop here
            stop = torch.tensor(FAILED if failure else max(signals, default=0))
            if WORLD > 1:
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            if stop:
                break
            report.after_step(trainer.step(*batch))
            last = trainer.done == trainer.total
            if last or trainer.done % config.save_every == 0:
                save(trainer, shown, last)
                report.since, report.clock = trainer.done, time.monotonic()  # that was no step
        if stop and trainer.done:
            save(trainer, shown)
    if report.board:
        report.board.close()

    if failure:
        raise failure
    if stop:
        line = "another process failed, see above; " if stop == FAILED else ""
        saved = "saved; goes on with --resume" if trainer.done else "nothing to save"
        line += f"stopped after step {trainer.done}, {saved}"
        raise BadInput(line, 1 if stop == FAILED else 128 + int(stop))
    return Path(config.out)


# ==================== Part III: the program ====================

# ---------- 11. Files and images ----------

DATA = Path(globals().get("__file__", ".")).resolve().parent / "data"  # the bundled drawings
FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM PSD QOI SGI TGA TIFF WEBP".split()


def say(line, end="\n", file=None):
    """Prints a line at once; goes on where the screen is gone."""
    with contextlib.suppress(OSError):
        print(line, end=end, file=file, flush=True)


WARNED = set()  # lines
WARNING = threading.Lock()


def warn(line):
    """Says a line once, whichever threads come upon it."""
    with WARNING:
        if line not in WARNED:
            WARNED.add(line)
            say(f"warning: {line}", file=sys.stderr)


def brief(error) -> str:
    return " ".join(re.sub("<.* at 0x.*>", "", str(error)).split())[:200] or type(error).__name__


def write_whole(path: Path, save):
    """save(file) into a file beside, then renamed: path is whole then, or what it was before."""
    path = path.resolve()                                 # where it is a link, what it leads to
    temporary = path.with_name(f".{path.name[:60]}.tmp")  # a name may be as long as the disk allows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        for pause in (0.5, 1, 2, 4):  # Windows, while another program reads what was there
            with contextlib.suppress(PermissionError):
                return os.replace(temporary, path)
            time.sleep(pause)
        os.replace(temporary, path)
    except Exception as error:  # PyTorch and PIL have their own
        raise BadInput(f"{path}: cannot be written ({brief(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # there after a failure, or Ctrl-C


def read_formats() -> dict[str, str]:
    """FORMATS by suffix, as far as this Pillow reads them."""
    known = Image.registered_extensions().items()
    return {suffix: kind for suffix, kind in known if kind in FORMATS and kind in Image.OPEN}


def list_images(folder, left_out: list | None = None) -> list[Path]:
    """The folder's images, subfolders and links too, hidden ones not; BadInput if there are none.

    A warning of what is left out, one of a kind, which goes into the list `left_out`, too.
    """
    if not Path(folder).is_dir():
        why = "is a file; name its folder" if Path(folder).is_file() else "no such file or folder"
        raise BadInput(f"{folder}: {why}")
    found, seen, errors, kinds = defaultdict(list), set(), [], read_formats()  # by why left out
    for here, subfolders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        if os.path.realpath(here) in seen:  # links may go round in circles
            found["linked once more"].append(here)
            subfolders.clear()
            continue
        seen.add(os.path.realpath(here))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in (Path(here, name) for name in names if not name.startswith(".")):
            kind = path.suffix.lower()
            why = "" if kind in kinds else f"{kind or 'no suffix'}: not read, convert it"
            found[why if os.path.exists(path) else "a dead link"].append(path)
    for error in errors:
        found[error.strerror].append(error.filename)

    images = found.pop("", [])
    line = ", ".join(f"{paths[0]} ({why}; {len(paths)} of these)" for why, paths in found.items())
    if not images:
        raise BadInput(f"{folder}: no images in this folder" + (f", only {line}" if line else ""))
    if line:
        warn(f"left out: {line}")
    if line and left_out is not None:
        left_out.append(line)
    return sorted(images)


def without_notes(data: bytes) -> bytes:
    """A PNG without its texts, which may be huge, or broken; any other file as it is."""
    kept, at = [data[:8]], 8
    while at < len(data) and data.startswith(b"\x89PNG"):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, whole = data[at + 4 : at + 8], zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big")
        wanted = name in (b"tRNS", b"iCCP", b"eXIf") and whole == data[end - 4 : end]
        if name[:1].isupper() or wanted:  # a capital: a PNG needs this chunk
            kept.append(data[at:end])
        at = end
    return b"".join(kept) if len(kept) > 1 else data


def open_image(path) -> Image.Image:
    """First frame, upright; 16-bit grey as mode I. BadInput; temporary errors as they are."""
    try:
        data = io.BytesIO(without_notes(Path(path).read_bytes()))
        with Image.open(data, formats=list(read_formats().values())) as image:
            image.load()
            with contextlib.suppress(Exception):  # a broken orientation
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "P":  # here, as its palette may be broken
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError(f"pixels of mode {image.mode}: save it with 8 or 16 bits")
        return image.convert("I") if image.mode.startswith("I;16") else image
    except Exception as error:
        lasting = isinstance(error, (PermissionError, FileNotFoundError, IsADirectoryError))
        if isinstance(error, MemoryError) or getattr(error, "errno", None) and not lasting:
            raise
        raise BadInput(f"{path}: not a usable image ({brief(error)})") from None


def load_image(path, mode: str | None = "RGB", size=0) -> Image.Image:
    """An image in sRGB, of 8 bits, on white where it is transparent. Errors as of `open_image`.

    mode None: RGB, or RGBA where it has transparency. size: of the shorter side, if not 0.
    """
    image = open_image(path)
    if size and max(image.size) > 100 * min(image.size):
        raise BadInput(f"{path}: not a usable image ({image.width} x {image.height} pixels)")
    if image.mode == "I":
        image = to_image(TF.pil_to_tensor(image).float() / 65535)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None

    # colours of a profile, as phones and cameras write; without a usable one as they are
    with contextlib.suppress(KeyError, OSError, TypeError, ValueError, ImageCms.PyCMSError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if "sRGB" not in ImageCms.getProfileDescription(profile):
            image = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    image = image.convert("RGB")
    image.info.pop("icc_profile", None)  # save() would write it
    if alpha:
        image.putalpha(alpha)
        image = image if mode is None else on_white(image)
    return TF.resize(image, size, TF.InterpolationMode.BICUBIC) if size else image


def on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB or grey -> (3 or 1, H, W) in [-1, 1]."""
    return TF.to_tensor(image) * 2 - 1


def to_image(x: Tensor) -> Image.Image:
    """(3 or 1, H, W) in [0, 1] -> RGB or grey; rounded, so that a copied pixel keeps its value."""
    return TF.to_pil_image((255 * x).round_().clamp_(0, 255).byte().cpu())


class UnpairedImages:
    """Pairs (real_a, real_b) of (3, size, size) in [-1, 1]: resized, randomly cropped and mirrored.

    Pair i, for any i >= 0, is a function of the seed and i alone, so that a resumed run sees what
    an uninterrupted one would. Folders are walked in shuffled passes; len() is the larger one's.
    Files that are no use are left out, with one warning. BadInput where all of a folder's are.
    """

    def __init__(self, folder_a, folder_b, size=256, resize=286, seed=0):
        self.paths = {"a": list_images(folder_a), "b": list_images(folder_b)}
        self.useless = {"a": set(), "b": set()}  # numbers of paths
        self.size, self.resize, self.seed = size, resize, seed

    def __len__(self):
        return max(len(self.paths["a"]), len(self.paths["b"]))

    def __getitem__(self, i):
        return self.load("a", i), self.load("b", i)

    def load(self, domain, i):
        paths, useless = self.paths[domain], self.useless[domain]
        epoch, position = divmod(i, len(paths))
        order = shuffled(len(paths), f"{self.seed} {domain} {epoch}")
        for k in order[position:] + order[:position]:  # the first that is of use
            try:
                if k not in useless:
                    image = load_image(paths[k], size=self.resize)
                    break
            except BadInput as error:
                useless.add(k)
                warn(f"{error}; going on without it")
            except (OSError, MemoryError) as error:  # may pass
                warn(f"{paths[k]}: {brief(error)}; another image in its place this time")
        else:
            raise BadInput(f"{paths[0].parent}: not one usable image")

        rng = random.Random(f"{self.seed} {domain} {i}")
        left = rng.randint(0, image.width - self.size)
        top = rng.randint(0, image.height - self.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        return to_tensor(ImageOps.mirror(image) if rng.random() < 0.5 else image)


@functools.lru_cache(maxsize=4)
def shuffled(n, key):
    return random.Random(key).sample(range(n), n)


def sibling(folder, old, new) -> Path | None:
    """The folder beside this one named with `new` for `old` (trainA -> testA), if there is one."""
    path = Path(os.path.abspath(folder))  # where it is a link, not what it leads to
    found = path.with_name(path.name.replace(old, new))
    return found if found != path and found.is_dir() else None


def domain_folders(config: Config) -> tuple[Path, Path]:
    return Path(config.a or DATA / "trainA"), Path(config.b or DATA / "trainB")


def sample_images(config: Config) -> list[Tensor]:
    """For the sample grids, four images of A and of B; of test folders, where there are any."""

    def four(folders):
        images = UnpairedImages(*folders, config.resize, config.resize, config.seed)
        return [torch.stack(column) for column in zip(*(images[i] for i in range(4)))]

    trained = domain_folders(config)
    try:
        return four([sibling(folder, "train", "test") or folder for folder in trained])
    except BadInput:  # a test folder without one usable image
        return four(trained)


# ---------- 12. Translate and evaluate ----------

WRITABLE = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"}  # others are written as PNG


def pick_device(name: str) -> torch.device:
    """BadInput where it is unknown or absent. On CUDA the one that torchrun gives this process."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        if name.startswith("cuda"):
            index = os.environ.get("LOCAL_RANK") or torch.device(name).index or 0
            torch.cuda.set_device(int(index))
            torch.cuda.set_stream(torch.cuda.Stream())  # the default one records no graphs
            name = "cuda"
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise BadInput(f"--device {name}: {brief(error)}") from None
    return torch.device(name)


def load_generators(run, device: torch.device) -> tuple[nn.ModuleDict, Config]:
    """The trained networks in evaluation mode, and their configuration. BadInput."""
    state = load_checkpoint(run)
    try:
        with torch.device("meta"):  # what does not match the file takes no memory
            nets = build(state["config"])
            nets.load_state_dict(state["parts"]["nets"], assign=True)
        return nets.float().to(device).eval(), state["config"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise unusable(run, error) from None


@torch.no_grad()
def apply_any_size(generator: nn.Module, x: Tensor) -> Translation:
    """The generator on an image (3, H, W) of any size: padded as it needs, cropped back; B = 1."""
    height, width = x.shape[-2:]
    down, right = (max(16 - side, -side % 4) for side in (height, width))  # to 16, multiples of 4
    t = generator(F.pad(x[None], (0, right, 0, down), mode="replicate"))
    if not t.image.isfinite().all():
        raise FloatingPointError("its translation is not finite")
    return Translation(*(part[..., :height, :width].cpu() for part in t))


def translate_image(generator: nn.Module, image: Image.Image, side: int, device):
    """Eq. (12): RGB or RGBA -> its translation and its mask, of its size; the first with its alpha.

    side: of the image as the generator sees it, the shorter one; 0: as it is.
    """
    colours = image.convert("RGB")
    seen = on_white(image) if image.mode == "RGBA" else colours
    if side:  # at most 16 times as long, but no thinner than a pixel
        longest = max(16 * side, math.ceil(max(image.size) / min(image.size)))
        seen = TF.resize(seen, side, TF.InterpolationMode.BICUBIC, max_size=longest)
    small = to_tensor(seen)  # (3, h, w)
    t = apply_any_size(generator, small.to(device))
    new, mask = to_image(t.image[0] / 2 + 0.5), to_image(t.foreground[0])

    if seen != colours:  # resized, or laid on white: Eq. (12)
        new = carry(to_tensor(colours)[None], small[None], t.image)
        new = to_image(new[0].add_(1).div_(2))
        mask = mask.resize(image.size, Image.Resampling.BICUBIC)
    if image.mode == "RGBA":
        new.putalpha(image.getchannel("A"))
    return new, mask


def translate(run, inputs, to, out, attention=False, resize=None, device="auto") -> list[Path]:
    """Each input image (files, or folders of them) -> `out`/its name, at its size, with its alpha.

    to: "a" or "b". attention: the mask too, as NAME_attention.png. resize: shorter side of what the
    networks see, by default that of the training; 0: the image as it is. BadInput where an input,
    or two outputs, would be overwritten; at the end, where an input was no use.
    """
    device, out = pick_device(device), Path(out)
    if out.is_file():
        raise BadInput(f"--out {out}: is a file; name a folder")

    # what is written for each image: nothing twice, and no input
    plan, taken, left_out = {}, {}, []
    for item in map(Path, inputs):
        for path in [item] if item.is_file() else list_images(item, left_out):
            target = out / (path.name if path == item else path.relative_to(item))
            if target.suffix.lower() not in WRITABLE:
                target = target.with_name(target.name + ".png")
            mask = target.with_name(target.stem + "_attention.png")
            plan[path] = [target, mask] if attention else [target]
    there = {os.stat(path)[1:3]: path for path in plan}  # by inode and device
    for path, outputs in plan.items():
        for output in outputs:
            other = taken.setdefault(str(output).casefold(), path)  # as some disks see names
            if other != path:
                raise BadInput(f"{path} and {other}: both would write {output}; split them")
            if output.exists() and (same := there.get(os.stat(output)[1:3])):
                raise BadInput(f"--out {out}: {same} is an input; name another folder")

    # one after the other, each as far as it goes
    nets, config = load_generators(run, device)
    generator, done = nets[{"a": "g_ba", "b": "g_ab"}[to]], []
    side = config.resize if resize is None else resize
    for number, (path, outputs) in enumerate(plan.items(), 1):
        try:
            pictures = translate_image(generator, load_image(path, mode=None), side, device)
            for output, picture in zip(outputs, pictures):
                kind = Image.registered_extensions()[output.suffix.lower()]
                picture = picture.convert("RGB") if kind == "JPEG" else picture
                write_whole(output, functools.partial(picture.save, format=kind, quality=95))
            say(f"{number}/{len(plan)}  {outputs[0]}")
            done.append(outputs[0])
        except (BadInput, OSError, ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
            line = error if isinstance(error, BadInput) else f"{path}: {brief(error)}"
            warn(f"{line}; going on without it")
    if len(done) < len(plan):
        raise BadInput(f"{len(plan) - len(done)} of {len(plan)} images failed, see above", 1)
    if left_out:
        raise BadInput("some files were left out, see above", 1)
    return done


def mask_figures(x: Tensor, t: Translation, mask: Tensor | None) -> dict[str, float]:
    """One image's figures: x (3, H, W), its translation, its true foreground (H, W), bool, or None.

    iou: of foreground >= 0.5 and the mask, 1 where both are empty; iou_of_all: of the whole image
    and the mask. background_error, foreground_change: mean |out - in| outside and inside it, images
    in [0, 1]. mean_attention: mean foreground. NaN without a mask, or of no pixels.
    """
    names = "iou", "iou_of_all", "background_error", "foreground_change"
    figures = dict.fromkeys(names, math.nan)
    if mask is not None:
        change = (t.image[0] - x).abs().mean(0) / 2  # (H, W)
        found = t.foreground[0, 0] >= 0.5            # (H, W)
        either = (found | mask).sum()
        figures["iou"] = ((found & mask).sum() / either).item() if either else 1.0
        figures["iou_of_all"] = mask.float().mean().item()
        figures["background_error"] = change[~mask].mean().item()
        figures["foreground_change"] = change[mask].mean().item()
    return figures | {"mean_attention": t.foreground.mean().item()}


def mask_variety(masks: Tensor) -> float:
    """Share of the variance of masks (N, 1, H, W) that is between images, at a pixel.

    1: they have nothing in common, 0: one mask for all; NaN: a single value.
    """
    return (masks.var(0, correction=0).mean() / masks.var(correction=0)).item()


def load_mask(path, size) -> Tensor:
    """A true foreground, (H, W) of bools, resized to `size`; BadInput where its meaning is open.

    Read from the alpha where that varies, else from each pixel's largest channel. Two values, 0 and
    another: the other is foreground. Else 128 and up, where nearly all is black or white.
    """
    image = open_image(path)
    layers = TF.pil_to_tensor(image if image.mode == "I" else image.convert("RGBA"))  # (1 or 4, ..)
    alpha = layers[-1]                                                   # (H, W); or the only one
    values = alpha if alpha.min() < alpha.max() else layers[:3].amax(0)  # (H, W)
    values = values / (257 if image.mode == "I" else 1)                  # to 255
    levels, mask = values.unique().tolist(), values >= 128
    if len(levels) == 2 and levels[0] == 0:
        mask = values > 0
    elif ((values < 32) | (values >= 224)).float().mean() < 0.9 or 0 < levels[-1] < 128:
        raise BadInput(f"{path}: not black and white; save the foreground as white (255)")

    height, width = mask.shape
    if abs(width / height * size[0] / size[1] - 1) > 0.05:
        raise BadInput(f"{path}: {width} x {height} pixels, for an image of {size[1]} x {size[0]}")
    return TF.resize(mask[None].float(), size)[0] >= 0.5


def evaluate(run, a="", b="", masks_a="", masks_b="", save="", resize=None, device="auto") -> dict:
    """{"a2b": figures, "b2a": figures} of test images: means over those that have one, or None.

    Folders not given: beside the training folders, with test for train in their names; of masks,
    beside the test folders, with masks for test, if any. A mask has its image's path in the folder,
    with any extension. save: a new folder for the translations (a2b, b2a) and the images as they
    were seen (a, b). resize: shorter side of what the networks see, by default the training's.
    """
    # folders, as given or found
    device = pick_device(device)
    nets, config = load_generators(run, device)
    side, folders = config.resize if resize is None else resize, {}
    for name, folder, training in zip("ab", (a, b), domain_folders(config)):
        folders[name] = folder = str(folder or sibling(training, "train", "test") or "")
        if not folder:
            raise BadInput(f"--{name}: no test folder beside {training}; name one")
        if save and Path(folder).resolve() in Path(save).resolve().parents:
            raise BadInput(f"--save {save}: is in {folder}; name a folder elsewhere")
    check(dataclasses.replace(config, **folders))  # that neither is in the other
    if save and Path(save).exists():
        raise BadInput(f"--save {save}: exists; name a new folder")

    # one direction after the other; pictures are kept until all has gone well
    results, saved = {}, {}
    for source, target, masks in (("a", "b", masks_a), ("b", "a", masks_b)):
        folder, way, figures, attention = folders[source], f"{source}2{target}", [], []
        paths, masks = list_images(folder), masks or sibling(folder, "test", "masks")
        composed = functools.partial(unicodedata.normalize, "NFC")  # unlike names from a Mac
        found = list_images(masks) if masks else []
        known = {composed(str(path.relative_to(masks).with_suffix(""))): path for path in found}
        for number, path in enumerate(paths, 1):
            name, image = path.relative_to(folder), load_image(path, size=side)
            x, mask = to_tensor(image), known.get(composed(str(name.with_suffix(""))))
            if masks and not mask:
                raise BadInput(f"{masks}: no mask for {name}")
            mask = load_mask(mask, x.shape[-2:]) if mask else None
            try:
                t = apply_any_size(nets[f"g_{source}{target}"], x.to(device))
            except ArithmeticError as error:
                raise BadInput(f"{path}: {error}", 1) from None
            figures.append(mask_figures(x, t, mask))
            attention.append(TF.resize(t.foreground[0], [config.size, config.size]))
            if save:
                new, seen = (Path(save, part, name).with_suffix(".png") for part in (way, source))
                if new in saved:
                    raise BadInput(f"--save: two images of {folder} would both be {new}")
                saved |= {new: to_image(t.image[0] / 2 + 0.5), seen: image}
            if sys.stdout.isatty():
                say(f"{way} {number}/{len(paths)}", end="\r")

        # means over the images that have a figure
        say(f"{way}: {len(paths)} images of {folder}" + ("" if masks else ", without masks"))
        results[way] = {"images": len(paths)}
        for name in figures[0]:
            values = [f[name] for f in figures if not math.isnan(f[name])]
            results[way][name] = sum(values) / len(values) if values else None
            if masks and len(values) < len(paths):
                say(f"{way}: {name} of {len(values)} images")
        variety = mask_variety(torch.stack(attention))
        results[way]["mask_variety"] = None if len(paths) < 2 or math.isnan(variety) else variety
    for path, picture in saved.items():  # all or none
        write_whole(path, functools.partial(picture.save, format="PNG"))
    return results


# ---------- 13. The command line ----------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line; argparse would add the usage


def add_config_options(parser):
    """An option for each field of `Config`, in its groups, with its comment as the help."""
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # (\w+)", line):
            group = parser.add_argument_group(heading[1])
        elif option := re.fullmatch(r"    (\w+): \w+ = (\S+) +# (.*)", line):
            name, default, text = option.groups()
            kind = Config.__annotations__[name]
            parse = os.path.expanduser if kind is str else kind  # a shell leaves --out=~/x
            settings = dict(type=parse, choices=CHOICES.get(name), metavar=kind.__name__.upper())
            if kind is bool:
                settings = dict(action=argparse.BooleanOptionalAction)
            text = f"{text} [{default}]".replace("%", "%%")
            group.add_argument(flag(name), default=argparse.SUPPRESS, help=text, **settings)


def make_parser() -> Parser:
    parser = Parser(prog="aggan.py", description=(__doc__ or "").partition("\n")[0])
    commands, home = parser.add_subparsers(dest="command", required=True), os.path.expanduser

    sub = commands.add_parser("train", help="train on two folders, or on the bundled drawings")
    sets = SMALL, OBJECTIVES["released"]
    small, released = (" ".join(f"{flag(k)} {v}" for k, v in brought.items()) for brought in sets)
    sub.epilog = f"[defaults]: scheme2's; on the drawings, and with --small: {small}; "
    sub.epilog += f"with --objective released: {released} (--lr: without --small)"
    add_config_options(sub)
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    sub.add_argument("--small", action="store_true", default=None, help="the drawings' sizes, rate")

    translate = commands.add_parser("translate", help="apply a trained run to images of any size")
    evaluate = commands.add_parser("evaluate", help="measure a run, against true masks if any")
    side = "shorter side of what the networks see [the training's]; 0: as it is"
    for sub in (translate, evaluate):
        sub.add_argument("run", type=home, help="run folder")
        sub.add_argument("--resize", type=int, help=side)
        sub.add_argument("--device", default="auto", help="auto or a PyTorch device")
    add = translate.add_argument
    add("inputs", type=home, nargs="+", help="images, or folders of them")
    add("--to", choices=("a", "b"), required=True, help="the domain to translate to")
    add("--out", type=home, required=True, help="folder for the results")
    add("--attention", action="store_true", help="save the foreground attention too")
    add = functools.partial(evaluate.add_argument, type=home, default="")
    for name in ("--a", "--b", "--masks-a", "--masks-b"):
        add(name, help="folder [of tests, beside the training's; of masks, beside the tests']")
    add("--save", help="new folder for the translations")
    add("--json", dest="json_file", help="file for the figures, too")
    return parser


def run_train(resume=False, small=None, **given):
    out = train(configure(given, small), resume, typed=set(given))
    say(f"finished: grids in {out}/samples; translate and evaluate take {out}")
    if WORLD > 1:
        dist.destroy_process_group()


def print_table(results: dict[str, dict]):
    """A column for each direction, or other key; a row for each of its figures."""
    say(" " * 18 + "".join(f"{key:>15}" for key in results))
    for name in next(iter(results.values())):
        values = [figures[name] for figures in results.values()]
        cells = ("-" if v is None else f"{v:.4f}" if isinstance(v, float) else v for v in values)
        say(f"{name:18}" + "".join(f"{cell:>15}" for cell in cells))


def run_evaluate(json_file, **given):
    path = Path(json_file)
    if json_file and path.exists() and (path.suffix != ".json" or path.is_dir()):
        raise BadInput(f"--json {path}: exists, and is no .json file")
    results = evaluate(**given)
    print_table(results)
    if json_file:
        write_whole(path, lambda file: file.write(f"{json.dumps(results, indent=2)}\n".encode()))


def main(argv: list[str] | None = None):
    """The command line. Where the input is no use: one line, exit status 2."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    commands = {"train": run_train, "translate": translate, "evaluate": run_evaluate}
    command = commands[given.pop("command")]
    if (given.get("resize") or 0) < 0:
        parser.error("--resize: must be 0 or more")
    if RANK > 0 or sys.stdout is None:  # of torchrun's processes one speaks
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for odd names
    warnings.filterwarnings("ignore", module="PIL")  # of large photographs, of broken notes
    try:
        command(**given)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except (BadInput, OSError, FloatingPointError) as error:
        parser.exit(getattr(error, "status", 2), f"{parser.prog}: {error}\n")
    except (MemoryError, RuntimeError) as error:
        if WORLD > 1 and "peer" in str(error):
            parser.exit(1, f"{parser.prog}: another process is lost ({brief(error)})\n")
        known = re.search("out of memory|t allocate memory|32-bit index", str(error))
        if not known and not isinstance(error, MemoryError):
            raise
        cure = "train needs less with a smaller --batch-size, --size, --width, --masks"
        parser.error(f"out of memory, or of 32-bit indices: {cure}")


if __name__ == "__main__":
    main()
