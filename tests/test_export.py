"""A run for everybody: the folder reads back the same, and sentence-transformers and transformers load it as it is."""

import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import recipe
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import checkpoint, export, text_model
from contrastive_jax.data import fast_tokenizer, tokenizer
from contrastive_jax.models import encoder, families

SMALL = dict(num_layers=2, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=24, attention="plain", dtype="float32")
TEXT = "The quick brown fox jumps over the lazy dog, 0123456789 times.\n\tdef f(x): return [x]\n</s> <0xAF> PAD y\n"
TEXTS = [*export.SAMPLES[:-1], "the lazy dog " * 4, "\n\n\n\t\t\tx", ""]
# What each family is written from, and its name.
MODELS = {
    "bert": ("bert_base", {}),
    "gpt2": ("cpt_text", {"mlp": "gelu_exact"}),
    "modernbert": ("modern_base", {}),
    "starcoder2": ("debug", {"final_norm": True, "num_kv_heads": 2, "embedding_dim": 8}),
    "bag": ("pile_small", {"num_layers": 0, "embedding_dim": 8}),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("words")
    made = tokenizer.train([f"{TEXT} {i} {TEXT[i:]}" for i in range(60)], 328)
    (folder / tokenizer.Tokenizer.file).write_bytes(made.model)
    return folder


def make(folder: pathlib.Path, name: str, **changed: object) -> text_model.TextModel:
    """A run of random weights, as `open_model` gives it."""
    recipe_name, other = MODELS[name]
    config = recipe(recipe_name, *["s"] * (recipe_name == "cpt_text"))
    config.model.update(SMALL | other)
    config.data.update(length=200)
    config.model.update(changed)
    made = encoder.make(config.model, 384, config.data.length)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), made.init(jax.random.key(0)))
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    state = {"params": {"encoder": params}}
    writer = checkpoint.Checkpoints(epath.Path(folder), keep=1)
    writer.save(1, {"config": {}}, **state)
    writer.wait()
    writer.close()
    return text_model.open_model(str(folder))


# The slow ones' encoders go the same way in test_warm_start.py.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in ("gpt2", "modernbert"))) for name in MODELS]
)
def model(
    request: pytest.FixtureRequest, words: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> text_model.TextModel:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / tokenizer.Tokenizer.file).write_bytes((words / tokenizer.Tokenizer.file).read_bytes())
    return make(folder, request.param)


@pytest.mark.parametrize("view", ["both", "document"])
def test_an_export_reads_back_as_the_same_model(model: text_model.TextModel, view: str, tmp_path: pathlib.Path) -> None:
    config = model.config
    assert config is not None
    out = tmp_path / "out"
    out.mkdir()
    export.write(model, config, out, view)
    again = text_model.open_model(str(out))
    # With prompts a text that is cut loses its closing delimiter.
    texts = TEXTS if config.data.delimiters and view == "both" else [*TEXTS, export.SAMPLES[-1]]
    for number, name in enumerate(text_model.VIEWS):
        if view in ("both", name):
            assert again.tokenize(texts, number) == model.tokenize(texts, number)
            np.testing.assert_allclose(again.encode(texts, number), model.encode(texts, number), atol=1e-6)
    card = (out / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert ("encode_query" in card) == (view == "both" and config.data.delimiters)


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
def test_others_load_it_without_us(model: text_model.TextModel, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch"), pytest.importorskip("sentence_transformers")
    import torch
    import transformers

    folder = tmp_path / "out"
    export.export(model, folder)  # which compares the vectors
    assert model.config is not None
    if model.config.model.num_layers:
        theirs = transformers.AutoModel.from_pretrained(folder).eval()
        words = transformers.AutoTokenizer.from_pretrained(folder)
        prompts = [fast_tokenizer.PROMPTS["query"] + text for text in ("the lazy dog", "a fox")]
        rows = words(prompts, padding=True, return_tensors="pt")
        assert [row[: int(n)].tolist() for row, n in zip(rows["input_ids"], rows["attention_mask"].sum(1), strict=True)] == (
            model.tokenize(["the lazy dog", "a fox"], 0)
        )
        with torch.no_grad():
            assert theirs(rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state.shape[2] == 16


def test_what_transformers_lacks_is_named(words: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / tokenizer.Tokenizer.file).write_bytes((words / tokenizer.Tokenizer.file).read_bytes())
    run = make(tmp_path, "starcoder2", final_norm=False)
    with pytest.raises(ValueError, match=r"starcoder2 with final_norm=True \(is False\)"):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already"):
        export.export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="give the workdir of a training run"):
        export.export(run._replace(config=None), tmp_path / "other")


def test_every_family_that_is_written_says_what_it_was_told() -> None:
    for name, (recipe_name, other) in MODELS.items():
        if name == "bag":
            continue
        config = recipe(recipe_name, *["s"] * (recipe_name == "cpt_text")).model
        config.update(SMALL | other)
        model = ConfigDict(config).to_dict()
        found, written = families.family_of(model)
        assert found == name
        read = families.FAMILIES[name].config(json.loads(json.dumps(written)))
        assert {key for key, value in read.items() if model[key] != value} <= {"bias", "embedding_dim"}
