"""Speed of the whole train step, beside the same model, batch and optimiser in PyTorch: a ratio in one run.

  pip install -e '.[benchmark]'
  GLIBC_TUNABLES=... python benchmarks/train_step.py       with the value that launch/local.sh sets

Both train transformers' BertModel architecture (post-norm, learned positions, GELU, no dropout), mean-pooled, with a symmetric
cross-entropy over the batch and AdamW, in float32, at the width, depth, vocabulary, batch and length of each recipe; ours
without the loop over blocks (`model.scan=False`). The two take turns, so that a noisy machine is noisy for both; the figure is
the ratio of the medians.
"""

import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from ml_collections import ConfigDict

from configs import base
from contrastive_jax import build, sharding

SHAPES = flags.DEFINE_list("shapes", ["debug", "pile_small", "minilm"], "Which shapes to time.")
STEPS = flags.DEFINE_integer("steps", 7, "Steps of each; the median counts.")
TEMPERATURE = 0.05


class Shape:
    """Sizes that both sides share."""

    def __init__(self, vocab: int, layers: int, d_model: int, heads: int, d_ff: int, pairs: int, length: int):
        self.vocab, self.layers, self.d_model, self.heads = vocab, layers, d_model, heads
        self.d_ff, self.pairs, self.length = d_ff, pairs, length


def recipe_shape(name: str, vocab: int) -> Shape:
    """The shape of a shipped recipe."""
    import importlib

    config = importlib.import_module(f"configs.{name}").get_config()
    model, data = config.model, config.data
    return Shape(vocab, model.num_layers, model.d_model, model.num_heads, model.d_ff, data.batch_size, data.length)


def ours(shape: Shape, tokens: np.ndarray) -> Callable[[], None]:
    """A function that takes one step of the step that `train` takes."""
    config = base.get_config()
    config.data.update(batch_size=shape.pairs, length=shape.length)
    config.model.update(num_layers=shape.layers, d_model=shape.d_model, d_ff=shape.d_ff, num_heads=shape.heads)
    config.model.update(num_kv_heads=shape.heads, head_dim=shape.d_model // shape.heads, position="learned")
    config.model.update(norm_position="post", embedding_norm=True, final_norm=False)
    config.model.scan = False
    config.optim.clip_norm = 0.0
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    run = build.build(config, mesh, shape.vocab)
    rows = np.arange(shape.pairs)
    host = {"tokens": tokens, "segment": np.ones(tokens.shape, np.int32), "doc": rows.astype(np.int32)}
    host["text"] = np.arange(2 * shape.pairs, dtype=np.int32).reshape(-1, 2)
    state = run.init()

    def step() -> None:
        nonlocal state
        batch = sharding.to_global(host, rows, shape.pairs, mesh)
        state, metrics, _ = run.train_step(state, batch)
        jax.block_until_ready((state, metrics))

    return step


def theirs(shape: Shape, tokens: np.ndarray) -> Callable[[], None]:
    """The same in PyTorch."""
    config = transformers.BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.d_ff,
        max_position_embeddings=shape.length,
        hidden_act="gelu_pytorch_tanh",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    log_temperature = torch.nn.Parameter(torch.tensor(float(np.log(TEMPERATURE))))
    optimizer = torch.optim.AdamW([*model.parameters(), log_temperature], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rows = torch.from_numpy(tokens.reshape(-1, shape.length).astype(np.int64))
    mask = torch.ones_like(rows)
    target = torch.arange(shape.pairs)

    def step() -> None:
        hidden = model(input_ids=rows, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        z = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1).view(shape.pairs, 2, -1)
        logits = z[:, 0] @ z[:, 1].T * torch.exp(-log_temperature)
        cross_entropy = torch.nn.functional.cross_entropy
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    """The time of one call."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main(argv: list[str]) -> None:
    """Prints a line a shape."""
    del argv
    shapes = {
        "debug": recipe_shape("debug", 8192),
        "pile_small": recipe_shape("pile_small", 16384),
        "minilm": Shape(vocab=30592, layers=6, d_model=384, heads=12, d_ff=1536, pairs=32, length=128),
    }
    print(f"{'shape':<12}{'ours, pairs/s':>16}{'PyTorch, pairs/s':>18}{'ratio':>8}")
    for name in SHAPES.value:
        shape = shapes[name]
        tokens = np.random.default_rng(0).integers(8, shape.vocab, (shape.pairs, 2, shape.length)).astype(np.int32)
        pair = ours(shape, tokens), theirs(shape, tokens)
        for step in pair:
            seconds(step)
        times = [[seconds(step) for step in pair] for _ in range(STEPS.value)]
        left, right = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name:<12}{shape.pairs / left:>16.1f}{shape.pairs / right:>18.1f}{right / left:>8.2f}", flush=True)


if __name__ == "__main__":
    app.run(main)
