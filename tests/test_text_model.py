"""Models of others: the same vectors from their folders, and what is not supported is said."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from conftest import evaluation, finish, start
from etils import epath
from flax import nnx
from safetensors import numpy as safetensors

from configs import base
from contrastive_jax import encode, text_model
from contrastive_jax.models import attention, encoder, hf, transformer
from contrastive_jax.models.layout import Layout

WORDS = "[PAD] [UNK] [CLS] [SEP] the cat dog sat ran on a mat hat red blue big small one two".split()
SMALL = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24)
CONFIGS = {
    "bert": SMALL | dict(max_position_embeddings=40, type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12),
    "roberta": SMALL | dict(max_position_embeddings=42, type_vocab_size=1, hidden_act="gelu", layer_norm_eps=1e-5),
    "distilbert": dict(vocab_size=len(WORDS), dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=40),
    "gpt2": dict(vocab_size=len(WORDS), n_embd=16, n_layer=3, n_head=4, n_positions=40),
    "modernbert": SMALL | dict(local_attention=8, global_attn_every_n_layers=2, max_position_embeddings=40),
}
SPECIAL = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
TEXTS = ["the cat sat on a mat", "a red hat", "one big dog ran", "blue"]


def write_folder(folder: pathlib.Path, family: str) -> pathlib.Path:
    """A model of random weights with a tokenizer of words, as sentence-transformers writes one."""
    folder.mkdir()
    config = CONFIGS[family] | SPECIAL | {"model_type": family}
    (folder / "config.json").write_text(json.dumps(config))
    model = base.get_config().model
    model.update(hf.FAMILIES[family].config(config), attention="plain")
    length = 40
    made = encoder.make(model, len(WORDS), length)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), made.init(jax.random.key(0)))
    tensors = hf.theirs(family, params, model.to_dict())
    if family == "roberta":
        tensors[POSITIONS] = np.concatenate([np.ones((2, 16), np.float32), tensors[POSITIONS]])
    if family in ("bert", "roberta"):
        types = CONFIGS[family]["type_vocab_size"]
        tensors[TYPES] = np.random.default_rng(1).normal(size=(types, 16)).astype(np.float32)
    safetensors.save_file(tensors, folder / "model.safetensors")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words.save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in MODULES]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


MODULES = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_gives_unit_vectors_and_its_tensors_come_back(family: str, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / family, family)
    model = text_model.open_model(f"hf:{folder}")
    z = model.encode(TEXTS)
    assert z.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    # Each text alone gives the same vector: neither padding nor neighbours matter.
    np.testing.assert_allclose(np.concatenate([model.encode([text]) for text in TEXTS]), z, atol=1e-6)
    assert np.abs(z[0] - z[1]).max() > 0.01
    found, before = hf.load(folder), safetensors.load_file(folder / "model.safetensors")
    again = hf.theirs(family, found.params, found.model)
    assert again.keys() == before.keys() - {TYPES}
    if TYPES in before:  # what every token has is in the table of positions
        before[POSITIONS] = before[POSITIONS][2 if family == "roberta" else 0 :] + before[TYPES][0]
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)


@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_and_gradients_equal_those_of_transformers(family: str, tmp_path: pathlib.Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = write_folder(tmp_path / family, family)
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    found = hf.load(folder)
    model = base.get_config().model
    model.update(found.model, attention="plain", pooling="mean")
    rng = np.random.default_rng(0)
    tokens, sizes = rng.integers(4, len(WORDS), (5, 24)).astype(np.int32), np.array([24, 3, 17, 9, 1])
    mask = np.arange(24) < sizes[:, None]
    # RoBERTa finds positions by what is not its padding id.
    tokens = np.where(mask, tokens, 1 if family == "roberta" else 0).astype(np.int32)
    theirs.config.pad_token_id = 1
    if family == "roberta":
        theirs.embeddings.padding_idx = 1
    direction = rng.normal(size=(5, 16)).astype(np.float32)

    given = {name: value.clone().requires_grad_() for name, value in theirs.state_dict().items() if value.is_floating_point()}
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask)}
    hidden = torch.func.functional_call(theirs, given, (), inputs).last_hidden_state
    mean = (hidden * torch.tensor(mask)[:, :, None]).sum(1) / torch.tensor(sizes)[:, None]
    unit = mean / mean.norm(dim=-1, keepdim=True)
    (unit * torch.tensor(direction)).sum().backward()

    # What the Transformer gives, token by token.
    module = transformer.Transformer(model, len(WORDS), 40, attention.make(model, Layout()), Layout(), nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, found.params["transformer"])
    nnx.update(module, state)
    states = np.asarray(module(tokens, mask.astype(np.int32)))
    np.testing.assert_allclose(states[mask], hidden.detach().numpy()[mask], atol=1e-5)

    ours = encoder.make(model, len(WORDS), 40)
    np.testing.assert_allclose(ours.apply(found.params, tokens, mask), unit.detach().numpy(), atol=1e-5)
    gradient = jax.grad(lambda params: (ours.apply(params, tokens, mask) * direction).sum())(found.params)
    compared = hf.theirs(family, jax.tree.map(np.asarray, gradient), found.model)
    for name, tensor in compared.items():
        if "position_embeddings" not in name or family != "roberta":
            expected = given[name].grad
            expected = np.zeros_like(tensor) if expected is None else expected.numpy()
            np.testing.assert_allclose(tensor, expected, atol=1e-4, rtol=1e-4, err_msg=name)


def test_what_a_folder_lacks_or_we_lack_is_named(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "bert", "bert")

    def broken(change: dict[str, str | None]) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        for name, text in change.items():
            (copy / name).unlink() if text is None else (copy / name).write_text(text)
        with pytest.raises(ValueError) as error:
            text_model.open_model(f"hf:{copy}")
        shutil.rmtree(copy)
        return str(error.value)

    def config(**values: object) -> dict[str, str | None]:
        return {"config.json": json.dumps(json.loads((folder / "config.json").read_text()) | values)}

    assert "no config.json there" in broken({"config.json": None})
    assert "model_type='t5'; this encoder reads bert, roberta" in broken(config(model_type="t5"))
    pickled = {"model.safetensors": None, "pytorch_model.bin": ""}
    assert "no .safetensors there (pickled weights are not read)" in broken(pickled)
    assert "no tokenizer.json there" in broken({"tokenizer.json": None})
    assert "hidden_act='relu'" in broken(config(hidden_act="relu"))
    assert "position_embedding_type" in broken(config(position_embedding_type="relative_key"))
    assert "no tensor 'encoder.layer.3." in broken(config(num_hidden_layers=4))
    assert "not what config.json says" in broken(config(hidden_size=8))
    pooling = json.dumps({"pooling_mode_max_tokens": True})
    assert "pooling_mode_max_tokens; this encoder knows" in broken({"1_Pooling/config.json": pooling})
    modules = json.dumps([{"type": "sentence_transformers.models.CNN", "path": "2_CNN"}])
    assert "module CNN; this encoder has" in broken({"modules.json": modules})


def test_the_command_on_a_folder(tmp_path: pathlib.Path) -> None:
    folder, data = write_folder(tmp_path / "bert", "bert"), tmp_path / "sts"
    data.mkdir()
    (data / "dev.tsv").write_text("5\tthe cat\tthe cat\n1\ta red hat\tone big dog\n3\ta mat\ta blue mat\n")
    more = ["--tasks=sts", f"--data={data}", f"--json={tmp_path}/sts.json"]
    output = finish(start(evaluation(f"--model=hf:{folder}", *more)))[0]
    assert "spearman" in output
    result = json.loads((tmp_path / "sts.json").read_text())
    assert result["protocol"]["pooling"] == "mean" and len(result["protocol_hash"]) == 16
    assert result["results"]["dev"]["spearman"] <= 1


def test_encode_writes_rows_in_their_order(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model.open_model(f"hf:{write_folder(tmp_path / 'bert', 'bert')}")
    folder = epath.Path(tmp_path)
    texts = [" ".join(np.random.default_rng(i).choice(WORDS[4:], 1 + i % 30)) for i in range(100)]
    source, out = folder / "texts.txt", folder / "z.npy"
    source.write_text("\n".join(texts) + "\n")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(encode, "BLOCK", 33)
    z = model.encode(texts)
    for name in ("texts.txt", "texts.jsonl"):
        encode.encode(model, folder / name, out)
        np.testing.assert_allclose(np.load(out), z, atol=1e-6)
    encode.encode(model, source, out, "float16", dim=8)
    assert np.load(out).dtype == np.float16
    np.testing.assert_allclose(np.load(out), z[:, :8] / np.linalg.norm(z[:, :8], axis=1, keepdims=True), atol=1e-3)
    encode.encode(model, source, out, "int8")
    np.testing.assert_allclose(np.load(out) / 127, z, atol=0.51 / 127)
    encode.encode(model, source, out, "binary")
    np.testing.assert_array_equal(np.unpackbits(np.load(out), axis=1), z > 0)
    (folder / "bad.jsonl").write_text('{"text": "the cat"}\n{"text": 3}\n')
    (folder / "empty.txt").write_text("")
    for arguments, message in (
        ((folder / "bad.jsonl", out), "bad.jsonl:2: text is not a string"),
        ((folder / "empty.txt", out), "empty.txt: no line there"),
        ((source, out, "float32", 17), "--dim=17: the model's vectors have 16 coordinates"),
        ((source, folder / "z.bin"), "give a .npy in a folder that is there"),
        ((folder / "absent", out), "no such file"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            encode.encode(model, *arguments)
