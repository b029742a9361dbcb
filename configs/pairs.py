"""Weak pairs at a large batch: questions and answers, titles and texts; what most encoders of today are trained on first.

    contrastive-jax prepare --pairs=pairs.toml --tokenizer=hf:FOLDER --record_tokens=510 --output=data/pairs
    bash launch/gpu.sh --config=configs/pairs.py --config.init_from=hf:FOLDER --config.data.dir=data/pairs --workdir=runs/pairs

The setting of DenseOn (lightonai, 2025): 16,384 pairs, temperature 0.02, each batch from one source, and sources by the root
of their sizes. FOLDER is a pretrained encoder, whose sizes replace those below. We have not trained it: no score is claimed.
"""

from ml_collections import ConfigDict

from configs import modern_base


def get_config() -> ConfigDict:
    config = modern_base.get_config()
    config.update(steps=110_000, micro_batch_tokens=65_536)
    config.data.update(sampler="fields", batch_size=16_384, length=512, query_length=128, min_span=1, max_span=510)
    config.data.update(one_source="domain", alpha=0.5)
    config.model.pooling = "cls"
    config.objective.update(temperature=0.02, temperature_trainable=False)
    config.optim.update(learning_rate=8e-5, weight_decay=0.01, schedule="linear", warmup_steps=5500)
    return config
