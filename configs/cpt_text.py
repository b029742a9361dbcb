"""CPT-text (Neelakantan et al., arXiv 2201.10005): a causal encoder, the last token's vector, very large batches.

  bash launch/local.sh --config=configs/cpt_text.py:s --config.data.dir=DIR        (on a machine with the memory)

`:s` is the paper's S: 300M parameters, embedding 1,024, batch 12,288. The paper starts from GPT weights and does not give
its learning rate, span lengths or number of steps: here spans have 64 to 510 tokens, and an epoch of the Pile at 2 × 287
tokens a pair is some 50,000 steps. Not trained at this size by us: no figure is claimed.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "s") -> ConfigDict:
    config = base.get_config()
    if size != "s":
        raise ValueError(f"configs/cpt_text.py:{size}: there is :s")
    config.steps = 50_000
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 1000

    config.data.batch_size = 12_288
    config.data.length = 512
    config.data.min_span = 64
    config.data.max_span = 510

    config.model.num_layers = 24
    config.model.d_model = 1024
    config.model.num_heads = config.model.num_kv_heads = 16
    config.model.head_dim = 64
    config.model.d_ff = 4096
    config.model.causal = True
    config.model.position = "learned"
    config.model.pooling = "eos"
    config.model.remat = "full"
    config.model.dtype = "bfloat16"

    config.optim.learning_rate = 2e-4
    config.optim.weight_decay = 0.1
    config.optim.warmup_steps = 2000
    config.optim.end_factor = 0.1

    # Parameters and moments are spread over every device; the batch too.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
