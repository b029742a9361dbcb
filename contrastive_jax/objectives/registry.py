"""The objectives by name. A new one is an entry here, and its name is a choice of `objective.name` in `config/keys.py`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives import distillation, labels, pairs, siamese, spread
from contrastive_jax.objectives.losses import LOSSES
from contrastive_jax.objectives.objective import NO_OBJECTIVE, Metrics, Objective, losses_of

# (the config of the run, views v, width e of an embedding) → Objective. A builder raises UserError where values of the config
# do not go together. Sums over the batch need no mesh: jit spreads them over the devices.
Builder = Callable[[ConfigDict, int, int], Objective]

# Losses without parameters, which `objective.extra` may add to any other.
EXTRA: dict[str, Builder] = {
    "similarity": distillation.similarity,
    "embedding": distillation.embedding,
    "margin_mse": distillation.margin_mse,
    "kl": distillation.kl,
    "spread_mean": spread.spread_mean,
    "spread_square": spread.spread_square,
}
# All but the losses over pairs, which `losses.LOSSES` has.
OBJECTIVES: dict[str, Builder] = EXTRA | {
    "simsiam": siamese.simsiam,
    "byol": siamese.byol,
    "softmax": labels.softmax,
    "cosent": labels.cosent,
    "cosine": labels.cosine,
}


def make_objective(config: ConfigDict, views: int, dim: int, mesh: Mesh | None = None, axes: tuple[str, ...] = ()) -> Objective:
    """Builds the objective of a run: its loss times `config.objective.weight`, and the losses of `config.objective.extra`.

    With weight 0 the loss is not built, and has no parameters; without any the objective is 0.

    Args:
      config: of the run.
      views: v, the views of a pair.
      dim: e, the width of an embedding.
      mesh: the mesh; None: one device.
      axes: the mesh axes over which the batch is spread.

    Raises:
      UserError: two config keys do not go together; the message names them.
    """
    weight, extra = config.objective.weight, tuple(config.objective.extra)
    if unknown := sorted({name for name, _ in extra} - EXTRA.keys()):
        raise UserError(f"config.objective.extra: no loss {unknown[0]!r}; there are {', '.join(EXTRA)}")
    if config.objective.matryoshka and not weight:
        raise UserError(
            "config.objective.matryoshka: config.objective.weight=0, and other losses see whole vectors; leave it out"
        )
    objective = make_named(config, views, dim, mesh, axes) if weight else NO_OBJECTIVE
    if not losses_of(config.objective) or (weight == 1 and not extra):
        return objective
    terms = [(name, factor, EXTRA[name](config, views, dim).loss) for name, factor in extra]

    def loss(z: jax.Array, *inputs: Any) -> tuple[jax.Array, Metrics]:
        value, metrics = objective.loss(z, *inputs)
        total = weight * value
        metrics |= {"batch_loss": jax.lax.stop_gradient(value)} if weight else {}
        for name, factor, term in terms:
            value, of_term = term(z[:, :views], *inputs)  # without the token states of config.objective.locals
            total += factor * value
            metrics |= of_term | {f"extra_{name}": jax.lax.stop_gradient(value)}
        return total, metrics

    return objective._replace(loss=loss)


def make_named(config: ConfigDict, views: int, dim: int, mesh: Mesh | None, axes: tuple[str, ...]) -> Objective:
    """Builds the objective `config.objective.name`; see `make_objective`."""
    name = config.objective.name
    if config.data.hard_negatives and config.data.copies > 1:
        raise UserError(f"config.data.hard_negatives={config.data.hard_negatives}: set config.data.copies=1")
    if name in LOSSES:
        if config.objective.mask_guide:
            distillation.check_target(config, "mask_guide")
        return pairs.make_objective(pairs.pair_config(config), views, dim, mesh, axes)
    for key in ("locals", "matryoshka"):
        if config.objective[key]:
            raise UserError(f"config.objective.{key}: config.objective.name={name!r} is no loss over pairs; leave it out")
    if config.data.hard_negatives and name in ("simsiam", "byol"):
        raise UserError(
            f"config.data.hard_negatives={config.data.hard_negatives}: config.objective.name={name!r} has no negatives, and "
            "would draw them to their anchors; set 0"
        )
    return OBJECTIVES[name](config, views, dim)
