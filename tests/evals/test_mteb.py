"""MTEB's own tasks."""

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
    rows = mteb.TASK.score(model, epath.Path(data), Options())
    own = sts.TASK.score(model, epath.Path(data), Options())
    assert rows["STSBenchmark"]["main_score"] == pytest.approx(own["test"]["spearman"], abs=1e-4)
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
    model = text_model.load(f"hf:{write_folder(tmp_path / 'bert', 'bert')}")
    for prompt in (None, *package.types.PromptType):
        mteb.MtebModel(model).encode([{"text": ["a", "b"]}, {"text": ["c"]}], task_metadata=None, prompt_type=prompt)
    assert views == [("query", ["a", "b", "c"]), ("query", ["a", "b", "c"]), ("document", ["a", "b", "c"])]
