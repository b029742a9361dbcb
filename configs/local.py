"""The default of launch/local.sh: one Transformer block that learns in minutes, on the embedded data.

    bash launch/local.sh

Its embeddings do most of the work and take a large rate; the block, which begins as the identity, follows slowly, so that
it cannot learn the training spans by heart. Each token has a weight in the mean (model.token_weights), because the last
norm gives all token states one length.
"""

from ml_collections import ConfigDict

from contrastive_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.update(steps=300, eval_every=100, checkpoint_every=100)
    config.data.batch_size = 256
    # Two heads of 32 that share their keys and values, and a feed-forward half as wide as the stream: larger ones take twice
    # the time, and gain nothing in it.
    config.model.update(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, d_ff=128, dropout=0.2)
    config.model.update(zero_init_branches=True, token_weights=True)
    config.optim.update(learning_rate=5e-3, warmup_steps=20)
    config.optim.learning_rate_rules = ((r"token_weight", 5.0), (r"blocks", 0.1), (r".*", 1.0))
    return config
