"""A batch larger than memory on the debug recipe: gradient caching for the encoder, tiles for the scores.

  bash launch/local.sh --config=configs/large_batch.py       on several devices with --config.objective.where=ring

2,048 pairs a step, of which 256 have activations at a time; on one device or many the loss is that of the whole batch. A
step takes 18 s on 2 CPU cores that do some other work. The whole run was not done, no figure is claimed.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.steps = 60
    config.log_every = 5
    config.eval_every = 30
    config.checkpoint_every = 30
    config.data.batch_size = 2048
    config.micro_batch = 256
    config.optim.warmup_steps = 5
    return config
