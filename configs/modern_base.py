"""A ModernBERT-base encoder (arXiv 2412.13663): rotary positions, gated MLP, two local layers per global one.

    bash launch/gpu.sh --config=configs/modern_base.py --config.data.dir=data/pile --workdir=runs/modern
    contrastive-jax plan --config=configs/modern_base.py --target=gpu:h100:1x1

Planned, not trained: one H100 needs 57.1 of 73.2 GiB and 2.1 s per step (docs/results.md). We claim no quality.
"""

from ml_collections import ConfigDict

from contrastive_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.update(steps=100_000, log_every=50, eval_every=2000, checkpoint_every=2000)
    config.data.update(batch_size=1024, length=512, min_span=64, max_span=510)
    config.model.update(num_layers=22, d_model=768, num_heads=12, num_kv_heads=12, head_dim=64, d_ff=1152, mlp="geglu")
    config.model.update(embedding_norm=True, rope_theta=160_000.0, local_rope_theta=10_000.0, bias=False)
    # Local layers see 64 tokens on either side, ModernBERT's window of 128; every third layer sees all.
    config.model.update(local_window=64, global_every=3, remat="full", dtype="bfloat16")
    config.optim.update(learning_rate=8e-4, weight_decay=1e-5, schedule="rsqrt", warmup_steps=3000)
    return config
