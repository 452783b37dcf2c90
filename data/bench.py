"""Times the training step: python data/bench.py [options of train] [--small] [--json FILE]

`Trainer.step` runs as it is, on random images, with `final`, full sizes or (--small) the drawings'.
Columns: in eager float32; in --precision; on CUDA as a graph, and with --compile, for comparison,
with networks that torch.compile made (which takes minutes). Rows:

    ms_a_step, ms_spread   median and interquartile range; the columns take turns
    pairs_a_second         pairs of images, --batch-size a step
    peak_gib               CUDA: the most memory that building a trainer and its first steps took
    share                  of the rate at which one large matrix product runs in the same precision
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aggan  # noqa: E402


def variants(config, cuda, compiled):
    """-> names of columns, configurations, whether to compile."""
    plain = replace(config, precision="fp32", graph=False)
    chosen = replace(plain, precision=config.precision)
    yield "eager float32", plain, False
    if config.precision != "fp32" and (cuda or config.precision != "auto"):
        yield f"eager, {config.precision}", chosen, False
    if cuda and config.graph:
        yield "graph", config, False
    if compiled:
        yield "graph+compile" if cuda and config.graph else "compile", config, True


def start(config, images, compiled):
    """-> a trainer past its first steps, and on CUDA the most memory that it took, in GiB."""
    if images.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trainer = aggan.Trainer(config, 10**9, images.device)
    if compiled:
        g_ab, g_ba, d_a, d_b = trainer.nets.values()
        for net in (g_ab, g_ba, *d_a.values(), *d_b.values()):
            net.compile(dynamic=False)
    for _ in range(5 if images.is_cuda else 1):  # compiles, records
        trainer.step(*images)
    return trainer, (torch.cuda.max_memory_allocated() - before) / 2**30 if images.is_cuda else None


def timed(statement, **names):
    return Timer(statement, globals=names, num_threads=torch.get_num_threads()).blocked_autorange()


def bench(config, device, compiled=False, rounds=5):
    """-> {column: {row: figure}}; None where it is not measured."""
    images = torch.rand((2, config.batch_size, 3, config.size, config.size), device=device) * 2 - 1
    chosen = variants(config, images.is_cuda, compiled)
    columns = {name: start(c, images, compiled) for name, c, compiled in chosen}

    with FlopCounterMode(display=False) as counter:
        columns["eager float32"][0].step(*images)
    flop = counter.get_total_flops()
    what = f"{config.model}, {config.objective}, {config.size} px, batch {config.batch_size}"
    where = torch.cuda.get_device_name() if images.is_cuda else device.type
    aggan.say(f"{what}, {where}, PyTorch {torch.__version__}, {flop / 1e12:.3g} TFLOP a step")

    times = {name: [] for name in columns}
    for _ in range(rounds):
        for name, (trainer, _) in columns.items():
            times[name].append(timed("trainer.step(*images)", trainer=trainer, images=images))

    results, n = {}, 8192 if images.is_cuda else 1024
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions may
    for name, (trainer, peak) in columns.items():
        step, a = Measurement.merge(times[name])[0], torch.randn(n, n, device=device)
        product = timed("a @ a", a=a.to(trainer.dtype or torch.float32))
        results[name] = {"ms_a_step": 1e3 * step.median, "ms_spread": 1e3 * step.iqr}
        results[name] |= {"pairs_a_second": config.batch_size / step.median, "peak_gib": peak}
        results[name]["share"] = flop / step.median / (2 * n**3 / product.median)
    return results


def main(argv=None):
    parser = aggan.Parser(description=__doc__.splitlines()[0])
    aggan.add_config_options(parser)
    parser.add_argument("--small", action="store_true", help="the sizes of the drawings")
    parser.add_argument("--compile", action="store_true", help="a compiled column too")
    parser.add_argument("--json", default="", help="file for the figures, too")
    given = vars(parser.parse_args(argv))
    file, small, compiled = given.pop("json"), given.pop("small"), given.pop("compile")
    if file and Path(file).exists() and not Path(file).match("*.json"):
        parser.error(f"--json {file}: exists, and is no .json file")
    try:
        config = aggan.check(aggan.configure(given, small))
        results = bench(config, aggan.pick_device(config.device), compiled)
        aggan.print_table(results)
        text = json.dumps(results, indent=2) + "\n"
        if file:
            aggan.write_whole(Path(file), lambda out: out.write(text.encode()))
    except aggan.BadInput as error:
        parser.exit(error.status, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except (MemoryError, RuntimeError) as error:
        known = re.search("out of memory|t allocate memory|32-bit index", str(error))
        if not known and not isinstance(error, MemoryError):  # which says nothing; as aggan.main
            raise
        why = aggan.brief(error)
        parser.error(f"out of memory: a smaller --batch-size, --size or --width ({why})")


if __name__ == "__main__":
    main()
