"""Fine-tuning of the whole encoder on labelled pairs of texts: RTE, MNLI and the like (GLUE, Wang et al., arXiv 1804.07461).

The classifier sees [u, v, |u - v|, u · v] of the two texts' vectors (InferSent, Conneau et al., arXiv 1705.02364; Reimers and
Gurevych, arXiv 1908.10084): the encoder reads one text at a time, as in pre-training. Or it sees the vector of one row,
"[CLS] hypothesis [SEP] premise", each of whose tokens attends to both texts, as in CoLE's protocol of RTE; BERT's figures
(Devlin et al., arXiv 1810.04805) are of such rows, and higher.

Data: a folder with train.jsonl and validation.jsonl (or dev.jsonl; also _matched and _mismatched), each line an object with two
texts and a label (`senteval.read_jsonl`), or tfds:glue/rte.

Dimensions: n pairs, b pairs of a batch, f rows of a pair, l tokens, e embedding, c classes.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data.batch import Batch
from contrastive_jax.evals import senteval
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Task, data_folder, hash_files
from contrastive_jax.inference import batching
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.objectives import labels
from contrastive_jax.objectives.objective import NOTHING, Given, Objective, PairIds
from contrastive_jax.runtime import sharding
from contrastive_jax.runtime.progress import Progress
from contrastive_jax.training import build, optim, views
from contrastive_jax.training.memory import NO_MEMORY
from contrastive_jax.training.noise import Vocabulary
from contrastive_jax.training.step import TrainState, make_train_step

LENGTHS = batching.LENGTHS[::4]  # of rows; the step is compiled once per length
HELD_OUT = ("validation", "dev")

Params = Any  # {"encoder": the model's, "objective": {"kernel": [4e c], or of joined rows [e c], "bias": [c]}}


class Recipe(NamedTuple):
    """How the model is trained: AdamW, linear warm-up and decay to 0, as BERT is, with a faster head.

    With `joined` both texts of a pair are in one row.
    """

    epochs: int = 3
    seeds: int = 3
    joined: bool = False
    batch_size: int = 32
    encoder_rate: float = 5e-5
    head_rate: float = 1e-3
    warmup: float = 0.1


class LabelledPairs(NamedTuple):
    """The opened data.

    Attributes:
      source: the folder, or "tfds:NAME".
      train: the training part.
      held_out: the parts to be scored on, by the name of their accuracy: "accuracy", or "matched" and the like.
    """

    source: epath.Path | str
    train: senteval.Labelled
    held_out: dict[str, senteval.Labelled]


class TokenPairs(NamedTuple):
    """The token ids of the f rows of each of n pairs, and their label int32[n], the number of a class."""

    rows: list[tuple[list[int], ...]]
    label: np.ndarray


def open_pairs(model: TextModel, data: str, options: Options) -> LabelledPairs:
    """Opens a folder of labelled pairs, or "tfds:NAME".

    Raises:
      UserError: a part is missing, or a line is not a pair with a label.
    """
    source = data_folder("glue", data, ("*.jsonl",), tfds=True)
    if isinstance(source, str):
        parts = senteval.read_tfds_splits(source.removeprefix("tfds:"))
    else:
        paths = sorted(path for path in source.glob("*.jsonl") if path.stem.startswith(("train", *HELD_OUT)))
        parts = {path.stem: senteval.to_columns(senteval.read_jsonl(path)) for path in paths}
    measures = {part: part.partition("_")[2] or "accuracy" for part in parts if part.startswith(HELD_OUT)}
    if "train" not in parts or not measures:
        raise UserError(f"--data={data}: needs train and validation (or dev), as .jsonl in a folder; there are {[*parts]}")
    if len(set(measures.values())) < len(measures):
        raise UserError(f"--data={data}: {' and '.join(measures)} are two names of one part; leave one")
    known = set(parts["train"].labels)
    for name in ("train", *measures):
        part = parts[name]
        if len(part.second) != len(part.texts) or not part.texts:
            raise UserError(
                f"--data={data}: {name} has {len(part.texts)} texts and {len(part.second)} partners; "
                "give two texts in each line"
            )
        if unknown := set(part.labels) - known:
            raise UserError(f"--data={data}: {name} has the label {min(unknown)!r}, which train does not have")
    return LabelledPairs(source, parts["train"], {measure: parts[part] for part, measure in measures.items()})


def tokenize_pairs(model: TextModel, part: senteval.Labelled, classes: list[str], joined: bool = False) -> TokenPairs:
    """Tokenizes both texts of each pair, as queries; or `joined`, the second text as a query and behind it the first one.

    The first text, a document, then loses its end where the row would be longer than the model's longest text.
    """
    first = model.tokenize_views(part.texts, "document" if joined else "query")
    second = model.tokenize_views(part.second, "query")
    rows: list[tuple[list[int], ...]] = [*zip(first.rows, second.rows, strict=True)]
    truncated = np.array([first.truncated, second.truncated])
    if joined:
        whole = [later + earlier for earlier, later in rows]
        truncated = truncated.any(0) | np.array([len(row) > model.max_tokens for row in whole])
        rows = [(row[: model.max_tokens],) for row in whole]
    model.truncation.add(truncated.ravel().tolist())
    return TokenPairs(rows, np.array([classes.index(label) for label in part.labels], np.int32))


def make_batch(pairs: TokenPairs, chosen: np.ndarray, total: int, longest: int) -> Batch:
    """Makes a batch of the chosen pairs, filled up to `total` pairs of label -1, whose rows have one token each.

    All rows are padded to the first of LENGTHS that holds the longest text, and to `longest` at most. The token of a filler row
    only keeps its mean defined.
    """
    fields, texts = len(pairs.rows[0]), [row for index in chosen for row in pairs.rows[index]]
    sizes = np.array([len(row) for row in texts] + [1] * (fields * total - len(texts)))
    length = min(next(length for length in LENGTHS if length >= sizes.max()), longest)
    tokens = np.zeros((fields * total, length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    label = np.full(total, -1, np.int32)
    label[: len(chosen)] = pairs.label[chosen]
    shape = (total, fields, 1, length)
    segment = (np.arange(length) < sizes[:, None]).astype(np.int32)
    no_ids = np.zeros((total, fields), np.int32)  # the loss looks at the label alone
    return Batch(tokens.reshape(shape), segment.reshape(shape), no_ids[:, 0], no_ids, label)


def logits(head: Params, z: jax.Array) -> jax.Array:
    """Returns [u, v, |u - v|, u · v] · kernel + bias, float32[b c], of unit vectors z[b 2 e]; of one, u · kernel + bias."""
    return labels.features(z, product=True) @ head["kernel"] + head["bias"]


def classification_loss(
    z: jax.Array, ids: PairIds, head: Params, given: Given = NOTHING
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean cross-entropy of the pairs of z[b f e] that have a label, and no further metrics."""
    if ids.label is None:
        raise ValueError("a batch without labels has no classification loss")
    weight = (ids.label >= 0).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(head, z), jnp.maximum(ids.label, 0))
    return (losses * weight).sum() / weight.sum(), {}


def make_optimizer(recipe: Recipe, steps: int, params: Params) -> optax.GradientTransformation:
    """Returns AdamW, as `training.optim` makes it, with the recipe's learning rates for the encoder and the head.

    Args:
      recipe: the learning rates and the share of the steps that warm up.
      steps: the number of steps of the fine-tuning.
      params: the parameters, or their shapes.
    """
    config = default_config().optim
    config.update(learning_rate=recipe.encoder_rate, b2=0.999, schedule="linear", warmup_steps=int(recipe.warmup * steps))
    config.learning_rate_rules = ((r"^objective/", recipe.head_rate / recipe.encoder_rate), (r".*", 1.0))
    config.weight_decay_rules = ((r"norm|bias|embedding", 0.0), (r".*", 1.0))  # unlike the default, it decays the head
    return optim.make_optimizer(config, steps, params)


class FineTuning(NamedTuple):
    """The jitted functions of a fine-tuning.

    Attributes:
      init: seed → TrainState; the encoder's parameters are a copy of the model's.
      train_step: (state, batch, seed) → (state, loss); donates the state.
      count_correct: (params, batch) → float32[], the number of pairs whose label is predicted.
      batch_pairs: the size of a batch with its fillers: a multiple of the devices.
      mesh: all devices; parameters and the optimiser's moments are spread over them.
    """

    init: Callable[[int], TrainState]
    train_step: Callable[[TrainState, Batch, int], tuple[TrainState, jax.Array]]
    count_correct: Callable[[Params, Batch], jax.Array]
    batch_pairs: int
    mesh: jax.sharding.Mesh


def make_fine_tuning(model: TextModel, classes: int, recipe: Recipe, steps: int) -> FineTuning:
    """Makes the functions that fine-tune a model for so many steps, by the train step of pre-training."""
    mesh = sharding.all_devices_mesh()
    replicated = sharding.replicated(mesh)
    config = default_config()  # one span per row, no micro-batches
    config.data.batch_size = -(-recipe.batch_size // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    encode = build.make_encode(model.encoder, config, mesh)

    def init_head(rng: jax.Array) -> Params:
        width = model.dim * (1 if recipe.joined else 4)
        return {"kernel": 0.02 * jax.random.normal(rng, (width, classes)), "bias": jnp.zeros(classes)}

    objective = Objective(init_head, classification_loss)

    def init_params(seed: Any, encoder: Params) -> Params:
        return {"encoder": jax.tree.map(jnp.copy, encoder), "objective": objective.init(jax.random.key(seed))}

    optimizer = make_optimizer(recipe, steps, jax.eval_shape(init_params, 0, model.params))

    def init(seed: Any, encoder: Params) -> TrainState:
        params = init_params(seed, encoder)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    def train_step(state: TrainState, batch: Batch, seed: Any) -> tuple[TrainState, jax.Array]:
        # The seed is traced, so that all seeds share one compiled step.
        step = make_train_step(views.make_views(config, Vocabulary(0, {})), encode, objective, NO_MEMORY, optimizer, seed)
        state, metrics, _ = step(state, batch)
        return state, metrics["loss"]

    def count_correct(params: Params, batch: Batch) -> jax.Array:
        tokens, segment = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segment))
        # Without a random key there is no dropout.
        z = model.apply(params["encoder"], tokens, segment).reshape(len(batch.label), -1, model.dim)
        predicted = logits(params["objective"], z).argmax(1)
        return (predicted == batch.label).astype(jnp.float32).sum()  # a filler's label, -1, is never predicted

    state = jax.eval_shape(init, 0, model.params)
    shardings = jax.tree.map(lambda _: replicated, state.params)
    shardings["encoder"] = sharding.dividing_shardings(model.encoder.axes, state.params["encoder"], mesh)
    placement = build.state_shardings(state, shardings, optimizer, (), mesh)
    jitted_init = jax.jit(init, out_shardings=placement)
    return FineTuning(
        init=lambda seed: jitted_init(seed, model.params),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(placement, replicated)),
        count_correct=jax.jit(count_correct, out_shardings=replicated),
        batch_pairs=config.data.batch_size,
        mesh=mesh,
    )


def batches(
    tuning: FineTuning, pairs: TokenPairs, order: np.ndarray, batch_size: int, longest: int
) -> Iterator[tuple[int, Batch]]:
    """Yields the number of pairs of each batch, and the batch on the devices, in this order of the pairs."""
    total = tuning.batch_pairs
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = make_batch(pairs, chosen, total, longest)
        yield len(chosen), sharding.to_global(batch, np.arange(total), total, tuning.mesh)


def accuracy(tuning: FineTuning, params: Params, pairs: TokenPairs, batch_size: int, longest: int) -> float:
    """Returns the share of pairs whose label is predicted; pairs of like length are scored together, for little padding."""
    order = np.argsort([len(rows[0]) for rows in pairs.rows], kind="stable")
    counts = [tuning.count_correct(params, batch) for _, batch in batches(tuning, pairs, order, batch_size, longest)]
    return float(sum(counts)) / len(order)


def fine_tune(
    tuning: FineTuning,
    training: TokenPairs,
    held_out: dict[str, TokenPairs],
    recipe: Recipe,
    longest: int,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Trains with one seed; returns the accuracy of each held-out part after the epoch in which it is highest."""
    rng = np.random.default_rng(seed)
    state = tuning.init(seed)
    best, loss = dict.fromkeys(held_out, 0.0), jnp.float32(0)
    for epoch in range(1, recipe.epochs + 1):
        order = rng.permutation(len(training.label))
        for count, batch in batches(tuning, training, order, recipe.batch_size, longest):
            earlier = float(loss)  # waits for it: the host is no more than a step ahead
            state, loss = tuning.train_step(state, batch, seed)
            progress.advance(count, f"seed {seed}, epoch {epoch}, loss {earlier:.4f}")
        scores = {name: accuracy(tuning, state.params, pairs, recipe.batch_size, longest) for name, pairs in held_out.items()}
        shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())
        logging.info("seed %d, epoch %d of %d: %s", seed, epoch, recipe.epochs, shown)
        best = {name: max(best[name], scores[name]) for name in scores}
    return best


def score_fine_tuned(model: TextModel, data: LabelledPairs, recipe: Recipe) -> Rows:
    """Fine-tunes copies of a model, one per seed, and scores them.

    Returns:
      Rows of accuracies with one column per held-out part: of the most frequent label in training ("majority"); of each seed,
      after its best epoch; and over the seeds their best, mean and standard deviation.
    """
    classes = sorted(set(data.train.labels))
    training = tokenize_pairs(model, data.train, classes, recipe.joined)
    held_out = {name: tokenize_pairs(model, part, classes, recipe.joined) for name, part in data.held_out.items()}
    count = len(training.label)
    tuning = make_fine_tuning(model, len(classes), recipe, steps=recipe.epochs * -(-count // recipe.batch_size))
    majority = np.bincount(training.label).argmax()
    rows = {"majority": {name: float((pairs.label == majority).mean()) for name, pairs in held_out.items()}}
    by_seed = []
    with Progress("fine-tuning", total=recipe.seeds * recipe.epochs * count, unit="pairs") as progress:
        for seed in range(recipe.seeds):
            by_seed.append(fine_tune(tuning, training, held_out, recipe, model.max_tokens, seed, progress))
            rows[f"seed {seed}"] = by_seed[-1]
    for row, summary in (("best", np.max), ("mean", np.mean), ("deviation", np.std)):
        rows[row] = {name: float(summary([scores[name] for scores in by_seed])) for name in held_out}
    return rows


def recipe_of(options: Options) -> Recipe:
    """Returns the recipe with the user's numbers of epochs and seeds, and rows."""
    return Recipe(epochs=options.epochs, seeds=options.seeds, joined=options.joined)


def score_pairs(model: TextModel, data: LabelledPairs, options: Options) -> Rows:
    """Fine-tunes and scores a model by the user's recipe."""
    return score_fine_tuned(model, data, recipe_of(options))


def protocol_of(model: TextModel, data: LabelledPairs, options: Options) -> dict[str, Any]:
    """Returns the data and how they are learnt."""
    towers, one_row = {"features": "u, v, |u - v|, u · v", "views": "0, 0"}, {"features": "u", "views": "0 and 1 in a row"}
    chosen = {"chosen": "best epoch on the held-out part"} | (one_row if options.joined else towers)
    return {"data": hash_files(data.source, ("*.jsonl",))} | recipe_of(options)._asdict() | chosen


TASK = Task("glue", open_pairs, score_pairs, protocol_of, in_training=False)
