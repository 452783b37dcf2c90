"""What one does with a run, loaded by aggan.py for it alone: translate, evaluate, bench, TensorBoard."""
import collections
import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

from aggan import (BadInput, Config, Trainer, Translation, UnpairedImages, attempt, build, check, configure,
                   domain_folders, list_images, load_checkpoint, load_image, pick_device, reading, sibling,
                   to_image, to_tensor, write_whole)

WRITABLE = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}  # other formats are written as PNG


def tensorboard(run: Path, step: int):
    """-> show(step, figures, grid), which writes them for TensorBoard. What a killed run wrote there after
    `step` is shown no more. BadInput where the package is missing, and where they cannot be written."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard needs one more package: pip install tensorboard") from None
    folder = run / "tensorboard"
    writer = SummaryWriter(str(folder), purge_step=step + 1)
    def show(step, figures=(), grid=None):
        with reading(folder, "cannot be written"):
            for name, value in dict(figures).items():
                writer.add_scalar(name, value, step)
            if grid is not None:
                writer.add_image("samples", grid, step)
            writer.flush()
    return show


def load_generators(run: str | Path, device: torch.device) -> tuple[torch.nn.ModuleDict, Config]:
    """The trained networks in evaluation mode, and their configuration."""
    state = load_checkpoint(run)
    with reading(run), torch.device("meta"):  # what does not match the file takes no memory
        nets = build(state["config"])
        nets.load_state_dict(state["parts"]["nets"], assign=True)
    return nets.float().to(device).eval(), state["config"]


@torch.no_grad()
def apply_any_size(generator: torch.nn.Module, x: torch.Tensor) -> Translation:
    """The generator on one image (3, H, W) of any size: padded to what it needs, cropped back; batch of 1."""
    height, width = x.shape[-2:]
    pad = [max(16, -(-side // 4) * 4) - side for side in (width, height)]
    t = generator(functional.pad(x[None], (0, pad[0], 0, pad[1]), mode="replicate"))
    return Translation(*(part[..., :height, :width] for part in t))


def translate(run, inputs, to, out, attention=False, device="auto"):
    """Each input image (files, or folders of them) -> `out`/its name, at its size, with its transparency;
    with `attention`, the mask beside it as NAME_attention.png. Returns the paths of the translations.
    BadInput where an output would overwrite an input or another output, and, after the others, where an
    input could not be translated."""
    device, out = pick_device(device), Path(out)
    if out.is_file():
        raise BadInput(f"--out {out}: is a file; name a folder")
    jobs, taken = {}, {}  # source -> its outputs; output -> its source
    for item in map(Path, inputs):
        for path in [item] if item.is_file() else list_images(item):
            target = out / (path.relative_to(item) if item.is_dir() else path.name)
            if target.suffix.lower() not in WRITABLE:
                target = target.with_name(target.name + ".png")
            jobs[path] = [target, target.with_name(target.stem + "_attention.png")][:1 + attention]
            for output in jobs[path]:
                if taken.setdefault(output, path) != path:
                    raise BadInput(f"{path} and {taken[output]}: both would write {output}; split them")
    if clash := {path.resolve() for path in jobs} & {output.resolve() for output in taken}:
        raise BadInput(f"--out {out}: {clash.pop()} is an input; name another folder")
    generator = load_generators(run, device)[0]["g_ab" if to == "b" else "g_ba"]
    def render(path, target, *masks):
        image = load_image(path, None)
        with reading(path, f"{image.width} x {image.height} pixels, not translated"):  # too large, perhaps
            t = apply_any_size(generator, to_tensor(image.convert("RGB")).to(device))
        new = to_image(t.image[0] / 2 + 0.5)
        if image.mode == "RGBA" and target.suffix.lower() not in (".jpg", ".jpeg"):  # which have no alpha
            new.putalpha(image.getchannel("A"))
        for output, picture in zip((target, *masks), (new, to_image(t.foreground[0]))):
            kind = Image.registered_extensions()[output.suffix.lower()]
            write_whole(output, functools.partial(picture.save, format=kind, quality=95))
        print(target, flush=True)
        return target
    done = [attempt(render, path, *outputs) for path, outputs in jobs.items()]
    if None in done:
        raise BadInput(f"{done.count(None)} of {len(done)} images not translated, see above", 1)
    return done


def matrix_rate(dtype, device):
    """FLOP/s (dtype None: float32) of a large product of two square matrices, the best of ten."""
    n, seconds = (8192 if device.type == "cuda" else 2048), []
    a = torch.randn(n, n, device=device).to(dtype or torch.float32)
    for _ in range(11):
        start = clock(device)
        a @ a
        seconds.append(clock(device) - start)
    return 2 * n ** 3 / min(seconds[1:])


def clock(device):
    """The time, when all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device, since=None):
    """GiB. Without `since`: now, where counting the peak begins. With that figure: how far the peak was above
    it. Of tensors on CUDA, of the process on Linux, else None."""
    if device.type == "cuda":
        if since is None:
            torch.cuda.reset_peak_memory_stats()
        used = torch.cuda.memory_allocated() if since is None else torch.cuda.max_memory_allocated()
    elif Path("/proc/self/clear_refs").exists():
        if since is None:
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)   # what is free goes back (glibc)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that was resident, starts anew
        field = "VmRSS" if since is None else "VmHWM"
        used = 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    else:
        return None
    return used / 2 ** 30 - (since or 0)


def bench(config, rounds=5):
    """The training step, timed: {row: {figure: value}}, where each row adds one measure to those before it.

    ms_a_step, pairs_a_second: median over rounds, in which the rows take turns; peak_gib: what building a
    trainer and its first steps took at most (CUDA: of tensors, and of a graph's while it is recorded; Linux:
    of the process, in the first row with what PyTorch loads then); tflop_a_second: the operations of the
    plain step, by PyTorch's counter, over the time; share: of the rate of a matrix product in the row's
    precision; wait_ms: a step's wait for the loader.
    Images come from the folders of `config`, or else from the mini set, resized."""
    torch.backends.cuda.matmul.allow_tf32 = True  # for the matrix rate, as convolutions may use it
    device = pick_device(config.device)
    cuda = device.type == "cuda"
    rows = {"plain fp32": {}, "one batch": dict(merge=True)}
    if cuda:
        rows |= {"precision": dict(precision=config.precision), "torch.compile": dict(compile=True),
                 "CUDA graph": {}}
    elif config.precision != "auto":
        rows |= {"precision": dict(precision=config.precision)}
    rows |= {"(channels_last)": {}}  # not what `train` does: to see whether it would pay
    steps, trainers, peaks, times = (20 if cuda else 1), {}, {}, {}
    data = UnpairedImages(*domain_folders(config), config.size, config.resize, config.seed)
    batches = [range(i * config.batch_size, (i + 1) * config.batch_size)
               for i in range(1 + len(rows) * (5 + steps * rounds))]
    loader = iter(DataLoader(data, batch_sampler=batches, num_workers=min(config.workers, os.cpu_count()),
                             pin_memory=cuda, generator=torch.Generator()))
    settings = dict(merge=False, precision="fp32", compile=False)
    for name, change in rows.items():
        settings |= change
        before = peak_memory(device)
        trainer = trainers[name] = Trainer(dataclasses.replace(config, **settings), 10 ** 9, device)
        if name == "torch.compile":
            trainer.graphs = None
        if name == "(channels_last)":
            torch._dynamo.reset()  # its compilations count apart
            trainer.nets.to(memory_format=torch.channels_last)
        for _ in range(5 if cuda else 2):  # compiles, records
            trainer.train_step(*next(loader))
        peaks[name], times[name] = peak_memory(device, before), []
    with FlopCounterMode(display=False) as counter:
        trainers["plain fp32"].train_step(*next(loader))
    rates = {dtype: matrix_rate(dtype, device) for dtype in {t.dtype for t in trainers.values()}}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            start, wait = clock(device), 0.0
            for _ in range(steps):
                asked = time.perf_counter()
                batch = next(loader)
                wait += time.perf_counter() - asked
                trainer.train_step(*batch)
            times[name].append(((clock(device) - start) / steps, wait / steps))
    results = {}
    for name, trainer in trainers.items():
        seconds, wait = (statistics.median(column) for column in zip(*times[name]))
        rate = counter.get_total_flops() / seconds
        results[name] = {"ms_a_step": 1e3 * seconds, "pairs_a_second": config.batch_size / seconds,
                         "peak_gib": peaks[name], "tflop_a_second": rate / 1e12,
                         "share": rate / rates[trainer.dtype], "wait_ms": 1e3 * wait}
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"{config.model}, {config.objective}, {config.size} px, batch {config.batch_size}, {device.type} "
          f"({where}), PyTorch {torch.__version__}, {counter.get_total_flops() / 1e12:.3f} TFLOP a step, "
          f"median of {rounds} x {steps} steps")
    return results


def fidelity(weights, device):
    """-> measure(fakes, reals), of lists of (3, H, W) bytes: KID (Binkowski et al. 2018; mean and standard
    deviation over subsets) and FID, by torch-fidelity. BadInput where it or its weights are missing.

    weights: file of its Inception network, or "" for the one that it keeps in PyTorch's cache."""
    try:
        from torch_fidelity import calculate_metrics
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError:
        raise BadInput("--kid needs one more package: pip install torch-fidelity") from None
    url = inception.URL_INCEPTION_V3
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]))
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run a pickle's code
        inception.FeatureExtractorInceptionV3("", ["2048"], str(path))
    except Exception:  # a foreign file can raise anything
        raise BadInput(f"--kid: no Inception weights in {path}; download {url}, and name it") from None

    def measure(*lists):
        subset = min(1000, min(map(len, lists)) // 2)  # subsets of everything would not differ
        print(f"KID: 100 subsets of {subset} from {len(lists[0])} translations, {len(lists[1])} real images")
        fakes, reals = (Subset(images, range(len(images))) for images in lists)  # Datasets, as it wants
        found = calculate_metrics(input1=fakes, input2=reals, kid=True, kid_subset_size=subset, fid=True,
                                  feature_extractor_weights_path=str(path), cuda=device.type == "cuda",
                                  batch_size=1, save_cpu_ram=True, verbose=False)  # 1: sizes may differ
        names = dict(kid="kernel_inception_distance_mean", kid_std="kernel_inception_distance_std",
                     fid="frechet_inception_distance")
        return {short: found[name] for short, name in names.items()}
    return measure


def mask_figures(x, t, mask):
    """x (1, 3, H, W), its translation, the true foreground (H, W) of bools or None -> one image's figures.
    iou: of foreground >= 0.5 against `mask`; background_error, foreground_change: mean |out - in| outside and
    inside it, images in [0, 1]; mean_attention: mean foreground. NaN where nothing can be measured."""
    figures = dict.fromkeys(("iou", "background_error", "foreground_change"), torch.tensor(math.nan))
    if mask is not None:
        change, found = (t.image - x).abs().mean(1)[0] / 2, t.foreground[0, 0] >= 0.5    # (H, W) each
        figures = {"iou": (found & mask).sum() / (found | mask).sum(),
                   "background_error": change[~mask].mean(), "foreground_change": change[mask].mean()}
    figures["mean_attention"] = t.foreground.mean()
    return {name: figure.item() for name, figure in figures.items()}


def evaluate(run, a="", b="", masks_a="", masks_b="", save="", kid=None, device="auto"):
    """Mean figures of test images, shorter side resized to the run's size: {"a2b": {...}, "b2a": {...}}.
    Folders not given: those beside the training folders, named with test for train, and beside the test
    folders, named with masks for test, if any. A mask has its image's path in the folder (any extension) and
    size; white is the foreground. None: not measured.
    `save`: new folder for the translations, a2b/NAME.png. `kid`: torch-fidelity's Inception weights, "" for
    the file that it keeps: the translations' KID and FID to the target's images too."""
    device, results, tests, seen = pick_device(device), {}, {}, collections.defaultdict(list)
    measure = None if kid is None else fidelity(kid, device)
    nets, config = load_generators(run, device)
    for source, folder, trained in zip("ab", (a, b), domain_folders(config)):
        folder = folder or sibling(trained, "train", "test")
        if not folder:
            raise BadInput(f"--{source}: no test folder beside {trained}; name one")
        tests[source] = folder, list_images(folder)
        if save and (Path(save).exists() or Path(folder).resolve() in Path(save).resolve().parents):
            raise BadInput(f"--save {save}: exists, or is in {folder}; name a new folder elsewhere")
        if measure and len(tests[source][1]) < 4:
            raise BadInput(f"--kid: {folder} has fewer than four images")
    for source, target, masks in zip("ab", "ba", (masks_a, masks_b)):
        direction, (folder, paths) = f"{source}2{target}", tests[source]
        masks = masks or sibling(folder, "test", "masks")
        truth = {p.relative_to(masks).with_suffix(""): p for p in list_images(masks)} if masks else {}
        figures = []
        if not masks:
            print(f"{folder}: no masks, so that only the mean attention is measured")
        for path in paths:
            name, real, mask = path.relative_to(folder), load_image(path, size=config.size), None
            x = to_tensor(real).to(device)
            if masks:
                if name.with_suffix("") not in truth:
                    raise BadInput(f"{masks}: no mask for {name}")
                mask = TF.to_tensor(load_image(truth[name.with_suffix("")], "L")).to(device)
                mask = TF.resize(mask, x.shape[-2:])[0] >= 0.5
            t = apply_any_size(nets["g_" + source + target], x)
            figures.append(mask_figures(x[None], t, mask))
            fake = to_image(t.image[0] / 2 + 0.5)
            if measure:
                seen[source].append(TF.pil_to_tensor(real))
                seen[direction].append(TF.pil_to_tensor(fake))
            if save:
                new = Path(save, direction, name).with_suffix(".png")
                if new.exists():
                    raise BadInput(f"--save: two images of {folder} would both be {new}")
                write_whole(new, functools.partial(fake.save, format="PNG"))
        means = {k: torch.tensor([f[k] for f in figures]).nanmean().item() for k in figures[0]}
        results[direction] = {k: None if math.isnan(v) else v for k, v in means.items()}
    for direction in results if measure else ():
        results[direction] |= measure(seen[direction], seen[direction[-1]])
    return results


def print_table(results):
    print(f"{'':18}" + "".join(f"{name.replace('_', ' '):>18}" for name in next(iter(results.values()))))
    for key, figures in results.items():
        values = ("-" if v is None else f"{v:.0f}" if v >= 1000 else f"{v:.4f}" for v in figures.values())
        print(f"{dict(a2b='A -> B', b2a='B -> A').get(key, key):18}" + "".join(f"{v:>18}" for v in values))


def run(command, given):
    """The command line: `translate`, or `bench` and `evaluate`, their table printed and written to --json."""
    if command == "translate":
        return translate(**given)
    file = given.pop("json")
    if file and Path(file).exists() and not (Path(file).is_file() and Path(file).suffix == ".json"):
        raise BadInput(f"--json {file}: exists, and is no .json file")
    results = bench(check(configure(given, small=False))) if command == "bench" else evaluate(**given)
    print_table(results)
    if file:
        write_whole(Path(file), lambda out: out.write((json.dumps(results, indent=2) + "\n").encode()))
