"""Losses against sentence-transformers' own of the same embeddings: value and gradients, on devices and in micro-batches."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from objectives.composition import HOW, LENGTH, B, E, computed, distance, encode, rows_of, small_encoder

from contrastive_jax.config import default_config
from contrastive_jax.objectives import registry
from contrastive_jax.objectives.objective import Given, PairIds
from contrastive_jax.runtime import sharding

torch = pytest.importorskip("torch")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SCALE = 20.0
GUIDE = 5  # the width of a guide's vectors
Theirs = Callable[[list], Any]  # float64 tensors [b e] of the views → loss


class Case(NamedTuple):
    """One loss of both: ours by the config, theirs by a function of the views' embeddings."""

    views: int
    config: dict[str, Any]
    theirs: Theirs


def scores(views: int) -> np.ndarray:
    """What a teacher says of the documents."""
    return np.random.default_rng(3).normal(size=(B, views - 1)).astype(np.float32)


def targets(views: int, width: int) -> np.ndarray:
    """Unit vectors [b v f] of another model."""
    z = np.random.default_rng(4).normal(size=(B, views, width)).astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def double(x: np.ndarray) -> Any:
    return torch.tensor(np.asarray(x, np.float64))


def columns(x: np.ndarray) -> list:
    """Tensors [b e] of the views of an array [b v e]."""
    return [double(x[:, view]) for view in range(x.shape[1])]


def spread_out(**weights: float) -> Theirs:
    return lambda z: sum(losses.GlobalOrthogonalRegularizationLoss(None, **weights).compute_loss_from_embeddings(z).values())


def distilled(metric: str) -> Theirs:
    return lambda z: losses.EmbedDistillLoss(None, metric).compute_loss_from_embeddings(z, columns(targets(2, E)))


def margin_mse(z: list) -> Any:
    loss = losses.MarginMSELoss(None, lambda a, b: util.pairwise_dot_score(a, b) / 0.5)
    return loss.compute_loss_from_embeddings(z, double(scores(4)) / 3)


def kl(z: list) -> Any:
    loss = losses.DistillKLDivLoss(None, student_temperature=0.5, teacher_temperature=3.0)
    return loss.compute_loss_from_embeddings(z, double(scores(4)))


def ranking(directions: str = "query_to_doc", hardness: str | None = None, **options: Any) -> Theirs:
    options |= {"directions": tuple(directions.split()), "hardness_mode": hardness, "hardness_strength": 7.0}
    loss = losses.MultipleNegativesRankingLoss(None, SCALE, **options)
    return lambda z: loss.compute_loss_from_embeddings(z, None)


class Stub(torch.nn.Module):
    """A model whose embeddings are an entry of its input."""

    def __init__(self, entry: str):
        super().__init__()
        self.entry, self.max_seq_length = entry, LENGTH
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))

    def forward(self, features: dict) -> dict:
        return {"sentence_embedding": features[self.entry]}


def guided(z: list, **options: Any) -> Any:
    loss = losses.GISTEmbedLoss(Stub("z"), Stub("guide"), temperature=1 / SCALE, **options)
    guide = columns(targets(len(z), GUIDE))
    return loss([{"z": x, "guide": y} for x, y in zip(z, guide, strict=True)], None)


FOUR = "query_to_doc doc_to_query query_to_query doc_to_doc"
ALL = ("document_query", "query_query", "document_document")
HARD = {"data.hard_negatives": 2}
GIST = {"memory.kind": "frozen", "objective.mask_guide": True}
OF_PAIRS = {
    "with hard negatives": Case(4, HARD, ranking()),
    "symmetric": Case(2, {"objective.symmetric": True}, ranking("query_to_doc doc_to_query", partition_mode="per_direction")),
    "joint, two directions": Case(2, {"objective.joint": ALL[:1]}, ranking("query_to_doc doc_to_query")),
    "joint, Qwen3's three": Case(4, HARD | {"objective.joint": ALL[1:]}, ranking("query_to_doc query_to_query doc_to_doc")),
    "joint, four directions": Case(2, {"objective.joint": ALL}, ranking(FOUR)),
    "joint, hard negatives": Case(4, HARD | {"objective.joint": ALL}, ranking(FOUR)),
    "hardness of other pairs": Case(4, HARD | {"objective.hardness": 7.0}, ranking(hardness="in_batch_negatives")),
    "hardness of its own": Case(4, HARD | {"objective.hardness_own": 7.0}, ranking(hardness="hard_negatives")),
    "hardness of all, joint": Case(
        4,
        HARD | {"objective.hardness": 7.0, "objective.hardness_own": 7.0, "objective.joint": ALL},
        ranking(FOUR, hardness="all_negatives"),
    ),
    "guided, of pairs": Case(
        2,
        GIST | {"objective.joint": ALL[1:], "objective.mask_margin": -0.1},
        functools.partial(guided, margin_strategy="absolute", margin=0.1),
    ),
    "guided, of triplets": Case(
        3,
        GIST
        | {"data.hard_negatives": 1, "objective.joint": ALL[1:2]}
        | {"objective.mask_margin": -0.05, "objective.mask_relative": True},
        functools.partial(guided, margin_strategy="relative", margin=0.05, contrast_positives=False),
    ),
}
FROZEN = {"memory.kind": "frozen", "objective.weight": 0.0}
SCORED = {"data.sampler": "fields", "scores.temperature": 0.5, "scores.teacher_temperature": 3.0}
OF_SUMS = {  # sums over the rows: there is no place where pairs are scored
    "spread": Case(
        2,
        {"objective.weight": 0.0, "objective.extra": (("spread_mean", 0.7), ("spread_square", 0.3))},
        spread_out(mean_weight=0.7, second_moment_weight=0.3),
    ),
    "spread summed": Case(
        3,
        {"objective.weight": 0.0, "objective.extra": (("spread_square", 3.0),)},
        spread_out(mean_weight=None, aggregation="sum"),
    ),
    "margin_mse": Case(4, SCORED | {"objective.name": "margin_mse"}, margin_mse),
    "kl": Case(4, SCORED | {"objective.name": "kl", "objective.weight": 2.0}, lambda z: 2 * kl(z)),
    "embedding": Case(2, FROZEN | {"objective.extra": (("embedding", 1.0),)}, distilled("cosine")),
    "embedding, mean square": Case(2, FROZEN | {"objective.extra": (("embedding", 2 / E),)}, distilled("mse")),
}
CASES = OF_SUMS | OF_PAIRS
DEVICES = (1, 2, 4, 8)
TABLE = [
    *itertools.product(OF_SUMS, ["gathered"], HOW, DEVICES),
    *itertools.product(OF_PAIRS, ["gathered", "ring"], HOW, DEVICES),
]
# In every run of the tests: each loss once, the other choices in turns.
COVER = [
    (name, ("gathered", "ring")[i % 2] if name not in OF_SUMS else "gathered", HOW[i // 2 % 2], (8, 4, 8, 1)[i % 4])
    for i, name in enumerate(CASES)
]


def config_of(case: Case, where: str) -> ConfigDict:
    config = default_config()
    config.objective.update(block=5, where=where, symmetric=False, temperature=1 / SCALE)
    config.objective.update(mask_same_document=False, mask_duplicates=False)
    config.update_from_flattened_dict(case.config)
    config.data.views = case.views
    return config


@functools.cache
def expected(name: str) -> tuple:
    """The embeddings, their loss in float64, and its gradients: of the encoder, by the chain rule, and of the embeddings."""
    case = CASES[name]
    z, to_params = jax.vjp(lambda params: encode(params, rows_of(case.views)), small_encoder()[1])
    views = [x.requires_grad_() for x in columns(np.asarray(z))]
    loss = case.theirs(views)
    loss.backward()
    gradient = jnp.stack([jnp.float32(x.grad.numpy()) for x in views], axis=1)
    return z, loss.item(), to_params(gradient)[0], gradient


def check(name: str, where: str, how: str, devices: int) -> None:
    case = CASES[name]
    config = config_of(case, where)

    def make(mesh: jax.sharding.Mesh) -> Any:
        return registry.make_objective(config, case.views, E, mesh, sharding.BATCH_AXES)

    text = np.arange(B * case.views, dtype=np.int32).reshape(B, case.views)
    host = PairIds(np.arange(B, dtype=np.int32), text, scores=scores(case.views))
    given = Given(targets(case.views, GUIDE if config.objective.mask_guide else E))
    value, (params, nudge) = computed(make, case.views, how, devices, host, given)
    z, loss, of_encoder, of_embeddings = expected(name)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    # They scale the vectors to unit length once more, so that their gradient has no part along them.
    across = [x - (x * z).sum(-1, keepdims=True) * z for x in (np.asarray(nudge), of_embeddings)]
    assert distance(*across) < 1e-5
    far = jax.tree.map(distance, params["encoder"], of_encoder)
    assert max(jax.tree.leaves(far)) < 1e-5, far


@pytest.mark.parametrize("case", COVER, ids=lambda case: "-".join(map(str, case)))
def test_losses_are_those_of_sentence_transformers(case: tuple) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=lambda case: "-".join(map(str, case)))
def test_losses_are_those_of_sentence_transformers_everywhere(case: tuple) -> None:
    check(*case)
