"""What `aggan.py bench` and `aggan.py evaluate --kid` run, loaded by aggan.py for them alone."""
import ctypes
import dataclasses
import os
import re
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from aggan import BadInput, Trainer, UnpairedImages, domain_folders, pick_device


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
