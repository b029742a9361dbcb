"""Small models with random weights: Hugging Face folders as sentence-transformers writes them, and runs."""

import json
import pathlib

import jax
import numpy as np
import tokenizers
from conftest import recipe
from etils import epath
from safetensors import numpy as safetensors

from contrastive_jax.config import default_config
from contrastive_jax.data import tokenizer as tokenizer_lib
from contrastive_jax.huggingface import weights
from contrastive_jax.models import encoder
from contrastive_jax.runtime import checkpoint

WORDS = "[PAD] [UNK] [CLS] [SEP] the cat dog sat ran on a mat hat red blue big small one two".split()
HF_SIZES = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24)
CONFIGS = {
    "bert": HF_SIZES | dict(max_position_embeddings=40, type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12),
    "roberta": HF_SIZES | dict(max_position_embeddings=42, type_vocab_size=1, hidden_act="gelu", layer_norm_eps=1e-5),
    "distilbert": dict(vocab_size=len(WORDS), dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=40),
    "gpt2": dict(vocab_size=len(WORDS), n_embd=16, n_layer=3, n_head=4, n_positions=40),
    "modernbert": HF_SIZES | dict(local_attention=8, global_attn_every_n_layers=2, max_position_embeddings=40),
}
SPECIAL = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
TEXTS = ["the cat sat on a mat", "a red hat", "one big dog ran", "blue"]


# config.model of a small run.
SMALL = dict(num_layers=2, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=24, attention="plain", dtype="float32")
# Family of an export → a recipe of that family, and what a small run of it changes in config.model.
EXPORTED: dict[str, tuple[str, dict]] = {
    "bert": ("bert_base", {"dense": ((12, "tanh", True), (8, "identity", False))}),
    "gpt2": ("cpt_text", {"mlp": "gelu_exact"}),
    "modernbert": ("modern_base", {}),
    "starcoder2": ("debug", {"num_kv_heads": 2, "head_dim": 6, "embedding_dim": 8, "token_weights": True}),
    "bag": ("pile_small", {"num_layers": 0, "embedding_dim": 8}),
}


def random_params(model: encoder.Encoder, noise: float) -> dict:
    """Initial parameters with noise on them, so that no bias is 0 and no scale is 1."""
    initial = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + noise * jax.random.normal(jax.random.key(x.size), x.shape), initial)


def write_run(
    folder: pathlib.Path, family: str, tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer, **changed: object
) -> None:
    """Writes the workdir of a run of one of EXPORTED, with random weights, a vocabulary of 384 and texts of 200 tokens."""
    name, values = EXPORTED[family]
    config = recipe(name)
    config.model.update(SMALL | values | {"max_length": 200} | changed)
    config.data.length = 66
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / tokenizer.file).write_bytes(tokenizer.model)
    writer = checkpoint.Checkpoints(epath.Path(folder), keep=1)
    writer.save(1, {"config": {}}, params={"encoder": random_params(encoder.make_encoder(config.model, 384), 0.2)})
    writer.wait()
    writer.close()


def write_folder(folder: pathlib.Path, family: str) -> pathlib.Path:
    """Writes a model of random weights with a tokenizer of WORDS, as sentence-transformers does."""
    folder.mkdir()
    config = CONFIGS[family] | SPECIAL | {"model_type": family}
    (folder / "config.json").write_text(json.dumps(config))
    model = default_config().model
    model.update(weights.FAMILIES[family].to_values(config), attention="plain")
    model.max_length = 40
    params = random_params(encoder.make_encoder(model, len(WORDS)), 0.1)
    tensors = weights.to_hf(family, params, model.to_dict())
    if family == "roberta":
        tensors[POSITIONS] = np.concatenate([np.ones((2, 16), np.float32), tensors[POSITIONS]])
    if family in ("bert", "roberta"):
        types = CONFIGS[family]["type_vocab_size"]
        tensors[TYPES] = np.random.default_rng(1).normal(size=(types, 16)).astype(np.float32)
    safetensors.save_file(tensors, folder / "model.safetensors")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in MODULES]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


MODULES = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
