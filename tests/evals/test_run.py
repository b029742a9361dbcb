"""Scoring a model on tasks: which data, which rows, which file, and the share of truncated texts in the protocol."""

import json
import pathlib

import numpy as np
import pytest
from etils import epath
from hf_folders import write_folder

from contrastive_jax.config import UserError
from contrastive_jax.evals import results, run
from contrastive_jax.evals.task import Options
from contrastive_jax.evals.tasks import TASKS
from contrastive_jax.inference import text_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_folder(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture
def pets(tmp_path: pathlib.Path) -> pathlib.Path:
    """A task of similarity: one of its six texts has more than 8 tokens."""
    data = tmp_path / "pets"
    data.mkdir()
    lines = ["5\tthe cat\tthe cat sat", "1\ta dog ran\tthe hat", "3\ta mat\ta small red cat sat on a big blue mat"]
    (data / "dev.tsv").write_text("\n".join(lines) + "\n")
    return data


def test_each_task_has_its_data() -> None:
    def assigned(names: list[str], data: list[str]) -> list[tuple[str, str]]:
        return [(task.name, folder) for task, folder in run.assign_data(names, data)]

    assert assigned(["sts", "knn"], ["a", "b"]) == [("sts", "a"), ("knn", "b")]
    assert assigned(["sts", "knn"], ["a"]) == [("sts", "a"), ("knn", "a")]
    assert assigned(["query_key"], []) == [("query_key", "")]
    with pytest.raises(UserError, match=r"--data names 2 folders, --tasks 1 tasks; give one per task, or one"):
        run.assign_data(["sts"], ["a", "b"])
    with pytest.raises(UserError, match=r"--tasks=stsb: choose one of query_key, information, sts, wordsim"):
        run.assign_data(["stsb"], [])


def test_every_task_of_the_table_is_found_by_its_name() -> None:
    assert all(name == task.name for name, task in TASKS.items())
    assert {name for name, task in TASKS.items() if not task.in_training} == {"glue", "mteb"}


def test_baselines_have_rows_of_their_own(folder: pathlib.Path, pets: pathlib.Path) -> None:
    model = text_model.load(f"hf:{folder}")
    rows, protocol = run.score_task(model, TASKS["sts"], str(pets), Options(), with_baselines=True)
    assert list(rows) == ["dev", "chance: dev", "TF-IDF: dev", "BM25: dev"]  # nobody knows a folder's initial weights
    assert all(row.keys() == {"spearman", "pearson"} for row in rows.values())
    assert protocol["similarity"] == "cosine" and len(protocol["data"]) == 32


@pytest.mark.parametrize("cached", [False, True])
def test_the_protocol_says_what_share_of_the_texts_was_truncated(
    cached: bool, folder: pathlib.Path, pets: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = Options(cache=tmp_path / "vectors.sqlite" if cached else None)
    for _ in range(2):  # with a cache, the second time no text is encoded
        model = text_model.load(f"hf:{folder}", max_tokens=8)
        rows, protocol = run.score_task(model, TASKS["sts"], str(pets), options)
        assert protocol["max_tokens"] == 8 and protocol["truncated"] == pytest.approx(1 / 6)
    whole, whole_protocol = run.score_task(text_model.load(f"hf:{folder}"), TASKS["sts"], str(pets), options)
    assert whole_protocol["truncated"] == 0 and whole != rows
    assert [key for key, _, _ in results.differences(protocol, whole_protocol)] == ["max_tokens"]


def test_vectors_of_another_architecture_are_not_taken_from_the_cache(pets: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The weights and the tokenizer are the same."""
    folder, options = write_folder(tmp_path / "bert", "bert"), Options(cache=tmp_path / "vectors.sqlite")
    config = json.loads((folder / "config.json").read_text())
    for changes in ({}, {"hidden_act": "gelu_new"}, {"num_attention_heads": 2}):
        (folder / "config.json").write_text(json.dumps(config | changes))
        model = text_model.load(f"hf:{folder}")
        rows, _ = run.score_task(model, TASKS["sts"], str(pets), options)
        assert rows == run.score_task(model, TASKS["sts"], str(pets), Options())[0]


def test_a_result_is_written_beside_its_run_or_to_output(
    folder: pathlib.Path, pets: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    workdir = str(tmp_path / "run")
    assert run.result_path(workdir, "sts", "a/stsb") == epath.Path(workdir) / "sts-stsb.json"
    assert run.result_path(f"{workdir}@best", "query_key", "") == epath.Path(workdir) / "query_key.json"
    assert run.result_path(f"hf:{folder}", "sts", "a/stsb") is None
    assert run.result_path(f"hf:{workdir}", "sts", "a/stsb") is None
    (tmp_path / "run@0.1" / "checkpoints").mkdir(parents=True)
    assert run.result_path(f"{workdir}@0.1", "sts", "a/stsb") == epath.Path(f"{workdir}@0.1") / "sts-stsb.json"
    for name in ("a.json", "b.json"):
        run.evaluate_model(f"hf:{folder}", ["sts"], [str(pets)], output=str(tmp_path / name))
    assert "spearman" in capsys.readouterr().out
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["task"] == "sts" and np.isfinite(stored["results"]["dev"]["spearman"])
    shown = run.compare_files([str(tmp_path / "a.json"), str(tmp_path / "b.json")], any_protocol=False)
    assert "sts dev, × 100" in shown
    with pytest.raises(UserError, match="one file holds one task"):
        run.evaluate_model(f"hf:{folder}", ["sts", "knn"], [str(pets)], output=str(tmp_path / "c.json"))
