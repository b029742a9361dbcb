"""Exported runs: the folder reads back the same, and sentence-transformers and transformers load it as it is."""

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from hf_folders import EXPORTED, write_folder, write_run

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.huggingface import fast_tokenizer
from contrastive_jax.inference import batching, export, text_model, tokenize

TEXT = "The quick brown fox jumps over the lazy dog, 0123456789 times.\n\tdef f(x): return [x]\n</s> <0xAF> PAD y\n"
TEXTS = [*export.SAMPLES[:-1], "the lazy dog " * 4, "\n\n\n\t\t\tx", ""]


@pytest.fixture(scope="module")
def trained() -> tokenizer.Tokenizer:
    return tokenizer.train([f"{TEXT} {i} {TEXT[i:]}" for i in range(60)], 328)


# The encoders of the slow ones are also exported in test_every_recipe_exports.py.
@pytest.fixture(
    scope="module",
    params=[pytest.param(family, marks=[pytest.mark.slow] * (family in ("gpt2", "modernbert"))) for family in EXPORTED],
)
def model(
    request: pytest.FixtureRequest, trained: tokenizer.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> text_model.TextModel:
    folder = tmp_path_factory.mktemp(request.param)
    write_run(folder, request.param, trained)
    return text_model.load(str(folder))


@pytest.mark.parametrize("view", ["both", "document"])
def test_an_export_reads_back_as_the_same_model(model: text_model.TextModel, view: str, tmp_path: pathlib.Path) -> None:
    config = model.config
    assert config is not None
    out = tmp_path / "out"
    out.mkdir()
    export.write(model, config, out, view)
    again = text_model.load(str(out))
    # With prompts a truncated text loses its closing delimiter.
    texts = TEXTS if config.data.delimiters and view == "both" else [*TEXTS, export.SAMPLES[-1]]
    for name in tokenize.VIEWS:
        if view in ("both", name):
            assert again.tokenize(texts, name) == model.tokenize(texts, name)
            np.testing.assert_allclose(again.encode(texts, name), model.encode(texts, name), atol=1e-6)
    card = (out / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert ("encode_query" in card) == (view == "both" and config.data.delimiters)


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
def test_sentence_transformers_and_transformers_load_it(model: text_model.TextModel, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch"), pytest.importorskip("sentence_transformers")
    import torch
    import transformers

    folder = tmp_path / "out"
    export.export(model, folder)  # which compares the vectors
    assert model.config is not None
    if model.config.model.num_layers:
        hf_model = transformers.AutoModel.from_pretrained(folder).eval()
        hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompts = [fast_tokenizer.PROMPTS["query"] + text for text in ("the lazy dog", "a fox")]
        rows = hf_tokenizer(prompts, padding=True, return_tensors="pt")
        assert [row[: int(n)].tolist() for row, n in zip(rows["input_ids"], rows["attention_mask"].sum(1), strict=True)] == (
            model.tokenize(["the lazy dog", "a fox"])
        )
        with torch.no_grad():
            assert hf_model(rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state.shape[2] == 16


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("family", ["bag", "bert"])
def test_special_tokens_of_a_tokenizer_json_are_text_in_a_text(family: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", family, tokenizer.load(write_folder(tmp_path / "hf", "bert")))
    model = text_model.load(str(tmp_path / "run"))
    export.export(model, tmp_path / "out")  # where sentence-transformers is, SAMPLES have the same vectors there
    text = "the [SEP] cat [PAD] sat"
    assert text_model.load(str(tmp_path / "out")).tokenize([text]) == model.tokenize([text])
    assert model.tokenize([text]) != model.tokenize(["the cat sat"])


def test_token_weights_of_a_bag_are_multiplied_into_its_embeddings(
    trained: tokenizer.Tokenizer, tmp_path: pathlib.Path
) -> None:
    for name, changes in {"run": {"embedding_dim": 0}, "projected": {}}.items():
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, "bag", trained, token_weights=True, **changes)
    model = text_model.load(str(tmp_path / "run"))
    export.export(model, tmp_path / "out")  # where sentence-transformers is, SAMPLES have the same vectors there
    np.testing.assert_allclose(text_model.load(str(tmp_path / "out")).encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    plain = text_model.load(str(tmp_path / "run"))
    plain.params["token_weight"] = np.zeros_like(plain.params["token_weight"])
    assert np.abs(plain.encode(TEXTS) - model.encode(TEXTS)).max() > 1e-2
    with pytest.raises(UserError, match=r"that has token_weights=False \(is True\)"):
        export.export(text_model.load(str(tmp_path / "projected")), tmp_path / "other")


def test_a_modernbert_without_windows_has_global_layers_only(
    trained: tokenizer.Tokenizer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window of 0, transformers lets a token of a local layer see itself alone."""
    write_run(tmp_path, "modernbert", trained, local_window=0, global_every=3, num_layers=2)
    precision = []
    embed = batching.embed_ragged

    def spy(*args: Any) -> np.ndarray:
        precision.append(jax.config.jax_default_matmul_precision)
        return embed(*args)

    monkeypatch.setattr(batching, "embed_ragged", spy)
    export.export(text_model.load(str(tmp_path)), tmp_path / "out")  # compares the vectors, where sentence-transformers is
    assert json.loads((tmp_path / "out" / "config.json").read_text())["global_attn_every_n_layers"] == 1
    # On GPUs and TPUs products of float32 are rounded, and no export would pass.
    assert set(precision) == ({"highest"} if importlib.util.find_spec("sentence_transformers") else set())


def test_what_transformers_lacks_is_named(trained: tokenizer.Tokenizer, tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, "starcoder2", trained, final_norm=False)
    run = text_model.load(str(tmp_path))
    with pytest.raises(UserError, match=r"to match starcoder2, set final_norm=True \(now False\)"):
        export.export(run, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        export.export(run, tmp_path / "out")
    with pytest.raises(UserError, match="give the workdir of a training run"):
        export.export(dataclasses.replace(run, config=None), tmp_path / "other")
