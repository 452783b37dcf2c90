"""Attention-guided unpaired image-to-image translation, in one file: AGGAN and AttentionGAN.

Two folders of images, A and B, without pairs. A generator G: A -> B learns to change what makes an A an A and
to leave the rest alone: beside new pixels (content, C) it predicts where to use them (attention, a). A second
generator F: B -> A does the converse, and discriminators judge the results. For x of A and y of B, and the
same with A and B exchanged (G is `g_ab` and F `g_ba` in the code; the numbers are this file's own):

    (1) fusion         G(x) = sum_{f=1}^{n-1} a_f * C_f + a_n * x     `fuse`   sum_f a_f = 1, a_n: background
    (2) scheme I       n = 2, a = (s, 1 - s), s = sigmoid(.)          `SchemeOneGenerator`    C = tanh(.)
    (3) scheme II      a = softmax over n masks, C = tanh(.)          `SchemeTwoGenerator`
    (4) L_GAN          log D_B(y) + log(1 - D_B(G(x)))                `adversarial_loss` on the view `whole`
                       or, by default, least squares: (D_B(y) - 1)^2 + D_B(G(x))^2
                       (D's is halved; G's is that of G(x) called real);
                       D's alone, not in the papers: + l_copy log(1 - D_B(x)), or l_copy D_B(x)^2
    (5) L_AGAN         log D([m, y]) + log(1 - D([m, G(x)]))          the same, on `paired`; m = 1 - a_n of x
    (6) L_cycle        |F(G(x)) - x|_1, a mean, as (7) and (8)        `cycle_loss`
    (7) L_pixel        |G(x) - x|_1                                   `pixel_loss`
    (8) L_identity     |G(y) - y|_1                                   `identity_loss`
    (9) L_tv           sum of |m[h+1, w] - m[h, w]| + |m[h, w+1] - m[h, w]|       `total_variation_loss`
   (10) objective      r (l_cycle L_cycle + l_pixel L_pixel + l_identity L_identity)
                       + (1 - r) (l_gan L_GAN + l_paired L_AGAN + l_tv L_tv)       `weigh`
                       (--curriculum none: without r, both factors 1)
   (11) r              ramp(t) min(1, (1 - e / c) / 0.65), e and c running means of L_GAN(G(x)) and
                       of L_GAN(x), where D_B sees x itself           `AdaptiveCurriculum`
                       (--curriculum papers: 0.01 for 5 % of the run, then 0.5)        `scheduled_r`

  --model  | paper                                            | generator            | attention
  scheme1  | AGGAN, Tang et al. 2019, arXiv 1903.12296        | `SchemeOneGenerator` | one sigmoid mask
  scheme2  | AttentionGAN, Tang et al. 2021, arXiv 1911.11897 | `SchemeTwoGenerator` | softmax over n masks
  cyclegan | CycleGAN, Zhu et al. 2017, arXiv 1703.10593      | `CycleGANGenerator`  | none: all is new
  mejjati  | Mejjati et al. 2018, arXiv 1806.02311            | `GatedGenerator`     | an `AttentionNetwork`'s
  guided   | Lin et al. 2021, spatial guidance, WACV          | `GuidedGenerator`    | a discriminator's

Shapes: B batch, H x W image size (multiples of 4), n masks, the last one the background's.
Images are (B, 3, H, W) in [-1, 1]; masks are in [0, 1].
Part I (sections 1-6) is the method: tensors in, tensors out. Part II (7-10) is the machinery around it.

    python aggan.py train [--a trainA --b trainB]            your folders, or the bundled drawings
    python aggan.py translate runs/NAME photo.jpg folder/ --to b --out translated/
    python aggan.py evaluate runs/NAME --a testA --b testB
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import math
import os
import random
import re
import runpy
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

# ======================================== Part I: the method ========================================
# ---------------------------------------- 1. the fusion formula ----------------------------------------
class Translation(NamedTuple):
    """What every generator returns."""
    image: Tensor      # (B, 3, H, W) in [-1, 1]
    attention: Tensor  # (B, n, H, W) in [0, 1], sums to 1 over n; the last mask is the background
    content: Tensor    # (B, n-1, 3, H, W) in [-1, 1]
    @property
    def foreground(self) -> Tensor:
        """(B, 1, H, W) in [0, 1]: how much of each pixel is new, where content and input are fused."""
        return 1 - self.attention[:, -1:]

def fuse(x: Tensor, attention: Tensor, content: Tensor) -> Tensor:
    """Eq. (1): new content where the foreground masks look, the input itself where the background mask does.
    x (B, 3, H, W), attention (B, n, H, W), content (B, n-1, 3, H, W) -> (B, 3, H, W).
    ValueError where n masks do not meet n - 1 contents."""
    if attention.shape[1] != content.shape[1] + 1:
        raise ValueError(f"{attention.shape[1]} masks need one content fewer, not {content.shape[1]}")
    foreground, background = attention[:, :-1], attention[:, -1:]     # (B, n-1, H, W), (B, 1, H, W)
    return (foreground[:, :, None] * content).sum(1) + background * x  # (B, 3, H, W)

# ---------------------------------------- 2. building blocks ----------------------------------------
NORMS = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}  # the first without affine, its default

def conv_block(in_channels: int, out_channels: int, kernel: int, stride: int = 1, norm: str = "instance"):
    """Convolution, norm, ReLU: c7s1-k and 3x3 layers (reflection padded); stride 2, as in dk, is zero padded.
    (B, in_channels, H, W) -> (B, out_channels, H/stride, W/stride), rounded up."""
    padding_mode = "reflect" if stride == 1 else "zeros"
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, padding_mode=padding_mode)
    return nn.Sequential(convolution, NORMS[norm](out_channels), nn.ReLU(inplace=True))

class ResidualBlock(nn.Module):
    """Rk (He et al. 2016, as in CycleGAN): two 3x3 convolutions, nothing after the sum. Keeps its shape."""
    def __init__(self, channels: int, norm: str = "instance"):
        super().__init__()
        self.body = nn.Sequential(conv_block(channels, channels, 3, norm=norm),
                                  nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"),
                                  NORMS[norm](channels))
    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)

class Encoder(nn.Sequential):
    """c7s1-64 d128 d256 R256 x blocks: (B, 3, H, W) -> (B, 4*width, H/4, W/4)."""
    def __init__(self, width: int = 64, blocks: int = 9, norm: str = "instance"):
        super().__init__(conv_block(3, width, 7, norm=norm),
                         conv_block(width, 2 * width, 3, stride=2, norm=norm),
                         conv_block(2 * width, 4 * width, 3, stride=2, norm=norm),
                         *[ResidualBlock(4 * width, norm) for _ in range(blocks)])

def up_block(in_channels: int, out_channels: int, norm: str = "instance", upsample: str = "nearest"):
    """uk: twice the height and the width, norm, ReLU. (B, in_channels, H, W) -> (B, out_channels, 2H, 2W).
    nearest: pixels doubled, then a 3x3 convolution (Odena et al. 2016). transposed: the papers' transposed
    convolution, which leaves a grid in the image; as many parameters."""
    if upsample == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), conv_block(in_channels, out_channels, 3, norm=norm))
    convolution = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(convolution, NORMS[norm](out_channels), nn.ReLU(inplace=True))

class Decoder(nn.Sequential):
    """u128 u64 c7s1-k, neither norm nor activation at the end: (B, 4*width, H/4, W/4) -> (B, k, H, W)."""
    def __init__(self, out_channels: int, width: int = 64, norm: str = "instance", upsample: str = "nearest"):
        super().__init__(
            up_block(4 * width, 2 * width, norm, upsample),
            up_block(2 * width, width, norm, upsample),
            nn.Conv2d(width, out_channels, 7, padding=3, padding_mode="reflect"))

# ---------------------------------------- 3. generators ----------------------------------------
# forward of each: (B, 3, H, W) in [-1, 1] -> `Translation`; H and W are multiples of 4, at least 16.
# .float(): also where autocast makes the convolutions' results bf16 or fp16, masks and fusion are float32.
class SchemeOneGenerator(nn.Module):
    """Scheme I (Tang 2019; Eq. 2): one decoder gives one attention mask and one content image; n = 2."""
    def __init__(self, width: int = 64, blocks: int = 9, norm: str = "instance", upsample: str = "nearest"):
        super().__init__()
        self.encoder = Encoder(width, blocks, norm)
        self.decoder = Decoder(1 + 3, width, norm, upsample)
    def forward(self, x: Tensor) -> Translation:
        mask, content = self.decoder(self.encoder(x)).float().split([1, 3], dim=1)
        mask = mask.sigmoid()                                           # (B, 1, H, W)
        attention = torch.cat([mask, 1 - mask], dim=1)                  # (B, 2, H, W)
        content = content.tanh()[:, None]                               # (B, 1, 3, H, W)
        return Translation(fuse(x, attention, content), attention, content)

class SchemeTwoGenerator(nn.Module):
    """Scheme II (Tang 2021; Eq. 3): a shared encoder; one decoder for n masks, one for n - 1 contents."""
    def __init__(self, width: int = 64, blocks: int = 9, masks: int = 10, norm: str = "instance",
                 upsample: str = "nearest"):
        super().__init__()
        self.encoder = Encoder(width, blocks, norm)                               # G_E
        self.attention_decoder = Decoder(masks, width, norm, upsample)            # G_A
        self.content_decoder = Decoder(3 * (masks - 1), width, norm, upsample)    # G_C
    def forward(self, x: Tensor) -> Translation:
        features = self.encoder(x)                                      # (B, 4*width, H/4, W/4)
        attention = self.attention_decoder(features).float().softmax(dim=1)  # (B, n, H, W)
        content = self.content_decoder(features).float().tanh()         # (B, 3(n-1), H, W)
        content = content.unflatten(1, (-1, 3))                         # (B, n-1, 3, H, W)
        return Translation(fuse(x, attention, content), attention, content)

class CycleGANGenerator(nn.Module):
    """Zhu 2017, the baseline: without attention, which makes the masks constants, 1 and 0; n = 2."""
    def __init__(self, width: int = 64, blocks: int = 9, norm: str = "instance", upsample: str = "nearest"):
        super().__init__()
        self.encoder = Encoder(width, blocks, norm)
        self.decoder = Decoder(3, width, norm, upsample)
    def forward(self, x: Tensor) -> Translation:
        content = self.decoder(self.encoder(x)).float().tanh()[:, None]  # (B, 1, 3, H, W)
        mask = torch.ones_like(x[:, :1])                                # (B, 1, H, W)
        attention = torch.cat([mask, 1 - mask], dim=1)                  # (B, 2, H, W)
        return Translation(fuse(x, attention, content), attention, content)

class AttentionNetwork(nn.Sequential):
    """Mejjati 2018: what is to be changed? (B, 3, H, W) -> (B, 1, H, W) in [0, 1]."""
    def __init__(self, width: int = 32, norm: str = "instance"):
        super().__init__(conv_block(3, width, 7, stride=2, norm=norm),
                         conv_block(width, 2 * width, 3, stride=2, norm=norm), ResidualBlock(2 * width, norm),
                         up_block(2 * width, 2 * width, norm), up_block(2 * width, width, norm),
                         nn.Conv2d(width, 1, 7, padding=3, padding_mode="reflect"))
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().sigmoid()

class GatedGenerator(nn.Module):
    """Mejjati 2018: CycleGAN's generator, g, sees the foreground alone: a g(a x) + (1 - a) x; n = 2."""
    def __init__(self, width: int = 64, blocks: int = 9, norm: str = "instance", upsample: str = "nearest"):
        super().__init__()
        self.attention_network = AttentionNetwork(max(1, width // 2), norm)
        self.generator = CycleGANGenerator(width, blocks, norm, upsample)
        self.frozen = False  # set by `switch`: the attention network learns no more
    def forward(self, x: Tensor) -> Translation:
        mask = self.attention_network(x)                                # (B, 1, H, W)
        mask = mask.detach() if self.frozen else mask
        attention = torch.cat([mask, 1 - mask], dim=1)                  # (B, 2, H, W)
        content = self.generator(mask * x).content                      # (B, 1, 3, H, W)
        return Translation(fuse(x, attention, content), attention, content)

class GuidedGenerator(nn.Module):
    """Lin 2021: CycleGAN's generator sees x (1 + a), with a from the discriminator of x's own domain, without
    gradient; n = 2. Not fused: the image is the generator's, (a, 1 - a) only reported."""
    def __init__(self, discriminator: nn.Module, width: int = 64, blocks: int = 9, norm: str = "instance",
                 upsample: str = "nearest"):
        super().__init__()
        self.generator = CycleGANGenerator(width, blocks, norm, upsample)
        self.guide = (discriminator,)  # in a tuple, so that its weights are not this network's too
    def forward(self, x: Tensor) -> Translation:
        mask = self.guide[0].attention(x).detach()                      # (B, 1, H, W)
        image, _, content = self.generator(x * (1 + mask))
        return Translation(image, torch.cat([mask, 1 - mask], dim=1), content)

# ---------------------------------------- 4. discriminators ----------------------------------------
class PatchDiscriminator(nn.Module):
    """Says of overlapping patches (head "patch") or of the whole image (head "pooled") whether they are real.
    patch (Isola et al. 2017): C64 C128 C256 stride 2, C512 stride 1, conv to one map; no norm in C64. Each
    logit sees 70 x 70 pixels. (B, in_channels, H, W) -> (B, 1, H//8 - 2, W//8 - 2); H, W >= 24.
    pooled (Tang 2019): C64 C128 C256 C512 stride 2, C512 stride 1 without norm, average, conv to one number.
    (B, in_channels, H, W) -> (B, 1, 1, 1); H, W >= 32. ValueError for another head."""
    def __init__(self, in_channels: int = 3, width: int = 64, norm: str = "instance", head: str = "patch"):
        super().__init__()
        if head not in ("patch", "pooled"):
            raise ValueError(f"unknown head {head!r}: patch or pooled")
        def block(inputs, outputs, stride, normed=True):
            return [nn.Conv2d(inputs, outputs, 4, stride, padding=1),
                    *([NORMS[norm](outputs)] if normed else []), nn.LeakyReLU(0.2, inplace=True)]
        pooled = head == "pooled"
        self.stem = nn.Sequential(*block(in_channels, width, 2, normed=pooled))
        self.trunk = nn.Sequential(*block(width, 2 * width, 2), *block(2 * width, 4 * width, 2))
        self.head = nn.Sequential(*block(4 * width, 8 * width, 2 if pooled else 1), *(
            [*block(8 * width, 8 * width, 1, normed=False), nn.AdaptiveAvgPool2d(1),
             nn.Conv2d(8 * width, 1, 1)] if pooled else [nn.Conv2d(8 * width, 1, 4, padding=1)]))
        self.normed = True  # set by `switch`: whether the norms are used
    def run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        for layer in layers:
            if self.normed or not isinstance(layer, tuple(NORMS.values())):
                x = layer(x)
        return x
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads and what `attention` averages, (B, 4*width, H//8, W//8) each."""
        features = self.run(self.trunk, self.run(self.stem, x))
        return features, features
    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.head, self.look(x)[0]).float()
    def attention(self, x: Tensor) -> Tensor:
        """PHA (Lin 2021): where the third block responds. Images -> (B, 1, H, W) in [0, 1]."""
        a = self.look(x)[1].float().abs().mean(1, keepdim=True)
        low, high = a.amin((2, 3), keepdim=True), a.amax((2, 3), keepdim=True)
        return F.interpolate((a - low) / (high - low).clamp(min=1e-6), size=x.shape[-2:], mode="bilinear")

class ResidualAttentionDiscriminator(PatchDiscriminator):
    """With TAM (Lin 2021, after Wang et al. 2017): a learnt mask m in [0, 1] beside the trunk; the head reads
    (1 + m) * trunk, `attention` averages m. Shapes as above."""
    def __init__(self, in_channels: int = 3, width: int = 64, norm: str = "instance", head: str = "patch"):
        super().__init__(in_channels, width, norm, head)
        wide = 4 * width
        self.branch = nn.Sequential(
            nn.MaxPool2d(3, 2, padding=1), conv_block(width, 2 * width, 3, norm=norm),
            nn.MaxPool2d(3, 2, padding=1), conv_block(2 * width, wide, 3, norm=norm),
            conv_block(wide, wide, 3, norm=norm), conv_block(wide, wide, 3, norm=norm))
        self.mix = nn.Sequential(nn.Conv2d(wide, wide, 1), nn.ReLU(), nn.Conv2d(wide, wide, 1), nn.Sigmoid())
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stem = self.run(self.stem, x)                                   # (B, width, H/2, W/2)
        trunk = self.run(self.trunk, stem)                              # (B, 4*width, H//8, W//8)
        mask = F.interpolate(self.branch(stem), size=trunk.shape[-2:], mode="bilinear")
        mask = self.mix(mask)                                           # (B, 4*width, H//8, W//8) in [0, 1]
        return (1 + mask) * trunk, mask

def whole(image: Tensor, mask: Tensor) -> Tensor:
    """What a discriminator sees of an image and its foreground mask: the image, Eq. (4). (B, 3, H, W)."""
    return image
def paired(image: Tensor, mask: Tensor) -> Tensor:
    """Mask and image: the attention-guided discriminator, L_AGAN, Eq. (5). (B, 1 + 3, H, W)."""
    return torch.cat([mask, image], dim=1)
def masked(image: Tensor, mask: Tensor, tau: float = 0.1) -> Tensor:
    """Mejjati 2018: the foreground, where mask >= tau, on grey (0). (B, 3, H, W)."""
    return image * (mask >= tau)

# ---------------------------------------- 5. losses ----------------------------------------
def adversarial_loss(logits: Tensor, real: bool, kind: str = "lsgan") -> Tensor:
    """Eqs. (4) and (5): how far `logits` (any shape) are from the verdict "real" or "fake"; a scalar.
    lsgan (Mao et al. 2017): mean (logit - target)^2. vanilla (the papers' log form): mean cross-entropy; the
    generator asks for `real=True`, the non-saturating form. ValueError for another kind."""
    target = torch.ones_like(logits) if real else torch.zeros_like(logits)  # nothing to broadcast
    if kind == "lsgan":
        return F.mse_loss(logits, target)
    if kind == "vanilla":
        return F.binary_cross_entropy_with_logits(logits, target)
    raise ValueError(f"unknown GAN loss {kind!r}: lsgan or vanilla")

def cycle_loss(reconstructed: Tensor, real: Tensor) -> Tensor:
    """Eq. (6), Zhu et al. 2017: mean |F(G(x)) - x|. Two (B, 3, H, W) -> a scalar."""
    return F.l1_loss(reconstructed, real)
def pixel_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Eq. (7), Tang 2019: mean |G(x) - x|, so that little is changed. Two (B, 3, H, W) -> a scalar."""
    return F.l1_loss(fake, real)
def identity_loss(same: Tensor, real: Tensor) -> Tensor:
    """Eq. (8), Taigman et al. 2017: mean |G(y) - y|: a B stays as it is. Two (B, 3, H, W) -> a scalar."""
    return F.l1_loss(same, real)

def total_variation_loss(mask: Tensor) -> Tensor:
    """Eq. (9), Tang 2019: the mask's steps between neighbours, summed over n, H and W, mean over B.
    (B, n, H, W) -> a scalar."""
    down = (mask[:, :, 1:] - mask[:, :, :-1]).abs().sum()
    across = (mask[..., 1:] - mask[..., :-1]).abs().sum()
    return (down + across) / mask.shape[0]

# ---------------------------------------- 6. the objective ----------------------------------------
@dataclasses.dataclass
class Config:
    """One run. Each field is an option of `train` and `bench`, its comment the help text. In order of
    precedence: command line, MINI (mini set, --small), PRESETS (by model), OBJECTIVES, these."""
    model: str = "scheme2"         # scheme1, scheme2, cyclegan, mejjati or guided
    objective: str = "final"       # weights, rate: final (the papers; scheme1, scheme2) or released (code)
    a: str = ""                    # folder of domain A; without --a and --b: the bundled mini set
    b: str = ""                    # folder of domain B
    out: str = ""                  # run folder; default runs/MODEL, on the mini set runs/mini-MODEL
    width: int = 64                # channels of the first layers
    blocks: int = 9                # residual blocks of a generator
    masks: int = 10                # n of scheme II: n - 1 foreground masks and the background
    upsample: str = "nearest"      # of the decoders: nearest (and a convolution) or transposed (the papers')
    attention_map: str = "pha"     # of guided's discriminators: pha or tam
    norm: str = "instance"         # instance or batch
    head: str = "patch"            # of the discriminators: patch or pooled
    gan: str = "lsgan"             # adversarial loss: lsgan or vanilla
    l_gan: float = 0.5             # weight of L_GAN, Eq. 4
    l_paired: float = 0.5          # weight of L_AGAN, Eq. 5: the attention-guided discriminators
    l_cycle: float = 10.0          # weight of L_cycle, Eq. 6
    l_pixel: float = 1.0           # weight of L_pixel, Eq. 7
    l_identity: float = 0.0        # weight of L_identity, Eq. 8
    l_tv: float = 1e-6             # weight of L_tv, Eq. 9
    l_copy: float = 1.0            # weight of the untouched input among D's fakes, Eq. 4
    curriculum: str = "adaptive"   # of r, Eq. 10: adaptive (Eq. 11), papers (a step), ramp, or none (no r)
    r: float = 0.5                 # its highest value: papers and ramp end with it, adaptive may reach it
    tau: float = 0.0               # from the switch on, L_GAN's discriminators see where mask >= tau; 0: all
    switch: float = 0.3            # fraction of the run before tau, if any; then mejjati's masks are frozen
    size: int = 256                # side of the training crops, a multiple of 4
    resize: int = 286              # shorter side of the images before cropping
    batch_size: int = 1            # pairs a step, of each process
    epochs: int = 200              # passes over the larger folder, in whole batches
    steps: int = 0                 # length of the run in steps, in place of --epochs
    lr: float = 1e-4               # Adam's rate, constant for half of the run, then linearly to 0
    pool: int = 50                 # earlier fakes kept for the discriminators
    seed: int = 0                  # of weights, order, crops, flips and pools
    device: str = "auto"           # auto (cuda, else mps, else cpu) or a PyTorch device
    precision: str = "auto"        # auto (bf16 or fp16 on CUDA, by its age; else fp32), fp32, bf16 or fp16
    merge: bool = True             # real and fake, x and identity input in one batch; never with batch norm
    compile: bool = True           # on CUDA: torch.compile the networks, replay the step as a CUDA graph
    workers: int = 4               # processes that load images, one a core at most; 0: none
    log_every: int = 100           # steps between progress lines, each a row of log.csv
    save_every: int = 1000         # steps between checkpoints, each with a sample grid
    tensorboard: bool = False      # curves and grids for TensorBoard too, in the run folder

OBJECTIVES = {  # fields that --objective sets
    "final": {},
    "released": dict(l_gan=1.0, l_paired=0.0, l_identity=5.0, l_pixel=0.0, l_tv=0.0, lr=2e-4)}
PRESETS: dict[str, dict] = {  # fields that --model sets
    "scheme1": {}, "scheme2": {},
    "cyclegan": dict(objective="released", curriculum="none", l_copy=0.0),
    "mejjati": dict(objective="released", l_identity=0.0, lr=1e-4, tau=0.1, r=0.8),  # 0.24 at the switch
    "guided": dict(objective="released", curriculum="none", l_copy=0.0, l_identity=0.0)}

def build(config: Config) -> nn.ModuleDict:
    """The networks: g_ab, g_ba, and the discriminators of weights other than 0 (d_a judges images of A)."""
    generators, discriminators = {}, {}
    tam = config.model == "guided" and config.attention_map == "tam"
    kind = ResidualAttentionDiscriminator if tam else PatchDiscriminator
    for domain in ("a", "b"):
        if config.l_gan:
            discriminators["d_" + domain] = kind(3, config.width, config.norm, config.head)
        if config.l_paired:
            discriminators["paired_" + domain] = kind(1 + 3, config.width, config.norm, config.head)
    for direction in ("ab", "ba"):
        kinds = {"scheme1": SchemeOneGenerator, "cyclegan": CycleGANGenerator, "mejjati": GatedGenerator,
                 "scheme2": functools.partial(SchemeTwoGenerator, masks=config.masks),
                 "guided": functools.partial(GuidedGenerator, discriminators.get("d_" + direction[0]))}
        generators["g_" + direction] = kinds[config.model](
            config.width, config.blocks, norm=config.norm, upsample=config.upsample)
    nets = nn.ModuleDict(generators | discriminators)
    for module in nets.modules():  # N(0, 0.02), a norm's weights N(1, 0.02), as in DCGAN
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
            nn.init.zeros_(module.bias)
    return nets

def switch(nets: nn.ModuleDict, config: Config, progress: float):
    """What the vanilla discriminators see: `whole`, or, if tau is not 0, `masked` from config.switch on. From
    then on they do without their norms, in which the blank background would count, and attention networks are
    frozen, lest they collapse (Mejjati 2018)."""
    late = config.tau > 0 and progress >= config.switch
    for name, net in nets.items():
        if name in ("d_a", "d_b"):
            net.normed = not late
        elif isinstance(net, GatedGenerator):
            net.frozen = late
            net.attention_network.train(net.training and not late)  # its batch norms, if any, rest too
    return functools.partial(masked, tau=config.tau) if late else whole

def judges(nets: nn.ModuleDict, domain: str, view) -> list[tuple]:
    """The discriminators of a domain, as (loss term, network, view); `view` is the vanilla one's."""
    table = ("gan", "d_" + domain, view), ("paired", "paired_" + domain, paired)
    return [(term, nets[name], look) for term, name, look in table if name in nets]

def scheduled_r(config: Config, progress: float) -> float:
    """r of Eq. (10) at `progress` in [0, 1] where the clock alone sets it: 0.01 for the first 5 % of the
    run, then the highest r (papers: 10 of 200 epochs), or that times `progress` (ramp)."""
    if progress < 0.05:
        return 0.01
    return config.r if config.curriculum == "papers" else max(0.01, config.r * progress)

class AdaptiveCurriculum(nn.Module):
    """Eq. (11): r of one direction, a ramp from 0 to `highest` over the run, held back as far as G copies.

        e, c  <-  running means of L_GAN(G(x)) and of L_GAN(x), over about 2 % of the run
        r      =  ramp (1 - e / c) / (1 - trust), between 0.01 and the ramp

    Where G copies, D says the same of G(x) and x, and e / c is 1; the better G(x) fools D, the smaller it
    is. Where e / c <= trust, r is the ramp's, so that masks shrink to what has to change. Where they shrink
    too far, D sees through G(x), and r falls. All of it stays on the device: no step waits for a GPU."""
    def __init__(self, steps: int, highest: float = 0.5, trust: float = 0.35):
        super().__init__()
        self.steps, self.highest, self.trust = steps, highest, trust
        self.register_buffer("e", torch.tensor(1.0))
        self.register_buffer("c", torch.tensor(1.0))

    def forward(self, step: int) -> Tensor:
        """r of the step, the first of which is 0; a scalar."""
        ramp = max(0.01, self.highest * step / self.steps)
        fooled = 1 - self.e / self.c.clamp(min=1e-6)
        return (ramp * fooled / (1 - self.trust)).clamp(0.01, ramp)

    @torch.no_grad()
    def update(self, step: int, e: Tensor, c: Tensor):
        """Takes in L_GAN(G(x)) and L_GAN(x) of the step; scalars."""
        share = 1 / min(step + 1, max(1, 0.02 * self.steps))  # at first the mean of all steps
        self.e.lerp_(e, share)
        self.c.lerp_(c, share)

def weigh(losses: dict[str, Tensor], config: Config, r: float | Tensor) -> Tensor:
    """Eq. (10): the generators' total from their terms, a scalar."""
    keep, change = (1, 1) if config.curriculum == "none" else (r, 1 - r)
    factors = dict(cycle=keep, pixel=keep, identity=keep, gan=change, paired=change, tv=change)
    return sum(factors[term] * getattr(config, "l_" + term) * loss for term, loss in losses.items())

def generator_objective(g, g_back, judges: list[tuple], x: Tensor, y: Tensor, config: Config, r):
    """Eq. (10) of one direction: g translates x and g_back back; y is of the domain that g translates to,
    `judges` are that domain's. x, y (B, 3, H, W) -> the total, its terms, and the Translation of x.
    Terms of weight 0 are not computed. Masks are not detached, so that they learn from every term."""
    merge = config.l_identity and config.merge and config.norm == "instance"  # norms every image for itself
    t = g(torch.cat([x, y]) if merge else x)                            # (B or 2B, ...)
    fake = Translation(*(part[:len(x)] for part in t))
    losses = {term: adversarial_loss(discriminator(view(fake.image, fake.foreground)), True, config.gan)
              for term, discriminator, view in judges}
    if config.l_cycle:
        losses["cycle"] = cycle_loss(g_back(fake.image).image, x)
    if config.l_pixel:
        losses["pixel"] = pixel_loss(fake.image, x)
    if config.l_identity:
        losses["identity"] = identity_loss(t.image[len(x):] if merge else g(y).image, y)
    if config.l_tv:
        losses["tv"] = total_variation_loss(fake.foreground)
    return weigh(losses, config, r), losses, fake

def discriminator_objective(judges: list[tuple], real: tuple, fake: tuple, copy: tuple, config: Config):
    """Eqs. (4) and (5) for the `judges` of one domain, halved -> the total, its terms, and what the first
    of them would say if x itself were G(x): L_GAN(x), 0 where neither l_copy nor the curriculum asks.
    real, fake and copy are (image, mask), detached: a real image and the mask of its own translation; a
    fake and the mask that made it; an untouched image of the other domain, x, and its mask. As in Eq. (5),
    `paired` sees the fake's mask beside the real image too."""
    merge = config.merge and config.norm == "instance"
    total, losses, said_of_copy = 0, {}, real[0].new_zeros(())
    for term, discriminator, view in judges:
        mask = fake[1] if view is paired else real[1]  # beside the real image
        seen = [view(real[0], mask), view(*fake)]
        if not losses and (config.l_copy or config.curriculum == "adaptive"):
            seen.append(view(*copy))
        verdicts = discriminator(torch.cat(seen)).chunk(len(seen)) if merge else map(discriminator, seen)
        on_real, on_fake, *on_copy = verdicts
        losses["d_" + term] = (adversarial_loss(on_real, True, config.gan)
                               + adversarial_loss(on_fake, False, config.gan)) / 2
        total = total + losses["d_" + term]
        if on_copy:
            losses["d_copy"] = adversarial_loss(on_copy[0], False, config.gan) / 2
            total = total + config.l_copy * losses["d_copy"]
            said_of_copy = adversarial_loss(on_copy[0].detach(), True, config.gan)
    return total, losses, said_of_copy

class ImagePool:
    """Up to `size` earlier fakes, each with its mask: a discriminator's memory (Shrivastava et al. 2017)."""
    def __init__(self, size: int = 50):
        self.size, self.items = size, []
    def query(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), (B, 1, H, W) -> the same shapes: each pair itself, or, half of the time once the pool
        is full, an earlier pair whose place it takes."""
        out = []
        for new in zip(images.detach(), masks.detach()):
            new = tuple(t.clone() for t in new)
            if len(self.items) < self.size:
                self.items.append(new)
            elif self.size and torch.rand(()) < 0.5:
                i = int(torch.randint(self.size, ()))
                new, self.items[i] = self.items[i], new
            out.append(new)
        return torch.stack([image for image, _ in out]), torch.stack([mask for _, mask in out])

# ======================================== Part II: the machinery ========================================
# ---------------------------------------- 7. data ----------------------------------------
class BadInput(Exception):
    """What was given is no use, or work ends early: the command line prints the line, exits with `status`."""
    def __init__(self, line: str, status: int = 2):
        super().__init__(line)
        self.status = status

@contextlib.contextmanager
def reading(path: str | Path, failure: str = "not a checkpoint that this can use"):
    """Within, whatever goes wrong is the file's fault, as a foreign one can raise anything: BadInput."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{path}: {failure} ({' '.join(str(error).split())[:200]})") from None

def attempt(function, path: Path, *arguments):
    """function(path, *arguments), or None, and a warning, where this file is no use."""
    try:
        return function(path, *arguments)
    except BadInput as error:
        with contextlib.suppress(OSError):  # where the screen is gone
            print(f"warning: {error}; going on without it", file=sys.stderr, flush=True)

def write_whole(path: Path, save):
    """save(file), beside, then renamed: afterwards the file is whole, or what it was. BadInput: no room."""
    path = path.resolve()  # where it is a link, what it leads to
    temporary = path.with_name(f".{path.name[:60]}.tmp")  # a name may be as long as the disk allows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # PyTorch and PIL have their own
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BadInput(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None

DATA = Path(__file__).resolve().parent / "data"  # the bundled mini set; below, what it and --small set
MINI = dict(size=64, resize=72, width=16, blocks=3, l_tv=1e-4, steps=2000, lr=4e-4, workers=0,
            log_every=50, save_every=400, compile=False)  # l_tv: of 64 pixels, not 256, the sum is small

def list_images(folder: str | Path) -> list[Path]:
    """The folder's image files, by their suffix or for lack of one, sorted by path, subfolders included; no
    hidden ones, such as macOS's ._photo.jpg. BadInput where there is none."""
    kinds = {"", *(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)}
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not paths:
        raise BadInput(f"{folder}: no {'images in this' if Path(folder).is_dir() else 'such file or'} folder")
    return paths

def load_image(path: str | Path, mode: str | None = "RGB", size: int = 0) -> Image.Image:
    """Any image that PIL reads, EPS apart: its first frame, turned upright by its EXIF tag; mode None: RGB or
    RGBA, by what it has; the shorter side resized to `size`, if given. BadInput where it is no use."""
    with reading(path, "not a usable image"), Image.open(path) as image:
        if image.format == "EPS" or size and max(image.size) > 100 * min(image.size):  # EPS are programs
            raise ValueError(f"{image.format} of {image.width} x {image.height} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # convert() would clip what is more than 8 bits, not scale it
            high = 65535 if image.mode.startswith("I;16") else image.getextrema()[1]
            scale = next((255 / top for top in (1, 255) if high <= top), 255 / 65535)
            image = image.convert("I" if image.mode[0] == "I" else "F")
            image = image.point(lambda value: value * scale + 0.5).convert("L")
        image = image.convert(mode or ("RGBA" if image.has_transparency_data else "RGB"))
        return TF.resize(image, size, TF.InterpolationMode.BICUBIC) if size else image

def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) in [-1, 1]."""
    return TF.to_tensor(image) * 2 - 1
def to_image(x: Tensor) -> Image.Image:
    """(3 or 1, H, W) in [0, 1] -> RGB or grey; rounded, so that a copied pixel keeps its value."""
    return TF.to_pil_image((255 * x).round().clamp(0, 255).byte().cpu())

class UnpairedImages(Dataset):
    """Pairs (real_a, real_b) of (3, size, size) in [-1, 1]: resized, randomly cropped, randomly mirrored.
    Pair i is a function of `seed` and i alone, for any i >= 0 (give a loader a sampler): a resumed run sees
    what an uninterrupted one would have. Each folder is walked in shuffled passes; len() is the longer's.
    Files that are no use are left out, with one warning. BadInput if all of a folder's are."""
    def __init__(self, folder_a, folder_b, size: int = 256, resize: int = 286, seed: int = 0):
        self.paths = {"a": list_images(folder_a), "b": list_images(folder_b)}
        self.useless = {k: torch.zeros(len(p)).share_memory_() for k, p in self.paths.items()}  # by workers
        self.size, self.resize, self.seed = size, resize, seed
    @staticmethod
    @functools.lru_cache(maxsize=4)
    def permutation(n: int, key: str) -> list[int]:
        return random.Random(key).sample(range(n), n)
    def __len__(self) -> int:
        return max(map(len, self.paths.values()))
    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.load("a", i), self.load("b", i)
    def load(self, domain: str, i: int) -> Tensor:
        paths, rng = self.paths[domain], random.Random(f"{self.seed} {domain} {i}")
        epoch, position = divmod(i, len(paths))
        order = self.permutation(len(paths), f"{self.seed} {domain} {epoch}")
        image = next(self.usable(domain, order[position:] + order[:position]))
        left, top = (rng.randint(0, side - self.size) for side in image.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        return to_tensor(ImageOps.mirror(image) if rng.random() < 0.5 else image)
    def usable(self, domain: str, order: Sequence[int]):
        """Yields those of the domain's images that can be read, resized."""
        for i in order:
            if not self.useless[domain][i]:
                image = attempt(load_image, self.paths[domain][i], "RGB", self.resize)
                self.useless[domain][i] = image is None
                if image:
                    yield image
        if self.useless[domain].all():
            raise BadInput(f"{self.paths[domain][0].parent}: not one usable image")
    def samples(self) -> list[Tensor]:
        """For the sample grids, of A and of B: the first images, up to four, the middle of each cut out."""
        pairs = zip(range(4), *(self.usable(k, range(len(paths))) for k, paths in self.paths.items()))
        return [torch.stack([to_tensor(TF.center_crop(image, self.size)) for image in images])
                for images in [*zip(*pairs)][1:]]

def panels(x: Tensor, t: Translation) -> Tensor:
    """(B, 3, H, W) and its translation -> (B, 4, 3, H, W): input, foreground attention, content (the mean of
    the n - 1, weighted by their masks), translation."""
    weight = t.attention[:, :-1, None] + 1e-6
    content = (weight * t.content).sum(1) / weight.sum(1)
    return torch.stack([x, (t.foreground * 2 - 1).expand_as(x), content, t.image], dim=1)

def sibling(folder: str | Path, old: str, new: str) -> Path | None:
    """The folder beside this one named with `new` for `old` (trainA -> testA), if there is one."""
    path = Path(folder).resolve()
    found = path.parent / path.name.replace(old, new)
    return found if found != path and found.is_dir() else None
def domain_folders(config: Config) -> tuple[Path, Path]:
    return Path(config.a or DATA / "trainA"), Path(config.b or DATA / "trainB")

# ---------------------------------------- 8. training ----------------------------------------
def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = next((kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()), "cpu")
    try:
        if name.startswith("cuda"):  # torchrun says which one is this process's
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", torch.device(name).index or 0)))
            torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be recorded in the default one
            name = "cuda"
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # unknown, absent, ...
        raise BadInput(f"--device {name}: {str(error).partition(chr(10))[0]}") from None
    return torch.device(name)

def compiler_works(device: torch.device) -> bool:
    try:
        return bool(torch.compile(torch.cos)(torch.zeros(8, device=device)).sum() == 8)
    except Exception as error:  # no C compiler, no Triton, a Python too new: each raises something else
        print(f"torch.compile does not work here, going on without: {str(error).partition(chr(10))[0]}")
        return False

def learning_rate(config: Config, progress: float) -> float:
    """Constant for the first half of the run, then linearly to 0 at progress = 1."""
    return config.lr * min(1.0, 2 - 2 * progress)

FREE = {"out", "device", "workers", "compile", "tensorboard"}  # may differ where a run goes on
FORMAT = 6  # of the checkpoints
UNFUSED = "cyclegan", "guided"  # fuse no mask of their own, so that none can collapse
PRECISIONS = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)
CHOICES = dict(model=PRESETS, objective=OBJECTIVES, norm=NORMS, head=("patch", "pooled"),
               gan=("lsgan", "vanilla"), attention_map=("pha", "tam"), upsample=("nearest", "transposed"),
               curriculum=("adaptive", "papers", "ramp", "none"), precision=("auto", *PRECISIONS))

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

def check(config: Config) -> Config:
    """Itself. BadInput names the field whose value is no use."""
    least = dict(width=1, masks=2, size=32, r=0.01, batch_size=1, epochs=1, log_every=1, save_every=1)
    most = dict(r=0.99, tau=1, switch=1, width=2048, blocks=1000, masks=1000, size=2**15, resize=2**15)
    for name, value in dataclasses.asdict(config).items():
        low, high = least.get(name, 0), most.get(name, 2**32)
        if not isinstance(value, str) and not low <= value <= high:
            raise BadInput(f"{flag(name)} {value}: must be between {low} and {high}")
        if value not in CHOICES.get(name, (value,)):
            raise BadInput(f"{flag(name)} {value}: must be one of {', '.join(CHOICES[name])}")
    for wrong, message in (
            (bool(config.a) != bool(config.b), "--a and --b go together: one folder for each domain"),
            (config.a and config.a == config.b, f"--a and --b are the same folder, {config.a}"),
            (config.size % 4, f"--size {config.size}: must be a multiple of 4"),
            (config.resize < config.size, f"--resize {config.resize}: must be at least --size {config.size}"),
            (not config.l_gan and not config.l_paired, "--l-gan 0 --l-paired 0: leaves no discriminator"),
            (config.model == "cyclegan" and (config.l_paired or config.l_tv or config.tau),
             "--model cyclegan: has no mask for --objective final, --l-paired, --l-tv or --tau"),
            (config.model == "guided" and (config.tau or not config.l_gan),
             "--model guided: its discriminators are its attention; needs --l-gan, and --tau 0")):
        if wrong:
            raise BadInput(message)
    return config

class Trainer:
    """Networks, optimisers, pools, position of a run: all that a checkpoint holds, and the training step.
    Under torchrun one of several processes, each with its own images and pools; gradients are averaged."""
    def __init__(self, config: Config, total: int, device: torch.device):
        self.config, self.total, self.device, self.step = config, total, device, 0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(config.seed)
        self.nets = build(config).to(device)
        torch.manual_seed(config.seed + self.rank)
        cuda = device.type == "cuda"
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        works = config.compile and cuda and compiler_works(device)
        self.fast = {k: torch.compile(net, dynamic=False) if works else net for k, net in self.nets.items()}
        self.graphs: dict[tuple, list] | None = {} if config.compile and cuda else None
        self.parameters = {k: [p for name, net in self.nets.items() if name.startswith("g_") == (k == "g")
                               for p in net.parameters()] for k in ("g", "d")}
        self.optimizers = {k: torch.optim.Adam(p, config.lr, betas=(0.5, 0.999), fused=True)
                           for k, p in self.parameters.items()}
        auto = "fp32" if not cuda else "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
        self.dtype = PRECISIONS[auto if config.precision == "auto" else config.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.curricula = nn.ModuleDict({"ab": AdaptiveCurriculum(total, config.r),
                                        "ba": AdaptiveCurriculum(total, config.r)}).to(device)
        self.r = {k: torch.zeros((), device=device) for k in ("ab", "ba")}  # a graph would keep numbers
        self.parts = {"nets": self.nets, "curricula": self.curricula, "scaler": self.scaler,
                      **self.optimizers}  # of a checkpoint
        self.pools = {"a": ImagePool(config.pool), "b": ImagePool(config.pool)}
        self.rows: list[Tensor] = []  # the figures `names` of each step since the last line of the log
        self.log: list[dict] = []     # those lines
    def backward(self, which: str, objective, *arguments):
        """Runs an objective, adds its gradients to those of the generators ("g") or the discriminators ("d").
        -> its terms and what else it returns."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss, terms, *rest = objective(*arguments)
        self.scaler.scale(loss).backward(inputs=self.parameters[which])
        return {name: term.detach() for name, term in terms.items()}, *rest
    def generator_gradients(self, real_a: Tensor, real_b: Tensor):
        """-> the loss terms, sums of both directions; the fakes of A and B, (image, mask) each; and, of both
        directions, L_GAN(G(x)), (2,)."""
        sums, fakes, fooled = collections.Counter(), {}, []
        self.optimizers["g"].zero_grad()
        for source, target, x, y in (("a", "b", real_a, real_b), ("b", "a", real_b, real_a)):
            g, g_back = self.fast["g_" + source + target], self.fast["g_" + target + source]
            terms, fake = self.backward("g", generator_objective, g, g_back, judges(
                self.fast, target, self.view), x, y, self.config, self.r[source + target])
            sums.update(terms)
            fakes[target] = fake.image.detach(), fake.foreground.detach()
            fooled.append(terms["gan" if "gan" in terms else "paired"])
        return dict(sums), fakes["a"], fakes["b"], torch.stack(fooled)
    def discriminator_gradients(self, *seen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """seen: a real image, its mask, a fake and its mask of A, then of B. -> the loss terms, sums of both
        domains; and, of the directions A -> B and B -> A, L_GAN(x), (2,)."""
        sums, copies = collections.Counter(), []
        self.optimizers["d"].zero_grad()
        of_a, of_b = seen[:4], seen[4:]
        for domain, own, other in (("b", of_b, of_a), ("a", of_a, of_b)):
            terms, copy = self.backward("d", discriminator_objective, judges(self.fast, domain, self.view),
                                        own[:2], own[2:], other[:2], self.config)
            sums.update(terms)
            copies.append(copy)
        return dict(sums), torch.stack(copies)
    def launch(self, function, *inputs: Tensor):
        """function(*inputs). On CUDA the fourth call (of a view) is recorded as a graph, which is
        replayed from then on: one launch for thousands. What a replay returns, the next one overwrites."""
        if self.graphs is None:
            return function(*inputs)
        graph = self.graphs.setdefault((function.__name__, self.view is whole), [])
        if len(graph) < 3:  # compilers and libraries settle first
            graph.append(None)
            return function(*inputs)
        if graph[0] is None:
            memory = next((g[0].pool() for g in self.graphs.values() if g[0]), None)  # all share it
            graph[:] = torch.cuda.CUDAGraph(), [x.clone() for x in inputs], None
            with torch.cuda.graph(graph[0], memory, torch.cuda.current_stream(),
                                  capture_error_mode="thread_local"):  # loaders pin memory meanwhile
                graph[2] = function(*graph[1])
        for static, new in zip(graph[1], inputs):
            static.copy_(new)
        graph[0].replay()
        return graph[2]
    def update(self, which: str):
        """One Adam step of the generators ("g") or the discriminators ("d")."""
        if self.world > 1:
            gradients = [p.grad for p in self.parameters[which] if p.grad is not None]
            mean = torch.cat([g.flatten() for g in gradients]) / self.world
            dist.all_reduce(mean)
            for g, new in zip(gradients, mean.split([g.numel() for g in gradients])):
                g.copy_(new.view_as(g))
        for group in self.optimizers[which].param_groups:
            group["lr"] = learning_rate(self.config, self.step / self.total)
        self.scaler.step(self.optimizers[which])

    def set_r(self):
        """r of this step, for both directions."""
        for direction, r in self.r.items():
            if self.config.curriculum == "adaptive":
                r.copy_(self.curricula[direction](self.step))
            else:
                r.fill_(scheduled_r(self.config, self.step / self.total))

    def update_curricula(self, fooled: Tensor, copies: Tensor):
        """Lets them take in L_GAN(G(x)) and L_GAN(x), each of both directions, (2,), of all processes."""
        losses = torch.stack([fooled, copies], dim=1)
        if self.world > 1:
            dist.all_reduce(losses)
        for curriculum, (e, c) in zip(self.curricula.values(), losses / self.world):
            curriculum.update(self.step, e, c)

    def train_step(self, real_a: Tensor, real_b: Tensor) -> dict[str, Tensor]:
        """Generators, then discriminators on pooled fakes. Returns the loss terms and the masks' means."""
        real_a, real_b = (x.to(self.device, non_blocking=True) for x in (real_a, real_b))
        self.view = switch(self.nets, self.config, self.step / self.total)
        self.set_r()
        terms, fake_a, fake_b, fooled = self.launch(self.generator_gradients, real_a, real_b)
        self.update("g")
        seen = (real_a, fake_b[1], *self.pools["a"].query(*fake_a),  # a real image with its own mask
                real_b, fake_a[1], *self.pools["b"].query(*fake_b))
        d_terms, copies = self.launch(self.discriminator_gradients, *seen)
        terms = {**terms, **d_terms, "attention_ab": fake_b[1].mean(), "attention_ba": fake_a[1].mean()}
        if self.config.curriculum != "none":
            terms |= {"r_ab": self.r["ab"], "r_ba": self.r["ba"]}
        if self.config.curriculum == "adaptive":
            self.update_curricula(fooled, copies)
        self.update("d")
        self.scaler.update()
        self.step += 1
        self.names, row = list(terms), torch.stack(list(terms.values()))  # a copy: replays overwrite
        self.rows.append(row)
        return dict(zip(self.names, row))
    def check_finite(self):
        """BadInput where a figure since the last line of the log, or a weight, is not finite."""
        rows = torch.stack(self.rows).tolist() if self.rows else []  # a GPU is waited for once, not for each
        wrong = [f"step {step}: {name} is {value}" for step, row in enumerate(rows, self.step - len(rows) + 1)
                 for name, value in zip(self.names, row) if not math.isfinite(value)]
        wrong += [f"step {self.step}: weights of {name} are not finite" for name, net in self.nets.items()
                  if not torch.stack([p.isfinite().all() for p in net.parameters()]).all()]
        if wrong:
            raise BadInput(f"{wrong[0]}; not saved, the last checkpoint is from before. Try a new run with a "
                           "lower --lr, or --precision fp32", 1)
    def state_dict(self) -> dict:
        """Of all processes; each has to call it."""
        self.check_finite()
        own = {"random": torch.get_rng_state(), "pools": {
            k: [(image.cpu(), mask.cpu()) for image, mask in pool.items] for k, pool in self.pools.items()}}
        everyone = [own] * self.world
        if self.world > 1:
            dist.gather_object(own, everyone if self.rank == 0 else None)
        return {"format": FORMAT, "config": dataclasses.asdict(self.config), "step": self.step,
                "rows": self.rows, "log": self.log, "processes": everyone,
                "parts": {k: part.state_dict() for k, part in self.parts.items()}}
    def load_state_dict(self, state: dict):
        if len(state["processes"]) != self.world:
            raise BadInput(f"a run of {len(state['processes'])} processes, here are {self.world}")
        self.step, self.log = range(self.total + 1).index(state["step"]), state["log"]
        self.rows = [row.to(self.device) for row in state["rows"]]
        for k, part in self.parts.items():
            if k != "scaler" or state["parts"][k]:  # one that was not needed is empty
                part.load_state_dict(state["parts"][k])
        for p, moments in [item for part in self.optimizers.values() for item in part.state.items()]:
            if any(moment.shape != p.shape for name, moment in moments.items() if name != "step"):
                raise ValueError("Adam would write elsewhere")  # it does not look
        own, size = state["processes"][self.rank], self.config.size
        for k, pool in self.pools.items():
            pool.items = [(image.to(self.device).view(3, size, size),
                           mask.to(self.device).view(1, size, size)) for image, mask in own["pools"][k]]
        torch.set_rng_state(own["random"].cpu())

def load_checkpoint(run: str | Path) -> dict:
    """A run folder or its checkpoint.pt -> the state. Never runs code from the file (weights_only)."""
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise BadInput(f"{run}: no checkpoint.pt here; name a run folder, such as runs/NAME")
    with reading(path):
        if zipfile.ZipFile(path).testzip():  # torch.load looks at no checksum
            raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"of format {state['format']}, this program's is {FORMAT}")
        config = {field.name: field.type(state["config"][field.name]) for field in dataclasses.fields(Config)}
        state["config"] = check(Config(**config))
        return state

def save_samples(path: Path, nets: nn.ModuleDict, real_a: Tensor, real_b: Tensor) -> Tensor:
    """A PNG, a row for each pair of images: four panels of A -> B, four of B -> A. -> the grid in [0, 1]."""
    nets.eval()
    with torch.no_grad():
        rows = [panels(real_a, nets["g_ab"](real_a)), panels(real_b, nets["g_ba"](real_b))]
    nets.train()
    grid = make_grid(torch.cat(rows, dim=1).flatten(0, 1) / 2 + 0.5, nrow=8, pad_value=1)
    write_whole(path, lambda file: to_image(grid).save(file, "PNG"))
    return grid

def write_progress(trainer: Trainer, path: Path, per_epoch: int, seconds: float, board=None):
    """A line on the screen, a row of log.csv and, where there is one, on the `board`: means since the last
    one. `seconds`: of a step."""
    step, config, progress = trainer.step, trainer.config, (trainer.step - 1) / trainer.total
    means = dict(zip(trainer.names, torch.stack(trainer.rows).mean(0).tolist()))
    row = {"step": step, "epoch": (step - 1) // per_epoch + 1,
           "pairs_per_second": config.batch_size * trainer.world / seconds,
           "rate": learning_rate(config, progress), **means}
    trainer.log.append({k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in row.items()})
    text = "".join(",".join(map(str, r)) + "\n" for r in (row, *map(dict.values, trainer.log)))
    write_whole(path, lambda file: file.write(text.encode()))
    if board:
        board(step, row)
    with contextlib.suppress(OSError):  # where the screen is gone, the run goes on
        print(f"epoch {row['epoch']}  step {step}/{trainer.total}  {row['pairs_per_second']:.1f} pairs/s  "
              f"{(trainer.total - step) * seconds / 60:.1f} min left  "
              + "  ".join(f"{name} {mean:.3f}" for name, mean in means.items()), flush=True)
        if config.model not in UNFUSED:
            warn_of_collapse(trainer.log, config)

def warn_of_collapse(log: list[dict], config: Config):
    """A line for each direction whose mean mask, in the last row, is nearly empty or nearly full."""
    *earlier, last = log
    for direction in ("ab", "ba"):
        name = "attention_" + direction
        if 0.03 <= last[name] <= 0.97:
            continue
        usual = sum(row[name] for row in earlier) / max(1, len(earlier))
        before = f" (so far {usual:.2f} on average)" if earlier else ""
        found, cure = (("copies its input, or nearly", "falls until it changes something again")
                       if last[name] < 0.5 else ("repaints everything", "rises as far as D allows"))
        advice = f"r_{direction} {cure}" if config.curriculum == "adaptive" else "try --curriculum adaptive"
        print(f"warning: {name} is {last[name]:.4f}{before}: g_{direction} {found}; {advice}",
              file=sys.stderr)

def tools() -> dict:
    """What one does with a run: `translate`, `evaluate`, `bench` and their like, of data/tools.py."""
    sys.modules.setdefault("aggan", sys.modules[__name__])  # for its `import aggan`, if this file is __main__
    return runpy.run_path(str(DATA / "tools.py"))

def in_worker(_number: int):
    """Signals that reach the loading processes too end none before `train` has had the time for its step."""
    getattr(os, "setpgrp", int)()  # a terminal's Ctrl-C goes to its group; Windows has none
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(1, os._exit, [0]).start())  # 0: no error

def train(config: Config, resume: bool = False, signals: Sequence[int] = ()) -> Path:
    """Trains, leaves checkpoint.pt, log.csv and samples/*.png in the run folder, and returns it.
    BadInput where it holds something already, unless `resume`: that goes on from its checkpoint, if any.
    Where `signals` comes to hold one: finishes the step, saves, raises BadInput, status 128 + its number."""
    device, out, folders = pick_device(config.device), Path(config.out), domain_folders(config)
    rank, world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)  # torchrun's
    if out.is_file() or not resume and rank == 0 and out.exists() and any(out.iterdir()):
        wrong = "is a file; name a folder" if out.is_file() else "not empty; name another folder, or --resume"
        raise BadInput(f"--out {out}: {wrong}")
    if any(folder.resolve() in (out / "samples").resolve().parents for folder in folders):
        raise BadInput(f"--out {out}: is in a training folder, whose images its samples would be")
    data = UnpairedImages(*folders, config.size, config.resize, config.seed)
    tests = UnpairedImages(*(sibling(x, "train", "test") or x for x in folders), config.size, config.size)
    shown = [x.to(device) for x in tests.samples()]
    data.useless |= {k: tests.useless[k] for k in "ab" if tests.paths[k] == data.paths[k]}  # named already
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    size, per_epoch = config.batch_size, max(1, len(data) // (config.batch_size * world))
    trainer = Trainer(config, config.steps or config.epochs * per_epoch, device)
    if resume and (out / "checkpoint.pt").exists():
        state = load_checkpoint(out)
        with reading(out / "checkpoint.pt"):
            trainer.load_state_dict(state)
    board = tools()["tensorboard"](out, trainer.step) if config.tensorboard and rank == 0 else None
    (out / "samples").mkdir(parents=True, exist_ok=True)
    started, first = time.monotonic(), trainer.step
    turns = range(first * world + rank, trainer.total * world, world)  # this process's batches
    loader = DataLoader(data, batch_sampler=(range(i * size, (i + 1) * size) for i in turns),
                        num_workers=min(config.workers, os.cpu_count()), pin_memory=device.type == "cuda",
                        generator=torch.Generator(),  # its own: the pools' random numbers stay the same
                        worker_init_fn=in_worker)
    stop, done = torch.tensor(0), trainer.step >= trainer.total
    for batch in loader:
        trainer.train_step(*batch)
        stop, done = torch.tensor(max(signals, default=0)), trainer.step == trainer.total
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)  # all stop after the same step
        if trainer.step % config.log_every == 0 or done:
            trainer.check_finite()
            if rank == 0:  # of several processes one speaks and writes
                seconds = (time.monotonic() - started) / (trainer.step - first)
                write_progress(trainer, out / "log.csv", per_epoch, seconds, board)
            trainer.rows, started, first = [], time.monotonic(), trainer.step
        if trainer.step % config.save_every == 0 or done or stop:
            state = trainer.state_dict()
            if rank == 0:
                grid = save_samples(out / "samples" / f"{trainer.step:07}.png", trainer.nets, *shown)
                if board:
                    board(trainer.step, grid=grid)
                write_whole(out / "checkpoint.pt", functools.partial(torch.save, state))
        if stop:
            break
    if world > 1:
        dist.destroy_process_group()
    if broken := int(sum(flags.sum() for flags in data.useless.values())):
        with contextlib.suppress(OSError):
            print(f"{broken} of {sum(map(len, data.paths.values()))} training images were no use; see above")
    if stop and not done:
        raise BadInput(f"stopped after step {trainer.step}, saved; goes on with --resume", 128 + int(stop))
    return out

# ---------------------------------------- 9. translate, evaluate, bench ----------------------------------
def __getattr__(name: str):  # aggan.translate(...), of data/tools.py
    if name in ("translate", "evaluate", "bench", "load_generators", "apply_any_size"):
        return tools()[name]
    raise AttributeError(name)

# ---------------------------------------- 10. command line ----------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line; argparse would print the usage too

def configure(given: dict, small: bool | None = None) -> Config:
    """Options given -> the configuration, not `check`ed. small: whether MINI's settings are the defaults;
    None: where no folders are given, that is on the mini set."""
    model, own = given.get("model", Config.model), bool(given.get("a"))
    objective = {**PRESETS[model], **given}.get("objective", Config.objective)
    preset = {**OBJECTIVES[objective], **PRESETS[model]}
    small = not own if small is None else small
    mini = {**MINI} if small else {}
    if small and "epochs" in given:
        mini["steps"] = 0
    if small and "l_tv" in preset:  # 0: this objective has no L_tv
        del mini["l_tv"]
    out = "runs/" + ("mini-" if small and not own else "") + model
    folders = {name: str(Path(given[name]).resolve()) for name in ("a", "b") if given.get(name)}
    return Config(**{"out": out, **preset, **mini, **given, **folders})

def run_train(resume: bool, given: dict, small: bool | None = None):
    config = configure(given, small)
    checkpoint = Path(config.out, "checkpoint.pt")
    if resume:
        print(f"resuming {checkpoint}" if checkpoint.exists() else f"no {checkpoint} yet: starting anew")
    if resume and checkpoint.exists():
        saved = load_checkpoint(checkpoint)["config"]
        asked = {**(MINI if small else {}), **given}
        wrong = [f"{flag(name)} {getattr(config, name)} (there {getattr(saved, name)})" for name in asked
                 if name not in FREE and getattr(config, name) != getattr(saved, name)]
        if wrong:
            raise BadInput(f"{', '.join(wrong)}: another run than {checkpoint}'s")
        free = {name: given[name] for name in given if name in FREE}
        config = dataclasses.replace(saved, **{"out": config.out, **free})
    if not config.a:
        print(f"no --a, no --b: the bundled mini set, {config.size} px, width {config.width}, mini settings")
    signals, note = [], lambda n, _: signals.append(n) or signal.signal(n, signal.SIG_DFL)  # a second kills
    with contextlib.ExitStack() as after:
        for number in (signal.SIGINT, signal.SIGTERM):
            after.callback(signal.signal, number, signal.signal(number, note))
        train(check(config), resume, signals)
    print(f"done: {config.out}/samples shows it, {config.out}/checkpoint.pt is for translate and evaluate")

def main(argv: list[str] | None = None):
    parser = Parser(prog="aggan.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(encoding="utf-8"), re.M))
    small = " ".join(f"{flag(name)} {value}" for name, value in MINI.items())
    for command, text in (("train", "train on two folders, or on the bundled mini set"),
                          ("bench", "time the training step; its loader on two folders or the mini set")):
        sub = commands.add_parser(command, help=text, epilog=f"[defaults]: scheme2's; mini set: {small}")
        for field in dataclasses.fields(Config):
            kind = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(
                type=field.type, metavar=field.type.__name__.upper(), choices=CHOICES.get(field.name)))
            sub.add_argument(flag(field.name), **kind, default=argparse.SUPPRESS,
                             help=f"{comments[field.name]} [{field.default}]".replace("%", "%%"))
    commands.choices["train"].add_argument("--resume", action="store_true",
                                           help="go on from the run folder's checkpoint, if any")
    commands.choices["train"].add_argument("--small", action="store_true",
                                           help=f"the mini set's settings, on your folders: {small}")
    common = Parser(add_help=False)
    common.add_argument("run", help="run folder")
    common.add_argument("--device", default="auto", help="auto or a PyTorch device")
    sub = commands.add_parser("translate", help="apply a trained run to images", parents=[common])
    sub.add_argument("inputs", nargs="+", help="images, or folders of them")
    sub.add_argument("--to", choices=("a", "b"), required=True, help="the domain to translate to")
    sub.add_argument("--out", required=True, help="folder for the results")
    sub.add_argument("--attention", action="store_true", help="save the foreground attention too")
    sub = commands.add_parser("evaluate", help="measure a run, against true masks if any", parents=[common])
    for name in ("a", "b", "masks_a", "masks_b"):
        sub.add_argument(flag(name), default="", help="folder; default: testA, masksA beside trainA")
    sub.add_argument("--save", default="", help="new folder for the translations")
    sub.add_argument("--kid", nargs="?", const="", metavar="WEIGHTS",
                     help="KID and FID too, by torch-fidelity; default: the weights that it keeps")
    for command in ("bench", "evaluate"):
        commands.choices[command].add_argument("--json", default="", help="file for the figures, too")
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    if int(os.environ.get("RANK") or 0):  # of torchrun's processes one speaks
        sys.stdout = open(os.devnull, "w")
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # for odd names
    try:
        if command == "train":
            run_train(given.pop("resume"), small=given.pop("small") or None, given=given)
        else:
            tools()["run"](command, given)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except (BadInput, OSError) as error:  # from a loading process: a traceback that ends in "BadInput: ..."
        line = str(error).strip().rpartition("BadInput: ")[2]
        parser.exit(getattr(error, "status", 2), f"{parser.prog}: {line}\n")
    except (MemoryError, RuntimeError) as error:
        if str(error) and not re.search("out of memory|t allocate memory", str(error)):
            raise
        parser.error("out of memory: train needs less with a smaller --batch-size, --size, --width, --masks")

if __name__ == "__main__":
    main()
