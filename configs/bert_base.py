"""A BERT-base encoder: 12 layers, 768 wide, post-norm, learned positions, mean pooling; for one H100 or 16 chips of v5e.

    bash launch/gpu.sh --config=configs/bert_base.py --config.data.dir=data/pile --workdir=runs/bert
    contrastive-jax plan --config=configs/bert_base.py --target=gpu:h100:1x1

Planned, not trained: one H100 needs 39.4 of 73.2 GiB and 0.78 s per step (docs/results.md). We claim no quality.
"""

from ml_collections import ConfigDict

from contrastive_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.update(steps=100_000, log_every=50, eval_every=2000, checkpoint_every=2000)
    config.data.update(batch_size=2048, length=128, min_span=32, max_span=126)
    config.model.update(num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, head_dim=64, d_ff=3072)
    config.model.update(norm_position="post", final_norm=False, embedding_norm=True, position="learned", max_length=128)
    config.model.update(dropout=0.1, remat="attention", dtype="bfloat16")
    config.optim.update(learning_rate=2e-4, warmup_steps=5000, schedule="linear")
    # Each device holds all parameters: 1.3 GB with their moments.
    return config
