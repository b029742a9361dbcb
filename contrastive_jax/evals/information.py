"""Deep InfoMax's two measures of a representation, on the pairs of the query-key test, in nats.

MINE is the mutual information of a span and its embedding, and of two neighbouring embeddings; the neural dependency measure
(NDM) says how much the coordinates of an embedding tell of one another. Both are the divergence of a joint distribution from
the product of its parts, bounded from below by a trained statistic. Only a few coordinates are compared, since a statistic of
all learns some hundred samples by heart; leaving some out makes a measure smaller, never larger.

Deep InfoMax (https://arxiv.org/abs/1808.06670), §4; MINE (https://arxiv.org/abs/1801.04062), equation 5; Brakel and Bengio
(https://arxiv.org/abs/1710.05050). Dimensions: n samples, d columns of a sample, k columns of x that are kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastive_jax.evals import query_key
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Task, untrained
from contrastive_jax.inference.text_model import TextModel

KEPT, WIDTH = 16, 256  # coordinates of an embedding; of the random vector of a token
HIDDEN, ROUNDS, STEPS, BATCH, RATE, DRAWS = 64, 25, 40, 256, 3e-3, 4  # draws per sample measured on


def statistic(params: Any, x: jax.Array) -> jax.Array:
    """Returns float[n] of x[n d]: a quadratic form, which is all that Gaussians need, and an MLP of one hidden layer."""
    return (x @ params["square"] * x).sum(-1) + jax.nn.relu(x @ params["in"] + params["bias"]) @ params["out"]


def bound(params: Any, rng: jax.Array, x: jax.Array, parts: jax.Array) -> jax.Array:
    """Returns E_P[t] - log E_Q[exp t]: P has the samples x[n d]; Q takes each of the parts int[d] from a sample of its own."""
    product = jnp.take_along_axis(x, jax.random.randint(rng, x.shape, 0, len(x))[:, parts], axis=0)  # no sort: it is slow
    return statistic(params, x).mean() - jax.nn.logsumexp(statistic(params, product)) + jnp.log(len(x))


@jax.jit
def divergence(rng: jax.Array, samples: jax.Array, parts: jax.Array) -> jax.Array:
    """Estimates KL(joint ‖ product of the parts) of samples[n d] in nats; column i belongs to part parts[i], from 0.

    The statistic is trained on half of the samples; its best state on a quarter is measured on the last quarter, so that
    nothing learnt by heart counts. Where no state is above 0 on the former, the estimate is 0.
    """
    n, d = samples.shape
    order, first, rest = jax.random.split(rng, 3)
    train, tune, test = jnp.split(jax.random.permutation(order, samples), [n // 2, n * 3 // 4])
    mean, std = train.mean(0), train.std(0) + 1e-8
    train, *held_out = ((part - mean) / std for part in (train, tune, test))
    params = {"square": jnp.zeros((d, d)), "in": jax.random.normal(first, (d, HIDDEN)) / d**0.5}
    params |= {"bias": jnp.zeros(HIDDEN), "out": jnp.zeros(HIDDEN)}
    optimizer = optax.adam(RATE)

    def step(state: Any, rng: jax.Array) -> tuple[Any, None]:
        choice, draw = jax.random.split(rng)
        batch = train[jax.random.randint(choice, (BATCH,), 0, len(train))]
        updates, moments = optimizer.update(jax.grad(lambda p: -bound(p, draw, batch, parts))(state[0]), state[1])
        return (optax.apply_updates(state[0], updates), moments), None

    def train_and_measure(state: Any, rng: jax.Array) -> tuple[Any, list[jax.Array]]:
        steps, draw = jax.random.split(rng)
        state, _ = jax.lax.scan(step, state, jax.random.split(steps, STEPS))
        return state, [bound(state[0], draw, jnp.tile(part, (DRAWS, 1)), parts) for part in held_out]

    _, (tuned, tested) = jax.lax.scan(train_and_measure, (params, optimizer.init(params)), jax.random.split(rest, ROUNDS))
    return jnp.where(tuned.max() > 0, tested[tuned.argmax()], 0.0)


def principal(x: np.ndarray) -> np.ndarray:
    """Returns the first principal components of x[n d], [n k]."""
    centred = x - x.mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:KEPT].T


def score(model: TextModel, data: query_key.HeldOut, options: Options) -> Rows:
    """Measures a model; a span is the bag of its tokens, each of them a random vector."""
    z, spans, seed = query_key.embed(model, data, options), data.pairs.spans[:, 0], data.protocol["seed"]
    bags = np.random.default_rng(seed).normal(size=(spans.max() + 1, WIDTH))[spans].mean(1)
    text, query, key = map(principal, (bags, z[:, 0], z[:, 1]))
    joints: dict[str, list[np.ndarray]] = {"mine_input": [text, query], "mine_views": [query, key]}
    joints["ndm"] = list(z[:, 0, :KEPT].T[..., None])
    parts = {name: np.repeat(np.arange(len(joint)), [part.shape[1] for part in joint]) for name, joint in joints.items()}
    samples = {name: np.concatenate(joint, axis=1, dtype=np.float32) for name, joint in joints.items()}
    return {name: {"nats": float(divergence(jax.random.key(seed), samples[name], parts[name]))} for name in joints}


WAY = {"coordinates": KEPT, "hidden": HIDDEN, "steps": ROUNDS * STEPS}
BASELINES = {"untrained": untrained(score)}
TASK = Task("information", query_key.open_held_out, score, lambda *of: query_key.protocol_of(*of) | WAY, BASELINES)
