"""Mutual information between parts of a text, on the debug recipe: its bounds, and what is paired with what.

    bash launch/local.sh --config=configs/information.py:dv

Other bounds: dv, mine (arXiv 1801.04062), nwj (1905.06922), jsd (1808.06670). Other pairs: simclr (2002.05709), cmc
(1906.05849), cpc (1807.03748), dim: a span and its own token states (1808.06670). docs/systems.md says more.
"""

from ml_collections import ConfigDict

from configs import debug
from contrastive_jax.config import with_variant

JSD = {"objective.name": "jsd", "objective.temperature": 0.1, "objective.bias": -3.0}
# Bounds whose temperature is trained overfit: query-key top-5 falls by 2 points (docs/systems.md).
FIXED = {"objective.temperature": 0.1, "objective.temperature_trainable": False}
CPC = {"objective.pairing": "all", "objective.context": 256, "objective.symmetric": False}
VARIANTS = {
    "dv": FIXED | {"objective.name": "dv"},
    "mine": FIXED | {"objective.name": "mine"},
    "nwj": FIXED | {"objective.name": "nwj", "objective.bias": 0.0},
    "jsd": JSD,
    "simclr": {"data.sampler": "span", "data.copies": 2, "objective.pairing": "both"},
    "cmc": {"objective.pairing": "all", "data.views": 3, "objective.temperature": 0.07},
    "cpc": CPC | {"data.views": 4, "data.order": "kept"},
    "dim": JSD | {"data.sampler": "span", "objective.locals": 8},
}


def get_config(variant: str = "dv") -> ConfigDict:
    return with_variant(debug.get_config(), VARIANTS, variant)
