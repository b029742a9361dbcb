"""The plain loss of `config.objective`: every matrix written out, on one device, straight from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.objectives.tiles import MASKED


def kept_rows(span_hash: np.ndarray) -> np.ndarray:
    """Whether each pair's spans occur in no earlier pair, bool[b]."""
    seen: set = set()
    return np.array([not (tuple(row) in seen or seen.add(tuple(row))) for row in span_hash.tolist()])


def negatives(config: ConfigDict, ids: PairIds, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Which keys are negatives of which anchors, bool[b b k], by looking at every pair; and which rows count, bool[b]."""
    doc, text = ids.document, ids.span_hash
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
                    of_key = {text[j, 1 + c]} if hard else set(text[j, : 1 + p].tolist())
                    ok = ok and not of_key & set(text[i, : 1 + p].tolist())
                allowed[i, j, c] = ok
    return allowed, keep


def loss(config: ConfigDict, z: jax.Array, ids: PairIds, params: dict, shards: int = 1) -> jax.Array:
    """The loss float32[] of z[b v e]; shards > 1: negatives come from one's own share of the batch alone."""
    return parts(config, z, ids, params, shards).sum()


def parts(config: ConfigDict, z: jax.Array, ids: PairIds, params: dict, shards: int = 1) -> jax.Array:
    """What each anchor and each positive contributes to the loss; they may have either sign and cancel."""
    allowed, keep = negatives(config, ids, shards)
    p = ids.span_hash.shape[1] - 1 - config.hard_negatives
    of_prefixes, weights = [], 0.0
    for size, weight in config.matryoshka or ((z.shape[-1], 1.0),):
        prefix = z[..., :size]
        prefix = prefix / jnp.sqrt(jnp.square(prefix).sum(-1, keepdims=True)) if size < z.shape[-1] else prefix
        of_prefixes.append(weight * parts_of_prefix(config, prefix, jnp.asarray(allowed), jnp.asarray(keep), p, params))
        weights += weight
    return jnp.concatenate(of_prefixes) / weights


def parts_of_prefix(config: ConfigDict, z: jax.Array, allowed: jax.Array, keep: jax.Array, p: int, params: dict) -> jax.Array:
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
    directions = [losses(config, own, s.reshape(b, 1, -1), in_rows.reshape(b, 1, -1))]
    if config.symmetric and config.name in ("infonce", "flatnce", "dcl"):
        # Anchors are the keys of a positive: [j p i].
        directions.append(losses(config, own, s.transpose(1, 2, 0)[:, :p], in_columns.transpose(1, 2, 0)[:, :p]))
    return jnp.stack([jnp.where(keep[:, None], value, 0) / (keep.sum() * p * len(directions)) for value in directions]).ravel()


def losses(config: ConfigDict, positive: jax.Array, others: jax.Array, allowed: jax.Array) -> jax.Array:
    """Losses [b p] of positives [b p] against their negatives among others [b p|1 n]."""
    masked = jnp.where(allowed, others, MASKED)
    if config.name == "siglip":
        return jax.nn.softplus(-positive) + jax.nn.softplus(masked).sum(-1)
    if config.name in ("dv", "mine", "nwj", "jsd"):  # expectations over all negatives of the batch
        number = allowed.sum()
        if config.name == "jsd":
            return jax.nn.softplus(-positive) + jax.nn.softplus(masked).sum() / number
        log_mean = jax.nn.logsumexp(masked) - jnp.log(number)
        return (jnp.exp(log_mean - 1) if config.name == "nwj" else log_mean) - positive
    ratio = jnp.where(allowed.any(-1), jax.nn.logsumexp(masked, axis=-1) - positive, 0)
    if config.name != "infonce":
        return ratio if config.name == "dcl" else jnp.exp(ratio - jax.lax.stop_gradient(ratio))
    masked, allowed = (jnp.broadcast_to(x, (*positive.shape, x.shape[-1])) for x in (masked, allowed))
    target = jnp.concatenate([positive[..., None], masked], axis=-1)
    among = jnp.concatenate([jnp.ones_like(allowed[..., :1]), allowed], axis=-1)
    log_probability = jax.nn.log_softmax(target, axis=-1)
    even = jnp.where(among, log_probability, 0).sum(-1) / among.sum(-1)
    return -(1 - config.label_smoothing) * log_probability[..., 0] - config.label_smoothing * even
