"""Hands on one direction of a run: python data/export.py runs/NAME --to b --out a2b.onnx

The file is for ONNX Runtime and its kind (.onnx), or for PyTorch without aggan.py (.pt2):

    image        (B, 3, H, W) in [0, 1], float32: any number of images, of any one size
    translation  (B, 3, H, W) in [0, 1]
    mask         (B, 1, H, W) in [0, 1]: how much of each pixel is new

    translation, mask = onnxruntime.InferenceSession("a2b.onnx").run(None, {"image": image})
    translation, mask = torch.export.load("a2b.pt2").module()(image)
"""

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aggan  # noqa: E402

SIDES = {0: "batch", 2: "height", 3: "width"}  # of the image, free
FREE = ({side: torch.export.Dim.DYNAMIC for side in SIDES},)


def fit(x: Tensor, height, width) -> Tensor:
    """x (B, C, H, W), cropped, or with its last row and column repeated -> (B, C, height, width).

    By indices, which unlike F.pad and slices can be exported for any size.
    """
    sides = zip((height, width), x.shape[-2:])
    rows, columns = (torch.arange(side).clamp(max=last - 1) for side, last in sides)
    return x[..., rows, :][..., columns]


def any_size(generator: nn.Module, x: Tensor, shorter: int) -> tuple[Tensor, Tensor]:
    """Eq. (12), as `translate_image`: at the scale of the training, the change carried to x.

    x (B, 3, H, W) in [-1, 1] -> image (B, 3, H, W), mask (B, 1, H, W). shorter: of the sides that
    the generator sees.
    """
    resize = functools.partial(F.interpolate, mode="bicubic", antialias=True)
    height, width = x.shape[-2:]
    least = torch.sym_min(height, width)  # min() would be decided once, in the export
    h, w = (shorter * side // least for side in (height, width))
    small = resize(x, (h, w))
    t = generator(fit(small, (h + 3) // 4 * 4, (w + 3) // 4 * 4))  # multiples of 4
    changed, mask = (fit(part, h, w) for part in (t.image, t.foreground))
    return aggan.carry(x, small, changed), resize(mask, x.shape[-2:])


class OneWay(nn.Module):
    """A generator for other programs: image (B, 3, H, W) in [0, 1] -> translation, mask."""

    def __init__(self, generator: nn.Module, shorter: int):
        super().__init__()
        self.generator, self.shorter = generator, shorter
        # guided's discriminator is no part of its generator: its weights go along
        self.guide = getattr(getattr(generator, "guide", None), "__self__", None)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        new, mask = any_size(self.generator, image * 2 - 1, self.shorter)
        return new / 2 + 0.5, mask.clamp(0, 1)  # bicubic goes beyond both ends


def export(run, to: str, out):
    """Writes one direction of a run, by the suffix of `out` as ONNX or as PyTorch's export.

    BadInput where the run or the suffix is no use, or packages are missing.
    """
    out = Path(out)
    if out.suffix not in (".onnx", ".pt2"):
        raise aggan.BadInput(f"--out {out}: must end in .onnx or .pt2")
    nets, config = aggan.load_generators(run, torch.device("cpu"))
    one_way = OneWay(nets["g_ab" if to == "b" else "g_ba"], config.resize)
    one_way.eval().requires_grad_(False)
    example = (torch.rand(2, 3, 96, 128),)  # sizes of 1 would be fixed

    if out.suffix == ".pt2":
        program = torch.export.export(one_way, example, dynamic_shapes=FREE)
        aggan.write_whole(out, functools.partial(torch.export.save, program))
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        line = "needs two more packages: pip install onnx onnxscript"
        raise aggan.BadInput(f"--out {out}: {line}") from None
    names = dict(input_names=["image"], output_names=["translation", "mask"])
    # opset 18: the first whose Resize averages where it shrinks
    options = dict(dynamo=True, opset_version=18, verbose=False, dynamic_shapes=(SIDES,))
    program = torch.onnx.export(one_way, example, **names, **options)
    model = program.model_proto.SerializeToString()
    aggan.write_whole(out, lambda file: file.write(model))


def main(argv=None):
    parser = aggan.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder")
    parser.add_argument("--to", choices=("a", "b"), required=True, help="domain to translate to")
    parser.add_argument("--out", required=True, help="file to write, NAME.onnx or NAME.pt2")
    given = parser.parse_args(argv)
    try:
        export(given.run, given.to, given.out)
    except aggan.BadInput as error:
        parser.exit(error.status, f"{parser.prog}: {error}\n")
    print(f"{given.out}: image (B, 3, H, W) in [0, 1] -> translation, mask; any batch, any size")


if __name__ == "__main__":
    main()
