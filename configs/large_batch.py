"""A batch larger than memory, on the debug recipe: gradient caching for the encoder, tiles for the scores.

    bash launch/local.sh --config=configs/large_batch.py

Each step has 2,048 pairs; activations of 256 are in memory at a time. The loss is that of the whole batch, on any number
of devices (on several: --config.objective.where=ring). A step takes 18 s on 2 shared CPU cores. The run was never
finished: we claim no score.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.update(steps=60, log_every=5, eval_every=30, checkpoint_every=30)
    config.data.batch_size = 2048
    config.micro_batch = 256
    config.optim.warmup_steps = 5
    return config
