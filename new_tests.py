"""To merge into test_aggan.py: tests of data/page.py and data/export.py, and test_pictures anew."""

import html.parser

from test_aggan import *  # noqa: F403
from test_aggan import seeded  # noqa: F401


def test_pictures(folders):
    pytest.importorskip("matplotlib")
    pictures, length = script("pictures"), dict(steps=2, log_every=1)
    runs = {
        model: aggan.train(tiny(folders, model=model, out=str(folders / model), **length))
        for model in ("scheme2", "cyclegan")
    }
    pictures.draw(runs, folders, steps=(0, 2))
    side = 2 * 32 + 2  # tiles at twice the size
    strip, family, attention, chart = (
        Image.open(folders / f"{name}.png").convert("RGB")
        for name in ("strip", "family", "attention", "chart")
    )
    assert strip.size == (8 * side, 16 + 2 * side) and family.height == 16 + 2 * side
    assert attention.size == (3 * 34, 16 + 2 * 34)
    grid = Image.open(runs["scheme2"] / "samples" / "0000002.png").convert("RGB")
    tile = grid.crop((2, 2, 34, 34)).resize((64, 64), Image.Resampling.BICUBIC)
    drawn = strip.crop((0, 16, 64, 80))  # quantised to 256 colours
    assert (aggan.to_tensor(tile) - aggan.to_tensor(drawn)).abs().mean() < 0.1
    found = {colour for _, colour in chart.getcolors(10**6)}
    assert {ImageColor.getrgb(colour) for colour in pictures.page.COLOURS[:4]} <= found  # curves
    left = family.width - 6 * side  # the masks: CycleGAN's is white
    masks = [
        family.crop((left + side, top, left + 2 * side - 2, top + side - 2)).convert("L")
        for top in (16, 16 + side)
    ]
    assert masks[0].getextrema()[0] < 250 and masks[1].getextrema()[0] > 250


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
    (run / "log.csv").write_text(f"{header}\n{first}\n4,1,nan{first[first.index(',', 8):]}\n6,1,7")
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

    def look(_seconds):
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
    here = export.OneWay(generator, TINY["size"])
    for batch, height, width in ((1, 32, 32), (4, 75, 101), (2, 20, 64)):
        image = torch.rand(batch, 3, height, width)
        (translation, mask), expected = outside(image), here(image)
        assert mask.shape == (batch, 1, height, width) and not translation.requires_grad
        for x, y in zip((translation, mask), expected):
            assert 0 <= x.min() and x.max() <= 1
            largest = max(largest, (x - y).abs().max().item())
        if height == 32:  # the generator's own scale
            t = generator(image * 2 - 1)
            torch.testing.assert_close(translation, (t.image / 2 + 0.5).clamp(0, 1))
            torch.testing.assert_close(mask, t.foreground)
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
