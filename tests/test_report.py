"""The report: what was written is read again, two protocols stay apart, and a browser shows the page whole."""

import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import matplotlib.image
import numpy as np
import pytest
from conftest import VOCAB, finish, recipe, shrink, start
from etils import epath

from contrastive_jax import report, train
from contrastive_jax.data import tokenizer
from contrastive_jax.evals import projection
from contrastive_jax.reporting import figures, written

SECTIONS = ("histogram", "matrix", "map", "neighbours")
DOMAINS = ["<b>&amp;", "two\twords"]
DIRECTIONS = ("query_to_key", "key_to_query", "mean")


def write_result(path: pathlib.Path, stamp: str, task: str = "query_key", top1: object = 0.25, **protocol: object) -> str:
    rows: dict = {name: {"top1": top1, "mrr": 0.5} for name in ("chance", "step 4")}
    if task == "query_key":
        rows = {name: {direction: found for direction in DIRECTIONS} for name, found in rows.items()}
    said = {"model": str(path), "step": 4, "pooling": "mean"} | protocol
    path.write_text(json.dumps({"task": task, "protocol": said, "protocol_hash": stamp, "results": rows}))
    return str(path)


def write_run(folder: pathlib.Path, lines: str, data: str = "absent") -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"data": {"dir": data}}))
    (folder / "metrics.jsonl").write_text(lines)
    return str(folder)


def svgs(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


@pytest.fixture(scope="module")
def run(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a trained run, evaluated; its domains have names that HTML and tables would take for their own."""
    root = tmp_path_factory.mktemp("report")
    data, workdir = root / "data", root / "run"
    shutil.copytree(dataset, data)
    syllables = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
    words = [a + b for a in syllables for b in syllables]
    rng = np.random.default_rng(0)
    trained = tokenizer.train([" ".join(rng.choice(words, 100)) for _ in range(50)], VOCAB)
    (data / tokenizer.Tokenizer.file).write_bytes(trained.model)
    with np.load(data / "index-validation.npz") as index:
        np.savez(data / "index-validation.npz", **dict(index) | {"domains": np.array(DOMAINS)})
    config = shrink(recipe("debug"), data)
    config.eval_every = 2
    train.loop(train.set_up(config, epath.Path(workdir)), config.steps)
    write_result(workdir / "query_key.json", "1" * 16)
    return workdir


@pytest.fixture(scope="module")
def page(run: pathlib.Path) -> str:
    return report.make([str(run)])


def test_curves_of_a_file_that_is_being_written(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_text('{"step": 1, "loss": 3.0, "batch_digest": "ab"}\n{"step": 2, "loss": NaN, "fill": 1}\n{"step": 3, "lo')
    curves = written.read_curves(path)
    assert curves.keys() == {"loss", "fill"} and curves["fill"] == ([2], [1])
    assert curves["loss"][0] == [1, 2] and np.isnan(curves["loss"][1][1])
    assert written.read_curves(epath.Path(tmp_path / "absent.jsonl")) == {}


def test_curves_of_several_runs_lie_over_one_another(tmp_path: pathlib.Path) -> None:
    lines = "".join(json.dumps({"step": step, "loss": 5 - step, "odd": 1.0}) + "\n" for step in range(4))
    first = write_run(tmp_path / "first", lines)
    second = write_run(tmp_path / "second", lines.replace("odd", "<odd>"))
    page = report.make([first, second])
    shown = svgs(page)
    assert [re.search('aria-label="(.*?) against', svg)[1] for svg in shown] == ["loss", "&lt;odd&gt;", "odd"]
    lines_of = [svg.count('id="curve-') and set(re.findall(r"stroke: (var\(--series-\d\))", svg)) for svg in shown]
    assert lines_of == [{"var(--series-0)", "var(--series-1)"}, {"var(--series-1)"}, {"var(--series-0)"}]
    assert '<section id="curves">' in page and "<odd>" not in page
    for name in ("first", "second"):  # whose data is gone
        assert f"</span>{name}</li>" in page
        assert f"{tmp_path / name}: its data was not found in absent; say where a prepared dataset is: <code>--data=DIR" in page


def test_another_protocol_stands_apart_with_what_differs(tmp_path: pathlib.Path) -> None:
    one = write_result(tmp_path / "one.json", "a" * 16, span=64)
    same = write_result(tmp_path / "same.json", "a" * 16, span=64, step=8, top1=0.756)
    other = write_result(tmp_path / "other.json", "b" * 16, span=16, prompts="[x], {y}")
    sts = write_result(tmp_path / "sts.json", "c" * 16, task="sts", data="0")
    more = write_result(tmp_path / "more.json", "d" * 16, task="sts", data="1")
    page = report.make([one, same, other, sts, more])
    assert page.count("<table") == 4 and page.count("Another protocol") == 1
    assert f"Other data than {'c' * 16}, not to be compared: <code>data</code> is 1, there 0" in page
    flag = re.search('<p class="flag">(.*?)</p>', page)[1]
    assert "<code>prompts</code> is [x], {y}, there absent; <code>span</code> is 16, there 64" in flag
    assert f"than {'a' * 16}" in flag and "step" not in flag and "model" not in flag
    first, second, third, _ = re.findall("<table.*?</table>", page, re.DOTALL)
    assert "one.json" in first and "same.json" in first and '<td class="figure">75.6</td>' in first
    assert "other.json" in second and "b" * 16 in second
    assert "direction" in first and "direction" not in third
    assert "<svg" not in page and 'id="curves"' not in page


def test_what_cannot_be_reported_is_named(tmp_path: pathlib.Path) -> None:
    def refused(name: object, data: str | None = None) -> str:
        with pytest.raises(ValueError) as error:
            report.make([str(name)] if name else [], data)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nothing to report: give workdirs" in refused(None)
    assert f"{tmp_path}/absent: no such file or folder" in refused(tmp_path / "absent")
    assert f"{tmp_path}: no config.json there" in refused(tmp_path)
    for text in ("{", "[]", '{"task": "sts"}'):
        (tmp_path / "bad.json").write_text(text)
        assert f"{tmp_path}/bad.json: not what evaluate writes" in refused(tmp_path / "bad.json")
    assert "text.json: not what evaluate writes" in refused(write_result(tmp_path / "text.json", "a", top1="high"))
    good = write_run(tmp_path / "good", "")
    assert "--data=nowhere: no manifest.json there" in refused(good, "nowhere")
    for number, line in enumerate(('{"loss": 1}', "[1]", "{")):
        bad = write_run(tmp_path / f"bad{number}", '{"step": 1}\n' + line + "\n")
        assert f"{bad}/metrics.jsonl:2: not an object with step" in refused(bad)
    assert "No <code>metrics.jsonl</code> with a number in it" in report.make([good])


def test_the_command(tmp_path: pathlib.Path) -> None:
    out, sts = tmp_path / "report.html", write_result(tmp_path / "sts.json", "c" * 16, task="sts")
    command = [sys.executable, "-m", "contrastive_jax.report", f"--out={out}", sts, write_run(tmp_path / "run", "")]
    assert f"written to {out}" in finish(start(command))[0]
    assert out.read_text() == report.make(command[-2:])


def test_neighbours_and_who_is_shown() -> None:
    z = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], np.float32)
    similarity, places = projection.neighbours(z, np.array([0, 2]), 2)
    np.testing.assert_array_equal(places, [[1, 3], [3, 1]])
    np.testing.assert_allclose(similarity, [[0.8, 0.6], [0.8, 0.6]], rtol=1e-6)
    assert projection.one_of_each(np.array([2, 2, 0, 2, 1, 0]), 4).tolist() == [0, 1, 2, 4]
    assert projection.one_of_each(np.array([1, 1, 1, 0]), 1).tolist() == [0]


@pytest.mark.parametrize("count", [1, 3, 4, 7, 150])
def test_a_map_of_few_and_of_many_is_the_same_each_time(count: int) -> None:
    z = np.random.default_rng(count).normal(size=(count, 16)).astype(np.float32)
    z[: count // 2] += 4
    places = projection.plane(z)
    assert places.shape == (count, 2) and np.isfinite(places).all()
    np.testing.assert_array_equal(projection.plane(z), places)
    assert np.isfinite(projection.plane(np.ones_like(z))).all()  # of a model that collapsed


def test_figures_are_the_same_each_time_and_take_their_colours_from_the_page() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.uniform(-1, 1, (70, 70))
    makers: list[Callable[[], str]] = [
        lambda: figures.curves("c", 'a "<metric>"', [([1, 2], [0.5, np.nan]), ([], [])]),
        lambda: figures.histogram("h", rng.permutation(np.arange(9.0)), np.zeros(0)),
        lambda: figures.matrix("m", similarity),
        lambda: figures.scatter("s", similarity[:20, :2], np.arange(20)),
    ]
    for make in makers:
        svg = make()
        assert svg == make()
        assert svg.startswith('<svg role="img" aria-label="') and svg.endswith("</svg>") and "<metric>" not in svg
        assert "#0102" not in svg and "DejaVu" not in svg and "var(--" in svg


def test_the_page_of_a_run(run: pathlib.Path, page: str) -> None:
    assert report.make([str(run)]) == page
    for name in ("results", "curves", *SECTIONS):
        assert page.count(f'<section id="{name}">') == 1
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert "<script" not in page and not re.search(r'(src|href)="(?!#|data:)', page) and "@import" not in page
    assert len(svgs(page)) == 3 + len(written.read_curves(epath.Path(run / "metrics.jsonl")))
    assert all("aria-label" in svg for svg in svgs(page))
    texts = page.partition('<section id="neighbours">')[2]
    assert "<b>" not in page
    rows = re.findall("<tr.*?</tr>", texts)[1:]
    assert len(rows) == report.TEXTS * report.NEIGHBOURS
    assert {re.findall("<td>(.*?)</td>", row)[0] for row in rows} == {*map(html.escape, DOMAINS), ""}

    config = (run / "projector_config.pbtxt").read_text()
    assert 'tensor_path: "projector/tensors.tsv"' in config and 'metadata_path: "projector/metadata.tsv"' in config
    z = np.loadtxt(run / "projector" / "tensors.tsv", delimiter="\t")
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-3)
    head, *lines = (run / "projector" / "metadata.tsv").read_text().removesuffix("\n").split("\n")
    assert head == "domain\ttext" and len(lines) == len(z) == 80
    assert {line.split("\t")[0] for line in lines} == {"<b>&amp;", "two words"} and all(line.count("\t") == 1 for line in lines)


def test_two_runs_one_with_the_tokenizer_of_others(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / tokenizer.Tokenizer.file).write_bytes(tokenizer.train(["a b c d e f g"] * 9, 278).model)
    page = report.make([str(run), str(copy)])
    for name in SECTIONS:
        assert page.count(f'<section id="{name}-1">') == 1 and f'id="{name}-2"' not in page
    assert f"its tokenizer is not that of {copy}" in page


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync --hide-scrollbars"
# The page in frames (a window is never as narrow as a telephone), everything unfolded, and its measures in each.
WIDTHS = (360, 1200)
FRAME = '<iframe style="width: {}px; height: 900px; border: 0" srcdoc="{}"></iframe>'
MEASURE = """<pre id="found"></pre>
<script>
const frames = [...document.querySelectorAll("iframe")];
const size = item => { const box = item.getBoundingClientRect(); return [box.width, box.height, box.right]; };
function measure(frame) {
  const page = frame.contentDocument, all = name => [...page.querySelectorAll(name)];
  all("details").forEach(part => part.open = true);
  return {window: frame.contentWindow.innerWidth, content: page.documentElement.scrollWidth,
    svgs: all("svg").map(size), images: all("image").map(size), figures: all("section table .figure").length};
}
window.onload = () => { document.getElementById("found").textContent = JSON.stringify(frames.map(measure)); };
</script>"""


def browse(folder: pathlib.Path, page: pathlib.Path, *flags: str) -> str:
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={folder}/profile", *flags, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")
def test_a_browser_shows_the_page_whole(page: str, tmp_path: pathlib.Path) -> None:
    out, framed = tmp_path / "report.html", tmp_path / "framed.html"
    out.write_text(page)
    framed.write_text("".join(FRAME.format(width, html.escape(page)) for width in WIDTHS) + MEASURE)
    dom = browse(tmp_path, framed, "--dump-dom", "--window-size=1300,1000")
    measured = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', dom)[1]))
    for width, found in zip(WIDTHS, measured, strict=True):
        assert found["window"] == width and found["content"] <= width
        assert len(found["svgs"]) == len(svgs(page)) and found["images"]
        assert all(wide > 100 and high > 100 and right <= width for wide, high, right in found["svgs"])
        assert found["figures"] == 2 + 2 * 2 * 3  # the head of the table of results, and its rows
    browse(tmp_path, out, f"--screenshot={tmp_path}/page.png", "--window-size=800,3000")
    image = matplotlib.image.imread(tmp_path / "page.png")
    assert image.shape[:2] == (3000, 800)
    filled = (image[:, :, :3].std(axis=1) > 0.01).mean()
    assert filled > 0.3  # of the rows of the screen; a page that is not drawn is of one colour
