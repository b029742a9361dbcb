"""Encoders without self-attention, on the debug recipe: each mixes the tokens of a row in its own way.

    bash launch/local.sh --config=configs/mixers.py:fnet

The paper of each, and what differs from it, is in docs/systems.md.
"""

from ml_collections import ConfigDict

from configs import debug, noise
from contrastive_jax.config import with_variant

RNN = {"model.mixer": "lstm", "model.mlp": "none", "model.norm": "affine", "model.position": "none", "model.final_norm": False}
VARIANTS = {
    "fnet": {"model.mixer": "fourier", "model.norm_position": "post", "model.embedding_norm": True, "model.final_norm": False},
    "resmlp": {"model.mixer": "linear", "model.norm": "affine"},
    "mixer": {"model.mixer": "mlp"},
    "gmlp": {"model.mixer": "gmlp", "model.mlp": "none", "model.position": "none", "model.d_ff": 1024},
    "amlp": {"model.mixer": "amlp", "model.mlp": "none", "model.position": "none", "model.d_ff": 1024},
    "external": {"model.mixer": "external", "model.num_heads": 1, "model.num_kv_heads": 1},
    "conv": {"model.mixer": "conv", "model.local_window": 3},
    "bilstm": RNN | {"model.pooling": "max"},
    "elmo": RNN | noise.ALONE | {"tokens.name": "bilm", "model.num_layers": 2, "model.zero_init_branches": False},
}


def get_config(variant: str = "gmlp") -> ConfigDict:
    config = debug.get_config()
    config.model.update(max_length=64, position="learned")
    return with_variant(config, VARIANTS, variant)
