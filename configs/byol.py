"""BYOL on the debug recipe: each span's prediction meets the other one's projection by a moving average of the network.

    bash launch/local.sh --config=configs/byol.py

Grill et al., arXiv 2006.07733, §3. The average's decay begins at 0.97, the paper's for short runs, and rises to 1. The heads
are those of configs/simsiam.py, smaller than the paper's. As a bag of embeddings (benchmarks/systems.py, three seeds)
query-key top-5 / top-1 rose from 34.6 / 22.2 to 38.9 / 23.7 %; the recipe as it stands, with a block, was not measured.
"""

from ml_collections import ConfigDict

from configs import simsiam


def get_config() -> ConfigDict:
    config = simsiam.get_config()
    config.data.sampler = "neighbours"
    config.objective.name = "byol"
    config.optim.constant_rate_rules = ((r".*", 0.0),)
    config.memory.update(kind="average", momentum=0.97, rise=True)
    return config
