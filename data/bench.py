"""Times the training step: python data/bench.py [options of train] [--json FILE]

A row is a way to run `Trainer.step` as it is: in eager float32, in the chosen --precision, on CUDA
recorded as a graph, with --compile compiled too. Full settings, unless --small is given. Figures:

    ms_a_step, ms_spread   median and interquartile range over rounds, in which the rows take turns
    pairs_a_second         pairs of images, --batch-size a step
    peak_gib               CUDA: the most memory that building a trainer and its first steps took
    share                  of the rate at which one large matrix product runs in the row's precision
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aggan  # noqa: E402


def variants(config, cuda):
    plain = dataclasses.replace(config, precision="fp32", graph=False, compile=False)
    chosen = dataclasses.replace(plain, precision=config.precision)
    rows = {"eager float32": plain}
    if cuda or config.precision not in ("auto", "fp32"):
        rows[f"eager, {config.precision}"] = chosen
    if cuda and config.graph:
        rows["graph"] = dataclasses.replace(chosen, graph=True)
    if cuda and config.compile:
        rows["compiled"] = dataclasses.replace(chosen, graph=config.graph, compile=True)
    return rows


def median_seconds(statement, **names):
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.2).median


def bench(config, device, rounds=5):
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions may
    cuda = device.type == "cuda"
    shape = (config.batch_size, 3, config.size, config.size)
    images = [torch.rand(shape, device=device) * 2 - 1 for _ in "ab"]
    trainers, peaks, times = {}, {}, {}
    for row, changed in variants(config, cuda).items():
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainers[row], times[row] = aggan.Trainer(changed, 10**9, device), []
        for _ in range(5 if cuda else 1):  # compiles, records
            trainers[row].step(*images)
        peaks[row] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None

    for _ in range(rounds):
        for row, trainer in trainers.items():
            times[row].append(
                median_seconds("trainer.step(*images)", trainer=trainer, images=images)
            )
            trainer.rows = []  # a row of figures a step

    with FlopCounterMode(display=False) as counter:
        trainers["eager float32"].step(*images)
    results = {}
    for row, trainer in trainers.items():
        low, median, high = statistics.quantiles(times[row], n=4)
        n = 8192 if cuda else 1024
        a = torch.randn(n, n, device=device, dtype=trainer.dtype or torch.float32)
        share = counter.get_total_flops() / median / (2 * n**3 / median_seconds("a @ a", a=a))
        results[row] = {"ms_a_step": 1e3 * median, "ms_spread": 1e3 * (high - low)}
        pairs = config.batch_size / median
        results[row] |= {"pairs_a_second": pairs, "peak_gib": peaks[row], "share": share}
    return results


def main(argv=None):
    parser = aggan.Parser(description=__doc__.splitlines()[0])
    aggan.add_config_options(parser)
    parser.add_argument("--small", action="store_true", help="the settings of the drawings")
    parser.add_argument("--json", default="", help="file for the figures, too")
    given = vars(parser.parse_args(argv))
    file, small = given.pop("json"), given.pop("small")
    try:
        config = aggan.check(aggan.configure(given, small))
        device = aggan.pick_device(config.device)
    except aggan.BadInput as error:
        parser.error(str(error))

    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{config.model}, {config.size} px, batch {config.batch_size}, {where}")
    results = bench(config, device)
    aggan.print_table(results)
    if file:
        Path(file).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
