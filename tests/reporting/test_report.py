"""The report: runs and results are read, two protocols are never in one table, and a browser shows the whole page."""

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

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.reporting import figures, inputs, projection, report, spans_section
from contrastive_jax.training import loop

SECTIONS = ("histogram", "matrix", "map", "neighbours")
DOMAINS = ["<b>&amp;", "two\twords"]
ROWS = ("query_to_key", "key_to_query", "mean")


def write_result(path: pathlib.Path, stamp: str, task: str = "query_key", top1: object = 0.25, **protocol: object) -> str:
    names = [f"{model}{row}" for model in ("", "chance: ") for row in ROWS] if task == "query_key" else ["dev", "test"]
    rows = {name: {"top1": top1, "mrr": 0.5} for name in names}
    protocol = {"model": str(path), "step": 4, "pooling": "mean"} | protocol
    path.write_text(json.dumps({"task": task, "protocol": protocol, "protocol_hash": stamp, "results": rows}))
    return str(path)


def write_run(folder: pathlib.Path, lines: str, data: str = "absent") -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"data": {"dir": data}}))
    (folder / "metrics.jsonl").write_text(lines)
    return str(folder)


def svgs(html_page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html_page, re.DOTALL)


@pytest.fixture(scope="module")
def run(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a trained and evaluated run, whose domains have names with characters that HTML and tables use."""
    root = tmp_path_factory.mktemp("report")
    data, workdir = root / "data", root / "run"
    shutil.copytree(dataset, data)
    syllables = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
    vocabulary = [a + b for a in syllables for b in syllables]
    rng = np.random.default_rng(0)
    trained = tokenizer.train([" ".join(rng.choice(vocabulary, 100)) for _ in range(50)], VOCAB)
    (data / tokenizer.Tokenizer.file).write_bytes(trained.model)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"domains": DOMAINS}))
    config = shrink(recipe("debug"), data)
    config.eval_every = 2
    loop.train(loop.set_up(config, epath.Path(workdir)), config.steps)
    write_result(workdir / "query_key.json", "1" * 16)
    return workdir


@pytest.fixture(scope="module")
def run_page(run: pathlib.Path) -> str:
    return report.make_report([str(run)])


def test_curves_of_a_file_that_is_being_written(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_text('{"step": 1, "loss": 3.0, "batch_digest": "ab"}\n{"step": 2, "loss": NaN, "fill": 1}\n{"step": 3, "lo')
    curves = inputs.read_curves(path)
    assert curves.keys() == {"loss", "fill"} and curves["fill"] == ([2], [1])
    assert curves["loss"][0] == [1, 2] and np.isnan(curves["loss"][1][1])
    assert inputs.read_curves(epath.Path(tmp_path / "absent.jsonl")) == {}


def test_curves_of_several_runs_lie_over_one_another(tmp_path: pathlib.Path) -> None:
    lines = "".join(json.dumps({"step": step, "loss": 5 - step, "odd": 1.0}) + "\n" for step in range(4))
    first = write_run(tmp_path / "first", lines)
    second = write_run(tmp_path / "second", lines.replace("odd", "<odd>"))
    shown = report.make_report([first, second])
    curves = svgs(shown)
    assert [re.search('aria-label="(.*?) against', svg)[1] for svg in curves] == ["loss", "&lt;odd&gt;", "odd"]
    colours = [svg.count('id="curve-') and set(re.findall(r"stroke: (var\(--series-\d\))", svg)) for svg in curves]
    assert colours == [{"var(--series-0)", "var(--series-1)"}, {"var(--series-1)"}, {"var(--series-0)"}]
    assert '<section id="curves">' in shown and "<odd>" not in shown
    for name in ("first", "second"):  # their data are gone
        assert f"</span>{name}</li>" in shown
        assert f"{tmp_path / name}: its data is not in absent; say where a prepared dataset is: <code>--data=DIR" in shown


def test_scores_of_older_runs_have_the_names_of_today(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_text(
        '{"step": 1, "query_key/top5": 0.5}\n{"step": 2, "query_key/mean/top5": 0.6, "sts-stsb/test/spearman": 0.7}\n'
    )
    assert inputs.read_curves(path) == {"query_key/mean/top5": ([1, 2], [0.5, 0.6]), "sts-stsb/test/spearman": ([2], [0.7])}


def test_another_protocol_has_its_own_table_and_says_what_differs(tmp_path: pathlib.Path) -> None:
    one = write_result(tmp_path / "one.json", "a" * 16, span=64)
    same = write_result(tmp_path / "same.json", "a" * 16, span=64, step=8, top1=0.756)
    other = write_result(tmp_path / "other.json", "b" * 16, span=16, prompts="[x], {y}")
    sts = write_result(tmp_path / "sts.json", "c" * 16, task="sts", data="0")
    more = write_result(tmp_path / "more.json", "d" * 16, task="sts", data="1")
    shown = report.make_report([one, same, other, sts, more])
    assert shown.count("<table") == 4 and shown.count("by another protocol") == 1
    assert f"on other data than {'c' * 16}, not comparable with it: <code>data</code> is 1 instead of 0" in shown
    flag = re.search('<p class="flag">(.*?)</p>', shown)[1]
    assert "<code>prompts</code> is [x], {y} instead of absent; <code>span</code> is 16 instead of 64" in flag
    assert f"than {'a' * 16}" in flag and "step" not in flag and "model" not in flag
    first, second, third, _ = re.findall("<table.*?</table>", shown, re.DOTALL)
    assert "one.json" in first and "same.json" in first and '<td class="figure">75.6</td>' in first
    assert "other.json" in second and "b" * 16 in second
    assert "chance: mean" in first and "chance: mean" not in third
    assert "<svg" not in shown and 'id="curves"' not in shown


def test_the_result_of_an_older_version_is_shown(tmp_path: pathlib.Path) -> None:
    models = {"chance": {"mean": {"top1": 0.001}}, "step 500": {"mean": {"top1": 0.705}, "query_to_key": {"top1": 0.7}}}
    result = {"task": "query_key", "protocol": {"model": "runs/a"}, "protocol_hash": "e" * 16, "results": models}
    (tmp_path / "older.json").write_text(json.dumps(result))
    rows = re.findall("<tr.*?</tr>", report.make_report([str(tmp_path / "older.json")]))[1:]
    cells = [re.findall("<td.*?>(.*?)</td>", row) for row in rows]
    assert cells == [["older.json", "mean", "70.5"], ["", "query_to_key", "70.0"], ["", "chance: mean", "0.1"]]


def test_an_argument_that_cannot_be_reported_is_named(tmp_path: pathlib.Path) -> None:
    def refused(name: object, data: str | None = None) -> str:
        with pytest.raises(UserError) as error:
            report.make_report([str(name)] if name else [], data)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nothing to report: give workdirs" in refused(None)
    assert f"{tmp_path}/absent: no such file or folder" in refused(tmp_path / "absent")
    assert f"{tmp_path}: no config.json there" in refused(tmp_path)
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object"), ('{"task": "sts"}', "not what evaluate writes")):
        (tmp_path / "bad.json").write_text(text)
        assert f"{tmp_path}/bad.json: {message}" in refused(tmp_path / "bad.json")
    assert "text.json: not what evaluate writes" in refused(write_result(tmp_path / "text.json", "a", top1="high"))
    good = write_run(tmp_path / "good", "")
    assert "--data=nowhere: no manifest.json there" in refused(good, "nowhere")
    for number, line in enumerate(('{"loss": 1}', "[1]", "{")):
        bad = write_run(tmp_path / f"bad{number}", '{"step": 1}\n' + line + "\n")
        assert f"{bad}/metrics.jsonl:2: not a JSON object with a step" in refused(bad)
    assert "There is no number in any <code>metrics.jsonl</code>" in report.make_report([good])


def test_the_command(tmp_path: pathlib.Path) -> None:
    out, sts = tmp_path / "report.html", write_result(tmp_path / "sts.json", "c" * 16, task="sts")
    command = [sys.executable, "-m", "contrastive_jax", "report", f"--output={out}", sts, write_run(tmp_path / "run", "")]
    assert f"written to {out}" in finish(start(command))[0]
    assert out.read_text() == report.make_report(command[-2:])


def test_nearest_neighbours_and_the_choice_across_domains() -> None:
    z = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], np.float32)
    similarity, rows = projection.nearest_neighbours(z, np.array([0, 2]), 2)
    np.testing.assert_array_equal(rows, [[1, 3], [3, 1]])
    np.testing.assert_allclose(similarity, [[0.8, 0.6], [0.8, 0.6]], rtol=1e-6)
    assert projection.choose_across_domains(np.array([2, 2, 0, 2, 1, 0]), 4).tolist() == [0, 1, 2, 4]
    assert projection.choose_across_domains(np.array([1, 1, 1, 0]), 1).tolist() == [0]


@pytest.mark.parametrize("count", [1, 3, 4, 7, 150])
def test_a_map_of_few_or_many_vectors_is_the_same_each_time(count: int) -> None:
    z = np.random.default_rng(count).normal(size=(count, 16)).astype(np.float32)
    z[: count // 2] += 4
    points = projection.project_to_plane(z)
    assert points.shape == (count, 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(projection.project_to_plane(z), points)
    assert np.isfinite(projection.project_to_plane(np.ones_like(z))).all()  # of a model that collapsed


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


def test_the_page_of_a_run(run: pathlib.Path, run_page: str) -> None:
    assert report.make_report([str(run)]) == run_page
    for name in ("results", "curves", *SECTIONS):
        assert run_page.count(f'<section id="{name}">') == 1
    ids = re.findall(r'\bid="([^"]*)"', run_page)
    assert len(ids) == len(set(ids))
    assert "<script" not in run_page and not re.search(r'(src|href)="(?!#|data:)', run_page) and "@import" not in run_page
    assert len(svgs(run_page)) == 3 + len(inputs.read_curves(epath.Path(run / "metrics.jsonl")))
    assert all("aria-label" in svg for svg in svgs(run_page))
    texts = run_page.partition('<section id="neighbours">')[2]
    assert "<b>" not in run_page
    rows = re.findall("<tr.*?</tr>", texts)[1:]
    assert len(rows) == spans_section.QUERY_SPANS * spans_section.NEIGHBOURS
    assert {re.findall("<td>(.*?)</td>", row)[0] for row in rows} == {*map(html.escape, DOMAINS), ""}


def test_a_key_that_an_older_run_lacks_changes_nothing(run: pathlib.Path, run_page: str, tmp_path: pathlib.Path) -> None:
    older = tmp_path / "run"
    shutil.copytree(run, older)
    config = json.loads((older / "config.json").read_text())
    del config["guard"], config["eval"]["seed"], config["objective"]["mask_margin"], config["model"]["local_window"]
    (older / "config.json").write_text(json.dumps(config))
    assert report.make_report([str(older)]) == run_page


def test_the_projector_of_a_run(run: pathlib.Path, run_page: str) -> None:
    del run_page  # making it writes the files
    config = (run / "projector_config.pbtxt").read_text()
    assert 'tensor_path: "projector/tensors.tsv"' in config and 'metadata_path: "projector/metadata.tsv"' in config
    z = np.loadtxt(run / "projector" / "tensors.tsv", delimiter="\t")
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-3)
    head, *lines = (run / "projector" / "metadata.tsv").read_text().removesuffix("\n").split("\n")
    assert head == "domain\ttext" and len(lines) == len(z) == 80
    assert {line.split("\t")[0] for line in lines} == {"<b>&amp;", "two words"} and all(line.count("\t") == 1 for line in lines)


def test_two_runs_one_with_another_tokenizer_than_its_data(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / tokenizer.Tokenizer.file).write_bytes(tokenizer.train(["a b c d e f g"] * 9, 278).model)
    shown = report.make_report([str(run), str(copy)])
    for name in SECTIONS:
        assert shown.count(f'<section id="{name}-1">') == 1 and f'id="{name}-2"' not in shown
    assert f"its tokenizer is not that of {copy}" in shown


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync --hide-scrollbars"
# The page in frames (a window cannot be as narrow as a telephone), unfolded; the script writes the sizes of its parts.
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


def browse(folder: pathlib.Path, file: pathlib.Path, *flags: str) -> str:
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={folder}/profile", *flags, f"file://{file}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")
def test_a_browser_shows_the_whole_page(run_page: str, tmp_path: pathlib.Path) -> None:
    out, framed = tmp_path / "report.html", tmp_path / "framed.html"
    out.write_text(run_page)
    framed.write_text("".join(FRAME.format(width, html.escape(run_page)) for width in WIDTHS) + MEASURE)
    dom = browse(tmp_path, framed, "--dump-dom", "--window-size=1300,1000")
    measured = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', dom)[1]))
    for width, measures in zip(WIDTHS, measured, strict=True):
        assert measures["window"] == width and measures["content"] <= width
        assert len(measures["svgs"]) == len(svgs(run_page)) and measures["images"]
        assert all(wide > 100 and high > 100 and right <= width for wide, high, right in measures["svgs"])
        assert measures["figures"] == 2 + 2 * 2 * 3  # the table of results: its head, and its rows
    browse(tmp_path, out, f"--screenshot={tmp_path}/page.png", "--window-size=800,3000")
    image = matplotlib.image.imread(tmp_path / "page.png")
    assert image.shape[:2] == (3000, 800)
    filled = (image[:, :, :3].std(axis=1) > 0.01).mean()
    assert filled > 0.3  # of the screen's rows; a page that is not drawn has one colour
