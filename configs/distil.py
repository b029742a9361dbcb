"""Distillation: a small model learns from a trained one, its teacher, which `--config.memory.source` names.

    bash launch/local.sh
    bash launch/local.sh --config=configs/distil.py

A bag of 64 whose cosines follow the teacher's, in place of a contrastive loss (RoFormer-Sim's second stage, kexue.fm/archives
/8454). `distil.py:tokens` is DistilBERT (arXiv 1910.01108): its teacher is a run of configs/noise.py:mlm, as wide but deeper
(--config.model.num_layers=3). To start from its blocks 0 and 2, say --config.init_from=runs/noise-mlm
--config.init_layers='(0, 2)'.
"""

from ml_collections import ConfigDict

from configs import debug, noise
from contrastive_jax.config import with_variant

SIMILARITY = {"objective.name": "similarity", "model.num_layers": 0, "model.d_model": 64}
VARIANTS = {
    "similarity": SIMILARITY | {"memory.source": "runs/local"},
    "tokens": {"tokens.name": "distil", "memory.source": "runs/noise-mlm"},
}


def get_config(variant: str = "similarity") -> ConfigDict:
    config = noise.get_config("mlm") if variant == "tokens" else debug.get_config()
    config.memory.kind = "frozen"
    return with_variant(config, VARIANTS, variant)
