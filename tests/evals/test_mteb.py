"""MTEB's own tasks."""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from etils import epath
from hf_folders import write_folder

from contrastive_jax.config import UserError
from contrastive_jax.evals import mteb, sts
from contrastive_jax.evals.task import Options
from contrastive_jax.inference import text_model
from contrastive_jax.inference.tokenize import NO_SIDE


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UserError, match=r"pip install 'contrastive_jax\[mteb\]'"):
        mteb.TASK.score(None, None, Options())


@pytest.mark.filterwarnings("default")
def test_a_task_of_mteb_equals_sts(tmp_path: pathlib.Path) -> None:
    package = pytest.importorskip("mteb")
    model = text_model.load(f"hf:{write_folder(tmp_path / 'bert', 'bert')}")
    assert isinstance(mteb.MtebModel(model), package.EncoderProtocol)
    vocabulary, rng = "the cat dog sat ran on a mat hat".split(), np.random.default_rng(0)
    texts = [" ".join(rng.choice(vocabulary, 5)) for _ in range(60)]
    data = tmp_path / "stsb"
    data.mkdir()
    lines = [f"{rng.uniform(0, 5):.3f}\t{a}\t{b}\n" for a, b in zip(texts[:30], texts[30:], strict=True)]
    (data / "dev.tsv").write_text("".join(lines))
    with pytest.raises(UserError, match=r"STSBenchmark is scored on test; that .tsv is not there"):
        mteb.TASK.score(model, epath.Path(data), Options())
    (data / "dev.tsv").rename(data / "test.tsv")
    rows = mteb.TASK.score(model, epath.Path(data), Options(mteb_results=str(tmp_path / "results")))
    own = sts.TASK.score(model, epath.Path(data), Options())
    assert rows["STSBenchmark"]["main_score"] == pytest.approx(own["test"]["spearman"], abs=1e-4)
    # mteb itself reads what was written.
    stored = package.ResultCache(tmp_path / "results").load_results(include_remote=False).model_results
    assert [(result.model_name, result.model_revision) for result in stored] == [
        ("contrastive_jax/bert", model.parameters_digest)
    ]
    (result,) = stored[0].task_results
    assert result.task_name == "STSBenchmark"
    assert result.get_score() == pytest.approx(rows["STSBenchmark"]["main_score"], abs=5e-6)  # it writes five digits
    with pytest.raises(UserError, match=r"--mteb_results=gs://b/r: mteb writes to local folders only; give one"):
        mteb.TASK.score(model, epath.Path(data), Options(mteb_results="gs://b/r"))
    with pytest.raises(UserError, match=r"--mteb=STSBenchmrk: 'STSBenchmrk' not found. Did you mean: 'STSBenchmark'"):
        mteb.TASK.score(model, None, Options(mteb=["STSBenchmrk"]))
    with pytest.raises(UserError, match=r"absent: no such folder"):
        mteb.TASK.open_data(model, str(tmp_path / "absent"), Options())


@pytest.mark.filterwarnings("default")
def test_mteb_says_which_texts_are_documents(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("mteb")
    views = []

    def encode(self: text_model.TextModel, texts: Sequence[str], view: str = "query") -> np.ndarray:
        views.append((view, list(texts)))
        return np.zeros((len(texts), 2), np.float32)

    monkeypatch.setattr(text_model.TextModel, "encode", encode)
    folder = write_folder(tmp_path / "bert", "bert")
    sts, search = (package.get_task(name).metadata for name in ("STSBenchmark", "NFCorpus"))

    def views_of(metadata: object) -> list[str]:
        views.clear()
        model = mteb.MtebModel(text_model.load(f"hf:{folder}"))
        for prompt in (None, *package.types.PromptType):
            model.encode([{"text": ["a", "b"]}, {"text": ["c"]}], task_metadata=metadata, prompt_type=prompt)
        assert all(texts == ["a", "b", "c"] for _, texts in views)
        return [view for view, _ in views]

    assert views_of(sts) == [NO_SIDE, "query", "document"]
    prompts = {"STS": "a ", "Retrieval-query": "the ", "NFCorpus-document": "hat "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    assert views_of(sts) == ["STS"] * 3
    assert views_of(search) == [NO_SIDE, "Retrieval-query", "NFCorpus-document"]


def test_the_protocol_knows_the_data_of_folders_in_folders(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("mteb")
    (tmp_path / "STS12").mkdir()
    seen = set()
    for text in ("1\ta\tb\n", "2\ta\tb\n"):
        (tmp_path / "STS12" / "test.tsv").write_text(text)
        seen.add(mteb.TASK.protocol(None, epath.Path(tmp_path), Options())["data"])
    assert len(seen) == 2


def test_benchmarks_are_found_by_name() -> None:
    package = pytest.importorskip("mteb")
    assert mteb.split_names("MTEB(eng, v2), STS12,NanoBEIR") == ["MTEB(eng, v2)", "STS12", "NanoBEIR"]
    for name in ("MTEB(eng, v2)", "NanoBEIR"):
        expected = [task.metadata.name for task in package.get_benchmark(name).tasks]
        assert [task.metadata.name for task in mteb.find_tasks(name)] == expected and len(expected) > 10
    with pytest.raises(UserError, match=r"--mteb=MTEB\(eng, v3\): 'MTEB\(eng, v3\)' not found. Did you mean: "):
        mteb.find_tasks("MTEB(eng, v3)")


def test_means_of_a_benchmark_are_over_tasks_and_over_their_types() -> None:
    package = pytest.importorskip("mteb")
    tasks = [package.get_task(name) for name in ("STS12", "STS13", "NFCorpus")]
    means = mteb.mean_scores(tasks, {"STS12": 0.2, "STS13": 0.4, "NFCorpus": 0.9})
    assert means == {"main_score": pytest.approx(0.5), "mean_of_types": pytest.approx(0.6)}
