"""SigLIP (arXiv 2303.15343) on the debug recipe: each pair is a two-class problem, nothing is normalised over the batch.

    bash launch/local.sh --config=configs/siglip.py

Temperature 0.1 and bias -10 are the paper's initial values (§3.2).
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.objective.name = "siglip"
    config.objective.temperature = 0.1
    config.objective.bias = -10.0
    return config
