"""MoCo (arXiv 1911.05722; for text CERT, arXiv 2005.12766) on the debug recipe: negatives come from a queue of past keys.

    bash launch/local.sh --config=configs/moco.py

The queue holds 32 batches, 4,096 keys. The momentum is 0.99 and not the paper's 0.999: the run has 500 steps, not
200,000.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.objective.symmetric = False
    config.memory.kind = "queue"
    config.memory.queue = 32
    config.memory.momentum = 0.99
    return config
