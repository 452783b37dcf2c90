"""Tests of the scripts in data/. Run: pytest -q"""

import contextlib
import functools
import http.server
import importlib.util
import json
import re
import shlex
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
from test_aggan import CPU, ROOT, TINY, figures_of, folders, options
from test_aggan import pixels_of, seeded, tiny, trained

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
    end = pictures.place(1, figures_of(runs["scheme2"], "attention_ab")[-1])  # of its curve
    colour = ImageColor.getrgb(pictures.CURVES["attention_ab"])
    assert chart.getpixel((round(end[0]) - 1, round(end[1]))) == colour
    left = family.width - 6 * side  # the masks: CycleGAN's is white
    for top, white in ((16, False), (16 + side, True)):
        mask = family.crop((left + side, top, left + 2 * side - 2, top + side - 2)).convert("L")
        assert (mask.getextrema()[0] > 250) == white


def test_bench(tmp_path, capsys):
    names = ("width", "blocks", "masks", "size", "resize", "device")
    given = [str(x) for name in names for x in (aggan.flag(name), TINY[name])]
    given += ["--precision", "bf16", "--json", str(tmp_path / "b.json")]
    script("bench").main(given)
    results, said = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    assert list(results) == ["eager float32", "eager, bf16"]
    for name, row in results.items():
        assert name in said and all(v is None or v > 0 for v in row.values())
        assert row["pairs_a_second"] * row["ms_a_step"] == pytest.approx(1000)


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
    own = ["--a", str(folders / "trainA"), "--b", str(folders / "trainB")]
    measure.main(["photographs", *own, "--runs", str(tmp_path / "own"), "--seeds", "0"])
    trained = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| tiny \| `--width 4 .*` \| 0 \| 0\.\d\d \| 0\.\d\d \|", trained)
    assert len(list((tmp_path / "own").glob("*-scored/b2a/*.png"))) == 3  # for KID
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


def test_export(trained, tmp_path):
    """One direction as a program of its own, for images of any one size."""
    export, out, x = script("export"), tmp_path / "a2b.pt2", torch.rand(2, 3, 60, 44)
    export.main([str(trained), "--to", "b", "--out", str(out)])
    nets, config = aggan.load_generators(trained, CPU)
    image, mask = torch.export.load(out).module()(x)
    drawn, attention = export.any_size(nets["g_ab"], x * 2 - 1, config.resize)
    torch.testing.assert_close(image, drawn / 2 + 0.5, rtol=0, atol=1e-4)
    torch.testing.assert_close(mask, attention, rtol=0, atol=1e-4)
