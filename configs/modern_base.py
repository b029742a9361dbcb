"""A ModernBERT-base encoder (arXiv 2412.13663): rotary positions, gated MLP, two local layers between global ones, no biases.

  bash launch/gpu.sh --config=configs/modern_base.py --config.data.dir=DIR --workdir=DIR
  python -m contrastive_jax.plan --config=configs/modern_base.py --target=gpu:h100:1x1

By the plan (upper bounds; vocabulary 65,536): one H100 57.1 of 73.2 GiB, 2.1 s a step, MFU 38 % (roofline); v5e-16 8.3 of
15.8 GiB, 0.88 s, MFU 29 %, 38 % with recomputed FLOPs. Not trained at this size by us: no quality is claimed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.steps = 100_000
    config.log_every = 50
    config.eval_every = 2000
    config.checkpoint_every = 2000

    config.data.batch_size = 1024
    config.data.length = 512
    config.data.min_span = 64
    config.data.max_span = 510

    config.model.num_layers = 22
    config.model.d_model = 768
    config.model.num_heads = config.model.num_kv_heads = 12
    config.model.head_dim = 64
    config.model.d_ff = 1152
    config.model.mlp = "geglu"
    config.model.embedding_norm = True
    config.model.rope_theta = 160_000.0
    config.model.local_rope_theta = 10_000.0
    # ModernBERT's window of 128 tokens, counted on either side; every third layer sees all.
    config.model.local_window = 64
    config.model.global_every = 3
    config.model.bias = False
    config.model.remat = "full"
    config.model.dtype = "bfloat16"

    config.optim.learning_rate = 8e-4
    config.optim.weight_decay = 1e-5
    config.optim.schedule = "rsqrt"
    config.optim.warmup_steps = 3000

    return config
