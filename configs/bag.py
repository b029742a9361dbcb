"""The honest floor: a bag of trainable token embeddings, mean-pooled, with no layers. What a Transformer has to beat.

python -m contrastive_jax.train --config=configs/bag.py --workdir=runs/bag --config.data.dir=DIR

The 12,000 steps take 32 minutes on 2 cores that do some other work. On 38 million tokens of Pile-format text, query-key top-5 /
top-1: 85.1 / 62.3 after 2,000 steps, 86.3 / 65.5 after 8,000, 85.3 / 65.5 at the end.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.steps = 12_000
    config.log_every = 100
    config.eval_every = 2000
    config.checkpoint_every = 2000

    config.data.batch_size = 512
    config.data.length = 64
    config.data.min_span = config.data.max_span = 64
    config.data.delimiters = False
    config.eval.span = 64

    config.model.num_layers = 0
    config.model.d_model = 512
    config.model.position = "none"
    config.model.final_norm = False

    config.optim.learning_rate = 5e-3
    config.optim.b2 = 0.999
    config.optim.clip_norm = 0.0
    config.optim.warmup_steps = 500
    return config
