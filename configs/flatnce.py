"""FlatNCE (arXiv 2107.01152) on the debug recipe. Its loss is always 1: watch the metric `log_ratio`, which falls.

    bash launch/local.sh --config=configs/flatnce.py

Its gradient is that of DCL (`--config.objective.name=dcl`), whose loss is worth watching.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.objective.name = "flatnce"
    return config
