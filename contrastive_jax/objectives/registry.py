"""The objectives by name. A new one is an entry here, and its name is a choice of `objective.name` in `config/keys.py`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives import distillation, labels, pairs, siamese
from contrastive_jax.objectives.losses import LOSSES
from contrastive_jax.objectives.objective import NO_OBJECTIVE, Metrics, Objective

# (the config of the run, views v, width e of an embedding) → Objective. A builder raises UserError where values of the config
# do not go together. Sums over the batch need no mesh: jit spreads them over the devices.
Builder = Callable[[ConfigDict, int, int], Objective]

# All but the losses over pairs, which `losses.LOSSES` has.
OBJECTIVES: dict[str, Builder] = {
    "simsiam": siamese.simsiam,
    "byol": siamese.byol,
    "softmax": labels.softmax,
    "cosent": labels.cosent,
    "cosine": labels.cosine,
    "similarity": distillation.similarity,
}


def make_objective(config: ConfigDict, views: int, dim: int, mesh: Mesh | None = None, axes: tuple[str, ...] = ()) -> Objective:
    """Builds the objective of a run, times `config.objective.weight`; with weight 0 it has neither a loss nor parameters.

    Args:
      config: of the run.
      views: v, the views of a pair.
      dim: e, the width of an embedding.
      mesh: the mesh; None: one device.
      axes: the mesh axes over which the batch is spread.

    Raises:
      UserError: two config keys do not go together; the message names them.
    """
    weight, name = config.objective.weight, config.objective.name
    if not weight:
        return NO_OBJECTIVE
    if config.objective.hard_negatives and config.data.copies > 1:
        raise UserError(f"config.objective.hard_negatives={config.objective.hard_negatives}: set config.data.copies=1")
    if name in LOSSES:
        objective = pairs.make_objective(config.objective, views, dim, mesh, axes)
    elif config.objective.locals:
        raise UserError(f"config.objective.locals: config.objective.name={name!r} is no loss over pairs")
    else:
        objective = OBJECTIVES[name](config, views, dim)

    def loss(*inputs: Any) -> tuple[jax.Array, Metrics]:
        value, metrics = objective.loss(*inputs)
        return weight * value, metrics | {"batch_loss": jax.lax.stop_gradient(value)}

    return objective if weight == 1 else objective._replace(loss=loss)
