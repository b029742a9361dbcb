"""Compares the speed of the whole train step with the same model, batch and optimiser in PyTorch.

  pip install -e '.[benchmark]'
  GLIBC_TUNABLES=... python -m benchmarks.train_step       with the value that launch/local.sh sets

Both sides train the architecture of transformers' BertModel (post-norm, learned positions, GELU, no dropout), mean-pooled, with
a symmetric cross-entropy over the batch and AdamW, at the width, depth, vocabulary, batch and length of each recipe; here
without the loop over blocks (`model.scan=False`). They take turns, so that a busy machine slows both down; the result is the
ratio of the medians. Expect 0.65 to 0.95 × PyTorch's speed on 2 CPU cores, in float32.

On a GPU both sides run on it: float32 as TF32, JAX's default there, and with --dtypes=bfloat16 in mixed precision. Give each
side a part of the memory: XLA_PYTHON_CLIENT_MEM_FRACTION=.45.
"""

import itertools
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import common
from contrastive_jax.config import default_config
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

DTYPES = flags.DEFINE_list("dtypes", ["float32"], "The types of activations: float32, bfloat16.")
PRODUCTS = flags.DEFINE_list("products", ["float32"], "Our types of products of float32 activations: float32, bfloat16.")
SHAPES = flags.DEFINE_list("shapes", ["debug", "pile_small", "minilm"], "The shapes to time.")
STEPS = flags.DEFINE_integer("steps", 7, "Timed steps of each side; the median counts.")
TEMPERATURE = 0.05
VOCAB_SIZES = {"debug": 8192, "pile_small": 16384, "minilm": 30592, "bert_base": 30592}


def make_config(name: str, dtype: str) -> ConfigDict:
    """Returns a BERT of the sizes of a recipe, or of MiniLM with 32 pairs or BERT-base with 256 pairs of 128 tokens."""
    config = default_config()
    config.model.dtype = dtype
    if name == "minilm":
        config.data.update(batch_size=32, length=128)
        config.model.update(num_layers=6, d_model=384, d_ff=1536, num_heads=12)
    elif name == "bert_base":
        config.data.update(batch_size=256, length=128)
        config.model.update(num_layers=12, d_model=768, d_ff=3072, num_heads=12)
    else:
        recipe = common.load_recipe(name)
        config.data.update({key: recipe.data[key] for key in ("batch_size", "length")})
        config.model.update({key: recipe.model[key] for key in ("num_layers", "d_model", "d_ff", "num_heads")})
    heads = config.model.num_heads
    config.model.update(num_kv_heads=heads, head_dim=config.model.d_model // heads)
    config.model.update(position="learned", max_length=config.data.length)
    config.model.update(norm_position="post", embedding_norm=True, final_norm=False, scan=False)
    config.optim.clip_norm = 0.0
    return config


def jax_stepper(config: ConfigDict, vocab_size: int, tokens: np.ndarray) -> Callable[[], None]:
    """Returns a function that takes one step of `train` on tokens int32[b 2 1 l] and waits for it."""
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    run = build.build(config, mesh, vocab_size)
    state = run.init()

    def take_step() -> None:
        nonlocal state
        state, metrics, _ = run.train_step(state, common.global_batch(tokens, mesh))
        jax.block_until_ready((state, metrics))

    return take_step


def torch_stepper(config: ConfigDict, vocab_size: int, tokens: np.ndarray) -> Callable[[], None]:
    """Returns a function that takes the same step in PyTorch."""
    model_config, pairs, length = config.model, config.data.batch_size, config.data.length
    bert = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=model_config.d_model,
        num_hidden_layers=model_config.num_layers,
        num_attention_heads=model_config.num_heads,
        intermediate_size=model_config.d_ff,
        max_position_embeddings=length,
        hidden_act="gelu_pytorch_tanh",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # "high": TF32
    model = transformers.BertModel(bert, add_pooling_layer=False).train().to(device)
    log_temperature = torch.nn.Parameter(torch.tensor(float(np.log(TEMPERATURE)), device=device))
    optimizer = torch.optim.AdamW([*model.parameters(), log_temperature], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rows = torch.from_numpy(tokens.reshape(-1, length).astype(np.int64)).to(device)
    mask = torch.ones_like(rows)
    target = torch.arange(pairs, device=device)

    def take_step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=model_config.dtype == "bfloat16"):
            hidden = model(input_ids=rows, attention_mask=mask).last_hidden_state.float()
        weight = mask[..., None].float()
        z = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1).view(pairs, 2, -1)
        logits = z[:, 0] @ z[:, 1].T * torch.exp(-log_temperature)
        cross_entropy = torch.nn.functional.cross_entropy
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return take_step


def main(argv: list[str]) -> None:
    """Prints a line per shape."""
    del argv
    print(f"{'shape':<22}{'products':<10}{'JAX, pairs/s':>14}{'PyTorch, pairs/s':>18}{'ratio':>8}")
    for name, dtype in itertools.product(SHAPES.value, DTYPES.value):
        config, vocab_size = make_config(name, dtype), VOCAB_SIZES[name]
        tokens = common.random_tokens(config, vocab_size)
        sides = {"PyTorch": torch_stepper(config, vocab_size, tokens)}
        for products in PRODUCTS.value:
            config.model.products = products
            sides[products] = jax_stepper(config, vocab_size, tokens)
        timings = common.time_in_turns(sides, STEPS.value)
        speed = {side: config.data.batch_size / timing.median for side, timing in timings.items()}
        for products in PRODUCTS.value:
            ours, theirs = speed[products], speed["PyTorch"]
            print(f"{f'{name} {dtype}':<22}{products:<10}{ours:>14.1f}{theirs:>18.1f}{ours / theirs:>8.2f}", flush=True)


if __name__ == "__main__":
    app.run(main)
