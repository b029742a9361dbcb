"""Fine-tuning of the whole encoder on labelled pairs of texts: RTE, MNLI and the like (GLUE, Wang et al., arXiv 1804.07461).

The classifier sees [u, v, |u - v|, u · v] of the two texts' vectors (InferSent, Conneau et al., arXiv 1705.02364; Reimers and
Gurevych, arXiv 1908.10084): the encoder reads one text at a time, as in pre-training. BERT's figures (Devlin et al.,
arXiv 1810.04805) are of both texts in one row, and higher.

Data: a folder with train.jsonl and validation.jsonl (or dev.jsonl; also _matched and _mismatched), an object with two texts and
a label a line (`senteval.json_lines`), or tfds:glue/rte.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath

from configs import base
from contrastive_jax import optim, sharding, text_model
from contrastive_jax.evals import embed, senteval
from contrastive_jax.step import step_key

LENGTHS = embed.LENGTHS[::4]  # of rows: each pair of lengths is compiled for
PROGRESS_SECONDS = 5
HELD_OUT = ("validation", "dev")

Params = Any  # {"encoder": the model's, "head": {"kernel": [4e classes], "bias": [classes]}}
Batch = dict[str, Any]  # tokens int32[b l] and mask bool[b l] of either text, label int32[b], weight float32[b]


class Recipe(NamedTuple):
    """How it is trained: AdamW, linear warm-up and decay to 0; that of BERT, with a faster head."""

    epochs: int = 3
    seeds: int = 3
    batch_size: int = 32
    encoder_rate: float = 5e-5
    head_rate: float = 1e-3
    warmup: float = 0.1


RECIPE = Recipe()


class Pairs(NamedTuple):
    """The ids of both texts of each pair, and label int32[n], a number below that of the classes."""

    first: list[list[int]]
    second: list[list[int]]
    label: np.ndarray


def read(data: epath.Path | str) -> tuple[senteval.Labelled, dict[str, senteval.Labelled]]:
    """The training part, and those to be scored on: "accuracy", or "matched" and the like.

    Raises:
      ValueError: a part is missing, or a line is no pair with a label.
    """
    name = str(data)
    if name.startswith("tfds:"):
        parts = senteval.tables_of_tfds(name.removeprefix("tfds:"))
    else:
        files = sorted(path for path in epath.Path(data).glob("*.jsonl") if path.stem.startswith(("train", *HELD_OUT)))
        parts = {path.stem: senteval.gather(senteval.json_lines(path)) for path in files}
    held = {part: part.partition("_")[2] or "accuracy" for part in parts if part.startswith(HELD_OUT)}
    if "train" not in parts or not held:
        raise ValueError(f"--data={data}: needs train and validation (or dev), as .jsonl in a folder; there are {[*parts]}")
    if len(set(held.values())) < len(held):
        raise ValueError(f"--data={data}: {' and '.join(held)} are two names of one part; leave one")
    known = set(parts["train"].labels)
    for part in ("train", *held):
        texts, labels, second = parts[part]
        if len(second) != len(texts) or not texts:
            raise ValueError(
                f"--data={data}: {part} has {len(texts)} texts and {len(second)} partners; give two texts in each line"
            )
        if new := set(labels) - known:
            raise ValueError(f"--data={data}: {part} has the label {min(new)!r}, which train does not have")
    return parts["train"], {column: parts[part] for part, column in held.items()}


def features(u: jax.Array, v: jax.Array) -> jax.Array:
    """[u, v, |u - v|, u · v], float32[n 4e], of unit vectors u and v [n e], scaled to entries near 1."""
    u, v = (z * np.float32(z.shape[1]) ** 0.5 for z in (u, v))
    return jnp.concatenate([u, v, jnp.abs(u - v), u * v], axis=1)


def logits(head: Params, u: jax.Array, v: jax.Array) -> jax.Array:
    """float32[n classes] of unit vectors u and v [n e]."""
    return features(u, v) @ head["kernel"] + head["bias"]


def padded(rows: list[list[int]], total: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as tokens int32[total l] and mask bool[total l], l one of few; those that are missing have a token of no meaning."""
    sizes = np.array([len(row) for row in rows] + [1] * (total - len(rows)))
    length = min(next(length for length in LENGTHS if length >= sizes.max()), longest)
    tokens = np.zeros((total, length), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return tokens, np.arange(length) < sizes[:, None]


def batches(pairs: Pairs, order: np.ndarray, batch_size: int, total: int, longest: int) -> Iterator[Batch]:
    """The pairs in this order, in batches of `total` rows, of which `batch_size`, in the last one fewer, have a weight."""
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        first, first_mask = padded([pairs.first[place] for place in chosen], total, longest)
        second, second_mask = padded([pairs.second[place] for place in chosen], total, longest)
        label = np.zeros(total, np.int32)
        label[: len(chosen)] = pairs.label[chosen]
        weight = (np.arange(total) < len(chosen)).astype(np.float32)
        masks = {"first_mask": first_mask, "second_mask": second_mask}
        yield {"first": first, "second": second, "label": label, "weight": weight} | masks


def make_optimizer(recipe: Recipe, steps: int, params: Params) -> optax.GradientTransformation:
    """AdamW of `optim` with the recipe's values."""
    config = base.get_config().optim
    config.update(learning_rate=recipe.encoder_rate, b2=0.999, schedule="linear", warmup_steps=int(recipe.warmup * steps))
    config.learning_rate_rules = ((r"^head/", recipe.head_rate / recipe.encoder_rate), (r".*", 1.0))
    return optim.make(config, steps, params)


class Functions(NamedTuple):
    """What fine-tuning is made of.

    Attributes:
      init: random key → (params, optimiser's state); the encoder's parameters are a copy of the model's.
      update: (params, state, batch, random key of the run, int32[] step) → (params, state, loss); takes the first two away.
      right: (params, batch) → float32[], how many pairs have their label.
    """

    init: Callable[[jax.Array], tuple[Params, Any]]
    update: Callable[..., tuple[Params, Any, jax.Array]]
    right: Callable[[Params, Batch], jax.Array]


def make(model: text_model.TextModel, classes: int, recipe: Recipe, steps: int) -> Functions:
    """The functions of a model's fine-tuning on all devices."""
    everywhere = sharding.replicated(text_model.one_axis())

    def new_params(key: jax.Array, encoder: Params) -> Params:
        rows = jnp.zeros((1, 1), jnp.int32)
        width = jax.eval_shape(model.apply, encoder, rows, rows == 0).shape[1]
        head = {"kernel": 0.02 * jax.random.normal(key, (4 * width, classes)), "bias": jnp.zeros(classes)}
        return {"encoder": jax.tree.map(jnp.copy, encoder), "head": head}

    optimizer = make_optimizer(recipe, steps, jax.eval_shape(new_params, jax.random.key(0), model.params))

    def init(key: jax.Array, encoder: Params) -> tuple[Params, Any]:
        params = new_params(key, encoder)
        return params, optimizer.init(params)

    def scores(params: Params, batch: Batch, keys: Any) -> jax.Array:
        u, v = (
            model.apply(params["encoder"], batch[side], batch[f"{side}_mask"], key)
            for side, key in zip(("first", "second"), keys, strict=True)
        )
        return logits(params["head"], u, v)

    def update(params: Params, state: Any, batch: Batch, root: jax.Array, step: jax.Array) -> tuple[Params, Any, jax.Array]:
        keys = jax.random.split(step_key(root, "dropout", step))

        def loss(params: Params) -> jax.Array:
            found = optax.softmax_cross_entropy_with_integer_labels(scores(params, batch, keys), batch["label"])
            return (found * batch["weight"]).sum() / batch["weight"].sum()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def right(params: Params, batch: Batch) -> jax.Array:
        return ((scores(params, batch, (None, None)).argmax(1) == batch["label"]) * batch["weight"]).sum()

    first = jax.jit(init, out_shardings=everywhere)
    return Functions(
        init=lambda key: first(key, model.params),
        update=jax.jit(update, donate_argnums=(0, 1), out_shardings=everywhere),
        right=jax.jit(right, out_shardings=everywhere),
    )


class Progress:
    """Tells every few seconds how far it is, over all seeds."""

    def __init__(self, steps: int, batch_size: int):
        self._steps, self._batch_size, self._done = steps, batch_size, 0
        self._began = self._told = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for a line."""
        if due := time.monotonic() > self._told + PROGRESS_SECONDS:
            self._told = time.monotonic()
        return due

    def step(self, loss: jax.Array) -> None:
        """One more step is done."""
        self._done += 1
        if self.due():
            rate = self._done / (time.monotonic() - self._began)
            eta = (self._steps - self._done) / rate
            logging.info(
                "step %d/%d  loss %.4f  %.1f examples/s  ETA %d:%02d:%02d",
                *(self._done, self._steps, float(loss), rate * self._batch_size),
                *(eta // 3600, eta % 3600 // 60, eta % 60),
            )


def fine_tune(
    functions: Functions,
    training: Pairs,
    held_out: dict[str, Pairs],
    recipe: Recipe,
    longest: int,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Trains with one seed: the accuracy of each held-out part after the epoch where it is highest."""
    mesh, root, rng = text_model.one_axis(), jax.random.key(seed), np.random.default_rng(seed)
    total = -(-recipe.batch_size // sharding.shards(mesh)) * sharding.shards(mesh)

    def spread(pairs: Pairs, order: np.ndarray) -> Iterator[Batch]:
        for batch in batches(pairs, order, recipe.batch_size, total, longest):
            yield sharding.to_global(batch, np.arange(total), total, mesh)

    def accuracy(params: Params, name: str, pairs: Pairs) -> float:
        # By length: little padding.
        count, order = jnp.float32(0), np.argsort([len(row) for row in pairs.first], kind="stable")
        for done, batch in enumerate(spread(pairs, order)):
            count += functions.right(params, batch)
            if progress.due():
                logging.info("seed %d, %s: %d of %d", seed, name, done * recipe.batch_size, len(order))
        return float(count) / len(order)

    params, state = functions.init(root)
    best, step, loss = dict.fromkeys(held_out, 0.0), 0, jnp.float32(0)
    for epoch in range(1, recipe.epochs + 1):
        for batch in spread(training, rng.permutation(len(training.label))):
            before = loss
            params, state, loss = functions.update(params, state, batch, root, np.int32(step))
            jax.block_until_ready(before)  # the host is no more than a step ahead
            step += 1
            progress.step(loss)
        found = {name: accuracy(params, name, pairs) for name, pairs in held_out.items()}
        shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in found.items())
        logging.info("seed %d, epoch %d of %d: %s", seed, epoch, recipe.epochs, shown)
        best = {name: max(best[name], found[name]) for name in found}
    return best


def evaluate(model: text_model.TextModel, data: epath.Path | str, recipe: Recipe = RECIPE) -> dict[str, dict[str, float]]:
    """Fine-tunes copies of a model, one a seed, and scores them.

    Returns:
      Rows of accuracies, a column a held-out part: of the most frequent label in training; of each seed, after its best epoch;
      and over the seeds their best, mean and standard deviation.

    Raises:
      ValueError: the data are not as they should be.
    """
    train, held = read(data)
    classes = sorted(set(train.labels))
    longest = model.protocol["max_tokens"]

    def tokenized(part: senteval.Labelled) -> Pairs:
        first, second = (model.tokenize(texts, 0) for texts in (part.texts, part.second))
        return Pairs(first, second, np.array([classes.index(label) for label in part.labels], np.int32))

    training, held_out = tokenized(train), {name: tokenized(part) for name, part in held.items()}
    steps = recipe.epochs * -(-len(training.label) // recipe.batch_size)
    functions = make(model, len(classes), recipe, steps)
    progress = Progress(recipe.seeds * steps, recipe.batch_size)
    majority = np.bincount(training.label).argmax()
    rows = {"majority": {name: float((pairs.label == majority).mean()) for name, pairs in held_out.items()}}
    seeds = [fine_tune(functions, training, held_out, recipe, longest, seed, progress) for seed in range(recipe.seeds)]
    rows |= {f"seed {seed}": row for seed, row in enumerate(seeds)}
    for measure, over in (("best", np.max), ("mean", np.mean), ("deviation", np.std)):
        rows[measure] = {name: float(over([row[name] for row in seeds])) for name in held_out}
    return rows
