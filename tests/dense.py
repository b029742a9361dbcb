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
                if doc[j] < -1 and doc[i] == doc[j]:  # a source without in-batch negatives
                    ok = ok and i == j and hard
                if config.mask_duplicates:
                    of_key = {text[j, 1 + c]} if hard else set(text[j, : 1 + p].tolist())
                    ok = ok and not of_key & set(text[i, : 1 + p].tolist())
                allowed[i, j, c] = ok
    return allowed, keep


def loss(
    config: ConfigDict, z: jax.Array, ids: PairIds, params: dict, shards: int = 1, guide: jax.Array | None = None
) -> jax.Array:
    """The loss float32[] of z[b v e]; shards > 1: negatives come from one's own share of the batch alone."""
    return parts(config, z, ids, params, shards, guide).sum()


def parts(
    config: ConfigDict, z: jax.Array, ids: PairIds, params: dict, shards: int = 1, guide: jax.Array | None = None
) -> jax.Array:
    """What each anchor and each positive contributes to the loss; they may have either sign and cancel."""
    allowed, keep = negatives(config, ids, shards)
    p = ids.span_hash.shape[1] - 1 - config.hard_negatives
    of_prefixes, weights = [], 0.0
    for size, weight in config.matryoshka or ((z.shape[-1], 1.0),):
        prefix = z[..., :size]
        prefix = prefix / jnp.sqrt(jnp.square(prefix).sum(-1, keepdims=True)) if size < z.shape[-1] else prefix
        judge = guide if config.mask_guide else prefix
        of_prefixes.append(weight * parts_of_prefix(config, prefix, judge, jnp.asarray(allowed), jnp.asarray(keep), p, params))
        weights += weight
    return jnp.concatenate(of_prefixes) / weights


def parts_of_prefix(
    config: ConfigDict, z: jax.Array, judge: jax.Array, allowed: jax.Array, keep: jax.Array, p: int, params: dict
) -> jax.Array:
    """The parts of one prefix of the embeddings; `judge` has those whose similarities mask_margin is about."""
    b, own = len(z), jnp.arange(len(z))
    similarity = jnp.einsum("iae,jce->iajc", z, z)  # of view a of pair i and view c of pair j
    s = similarity / jnp.exp(params["log_temperature"]) + params.get("bias", 0.0)
    positive = s[own, 0, own, 1 : 1 + p]  # [b p]
    same = jnp.eye(b, dtype=bool)[:, :, None]
    # Who is whose negative, [i a j c]: with hard negatives of one's own pair for the query alone.
    other = allowed & ~same
    among = jnp.stack([jnp.concatenate([other[..., :1], keys], axis=2) for keys in (allowed, *[other] * (z.shape[1] - 1))], 1)
    if config.mask_margin is not None:
        judged = jax.lax.stop_gradient(jnp.einsum("iae,jce->iajc", judge, judge))
        right = judged[own, 0, own, 1 : 1 + p]
        limit = right + config.mask_margin * (jnp.abs(right) if config.mask_relative else 1)
        limit = jnp.concatenate([limit.max(1, keepdims=True), limit], axis=1)[:, :, None, None]
        among = among.at[:, : 1 + p].set(among[:, : 1 + p] & (judged[:, : 1 + p] <= limit))
    hardness = jnp.where(same, config.hardness_own, config.hardness)
    shifted = s[:, 0, :, 1:] + jax.lax.stop_gradient(similarity[:, 0, :, 1:]) * hardness
    to_documents = (shifted.reshape(b, 1, -1), among[:, 0, :, 1:].reshape(b, 1, -1))
    documents = slice(1, 1 + p)
    to_queries = (s[:, documents, :, 0], among[:, documents, :, 0])
    directions = [to_documents]
    if config.joint:
        found = {  # the positive is among the documents' queries
            "document_query": (to_queries[0], to_queries[1] | jnp.eye(b, dtype=bool)[:, None]),
            "query_query": (s[:, :1, :, 0], among[:, :1, :, 0]),
            "document_document": tuple(x[:, documents, :, 1:].reshape(b, p, -1) for x in (s, among)),
        }
        joined = [to_documents, *(found[name] for name in config.joint)]
        logits, allowed = (
            jnp.concatenate([jnp.broadcast_to(found[part], (b, p, found[part].shape[2])) for found in joined], axis=2)
            for part in (0, 1)
        )
        directions = [(logits, allowed)]
    elif config.symmetric and config.name in ("infonce", "flatnce", "dcl"):
        directions.append(to_queries)
    values = [losses(config, positive, *direction) for direction in directions]
    return jnp.stack([jnp.where(keep[:, None], value, 0) / (keep.sum() * p * len(values)) for value in values]).ravel()


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
