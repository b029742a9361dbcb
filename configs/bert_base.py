"""A BERT-base encoder: 12 layers, 768 wide, post-norm, learned positions, mean pooling; for one H100 or v5e-16.

  bash launch/gpu.sh --config=configs/bert_base.py --config.data.dir=DIR --workdir=DIR
  python -m contrastive_jax.plan --config=configs/bert_base.py --target=gpu:h100:1x1

By the plan (upper bounds; vocabulary 65,536): one H100 39.4 of 73.2 GiB, 0.78 s a step, MFU 35 % (roofline); v5e-16 5.0 of
15.8 GiB, 0.24 s, MFU 37 %, 49 % with recomputed FLOPs. Not trained at this size by us: no quality is claimed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.steps = 100_000
    config.log_every = 50
    config.eval_every = 2000
    config.checkpoint_every = 2000

    config.data.batch_size = 2048
    config.data.length = 128
    config.data.min_span = 32
    config.data.max_span = 126

    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = config.model.num_kv_heads = 12
    config.model.head_dim = 64
    config.model.d_ff = 3072
    config.model.norm_position = "post"
    config.model.final_norm = False
    config.model.embedding_norm = True
    config.model.position = "learned"
    config.model.dropout = 0.1
    config.model.remat = "attention"
    config.model.dtype = "bfloat16"

    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = 5000
    config.optim.schedule = "linear"

    # Parameters are whole on every device: 1.3 GB with their moments.
    return config
