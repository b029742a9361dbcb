"""The plain loss of `config.objective`: every matrix written out, on one device, straight from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.objectives import pairs


def kept_rows(text: np.ndarray) -> np.ndarray:
    """Whether each row's texts occur in no earlier row, bool[b]."""
    seen: set = set()
    return np.array([not (tuple(row) in seen or seen.add(tuple(row))) for row in text.tolist()])


def negatives(config: ConfigDict, doc: np.ndarray, text: np.ndarray, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Which keys are negatives of which anchors, bool[b b k], by looking at every pair; and which rows count, bool[b]."""
    b, views = text.shape
    p = views - 1 - config.hard_negatives
    keep = kept_rows(text) if config.mask_duplicates else np.ones(b, bool)
    allowed = np.zeros((b, b, views - 1), bool)
    for i in range(b):
        for j in range(b):
            for c in range(views - 1):
                hard = c >= p
                ok = keep[i] and keep[j] and i // (b // shards) == j // (b // shards) and (i != j or hard)
                if config.mask_same_document and not hard:
                    ok = ok and doc[i] != doc[j]
                if config.mask_duplicates:
                    of_key = {text[j, 1 + c]} | (set() if hard else {text[j, 0]})
                    ok = ok and not of_key & set(text[i, : 1 + p].tolist())
                allowed[i, j, c] = ok
    return allowed, keep


def loss(config: ConfigDict, z: jax.Array, doc: np.ndarray, text: np.ndarray, params: dict, shards: int = 1) -> jax.Array:
    """The loss float32[] of z[b v e]; shards > 1: negatives from one's own share of the batch alone."""
    return parts(config, z, doc, text, params, shards).sum()


def parts(config: ConfigDict, z: jax.Array, doc: np.ndarray, text: np.ndarray, params: dict, shards: int = 1) -> jax.Array:
    """What each anchor and each positive contributes to the loss; they may have either sign and cancel."""
    allowed, keep = negatives(config, doc, text, shards)
    p = text.shape[1] - 1 - config.hard_negatives
    found, weights = [], 0.0
    for size, weight in config.matryoshka or ((z.shape[-1], 1.0),):
        cut = z[..., :size]
        cut = cut / jnp.sqrt(jnp.square(cut).sum(-1, keepdims=True)) if size < z.shape[-1] else cut
        found.append(weight * whole(config, cut, jnp.asarray(allowed), jnp.asarray(keep), p, params))
        weights += weight
    return jnp.concatenate(found) / weights


def whole(config: ConfigDict, z: jax.Array, allowed: jax.Array, keep: jax.Array, p: int, params: dict) -> jax.Array:
    """The parts of one prefix of the embeddings."""
    b = len(z)
    similarity = jnp.einsum("ie,jce->ijc", z[:, 0], z[:, 1:])
    s = similarity / jnp.exp(params["log_temperature"]) + params.get("bias", 0.0)
    own, own_similarity = (x[jnp.arange(b), jnp.arange(b), :p] for x in (s, similarity))  # [b p]
    in_rows = in_columns = allowed
    if config.mask_margin is not None:
        in_rows = allowed & (similarity <= (own_similarity.max(1) + config.mask_margin)[:, None, None])
        limit = jnp.concatenate([own_similarity + config.mask_margin, jnp.full((b, allowed.shape[2] - p), jnp.inf)], axis=1)
        in_columns = allowed & (similarity <= limit)
    each = [one(config, own, s.reshape(b, 1, -1), in_rows.reshape(b, 1, -1))]
    if config.symmetric and config.name != "siglip":
        # Anchors are the keys of a positive: [j p i].
        each.append(one(config, own, s.transpose(1, 2, 0)[:, :p], in_columns.transpose(1, 2, 0)[:, :p]))
    return jnp.stack([jnp.where(keep[:, None], value, 0) / (keep.sum() * p * len(each)) for value in each]).ravel()


def one(config: ConfigDict, positive: jax.Array, others: jax.Array, allowed: jax.Array) -> jax.Array:
    """Losses [b p] of positives [b p] against their negatives among others [b p|1 n]."""
    masked = jnp.where(allowed, others, pairs.distributed.MASKED)
    if config.name == "siglip":
        return jax.nn.softplus(-positive) + jax.nn.softplus(masked).sum(-1)
    ratio = jnp.where(allowed.any(-1), jax.nn.logsumexp(masked, axis=-1) - positive, 0)
    if config.name != "infonce":
        return ratio if config.name == "dcl" else jnp.exp(ratio - jax.lax.stop_gradient(ratio))
    masked, allowed = (jnp.broadcast_to(x, (*positive.shape, x.shape[-1])) for x in (masked, allowed))
    target = jnp.concatenate([positive[..., None], masked], axis=-1)
    among = jnp.concatenate([jnp.ones_like(allowed[..., :1]), allowed], axis=-1)
    log_probability = jax.nn.log_softmax(target, axis=-1)
    even = jnp.where(among, log_probability, 0).sum(-1) / among.sum(-1)
    return -(1 - config.label_smoothing) * log_probability[..., 0] - config.label_smoothing * even
