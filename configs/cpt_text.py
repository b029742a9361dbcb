"""CPT-text (Neelakantan et al., arXiv 2201.10005): a causal encoder, the last token's vector, very large batches.

    bash launch/tpu.sh run --name=cpt --zone=ZONE --type=v5litepod-256 -- --config=configs/cpt_text.py:s --workdir=gs://B/cpt
    contrastive-jax plan --config=configs/cpt_text.py:s --target=tpu:v5e:16x16

Widths and batches are those of the paper's table 1; layers and heads are GPT-3's of that size, but that size s has 8 heads of
128 in place of 16 of 64, because 128 fills a TPU's matrix unit. The paper starts from GPT weights and gives neither learning
rate, span lengths nor steps. Planned, not trained: size s takes 0.69 s per step on a v5e:16x16. It saves queries, keys, values
and middle states, and its blocks run one by one, because a loop would copy what is saved. The other sizes, their slices, and
packing are in docs/results.md. We claim no quality.
"""

from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config

# Layers, width, heads, batch size (the paper's, made to divide over the slice), learning rate, remat, mesh.fsdp, mesh.tensor.
SIZES = {
    "s": (24, 1024, 8, 12_288, 2e-4, "attention", 16, 1),
    "s-gpu": (24, 1024, 16, 12_288, 2e-4, "full", 8, 1),
    "m": (24, 2048, 16, 6_912, 2e-4, "attention", 32, 1),
    "l": (32, 4096, 32, 6_144, 1.2e-4, "full", 64, 1),
    "xl": (96, 12288, 96, 5_120, 6e-5, "full", 256, 4),
}


def get_config(size: str = "s") -> ConfigDict:
    if size not in SIZES:
        raise UserError(f"configs/cpt_text.py:{size}: no such size; choose one of {', '.join(f':{name}' for name in SIZES)}")
    layers, width, heads, batch_size, learning_rate, remat, fsdp, tensor = SIZES[size]
    config = default_config()
    config.update(steps=50_000, log_every=50, eval_every=1000, checkpoint_every=1000)
    config.data.update(batch_size=batch_size, length=512, min_span=64, max_span=510)
    config.model.update(num_layers=layers, d_model=width, d_ff=4 * width, num_heads=heads, num_kv_heads=heads)
    config.model.update(head_dim=width // heads, causal=True, position="learned", max_length=512, pooling="eos")
    saved = tuple((name, layers) for name in ("query", "key", "value", "middle")) if size == "s" else ()
    # In the backward pass a bias is a column sum. TPUs do these slowly: they would take a tenth of the step.
    config.model.update(bias=False, remat=remat, dtype="bfloat16", saved=saved, scan=not saved)
    config.optim.update(learning_rate=learning_rate, weight_decay=0.1, warmup_steps=2000, end_factor=0.1)
    config.mesh.update(fsdp=fsdp, tensor=tensor)
    return config
