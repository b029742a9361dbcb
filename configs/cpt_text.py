"""CPT-text (Neelakantan et al., arXiv 2201.10005): a causal encoder, the last token's vector, very large batches.

  bash launch/tpu.sh run --name=cpt --zone=ZONE --type=v5litepod-256 -- --config=configs/cpt_text.py:s --workdir=gs://B/cpt ...
  python -m contrastive_jax.plan --config=configs/cpt_text.py:s --target=tpu:v5e:16x16

Widths and batches are the paper's table 1; layers and heads are GPT-3's of that size. The paper starts from GPT weights and
gives neither learning rate, span lengths nor steps: here spans have 64 to 510 tokens. By `contrastive_jax.plan` (the compiler's
estimate: utilisation and speed are upper bounds; jax 0.10.2, vocabulary 65,536); none was trained by us, no quality is claimed:

  size    target             HBM, GiB of what there is   step     MFU    with recomputation   pairs/s
  :s      tpu:v5e:16x16       8.7 of 15.8                0.90 s   54 %   66 %                 13,600
  :s-gpu  gpu:h100:4x8       35.7 of 73.2                1.48 s   53 %   66 %  (roofline)      8,300
  :m      tpu:v5p:4x4x8      19.7 of 95.7                1.43 s   64 %   78 %                  4,850
  :l      tpu:v5p:8x8x8       8.7 of 95.7                1.77 s   60 %   73 %                  3,480
  :xl     tpu:v5p:16x16x16   16.5 of 95.7                6.00 s   49 %   60 %                    853

On tpu:v5p:8x8x4, with --config.model.remat=dots --config.model.scan=False, S takes 0.32 s a step, MFU 66 %; with rows of 128
tokens, 49,152 pairs and --config.mesh.fsdp=4 0.31 s, 65 % (12,288 pairs: 0.088 s, 56 %, a tenth of it transfers).

Rows are filled to 56 % by such spans. Packed, 48 pairs in 15 rows of 1,024 tokens a view (90 % full, 0.4 % of tokens cut), S
on tpu:v5e:16x16 takes 0.61 s a step, 20,100 pairs/s, 5.2 GiB; the price is a table of 1,024 positions:
  --config.data.length=1024 --config.data.pack_pairs=48 --config.data.pack_rows=15
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import base


class Size(NamedTuple):
    """One line of the table: the model, the batch, and how it lies on the smallest sensible slice."""

    layers: int
    width: int
    heads: int
    batch_size: int
    learning_rate: float
    remat: str
    fsdp: int
    tensor: int


SIZES = {
    "s": Size(24, 1024, 16, 12_288, 2e-4, "attention", 16, 1),
    "s-gpu": Size(24, 1024, 16, 12_288, 2e-4, "full", 8, 1),
    "m": Size(24, 2048, 16, 6_912, 2e-4, "attention", 32, 1),
    # The paper's 5,896 does not divide over 512 chips: the nearest multiple is 6,144.
    "l": Size(32, 4096, 32, 6_144, 1.2e-4, "full", 64, 1),
    # The paper's 4,976 does not divide over 4,096 chips in groups of 4: the nearest multiple of 1,024 is 5,120.
    "xl": Size(96, 12288, 96, 5_120, 6e-5, "full", 1024, 4),
}


def get_config(size: str = "s") -> ConfigDict:
    config = base.get_config()
    if size not in SIZES:
        raise ValueError(f"configs/cpt_text.py:{size}: there is {', '.join(f':{name}' for name in SIZES)}")
    chosen = SIZES[size]
    config.steps = 50_000
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 1000

    config.data.batch_size = chosen.batch_size
    config.data.length = 512
    config.data.min_span = 64
    config.data.max_span = 510

    config.model.num_layers = chosen.layers
    config.model.d_model = chosen.width
    config.model.num_heads = config.model.num_kv_heads = chosen.heads
    config.model.head_dim = chosen.width // chosen.heads
    config.model.d_ff = 4 * chosen.width
    config.model.causal = True
    config.model.position = "learned"
    config.model.pooling = "eos"
    # Biases are a column sum each in the backward pass, which TPUs do slowly: a tenth of its time.
    config.model.bias = False
    config.model.remat = chosen.remat
    config.model.dtype = "bfloat16"

    config.optim.learning_rate = chosen.learning_rate
    config.optim.weight_decay = 0.1
    config.optim.warmup_steps = 2000
    config.optim.end_factor = 0.1

    config.mesh.fsdp = chosen.fsdp
    config.mesh.tensor = chosen.tensor
    return config
