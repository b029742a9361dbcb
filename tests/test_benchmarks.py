"""Each benchmark runs: with toy sizes, for its output and not for its figures."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_dataset
from hf_folders import WORDS, write_folder

from benchmarks import common


def run(name: str, *flags: str) -> list[str]:
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_every_benchmark_says_how_to_run_it() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        text = path.read_text()
        if "app.run(main)" in text:
            assert f"python -m benchmarks.{path.stem}" in text.partition('"""\n\n')[0], path


@pytest.mark.slow
def test_loss_memory() -> None:
    lines = run("loss_memory", "--dim=8", "--devices=2", "--batches=64", "--timed=64", "--repeats=1", "--block=16")
    assert lines[-1].split()[0] == "64" and lines[-1].count("ms") == 5


@pytest.mark.slow
def test_plan_memory() -> None:
    lines = run("plan_memory", "--devices=2", "--case=debug")
    assert lines[-1].startswith("debug") and len(lines[-1].split()) == 4


@pytest.mark.slow
def test_grad_cache() -> None:
    lines = run("grad_cache", "--batches=16", "--micro_batch=8", "--timed=0")
    assert lines[-1].split()[0] == "16" and len(lines[-1].split()) == 5


@pytest.mark.slow
def test_near_duplicates(tmp_path: pathlib.Path) -> None:
    texts = [" ".join(f"{a}{i * a % 97}" for i in range(80)) for a in range(1, 31)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/set.txt").write_text(" ".join(f"question{i}" for i in range(13)))
    lines = run("near_duplicates", f"--input={tmp_path}/texts.jsonl", "--planted=9", f"--decontaminate={tmp_path}/sets")
    assert lines[-1].strip() == "sets: 1 of 1 planted texts found"


@pytest.mark.slow
def test_mine(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    model = write_folder(tmp_path / "bert", "bert")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[4:], 8)) for _ in range(160)]
    pairs = [{"query": query, "positive": positive} for query, positive in zip(texts[::2], texts[1::2], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = [f"--pairs={tmp_path}/pairs.jsonl", f"--model={model}"]
    assert run("mine", *flags)[-1].startswith("the same negatives for 80 of 80 queries (100.000%)")
    assert run("mine", *flags, "--documents=50")[-1].startswith("peak memory: ")


@pytest.mark.slow
def test_finetune_goes_on_where_it_ended(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets"), pytest.importorskip("accelerate")
    model = write_folder(tmp_path / "bert", "bert")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[4:], 8)) for _ in range(160)]
    pairs = [{"query": f"{text} the", "positive": text} for text in texts]  # near, so that there are others less near
    for name, part in (("train", pairs[:120]), ("dev", pairs[120:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    flags = [f"--pairs={tmp_path}/train.jsonl", f"--held_out={tmp_path}/dev.jsonl", f"--model={model}", "--steps=10"]
    flags += ["--batch=8", "--length=32", "--relative_margin=0", f"--output={tmp_path / 'out'}"]
    lines = run("finetune", *flags, "--seeds=0", "--rival_seeds=0")
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| MiniLM", "| ours, seed 0", "| sentence-transformers, seed 0"]
    results = json.loads((tmp_path / "out/results.json").read_text())
    results["rows"]["MiniLM"]["ndcg"] = 12.34  # is kept
    (tmp_path / "out/results.json").write_text(json.dumps(results))
    lines = run("finetune", *flags, "--seeds=0,1", "--rival_seeds=")
    assert lines[-4].startswith("| MiniLM | 12.34 |") and lines[-1].startswith("| ours, seed 1 |")


@pytest.mark.slow
def test_log_line() -> None:
    lines = run("log_line", "--lines=3", "--width=8")
    assert len(lines) == 2 and all(line.endswith("ms per line") for line in lines)


@pytest.mark.slow
def test_data_order(tmp_path: pathlib.Path) -> None:
    lines = run("data_order", "--records=20000", "--pairs=256", "--sizes=100,2000", f"--output={tmp_path / 'figure.png'}")
    assert sum("each exactly once in each of 3 epochs: True" in line for line in lines) == 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_systems_goes_on_where_it_ended(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [200] * 300, "validation": [200] * 60}, window=200)
    shutil.copy(dataset / "tokenizer.model", data)
    flags = [f"--data={data}", f"--output={tmp_path}", "--steps=2", "--pairs=40", "--rows=untrained,replaced tokens"]
    lines = run("systems", *flags)
    assert [line.split(":")[0] for line in lines[:2]] == ["untrained seed 0", "replaced tokens seed 0"]
    assert "not run: byol >= simsiam -5" in lines and "not run: mlm >= 20" in lines
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert 0.3 < rows["replaced tokens seed 0"]["held_out_token_auc"] < 0.7 and "TF-IDF seed 0" in rows
    assert (tmp_path / "systems.png").stat().st_size > 5000
    assert run("systems", *flags)[0].startswith("| system | top-5 | top-1 |")
    assert (tmp_path / "systems.md").read_text().count("\n") == 5


@pytest.mark.slow
def test_m11_views_goes_on_where_it_ended(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [200] * 300, "validation": [200] * 60}, window=200)
    shutil.copy(dataset / "tokenizer.model", data)
    flags = [f"--data={data}", f"--output={tmp_path}", "--steps=2", "--pairs=40"]
    assert run("views", *flags, "--distances=copies,62")[-1].startswith("top-1: best at ")
    kept = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert kept["copies"]["mutual_information"] > kept["62"]["mutual_information"]
    kept["62"] |= {"mutual_information": 1.0, "query_key/mean/top5": 1.0}  # an earlier point stays as it is
    (tmp_path / "results.json").write_text(json.dumps(json.loads((tmp_path / "results.json").read_text()) | {"rows": kept}))
    lines = run("views", *flags, "--distances=62,copies")
    assert lines[2].startswith("| 62 | 1.00 | 100.0 |")
    assert "top-5: best at 62, the least information" in lines and (tmp_path / "views.png").stat().st_size > 5000


@pytest.mark.slow
def test_m13_longer_shows_each_evaluation(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [200] * 300, "validation": [200] * 60}, window=200)
    shutil.copy(dataset / "tokenizer.model", data)
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb/dev.tsv").write_text("1\ta b\tc d\n5\ta b\ta b\n3\ta b\ta d\n")
    flags = [f"--data={data}", f"--output={tmp_path}", f"--tasks=sts={tmp_path}/stsb", "--steps=2", "--every=1", "--pairs=40"]
    lines = run("longer", *flags)
    assert lines[0] == "| steps | top-5 | top-1 | sts-stsb dev spearman |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 0", "| 1", "| 2"]
    assert lines[-1].startswith("sts-stsb dev spearman: best ") and (tmp_path / "longer.png").stat().st_size > 5000


@pytest.mark.slow
def test_small_encoders_goes_on_where_it_ended(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [200] * 300, "validation": [200] * 60}, window=200)
    shutil.copy(dataset / "tokenizer.model", data)
    flags = [f"--data={data}", f"--output={tmp_path}", "--minutes=0.05", "--pairs=40", "--only=bag"]
    lines = run("small_encoders", *flags, "--seeds=0,1")
    assert [line.split(":")[0] for line in lines[:2]] == ["bag, seed 0", "bag, seed 1"]
    assert lines[-1].startswith("| bag | 2 | ") and (tmp_path / "small_encoders.png").stat().st_size > 5000
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    minutes = [point[0] for point in rows["bag, seed 0"]["curve"]]
    assert minutes[0] == 0 and len(minutes) >= 6 and minutes == sorted(minutes)
    assert run("small_encoders", *flags, "--seeds=0,1") == lines[2:]


def test_row47_the_area_under_the_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 9, 70) / 8, rng.random(70) < 0.3
    difference = score[positive][:, None] - score[~positive]
    assert common.auc(score, positive) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())


def test_the_threshold_is_the_most_often_right() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.6
    score = rng.normal(size=300) + 2 * positive
    best = max(((score > t) == positive).mean() for t in score)
    assert ((score > common.threshold(score, positive)) == positive).mean() >= best - 1 / 300


@pytest.mark.slow
def test_labelled(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    flags = [f"--data={dataset / 'pairs'}", f"--output={tmp_path}", "--epochs=2", "--length=24", "--rows=rdrop,cosine"]
    lines = run("labelled", *flags)
    assert [line.count(",") for line in lines[-2:]] == [1, 1] and lines[2] == "| majority class | 50.0 | |"
    assert (tmp_path / "labelled.md").read_text().splitlines() == lines
