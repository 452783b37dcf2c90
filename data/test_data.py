"""Tests of the scripts in data/. Run: pytest -q"""

import contextlib
import functools
import html.parser
import http.server
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor

sys.path.insert(0, str(Path(__file__).parent.parent))
import aggan
from aggan import SchemeTwoGenerator
from test_aggan import CPU, ROOT, TINY, folders, options
from test_aggan import pixels_of, raising, seeded, tiny, trained

__all__ = ["folders", "seeded", "trained"]  # fixtures


def script(name):
    """NAME.py, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mini_set_is_what_its_script_draws(tmp_path):
    draw = script("draw")
    draw.draw_set(tmp_path / "first", train=1, test=1)
    draw.draw_set(tmp_path / "second", train=1, test=1)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 2 * (1 + 1 + 1)
    for file in files:
        first, second = (tmp_path / name / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        drawn, committed = pixels_of(first), pixels_of(aggan.DATA / file)
        assert drawn.shape == (3, 128, 128)
        assert (drawn - committed).abs().mean() < 0.01  # another Pillow may round otherwise
    for given, words in (("first", "first: has a folder trainA"), ("new --size 0", "at least 8")):
        line = [sys.executable, aggan.DATA / "draw.py", *given.split()]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1

    scenes = [draw.draw_scene("testA0", False, textured=kind) for kind in (False, True, True)]
    (plain, mask), (textured, same_mask), (again, _) = scenes
    assert textured.tobytes() == again.tobytes() and mask.tobytes() == same_mask.tobytes()
    assert (aggan.to_tensor(plain) - aggan.to_tensor(textured)).abs().mean() > 0.1
    for domain in "AB":
        images, masks = (aggan.list_images(aggan.DATA / (k + domain)) for k in ("test", "masks"))
        assert [p.stem for p in images] == [p.stem for p in masks] and len(images) == 60
        assert len(aggan.list_images(aggan.DATA / ("train" + domain))) == 300
        area = torch.stack([pixels_of(path) for path in masks]).gt(0).float().mean()
        assert 0.05 < area < 0.3


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine; its folder and its address. It breaks off in the maps."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def copyfile(self, source, target):
            content = source.read()
            target.write(content[: len(content) // 2] if "maps" in self.path else content)

    monkeypatch.setenv("no_proxy", "*")
    root = tmp_path / "server"
    root.mkdir()
    handler = functools.partial(Handler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield root, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_download(folders, server, capsys):
    (root, host), here, download = server, folders / "my data", script("download")
    parts = ("trainA", "trainB", "testA", "testB")

    def get(name, *more, fails=""):
        with pytest.raises(SystemExit) if fails else contextlib.nullcontext() as stopped:
            download.main([name, "--folder", str(here), "--host", host, *more])
        output = capsys.readouterr()
        assert not fails or stopped.value.code == 2 and fails in output.err.splitlines()[-1]
        return output.out

    def archive(name, parts):
        with zipfile.ZipFile(root / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for part in parts:
                for image in sorted((folders / part).iterdir()):
                    file.write(image, f"{name}/{part}/{image.name}")
        return root / f"{name}.zip"

    archive("horse2zebra", parts)
    said = get("horse2zebra").split("aggan.py ")[1]
    for part in parts:
        for image in (folders / part).iterdir():
            copy = here / "horse2zebra" / part / image.name
            assert copy.read_bytes() == image.read_bytes()
    a, b = shlex.split(said)[2::2]
    aggan.main([*shlex.split(said), *options(folders, a=a, b=b, steps=1)])
    (here / "horse2zebra" / "mine.txt").write_text("kept")
    get("horse2zebra", fails="exists already")
    archive("apple2orange", parts[:3])
    get("apple2orange", fails="has no testB")
    whole = archive("facades", parts).read_bytes()
    for place in range(50, len(whole) - 1, len(whole) // 10):  # in contents, in the list of files
        damaged = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        (root / "facades.zip").write_bytes(damaged)
        get("facades", fails="facades.zip: ")
    archive("maps", parts)
    get("maps", fails="maps.zip: did not arrive whole")
    get("monet2photo", fails="monet2photo.zip: not downloaded (HTTP Error 404")
    get("cats2dogs", fails="invalid choice: 'cats2dogs' (choose from")
    get("ukiyoe2photo", "--host", "http://127.0.0.1:9", fails="ukiyoe2photo.zip: not downloaded (")
    assert [p.name for p in here.iterdir()] == ["horse2zebra"]
    assert (here / "horse2zebra" / "mine.txt").read_text() == "kept"
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|.* [GM]B \|$", text, re.M)) == set(download.SETS)


def test_pictures(folders):
    pytest.importorskip("matplotlib")
    pictures, length = script("pictures"), dict(steps=2, log_every=1)
    runs = {
        model: aggan.train(tiny(folders, model=model, out=str(folders / model), **length))
        for model in ("scheme2", "cyclegan")
    }
    pictures.draw(runs, folders, steps=(0, 2))
    side = 2 * 36 + 2  # tiles at twice the size
    strip, family, attention, chart = (
        Image.open(folders / f"{name}.png").convert("RGB")
        for name in ("strip", "family", "attention", "chart")
    )
    assert strip.size == (8 * side, 16 + 2 * side) and family.height == 16 + 2 * side
    assert attention.size == (3 * 38, 16 + 2 * 38)
    grid = Image.open(runs["scheme2"] / "samples" / "0000002.png").convert("RGB")
    tile = grid.crop((2, 2, 38, 38)).resize((72, 72), Image.Resampling.BICUBIC)
    drawn = strip.crop((0, 16, 72, 88))  # quantised to 256 colours
    assert (aggan.to_tensor(tile) - aggan.to_tensor(drawn)).abs().mean() < 0.1
    found = {colour for _, colour in chart.getcolors(10**6)}
    assert {ImageColor.getrgb(colour) for colour in pictures.page.COLOURS[:4]} <= found  # curves
    large = Image.open(folders / "large.png")
    assert large.size == (3 * 514, 16 + 2 * 514)
    left = family.width - 6 * side  # the masks: CycleGAN's is white
    for top, white in ((16, False), (16 + side, True)):
        mask = family.crop((left + side, top, left + 2 * side - 2, top + side - 2)).convert("L")
        assert (mask.getextrema()[0] > 250) == white


def test_bench(tmp_path, capsys, monkeypatch):
    names = ("width", "blocks", "masks", "size", "resize", "device")
    given = [str(x) for name in names for x in (aggan.flag(name), TINY[name])]
    given += ["--precision", "bf16", "--json", str(tmp_path / "b.json")]
    script("bench").main(given)
    results, said = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    assert list(results) == ["eager float32", "eager, bf16"]
    for name, row in results.items():
        assert name in said and all(v is None or v > 0 for v in row.values())
        assert row["pairs_a_second"] * row["ms_a_step"] == pytest.approx(1000)
    (tmp_path / "b.json").rename(tmp_path / "notes.txt")
    given[-1] = str(tmp_path / "notes.txt")
    with pytest.raises(SystemExit, match="2"):
        script("bench").main(given)
    assert "notes.txt: exists" in capsys.readouterr().err
    bench = script("bench")
    for error, status in ((MemoryError(), 2), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(bench, "bench", raising(error))
        with pytest.raises(SystemExit, match=str(status)):
            bench.main(given[:-2])
        assert capsys.readouterr().err.count("\n") == 1


def test_measure(folders, tmp_path, capsys, monkeypatch):
    measure, row = script("measure"), {"tiny": "--width 4 --blocks 1 --steps 1"}
    monkeypatch.setattr(measure, "TABLES", {"short": row, "photographs": row})
    given = ["--runs", str(tmp_path), "--seeds", "0"]
    measure.main(given)
    trained = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| tiny \| `--width 4 .*` \| 0 \| 0\.\d{3} \| 0\.\d{3} \|.*", trained)
    measure.main([*given, "--print"])
    assert capsys.readouterr().out.splitlines()[-1] == trained  # it is there
    measure.main(["--runs", str(tmp_path / "none"), "--seeds", "0", "--print"])
    assert "none" in capsys.readouterr().err  # it is not
    (folders / "link").symlink_to(folders)
    own = ["--a", str(folders / "link" / "trainA"), "--b", str(folders / "link" / "trainB")]
    own = ["photographs", *own, "--runs", str(tmp_path / "own"), "--seeds", "0"]
    measure.main(own)
    trained = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| tiny \| `--width 4 .*` \| 0 \| 0\.\d\d \| 0\.\d\d \|", trained)
    assert len(list((tmp_path / "own").glob("*-scored/b2a/*.png"))) == 3  # for KID
    measure.main([*own, "--print"])
    assert capsys.readouterr().out.splitlines()[-1] == trained
    (folders / "testB").rename(folders / "notes")
    with pytest.raises(SystemExit, match="2"):
        measure.main(own)
    assert "trainB: no test folder beside it" in capsys.readouterr().err
    (folders / "notes").rename(folders / "testB")
    shutil.copytree(folders, tmp_path / "others", ignore=shutil.ignore_patterns("own", "link"))
    next((tmp_path / "own").glob("*.json")).unlink()  # no figures, as if evaluation was stopped
    own[2], own[4] = (str(tmp_path / "others" / f"train{domain}") for domain in "AB")
    measure.main(own)
    assert "a run of other images" in capsys.readouterr().err
    (tmp_path / "1x1-0").write_text("not a run folder")
    with pytest.raises(aggan.BadInput):
        measure.measure("1x1", 0, tmp_path)
    assert aggan.SchemeTwoGenerator is SchemeTwoGenerator  # no other row has its last layer
    figures = [
        {"a2b": dict(iou=iou, background_error=0.01, foreground_change=0.2)}
        for iou in (0.5, 0.6, 0.9)
    ]
    assert measure.cell(figures[:2], "iou", "a2b") == "0.550 ± 0.071"  # sqrt(2 x 0.05^2)
    assert measure.cell(figures, "iou", "a2b") == "0.500, 0.600, 0.900"
    assert measure.cell(figures, "background_error", "a2b") == "0.0100, 0.0100, 0.0100"


class Page(html.parser.HTMLParser):
    """A page's text, and its elements: their tag and attributes. All that opens is closed."""

    def __init__(self, path):
        super().__init__()
        self.text, self.elements, self.open = "", [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def test_page(folders, capsys):
    pytest.importorskip("matplotlib")
    page, other = script("page"), folders / "run <2>"
    run = aggan.train(tiny(folders, steps=4))
    aggan.train(tiny(folders, steps=2, objective="released", out=str(other)))
    header, first, _ = (run / "log.csv").read_text().splitlines()
    (run / "log.csv").write_text(f"{header}\n{first}\n4,1,nan{first[first.index(',', 8) :]}\n6,1,7")
    found = dict(iou=0.8765, background_error=None)
    (folders / "run.json").write_text(json.dumps({"a2b": found, "b2a": found}))

    page.main([str(run)])
    shown = Page(folders / "run.html")
    columns = header.split(",")[2:]
    assert page.read_log(run / "log.csv")["step"] == [2, 4]  # not the half row
    assert shown.all("data-step") == ["2", "4"] and shown.all("data-steps") == ["[2, 4]"]
    charted = [alt for alt in shown.all("alt") if not alt.startswith("step")]
    assert sorted(", ".join(charted).split(", ")) == sorted(columns)  # each once
    for words in ("step 4 of 4", "0.8765", "--blocks", "translation", "Masks and r", "Others"):
        assert words in shown.text
    assert all(source.startswith("data:image/") for source in shown.all("src"))  # offline
    assert "reload" not in shown.text

    # several runs, of other columns, and one that has just begun
    (folders / "new" / "samples").mkdir(parents=True)
    out = folders / "all.html"
    page.main([*map(str, (run, other, folders / "new")), "--out", str(out)])
    shown = Page(out)
    assert shown.all("data-step") == ["2", "4", "2"] and shown.all("data-steps") == ["[2, 4]"]
    charted = [alt for alt in shown.all("alt") if not alt.startswith("step")]
    assert sorted(", ".join(charted).split(", ")) == sorted([*columns, "identity"])
    assert "run <2>" in shown.text and "no sample grid yet" in shown.text
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.pt", "log.csv", "samples"]

    capsys.readouterr()
    for given, words in (([folders], "no run folder"), ([run, "--out", run], "end in .html")):
        with pytest.raises(SystemExit) as stopped:
            page.main([*map(str, given)])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and words in error


def test_page_follows_a_run(trained, monkeypatch):
    page, seen = script("page"), []
    monkeypatch.setattr(page, "draw_charts", lambda logs: "")  # a second each time
    out, grid = trained.with_name("run.html"), trained / "samples" / "0000001.png"
    later = trained.rename(trained.with_name("later"))

    def look(_seconds):
        if later.exists():  # the run has no folder yet
            assert not out.exists()
            later.rename(trained)
            return
        seen.append((out.stat().st_mtime_ns, Page(out)))
        if len(seen) == 2:
            shutil.copy(grid, grid.with_name("0000009.png"))
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(page.time, "sleep", look)
    page.main([str(trained), "--watch"])
    assert seen[0][0] == seen[1][0] < seen[2][0]  # written where something has changed
    assert [shown.all("data-step") for _, shown in seen] == [["1"], ["1"], ["1", "9"]]
    assert all("location.reload()" in shown.text for _, shown in seen)
    assert "location.reload()" not in out.read_text()  # at the end


@pytest.mark.parametrize("name, model", [("a2b.pt2", "guided"), ("a2b.onnx", "scheme2")])
def test_export(folders, name, model):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    export, file = script("export"), folders / name
    run = aggan.train(tiny(folders, model=model, steps=1, blocks=0))
    export.main([str(run), "--to", "b", "--out", str(file)])
    if name.endswith(".onnx"):
        session = runtime.InferenceSession(file)
        outside = lambda x: map(torch.from_numpy, session.run(None, {"image": x.numpy()}))  # noqa
    else:
        outside = torch.export.load(file).module()

    generator, largest = aggan.load_generators(run, CPU)[0]["g_ab"], 0
    here = export.OneWay(generator, TINY["resize"])
    for batch, height, width in ((1, 36, 36), (4, 75, 101), (2, 20, 64)):
        image = torch.rand(batch, 3, height, width)
        (translation, mask), expected = outside(image), here(image)
        assert mask.shape == (batch, 1, height, width) and not translation.requires_grad
        for x, y in zip((translation, mask), expected):
            assert 0 <= x.min() and x.max() <= 1
            largest = max(largest, (x - y).abs().max().item())
        if height == 36:  # the generator's own scale
            t = generator(image * 2 - 1)
            torch.testing.assert_close(translation, (t.image / 2 + 0.5).clamp(0, 1))
            torch.testing.assert_close(mask, t.foreground)
    picture = aggan.TF.to_pil_image(torch.rand(3, 50, 75))  # seen as 36 x 54, padded to 36 x 56
    exported = here(aggan.TF.to_tensor(picture)[None])
    for x, y in zip(exported, aggan.translate_image(generator, picture, TINY["resize"], CPU)):
        assert (x[0] - aggan.TF.to_tensor(y)).abs().mean() < 0.01  # rounded to 8 bits
    print(f"{name}, {model}: at most {largest:.1e} from PyTorch")
    assert largest < 1e-4


def test_export_refuses(trained, capsys, monkeypatch):
    export = script("export")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for run, name, words in (
        (trained, "a2b.onnx", "pip install onnx onnxscript"),
        (trained, "a2b.pth", "must end in .onnx or .pt2"),
        (trained / "samples", "a2b.pt2", "no checkpoint.pt"),
    ):
        with pytest.raises(SystemExit) as stopped:
            export.main([str(run), "--to", "b", "--out", str(trained / name)])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and words in error
        assert not (trained / name).exists()
