"""Which views of a pair are anchors, and which are their positives.

A loss sees problems: arrays [b' v' e] with the anchor first, then its positives and hard negatives.

Dimensions: b pairs, v views (anchor, positives, hard negatives), e embedding.
"""

import itertools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives.dense import normalize
from contrastive_jax.objectives.objective import Params, check_two_views


def check_pairing(config: ConfigDict, views: int) -> None:
    """Raises UserError if `pairs.pair_config` pairs v views in a way that it does not know."""
    hard = config.hard_negatives
    if not config.locals:
        check_two_views(config, views)
    if hard > max(views - 2, 0):
        raise UserError(
            f"config.data.hard_negatives={hard}: of the {views} views of a pair two are anchor and positive; set "
            f"config.data.sampler='fields' and config.data.views={2 + hard}"
        )
    if config.locals and (config.pairing != "first" or config.positives == "mean" or hard):
        raise UserError(f"config.objective.locals={config.locals}: needs config.objective.pairing='first' and positives='each'")
    many = "config.objective.positives='mean' needs" if config.positives == "mean" else "config.objective.pairing='all' needs"
    if (config.positives == "mean" or config.pairing == "all") and views - hard < 3:
        raise UserError(f"{many} pairs of three views or more, and the data gives {views - hard}")
    if config.pairing != "first" and hard:
        raise UserError(f"config.objective.pairing={config.pairing!r}: a hard negative belongs to one anchor; take 'first'")
    if config.pairing == "all" and config.positives == "mean":
        raise UserError("config.objective.pairing='all': config.objective.positives='mean' leaves one pair; take 'each'")
    if config.pairing == "both" and config.positives == "each" and views != 2:
        raise UserError(
            f"config.objective.pairing='both' needs two views, and the data gives {views}; set "
            "config.objective.positives='mean'"
        )
    if config.context and config.pairing != "all":
        raise UserError(f"config.objective.context={config.context}: needs config.objective.pairing='all'")
    if config.pairing == "all" and config.name == "mine":
        raise UserError("config.objective.pairing='all': config.objective.name='mine' has one moving average; take 'dv'")


def choose_states(states: jax.Array, segment: jax.Array, uniform: jax.Array, k: int) -> jax.Array:
    """Returns k token states of each row as unit vectors float32[n k d]; a row with fewer tokens repeats them.

    Args:
      states: [n l d].
      segment: int32[n l]; 0 is padding.
      uniform: float32[n l] in [0, 1); the tokens with the largest numbers are chosen.
      k: how many.
    """
    order = jnp.argsort(jnp.where(segment > 0, -uniform, 1.0), axis=1)
    place = jnp.arange(k) % jnp.maximum((segment > 0).sum(1, keepdims=True), 1)  # [n k]
    index = jnp.take_along_axis(order, place, axis=1)
    return normalize(jnp.take_along_axis(states, index[..., None], axis=1).astype(jnp.float32))


def init_context(config: ConfigDict, views: int, dim: int, rng: jax.Array) -> Params:
    """Returns the parameters of `predict_views`: a GRU of width `config.context` = h and a matrix W_k [h e] per offset k."""
    h = config.context
    shapes = {"input": (dim, 3 * h), "recurrent": (h, 3 * h), "predict": (views - 1, h, dim)}
    keys = zip(shapes.items(), jax.random.split(rng, len(shapes)), strict=True)
    kernels = {name: jax.random.normal(key, shape) * shape[-2] ** -0.5 for (name, shape), key in keys}
    return kernels | {"bias": jnp.zeros(3 * h)}


def predict_views(params: Params, z: jax.Array) -> list[jax.Array]:
    r"""Returns a problem [b 2 e] for each two views i < j: the unit vector of :math:`c_i W_{j-i}`, and view j.

    The context c_i is the state of a GRU that has seen views 0 to i.

    References:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748, §2.2
      Cho et al., https://arxiv.org/abs/1406.1078, §2.3; the reset gate is applied after the matrix, as cuDNN does.
    """
    context, problems = jnp.zeros((len(z), len(params["recurrent"]))), []
    for i in range(z.shape[1] - 1):
        of_input = jnp.split(z[:, i] @ params["input"] + params["bias"], 3, axis=1)
        of_context = jnp.split(context @ params["recurrent"], 3, axis=1)
        reset, update = (jax.nn.sigmoid(a + b) for a, b in zip(of_input[:2], of_context[:2], strict=True))
        new = jnp.tanh(of_input[2] + reset * of_context[2])
        context = update * context + (1 - update) * new
        for j in range(i + 1, z.shape[1]):
            problems.append(jnp.stack([normalize(context @ params["predict"][j - i - 1]), z[:, j]], axis=1))
    return problems


def arrange(config: ConfigDict, z: jax.Array, params: Params) -> tuple[list[jax.Array], int]:
    """Returns the problems whose losses are summed, and how many anchors a pair has in each.

    * "first": view 0 is the anchor of all others.
    * "both": each of two views is the anchor of the other, and both views of all other pairs are negatives, 2b - 2 (NT-Xent:
      Chen et al., A Simple Framework for Contrastive Learning, https://arxiv.org/abs/2002.05709, equation 1).
    * "all": one problem for each two views (Tian et al., Contrastive Multiview Coding, https://arxiv.org/abs/1906.05849,
      equation 7). With `context` the anchor of view j is not view i but what a context over views 0 to i predicts of it.

    With `locals` k the positives are the last k vectors of z, token states (Hjelm et al., DIM,
    https://arxiv.org/abs/1808.06670, equation 8).

    With positives="mean" the positives of an anchor are one, the unit vector of their mean (Giorgi et al., DeCLUTR,
    https://arxiv.org/abs/2006.03659, §3.1).

    Args:
      config: `config.objective`.
      z: float32[b v e].
      params: of the objective.
    """
    if config.locals:
        return [jnp.concatenate([z[:, :1], z[:, -config.locals :]], axis=1)], 1
    if config.positives == "mean":
        last = z.shape[1] - config.hard_negatives
        z = jnp.concatenate([z[:, :1], normalize(z[:, 1:last].mean(1, keepdims=True)), z[:, last:]], axis=1)
    if config.context:
        return predict_views(params["context"], z), 1
    if config.pairing == "all":
        return [z[:, views] for views in itertools.combinations(range(z.shape[1]), 2)], 1
    if config.pairing == "both":
        # The two rows of a pair follow one another, so that none leaves its device.
        return [jnp.stack([z, z[:, ::-1]], axis=1).reshape(-1, *z.shape[1:])], 2
    return [z], 1
