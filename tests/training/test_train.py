"""The loop: every recipe runs, a run resumes bit for bit, and layouts of devices and processes change nothing."""

import contextlib
import json
import pathlib
import re
import signal

import jax
import numpy as np
import pytest
from absl import logging
from conftest import command, evaluation, finish, peers, recipe, refusal, shrink, start, trace, wait_for
from etils import epath
from ml_collections import ConfigDict
from transfers import like_an_accelerator

import contrastive_jax
from contrastive_jax import files
from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import spans
from contrastive_jax.runtime import digest, processes
from contrastive_jax.runtime.checkpoint import Checkpoints
from contrastive_jax.runtime.processes import PREEMPTED
from contrastive_jax.training import loop, metrics


def fit(config: ConfigDict, workdir: pathlib.Path, stop_at: int | None = None) -> list[dict]:
    """Trains in this process; returns the lines of metrics.jsonl that have a loss."""
    contrastive_jax.train(config, workdir, stop_at)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


# The recipes that are run here; test_every_recipe.py traces a step of the others, and with -m slow runs all.
RUN = [
    *(("debug", ""), ("moco", ""), ("declutr", ""), ("information", "mine"), ("information", "dim"), ("labelled", "rdrop")),
    *(("mixers", "elmo"), ("noise", "infoword"), ("seq2seq", "t5"), ("seq2seq", "univae"), ("seq2seq", "simbert")),
]
QUICK = [("debug", ""), ("moco", ""), ("labelled", "rdrop"), ("seq2seq", "t5")]


@pytest.mark.parametrize(
    ("name", "argument"), [each if each in QUICK else pytest.param(*each, marks=pytest.mark.slow) for each in RUN]
)
def test_every_recipe_runs_a_shrunk_step(name: str, argument: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe(name, *[argument] * bool(argument)), dataset)
    config.steps = 3
    with like_an_accelerator():
        lines = fit(config, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_every_key_is_read(dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shrink(default_config(), dataset)
    config.update(eval_every=1, steps=2)
    config.model.remat, config.guard.warmup_steps = "full", 0
    leaves = {key for value in config.values() for key in (value if isinstance(value, ConfigDict) else ())} | set(config.keys())
    seen, read = set(), ConfigDict.__getattr__

    def record(node: ConfigDict, key: str) -> object:
        seen.add(key)
        return read(node, key)

    monkeypatch.setattr(ConfigDict, "__getattr__", record)
    fit(config, tmp_path / "base")
    config.objective.update(name="siglip", symmetric=False)  # keys that only these read
    config.memory.kind, config.tokens.name, config.noise.ops = "queue", "mlm", (("mask", 0.15), ("infill", 0.1))
    config.data.join = "both"
    config.model.local_window = 2
    trace(config)
    recipes = (
        ("labelled", "rdrop"),
        ("labelled", "cosine"),
        ("information", "mine"),
        ("seq2seq", "univae"),
        ("distil", "tokens"),
    )
    for name, *argument in (*recipes, ("simsiam",)):
        trace(recipe(name, *argument))
    scored = recipe("labelled", "cosine")
    scored.objective.update(name="kl", extra=(("spread_square", 1.0),))
    scored.data.views = 3
    trace(scored)
    for config.data.sampler in spans.SAMPLERS:
        spans.make_sampler(config.data)
    assert sorted(leaves - seen) == []


@pytest.mark.parametrize("name", ["moco", *(pytest.param(name, marks=pytest.mark.slow) for name in ("debug", "byol"))])
def test_resume_is_exact_with_dropout(name: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe(name), dataset)
    config.steps, config.model.dropout, config.checkpoint_every = 6, 0.3, 4
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "parts", stop_at=3)
    parts = fit(config, tmp_path / "parts")
    keys = ("step", "loss", "batch_digest", "gradient_norm")
    assert [[line[key] for key in keys] for line in whole] == [[line[key] for key in keys] for line in parts]
    assert digest_of(config, tmp_path / "whole") == digest_of(config, tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["3", "4", "6"]


def digest_of(config: ConfigDict, workdir: pathlib.Path) -> str:
    setup = loop.set_up(config, epath.Path(workdir))
    state = loop.restore_or_init(setup, loop.checkpoint.Checkpoints(workdir))
    return digest.combine_hashes(digest.hash_tree(state.params))


def test_checkpoint_restores_onto_another_mesh(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("debug"), dataset)
    config.steps = 2
    fit(config, tmp_path)
    before = digest_of(config, tmp_path)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    assert digest_of(config, tmp_path) == before


def test_the_log_says_once_what_the_order_of_the_data_is(
    dataset: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="absl"):
        setup = loop.set_up(shrink(recipe("debug"), dataset), epath.Path(tmp_path))
        next(loop.global_batches(setup, 0))
    assert caplog.text.count("of the records have room for the longest") == 1


def test_training_learns(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = shrink(recipe("debug"), dataset)
    config.steps, config.log_every, config.data.batch_size = 60, 10, 64
    config.optim.learning_rate, config.optim.warmup_steps = 5e-3, 5
    lines = fit(config, tmp_path)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["in_batch_top1"] > lines[0]["in_batch_top1"]
    expected = {
        "alignment",
        "uniformity",
        "effective_rank",
        "pairs_per_second",
        "tokens_per_second",
        "learning_rate",
        "temperature",
    }
    assert expected <= lines[-1].keys()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_restart_rewrites_the_steps_it_repeats(tmp_path: pathlib.Path) -> None:
    for first, last in ((0, 5), (3, 4)):
        writer = metrics.Writer(epath.Path(tmp_path), first)
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": 10.0 * first + step})
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 34)]


def test_embedding_metrics() -> None:
    collapsed = np.ones((8, 2, 4)) / 2
    assert metrics.embedding_metrics(collapsed)["effective_rank"] == pytest.approx(1)
    spread = np.stack([np.eye(8), np.roll(np.eye(8), 1, 0)], axis=1)
    values = metrics.embedding_metrics(spread)
    assert values["effective_rank"] == pytest.approx(8)
    assert values["alignment"] == pytest.approx(2)
    assert values["uniformity"] == pytest.approx(-4)
    alone = metrics.embedding_metrics(spread[:, :1])
    assert alone == {name: value for name, value in values.items() if name != "alignment"}


# What follows starts real processes.


@pytest.mark.slow
def test_layouts_of_processes_and_devices_train_the_same(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    options = ["--config.steps=6", "--config.model.dropout=0.2", "--config.eval_every=6"]
    finish(start(command(dataset, tmp_path / "1x8", *options, "--config.mesh.fsdp=2", "--config.mesh.tensor=2"), devices=8))
    finish(*peers(dataset, tmp_path / "2x4", *options))
    finish(start(command(dataset, tmp_path / "1x1", *options)))
    runs = {}
    for name in ("1x8", "2x4", "1x1"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        runs[name] = [line for line in lines if "loss" in line]
        assert len(runs[name]) == 6
        assert "query_key/mean/top5" in lines[-1]
    for name in ("1x8", "2x4"):
        assert [line["batch_digest"] for line in runs[name]] == [line["batch_digest"] for line in runs["1x1"]]
        np.testing.assert_allclose([line["loss"] for line in runs[name]], [line["loss"] for line in runs["1x1"]], rtol=1e-5)


def test_sigterm_saves_and_ends_and_the_run_resumes(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    options = ["--config.steps=100000", "--config.checkpoint_every=0"]
    # Of one process alone: test_launch.py, at a maintenance notice.
    processes, file = peers(dataset, tmp_path, *options), tmp_path / "metrics.jsonl"
    wait_for(lambda: file.exists() and "loss" in file.read_text())
    processes[-1].send_signal(signal.SIGTERM)
    outputs = finish(*processes, status=PREEMPTED)
    reached = {
        line.split("ended at step ")[1].split()[0] for text in outputs for line in text.splitlines() if "ended at" in line
    }
    assert len(reached) == 1  # all processes saved the same step
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [*reached]


def test_processes_that_differ_refuse_to_start(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    processes = peers(dataset, tmp_path, differ="--config.seed={}")
    for output in finish(*processes, status=UserError.status):
        assert re.search("(?m)^error: .*the config of process 1 differs from that of process 0", output)


def test_processes_that_see_other_folders_refuse_to_start(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A local folder of the same name on each machine, for example."""
    processes = peers(dataset, tmp_path, differ=f"--workdir={tmp_path}/{{}}")
    for output in finish(*processes, status=UserError.status):
        assert re.search(f"(?m)^error: .*--workdir={tmp_path}/[01]: process 1 does not see what process 0 writes there", output)
    assert not list((tmp_path / "0").glob(".seen*"))


def test_a_workdir_in_the_home_folder(dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not expand the "~" of --workdir=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    contrastive_jax.train(shrink(recipe("bag"), dataset), "~/run", stop_at=1)
    assert {"checkpoints", "config.json", "metrics.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not pathlib.Path("~").exists()


def test_b5_versions_are_agreed_on_kept_with_a_checkpoint_and_a_change_is_said(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed, warnings = dict[str, str](), list[str]()
    monkeypatch.setattr(processes, "check_agreement", lambda **values: agreed.update(values))
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    config = shrink(recipe("debug"), dataset)
    contrastive_jax.train(config, tmp_path, stop_at=1)
    versions = digest.software_versions()
    assert versions["jax"] == jax.__version__ and versions.keys() == {"jax", "jaxlib", "libtpu", "code"}
    assert {name: agreed[f"version of {name}"] for name in versions} == versions
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as checkpoints:
        meta = checkpoints.meta(1)
    assert meta.items() >= versions.items()
    monkeypatch.setattr(digest, "software_versions", lambda: versions | {"jax": "0.0.1"})
    warnings.clear()
    loop.warn_of_other_versions(meta)  # what a resumed run calls
    assert warnings == [f"this run has used jax {jax.__version__} so far, now 0.0.1: it may not continue bit for bit"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.dropuot=0.1", "unknown key 'dropuot'; there are: attention, attention_dropout, bias"),
        ("--config.steps=many", "--config.steps=many"),
        ("--config.steps=0", "config.steps=0: must be at least 1"),
        ("--config=configs/absent.py", "absent.py"),
        ("--config.data.dir=/absent", "config.data.dir=/absent: no manifest.json there"),
        ("--config.eval.pairs=5000", "config.eval.pairs=5000: only 60 held-out records"),
        ("--num_processes=2", "give --coordinator, --num_processes and --process_id together"),
        ("--stop=3", "Unknown command line flag 'stop'"),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    argument: str,
    message: str,
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert message in refusal(command(dataset, tmp_path, "--config.eval_every=5", argument), monkeypatch, capsys)


def test_evaluate_prints_and_writes_the_table(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fit(shrink(recipe("debug"), dataset), tmp_path)
    output = finish(start(evaluation(f"--model={tmp_path}", "--tasks=query_key", "--pairs=30")))[0]
    for row in ("query_to_key", "key_to_query", "mean"):
        assert row in output
    results = json.loads((tmp_path / "query_key.json").read_text())
    assert results["results"].keys() == {"query_to_key", "key_to_query", "mean"}
    assert results["protocol"]["pairs"] == 30 and results["protocol"]["input"] == "tokens"
    output = finish(start(evaluation(f"--model={tmp_path}@3")), status=UserError.status)[0]
    assert re.search(r"(?m)^error: .*: no checkpoint 3; there are \[4\]", output)


def test_compiled_programs_are_kept_but_for_those_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    try:
        processes.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(files.cache_folder())
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        processes.enable_compilation_cache("gs://bucket/run")
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/run/compiled"
        jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")  # what JAX_COMPILATION_CACHE_DIR does
        processes.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
