"""The baseline: a bag of trainable token embeddings, mean-pooled, without layers. A Transformer has to beat it.

    contrastive-jax train --config=configs/bag.py --workdir=runs/bag --config.data.dir=data/pile

The run takes 32 minutes on 2 shared CPU cores. On 38 million tokens of Pile-format text, query-key top-5 / top-1 is 85.1
/ 62.3 % after 2,000 steps, 86.3 / 65.5 % after 8,000, and 85.3 / 65.5 % at the end.
"""

from ml_collections import ConfigDict

from contrastive_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.update(steps=12_000, log_every=100, eval_every=2000, checkpoint_every=2000)
    config.data.update(batch_size=512, length=64, min_span=64, max_span=64, delimiters=False)
    config.eval.span = 64
    config.model.update(num_layers=0, d_model=512, position="none", final_norm=False)
    config.optim.update(learning_rate=5e-3, b2=0.999, clip_norm=0.0, warmup_steps=500)
    return config
