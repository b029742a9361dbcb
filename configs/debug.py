"""The smallest recipe that learns: the default of launch/local.sh, on the embedded data.

  bash launch/local.sh

One block, which begins as the identity over a bag of embeddings.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.steps = 500
    config.eval_every = 250
    config.checkpoint_every = 250

    config.data.batch_size = 128
    config.model.num_layers = 1
    config.model.d_ff = 512
    config.model.dropout = 0.1
    config.model.zero_init_branches = True
    config.model.final_norm = False

    # The embeddings do the work at first and take a large rate; the block follows.
    config.optim.learning_rate = 5e-3
    config.optim.learning_rate_rules = ((r"blocks", 0.1), (r".*", 1.0))
    config.optim.warmup_steps = 20
    return config
