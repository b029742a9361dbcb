"""Folders of Hugging Face: the same hidden states, gradients and tensors as in transformers; what is not supported is named."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import recipe
from flax import nnx
from hf_folders import CONFIGS, EXPORTED, POSITIONS, SMALL, TEXTS, TYPES, WORDS, write_folder
from safetensors import numpy as safetensors

from contrastive_jax.config import UserError, default_config
from contrastive_jax.huggingface import families, weights
from contrastive_jax.huggingface import folder as folder_lib
from contrastive_jax.inference import text_model
from contrastive_jax.models import attention, encoder, transformer
from contrastive_jax.runtime.layout import Layout


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_gives_unit_vectors_and_its_tensors_come_back(family: str, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / family, family)
    model = text_model.load(f"hf:{folder}")
    z = model.encode(TEXTS)
    assert z.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    # Each text alone gives the same vector: neither padding nor neighbours matter.
    np.testing.assert_allclose(np.concatenate([model.encode([text]) for text in TEXTS]), z, atol=1e-6)
    assert np.abs(z[0] - z[1]).max() > 0.01
    imported, before = weights.load_transformer(folder), safetensors.load_file(folder / "model.safetensors")
    again = weights.to_hf(family, imported.params, imported.model)
    assert again.keys() == before.keys() - {TYPES}
    if TYPES in before:  # it is folded into the table of positions
        before[POSITIONS] = before[POSITIONS][2 if family == "roberta" else 0 :] + before[TYPES][0]
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)


@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_and_gradients_equal_those_of_transformers(family: str, tmp_path: pathlib.Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = write_folder(tmp_path / family, family)
    hf_model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    imported = weights.load_transformer(folder)
    model = default_config().model
    model.update(imported.model, attention="plain", pooling="mean", max_length=imported.length or 512)
    rng = np.random.default_rng(0)
    tokens, sizes = rng.integers(4, len(WORDS), (5, 24)).astype(np.int32), np.array([24, 3, 17, 9, 1])
    mask = np.arange(24) < sizes[:, None]
    # RoBERTa finds positions by what is not its padding id.
    tokens = np.where(mask, tokens, 1 if family == "roberta" else 0).astype(np.int32)
    hf_model.config.pad_token_id = 1
    if family == "roberta":
        hf_model.embeddings.padding_idx = 1
    direction = rng.normal(size=(5, 16)).astype(np.float32)

    hf_params = {
        name: value.clone().requires_grad_() for name, value in hf_model.state_dict().items() if value.is_floating_point()
    }
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask)}
    hidden = torch.func.functional_call(hf_model, hf_params, (), inputs).last_hidden_state
    mean = (hidden * torch.tensor(mask)[:, :, None]).sum(1) / torch.tensor(sizes)[:, None]
    unit = mean / mean.norm(dim=-1, keepdim=True)
    (unit * torch.tensor(direction)).sum().backward()

    # The states of the Transformer, token by token.
    module = transformer.Transformer(model, len(WORDS), attention.make_attend(model, Layout()), Layout(), nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, imported.params["transformer"])
    nnx.update(module, state)
    states = np.asarray(module(tokens, mask.astype(np.int32))[0])
    np.testing.assert_allclose(states[mask], hidden.detach().numpy()[mask], atol=1e-5)

    jax_model = encoder.make_encoder(model, len(WORDS))
    np.testing.assert_allclose(jax_model.apply(imported.params, tokens, mask), unit.detach().numpy(), atol=1e-5)
    gradient = jax.grad(lambda params: (jax_model.apply(params, tokens, mask) * direction).sum())(imported.params)
    compared = weights.to_hf(family, jax.tree.map(np.asarray, gradient), imported.model)
    for name, tensor in compared.items():
        if "position_embeddings" not in name or family != "roberta":
            expected = hf_params[name].grad
            expected = np.zeros_like(tensor) if expected is None else expected.numpy()
            np.testing.assert_allclose(tensor, expected, atol=1e-4, rtol=1e-4, err_msg=name)


def test_poolings_of_older_and_newer_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    for text, pooling in (
        ('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', "cls"),
        ('{"pooling_mode": "lasttoken"}', "eos"),
        ('{"pooling_mode": "mean"}', "mean"),
        ('{"embedding_dimension": 16}', "mean"),
        ('{"pooling_mode": ["cls"], "pooling_mode_mean_tokens": true}', "cls"),
        ('{"pooling_mode_max_tokens": true}', "max"),
    ):
        path.write_text(text)
        assert folder_lib.read_pooling(path) == pooling


def test_what_a_folder_or_this_encoder_lacks_is_named(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "bert", "bert")

    def message_of(change: dict[str, str | None]) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        for name, text in change.items():
            (copy / name).unlink() if text is None else (copy / name).write_text(text)
        with pytest.raises(UserError) as error:
            text_model.load(f"hf:{copy}")
        shutil.rmtree(copy)
        return str(error.value)

    def config(**values: object) -> dict[str, str | None]:
        return {"config.json": json.dumps(json.loads((folder / "config.json").read_text()) | values)}

    assert "no config.json there" in message_of({"config.json": None})
    assert "model_type='t5'; this encoder reads bert, roberta" in message_of(config(model_type="t5"))
    pickled = {"model.safetensors": None, "pytorch_model.bin": ""}
    assert "no .safetensors there (pickled weights are not read)" in message_of(pickled)
    assert "no tokenizer.json there" in message_of({"tokenizer.json": None})
    assert "hidden_act='relu'" in message_of(config(hidden_act="relu"))
    modern = {"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}
    for values in ({"rope_parameters": modern}, {"rope_scaling": {"type": "yarn", "factor": 4.0}}):
        with pytest.raises(UserError, match="rope_type='yarn'; this encoder knows 'default'"):
            families.modernbert_values(values)
        with pytest.raises(UserError, match="rope_type='yarn'; this encoder knows 'default'"):
            starcoder = {"num_attention_heads": 2, "hidden_size": 8, "rope_parameters": modern["full_attention"]}
            families.starcoder2_values(starcoder | values if "rope_scaling" in values else starcoder)
    assert "position_embedding_type" in message_of(config(position_embedding_type="relative_key"))
    assert "no tensor 'encoder.layer.3." in message_of(config(num_hidden_layers=4))
    assert "not what config.json says" in message_of(config(hidden_size=8))
    pooling = json.dumps({"pooling_mode_weightedmean_tokens": True})
    assert "pooling_mode_weightedmean_tokens; this encoder knows" in message_of({"1_Pooling/config.json": pooling})
    newer = {"1_Pooling/config.json": '{"pooling_mode": "weightedmean"}'}
    assert "by weightedmean; this encoder knows mean, max, cls, lasttoken" in message_of(newer)
    modules = json.dumps([{"type": "sentence_transformers.models.CNN", "path": "2_CNN"}])
    assert "module CNN; this encoder has" in message_of({"modules.json": modules})


def test_a_written_config_is_read_as_the_same_model() -> None:
    for name, (recipe_name, changed) in EXPORTED.items():
        if name == "bag":
            continue
        config = recipe(recipe_name, *["s"] * (recipe_name == "cpt_text")).model
        config.update(SMALL | changed)
        model = config.to_dict()
        family, written = families.family_of(model)
        assert family == name
        values = families.FAMILIES[name].to_values(json.loads(json.dumps(written)))
        assert {key for key, value in values.items() if model[key] != value} <= {"bias", "embedding_dim"}
