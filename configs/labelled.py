"""Supervised pairs, five ways, from a run that was trained without labels (--config.init_from=runs/local).

    contrastive-jax prepare --pairs='nli/*.jsonl' --labels=entailment,neutral,contradiction --tokenizer=runs/local \
      --output=data/nli_local
    contrastive-jax train --config=configs/labelled.py:softmax --config.init_from=runs/local --config.labels.classes='(3,)' \
      --config.data.dir=data/nli_local --workdir=runs/nli

infonce: with a hard negative, as in supervised SimCSE (arXiv 2104.08821). softmax: a classifier of [u, v, |u - v|] (SBERT,
1908.10084). rdrop: the same with R-Drop (2106.14448). cosent, cosine: scores, such as those of STS.
"""

from ml_collections import ConfigDict

from configs import debug
from contrastive_jax.config import with_variant

VARIANTS = {
    "infonce": {"data.views": 3, "data.hard_negatives": 1},
    "softmax": {"objective.name": "softmax"},
    "rdrop": {"objective.name": "softmax", "data.copies": 2, "labels.rdrop": 4.0},
    "cosent": {"objective.name": "cosent"},
    "cosine": {"objective.name": "cosine"},
}


def get_config(variant: str = "infonce") -> ConfigDict:
    config = debug.get_config()
    config.update(steps=450, eval_every=0, checkpoint_every=90)
    config.data.update(sampler="fields", batch_size=64)
    config.optim.update(learning_rate=2e-3, warmup_steps=45)
    return with_variant(config, VARIANTS, variant)
