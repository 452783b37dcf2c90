"""Shows runs as one web page: python data/page.py runs/NAME [runs/OTHER ...] [--watch]

Writes runs/NAME.html, beside the run: one file, offline, with the sample grids under a slider over
the steps, the figures of `evaluate`, the curves of log.csv and the configuration. Of several runs
grids stand side by side, and curves in one chart. --watch: the page is written anew as the runs go
on, and a browser that shows it follows. Needs matplotlib. The figures are those of runs/NAME.json:

    python aggan.py evaluate runs/NAME --json runs/NAME.json
"""

import base64
import functools
import io
import json
import math
import os
import sys
import time
from html import escape
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import aggan  # noqa: E402

CHARTS = {  # a chart for columns that are read together
    "Masks and r": ("attention_ab attention_ba", "r_ab r_ba"),
    "Adversarial": ("gan copy", "d_gan d_copy", "paired d_paired"),
    "Keeping": ("cycle", "pixel", "identity", "tv"),
}
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
STYLES = "-", "--", ":", "-."
PANELS = "input", "attention", "content", "translation"
SECONDS = 10  # between looks: of --watch at the runs, of the browser at the page
MOST = 60     # grids of a run, evenly spread, so that a browser can hold the page

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 1em 2em 4em }
h2 { font-size: 1.1em; margin: 2em 0 .3em }  p, figure { margin: 0 }
img { display: block; width: 100%; height: auto }  [hidden] { display: none }
.slider { position: sticky; top: 0; background: white; padding: .5em 0 }
.slider input { width: 100%; max-width: 1060px; margin: 0 }
.runs { display: flex; flex-wrap: wrap; gap: 1em 2em }
.runs figure { flex: 1 1 540px; max-width: 1060px }
.panels { display: grid; grid-template-columns: repeat(8, 1fr); text-align: center }
.panels b { grid-column: span 4 }  .panels span { font-size: 12px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)) }
table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; padding: 1px 2em 1px 0; overflow-wrap: anywhere }
"""
SLIDER = """
const slider = document.querySelector("input"), steps = JSON.parse(slider.dataset.steps)
const place = steps.indexOf(Number(location.hash.slice(1)))
slider.value = place < 0 ? slider.max : place
slider.oninput = () => {  // of each run its last grid up to this step
  for (const run of document.querySelectorAll("figure")) {
    const grids = [...run.querySelectorAll("img")]
    if (!grids.length) continue
    const shown = grids.filter(grid => grid.dataset.step <= steps[slider.value]).pop() ?? grids[0]
    for (const grid of grids) grid.hidden = grid != shown
    run.querySelector("output").value = "(shown: step " + shown.dataset.step + ")"
  }
}
slider.onchange = () => {  // the address keeps the step; at the end, new grids are to follow
  location.replace("#" + (slider.value == slider.max ? "last" : steps[slider.value]))
}
slider.oninput()
"""
FOLLOW = """
let timer
const wait = () => { clearTimeout(timer); timer = setTimeout(() => location.reload(), 1000 * N) }
document.oninput = wait  // not while the slider moves
wait()
""".replace("N", str(SECONDS))


def files(folder: Path) -> dict[Path, int]:
    """log.csv, checkpoint.pt, samples, RUN.json -> when each was changed; 0: it is not there."""
    paths = [folder / name for name in ("log.csv", "checkpoint.pt", "samples")]
    paths.append(folder.parent / f"{folder.name}.json")
    return {path: path.stat().st_mtime_ns if path.exists() else 0 for path in paths}


def read_log(path) -> dict[str, list[float]]:
    """A log.csv by column, without a row that is not written to its end. ValueError."""
    names, *rows = [line.split(",") for line in Path(path).read_text().split("\n")[:-1]] or [[]]
    rows = [row for row in rows if len(row) == len(names)]
    if names[:1] not in ([], ["step"]):
        raise ValueError("not a log of train")
    return {name: [float(row[k]) for row in rows] for k, name in enumerate(names)}


@functools.lru_cache
def read_checkpoint(path, _changed) -> tuple[dict, int]:
    """-> configuration, steps; once for each change, as it may have 400 MB."""
    state = aggan.load_checkpoint(path)
    return vars(state["config"]), state["total"]


class Run:
    """What there is of a run yet. BadInput where it is none, or a file is not what it should be."""

    def __init__(self, folder: Path):
        (log, checkpoint, _, figures), times = files(folder), [*files(folder).values()]
        if not any(times[:3]):
            raise aggan.BadInput(f"{folder}: no run folder: no log.csv, checkpoint.pt, samples")
        try:
            self.log = read_log(log) if times[0] else {}
            found = json.loads(figures.read_text()) if times[3] else {}
            self.figures = {way: dict(found[way]) for way in ("a2b", "b2a") if way in found}
        except (ValueError, TypeError) as error:
            raise aggan.BadInput(f"{log} or {figures}: {error}") from None
        self.settings, self.total = read_checkpoint(checkpoint, times[1]) if times[1] else ({}, 0)

        # sample grids by step; of many every second, third, ... to the last
        paths = sorted(path for path in folder.glob("samples/*.png") if path.stem.isdecimal())
        every = math.ceil(len(paths) / MOST) or 1
        self.grids = {int(path.stem): path for path in sorted(paths[::-every])}


@functools.lru_cache(maxsize=None)
def embed_grid(path, step, _changed) -> str:
    """A sample grid as an element of the page; as WebP it has a fifth of the PNG's bytes."""
    with Image.open(path) as image, io.BytesIO() as file:
        image.save(file, "WEBP", quality=90)
        size = f'width="{image.width}" height="{image.height}"'
        return embed("webp", file.getvalue(), f'data-step="{step}" {size} alt="step {step}"')


def embed(kind, data: bytes, attributes) -> str:
    return f'<img {attributes} src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def chart(logs, columns, size=(4.2, 2.5)):
    """Columns of logs, {run: {column: values}}, over the steps -> a matplotlib Figure.

    A colour for each column; of several runs a colour for each run, a style for each column.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise aggan.BadInput("charts need one more package: pip install matplotlib") from None
    figure, several = Figure(size, layout="constrained"), len(logs) > 1
    axes = figure.subplots()
    for k, name in enumerate(columns):
        style, colour = (STYLES[k % 4], "gray") if several else ("-", COLOURS[k % 6])
        axes.plot([], [], style, color=colour, label=name)
        for n, log in enumerate(logs.values()):
            if name in log:
                own = COLOURS[n % 6] if several else colour
                marker = "." if len(log[name]) == 1 else ""  # no line to see yet
                axes.plot(log["step"], log[name], style, color=own, marker=marker)
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(columns), frameon=False)
    return figure


def draw_charts(logs) -> str:
    """Every column but step and epoch; what CHARTS does not name comes last."""
    columns = dict.fromkeys(name for log in logs.values() for name in log)
    named = " ".join(["step epoch", *sum(CHARTS.values(), ())]).split()
    groups = {**CHARTS, "Others": [name for name in columns if name not in named]}
    lines = []
    for title, group in groups.items():
        shown = [[name for name in names.split() if name in columns] for names in group]
        if any(shown):
            lines += [f"<h2>{title}</h2>", '<div class="charts">']
            for names in filter(None, shown):
                file = io.BytesIO()
                chart(logs, names).savefig(file, format="svg")
                attributes = f'alt="{escape(", ".join(names))}"'
                lines.append(embed("svg+xml", file.getvalue(), attributes))
            lines.append("</div>")
    return "\n".join(lines)


def draw_grids(runs) -> str:
    """The sample grids of all runs under one slider."""
    lines, steps = ['<div class="runs">'], sorted({k for run in runs.values() for k in run.grids})
    titles = "<b>A → B</b><b>B → A</b>" + "".join(f"<span>{name}</span>" for name in PANELS * 2)
    for n, (name, run) in enumerate(runs.items()):
        colour = COLOURS[n % 6] if len(runs) > 1 else "inherit"
        done = f"{(run.log.get('step') or [0])[-1]:.0f}" + (f" of {run.total}" if run.total else "")
        lines.append(f'<figure><b style="color: {colour}">{escape(name)}</b>, step {done}')
        shown = f'<output></output><div class="panels">{titles}</div>'
        lines.append(shown if run.grids else "(no sample grid yet)")
        for step, path in run.grids.items():
            lines.append(embed_grid(path, step, path.stat().st_mtime_ns))
        lines.append("</figure>")
    lines.append("</div>")
    if steps:
        slider = f'type="range" max="{len(steps) - 1}" data-steps="{steps}" autocomplete="off"'
        lines.insert(0, f'<div class="slider"><input {slider} aria-label="step"></div>')
        lines.append(f"<script>{SLIDER}</script>")
    return "\n".join(lines)


def table(head, rows) -> str:
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{escape(str(x))}</{tag}>" for x in row) for tag, row in lines)
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "\n</table>"


def list_figures(runs) -> str:
    """What `evaluate` measured, a column for each run and direction."""
    columns = {(name, way): f for name, run in runs.items() for way, f in run.figures.items()}
    rows = []
    for figure in dict.fromkeys(figure for figures in columns.values() for figure in figures):
        values = [figures.get(figure) for figures in columns.values()]
        cells = (f"{x:.4f}" if isinstance(x, float) else "-" if x is None else x for x in values)
        rows.append([figure, *cells])
    head = ["", *(f"{name}, {way}" for name, way in columns)]
    return "<h2>Measured by evaluate</h2>\n" + table(head, rows) if rows else ""


def list_settings(runs) -> str:
    """The configurations: options that are not as by default, and, folded, the others."""
    known = {name: run.settings for name, run in runs.items() if run.settings}
    if not known:
        return "<h2>Configuration</h2>\n<p>Known from the first checkpoint on.</p>"
    rows = {True: [], False: []}
    for name, default in vars(aggan.Config()).items():
        values = [settings[name] for settings in known.values()]
        changed = any(value != default for value in values)
        rows[changed].append([aggan.flag(name), *values, default])
    first, others = (table(["", *known, "default"], rows[changed]) for changed in (True, False))
    folded = f"<details><summary>as by default</summary>\n{others}\n</details>"
    return f"<h2>Configuration</h2>\n{first}\n{folded}"


def write(folders, out: Path, follow=False):
    """The page of the runs in folders, {name: path}. follow: it loads itself again. BadInput."""
    runs = {name: Run(folder) for name, folder in folders.items()}
    lines = ['<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">']
    lines.append(f"<title>{escape(', '.join(runs))}</title>\n<style>{CSS}</style>")
    lines += [draw_grids(runs), list_figures(runs)]
    lines += [draw_charts({name: run.log for name, run in runs.items()}), list_settings(runs)]
    lines.append(f"<script>{FOLLOW}</script>\n</html>" if follow else "</html>")
    aggan.write_whole(out, lambda file: file.write("\n".join(lines).encode()))


def watch(folders, out: Path):
    """Writes the page whenever a file that it shows has changed, until Ctrl-C."""
    seen = None
    try:
        while True:
            found = [files(folder) for folder in folders.values()]
            there = all(any([*times.values()][:3]) for times in found)  # a run's come late
            if found != seen and there:
                write(folders, out, follow=True)
            seen = found
            time.sleep(SECONDS)
    except KeyboardInterrupt:
        write(folders, out)


def main(argv=None):
    parser = aggan.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--watch", action="store_true", help="follow the runs, until Ctrl-C")
    parser.add_argument("--out", default="", help="the page; default: RUN.html beside the run")
    given = parser.parse_args(argv)
    paths = [Path(os.path.abspath(run)) for run in given.runs]
    names = [path.name for path in paths]
    folders = dict(zip(names if len(set(names)) == len(names) else given.runs, paths))
    out = Path(given.out or paths[0].parent / ("+".join(names) + ".html"))
    if out.suffix != ".html":
        parser.error(f"--out {out}: must end in .html")
    try:
        aggan.say(out)
        watch(folders, out) if given.watch else write(folders, out)
    except (aggan.BadInput, OSError) as error:
        parser.exit(getattr(error, "status", 2), f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
