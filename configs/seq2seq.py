"""One encoder that also writes: the second text of a row from the first (UniLM's mask, arXiv 1905.03197); docs/systems.md.

    bash launch/local.sh --config=configs/seq2seq.py:simbert
    contrastive-jax generate --model=runs/seq2seq-simbert --input=texts.txt --output=pairs.jsonl

A text from its noisy copy, without pairs: bart (1910.13461), t5 (1910.10683), tsdae (2104.06979); from a few numbers: univae
(kexue.fm/archives/8475). One text of a pair from the other, with NT-Xent: simbert (7427), roformer_sim (8454).
"""

from ml_collections import ConfigDict

from configs import debug, noise
from contrastive_jax.config import with_variant

REWRITE = noise.ALONE | noise.COPIES | {"data.join": "next", "tokens.name": "seq2seq", "noise.views": (0,)}
FIXED = {"objective.pairing": "both", "objective.temperature_trainable": False, "model.pooling": "cls"}
SIMBERT = FIXED | {"data.join": "both", "tokens.name": "seq2seq", "objective.temperature": 1 / 30}
MASKED_SOURCE = {"noise.ops": (("mask", 0.15),), "noise.unit": "word", "noise.exact": False, "noise.clean_rows": 0.5}
BOTTLENECK = {"model.part_mask": "bottleneck", "model.pooling": "cls"}
VARIANTS = {
    "bart": REWRITE | {"noise.ops": (("permute", 1.0), ("infill", 0.3)), "noise.unit": "word"},
    "t5": REWRITE | {"noise.ops": (("sentinel", 0.15),), "noise.views": ()},
    "tsdae": REWRITE | BOTTLENECK | {"noise.ops": (("delete", 0.6),)},
    "univae": REWRITE | BOTTLENECK | {"model.latent": 16, "model.num_layers": 4, "data.max_span": 30, "data.min_span": 30},
    "simbert": SIMBERT,
    "roformer_sim": SIMBERT | MASKED_SOURCE | {"objective.temperature": 1 / 20, "model.dropout": 0.2},
}


def get_config(variant: str = "simbert") -> ConfigDict:
    return with_variant(debug.with_whole_block(), VARIANTS, variant)
