"""Token losses and noisy views, on the debug recipe. What differs from the sources is in docs/systems.md.

    bash launch/local.sh --config=configs/noise.py:mlm

From tokens alone, as starts for other runs (config.init_from): mlm (RoBERTa, arXiv 1907.11692), wwm (of whole words), bert (mlm
with next-sentence prediction, 1810.04805), spanbert (1907.10529), replaced (CoLE; near ELECTRA, 2003.10555), lm (GPT). With
pairs: clear (2012.15466), infoword (1910.08350).
"""

from ml_collections import ConfigDict

from configs import debug
from contrastive_jax.config import with_variant

ALONE = {"objective.weight": 0.0, "guard.effective_rank_stop": 0.0, "guard.embedding_std_stop": 0.0}
# 20 places are enough for 15 % of two joined spans.
MLM = ALONE | {"noise.ops": (("mask", 0.15),), "tokens.name": "mlm", "tokens.head": "mlp", "tokens.positions": 20}
NEXT_SENTENCE = {"data.random_next": 0.5, "objective.name": "softmax", "objective.weight": 1.0}
TWO_TEXTS = {"data.join": "next", "data.order": "kept", "model.part_mask": "full", "model.pooling": "cls"}
COPIES = {"data.sampler": "span", "data.copies": 2}
VARIANTS = {
    "mlm": MLM,
    "wwm": MLM | {"noise.unit": "word"},
    "bert": MLM | NEXT_SENTENCE | TWO_TEXTS,
    "spanbert": MLM | {"noise.unit": "span"},
    "replaced": ALONE | {"noise.ops": (("replace", 0.1),), "tokens.name": "replaced"},
    "lm": ALONE | {"tokens.name": "lm", "model.causal": True, "model.pooling": "eos"},
    "clear": COPIES | {"noise.ops": (("delete", 0.3), ("replace", 0.1)), "noise.unit": "span"},
    "infoword": COPIES | {"noise.ops": (("ngram", 5.0),), "tokens.name": "mlm", "tokens.positions": 20},
}


def get_config(variant: str = "mlm") -> ConfigDict:
    return with_variant(debug.with_whole_block(), VARIANTS, variant)
