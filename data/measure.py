"""Measures the course: python data/measure.py [TABLE ...]

Trains and evaluates what the tables of results.md compare, each row with several seeds, and prints
the tables in Markdown: means ± standard deviations of the figures of `evaluate`, or each seed's,
where their IoU differs by more than 0.1.

    python data/measure.py family objectives pieces
    python data/measure.py photographs --a trainA --b trainB --runs runs/photographs

Runs and their figures are kept in runs/measure; what is there is not done again. Two processes may
work side by side, each with seeds of its own (--seeds 0 and --seeds 1 2) and with one thread
(OMP_NUM_THREADS=1). A run takes three to four minutes. Of one's own images, which have no masks,
the mean attention is measured, and the translations are kept beside each run for KID and FID.
"""

import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aggan  # noqa: E402

TABLES = {
    "family": {
        "scheme2": "",
        "scheme1": "--model scheme1",
        "mejjati": "--model mejjati",
        "cyclegan": "--model cyclegan",
        "guided, pha": "--model guided",
        "guided, tam": "--model guided --attention-map tam",
    },
    "objectives": {
        "scheme2, final": "",
        "scheme2, released": "--objective released",
        "scheme2, CycleGAN's": "--objective released --curriculum none --l-copy 0",
        "scheme1, final": "--model scheme1",
        "scheme1, released": "--model scheme1 --objective released",
    },
    "pieces": {
        "the default": "",
        "r steps, as in the papers": "--curriculum papers",
        "r by the clock alone": "--curriculum ramp",
        "without cycle": "--l-cycle 0",
        "without pixel": "--l-pixel 0",
        "without TV": "--l-tv 0",
        "without attention-guided discriminators": "--l-paired 0",
        "without image pool": "--pool 0",
        "n = 2": "--masks 2",
        "transposed convolutions": "--upsample transposed",
        "the masks' last layer 1x1": "1x1",
    },
    "photographs": {
        "cyclegan": "--model cyclegan",
        "scheme1": "--model scheme1",
        "scheme2": "",
        "scheme2, released": "--objective released",
    },
}
FIGURES = "iou", "background_error", "foreground_change"


class OneByOne(aggan.SchemeTwoGenerator):
    """Scheme II with the last layer that the authors' release has."""

    def __init__(self, width=64, blocks=9, masks=10, **settings):
        super().__init__(width, blocks, masks, **settings)
        self.attention_decoder[-1] = nn.Conv2d(width, masks, 1)


def measure(options, seed, runs, train=True, folders=()):
    """-> what `evaluate` finds, of a run that is trained if it is not there yet.

    folders: options that name images; without, the drawings.
    """
    name = options.replace("--", "").replace(" ", "-") or "default"
    out, scheme2 = runs / f"{name}-{seed}", aggan.SchemeTwoGenerator
    figures = Path(f"{out}.json")  # with_suffix would cut what follows a dot
    if folders and (figures.exists() or (out / "checkpoint.pt").exists()):
        trained = aggan.load_checkpoint(out)["config"]
        if [os.path.abspath(folders[k]) for k in (1, 3)] != [trained.a, trained.b]:
            raise aggan.BadInput(f"{out}: a run of other images; name another folder, --runs")
    if figures.exists():
        return json.loads(figures.read_text())
    if not train:
        raise aggan.BadInput(f"{figures}: not there yet")

    small = ["--seed", str(seed), "--out", str(out), "--resume", "--device", "cpu"]
    changes = ["train", *options.replace("1x1", "").split(), *small, *folders]
    given = vars(aggan.make_parser().parse_args(changes))
    given.pop("command")
    try:
        if options == "1x1":
            aggan.SchemeTwoGenerator = OneByOne
        aggan.run_train(**given)
        scored = str(out) + "-scored" if folders else ""
        shutil.rmtree(scored, ignore_errors=True)  # of an evaluation that was stopped
        side = None if folders else 64  # the tables' scale, from before --resize was the default
        results = aggan.evaluate(out, save=scored, resize=side, device="cpu")
    finally:  # the next row has the usual one
        aggan.SchemeTwoGenerator = scheme2
    aggan.write_whole(figures, lambda file: file.write(json.dumps(results).encode()))
    return results


def cell(results, figure, way):
    """One figure of several seeds: its mean ± standard deviation, or, where they differ, each."""
    values = [result[way][figure] for result in results]
    found = [result[way]["iou"] or 0 for result in results]
    digits = {"iou": 3, "background_error": 4}.get(figure, 2)
    if max(found) - min(found) > 0.1 or len(values) == 1:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main(argv=None):
    parser = aggan.Parser(description=__doc__.splitlines()[0])
    drawings = [name for name in TABLES if name != "photographs"]
    parser.add_argument("tables", nargs="*", default=drawings, help=f"of {', '.join(TABLES)}")
    parser.add_argument("--a", help="images of domain A to train on, not the drawings")
    parser.add_argument("--b", help="images of domain B")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--runs", default="runs/measure", help="folder of the runs")
    parser.add_argument("--print", action="store_true", help="what is there, and train nothing")
    given, found = parser.parse_args(argv), {}
    for name in given.tables:
        if name not in TABLES or bool(given.a) != (name == "photographs"):
            parser.error(f"{name}: a table of {', '.join(TABLES)}; photographs needs --a and --b")
    if bool(given.a) != bool(given.b):
        parser.error("--a and --b go together: one folder for each domain")
    for name, folder in (("a", given.a), ("b", given.b)) if given.a else ():
        if not aggan.sibling(folder, "train", "test"):
            parser.error(f"--{name} {folder}: no test folder beside it, as testA beside trainA")
    folders = ["--a", given.a, "--b", given.b, "--small"] if given.a else []

    train, runs = not given.print, Path(given.runs)
    rows = {options: None for name in given.tables for options in TABLES[name].values()}
    for seed in given.seeds:
        for options in rows:
            try:
                found[options, seed] = measure(options, seed, runs, train, folders)
            except (aggan.BadInput, OSError) as error:
                if getattr(error, "status", 2) >= 128:  # stopped by a signal
                    parser.exit(error.status, f"{parser.prog}: {error}\n")
                aggan.say(error, file=sys.stderr)

    figures = ("mean_attention",) if given.a else FIGURES
    columns = [(figure, way) for figure in figures for way in ("a2b", "b2a")]
    for name in given.tables:
        heads = (f"{figure.replace('_', ' ')} {way}" for figure, way in columns)
        print(f"\n| {name} | option | seeds | {' | '.join(heads)} |")
        print("|" + "---|" * (len(columns) + 3))
        for row, options in TABLES[name].items():
            seeds = [seed for seed in given.seeds if (options, seed) in found]
            results = [found[options, seed] for seed in seeds]
            cells = (cell(results, *column) if results else "-" for column in columns)
            option = f"`{options}`" if options.startswith("--") else ""
            print(f"| {row} | {option} | {', '.join(map(str, seeds))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
