"""Skip-gram (arXiv 1310.4546) on the debug recipe: a table of tokens, where a token has to find one near it.

    bash launch/local.sh --config=configs/skipgram.py

NCE with k = 2,047 noise tokens, those of the batch: logits are log p(y | x) / p(y) - log k, so the bias is fixed. We claim no
score.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.data.update(batch_size=2048, length=1, min_span=1, max_span=1, max_gap=4, delimiters=False)
    config.model.update(num_layers=0, position="none", final_norm=False, dropout=0.0)
    config.objective.update(name="siglip", temperature=0.2, bias=-7.62)
    config.optim.learning_rate_rules = ((r"objective/bias", 0.0), (r".*", 1.0))
    return config
