"""InfoNCE as a plain function, for notebooks and small batches: the whole score matrix in memory, on one device.

Training uses `pairs.make_objective`, which never stores that matrix; the tests compare the two.
"""

import jax
import jax.numpy as jnp


def info_nce(anchors: jax.Array, positives: jax.Array, temperature: float = 0.05, symmetric: bool = True) -> jax.Array:
    r"""Computes InfoNCE with in-batch negatives: positive i belongs to anchor i, all other positives are its negatives.

    .. math::
      \frac{1}{b} \sum_i -\log \frac{e^{x_i \cdot y_i / \tau}}{\sum_j e^{x_i \cdot y_j / \tau}}

    Examples:
      >>> import jax.numpy as jnp
      >>> from contrastive_jax import info_nce
      >>> anchors = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> positives = jnp.array([[0.8, 0.6], [-0.6, 0.8]])
      >>> print(f"{info_nce(anchors, positives, temperature=0.5):.4f}")
      0.2860

    Args:
      anchors: float[b e]; need not have unit length, both inputs are normalised.
      positives: float[b e].
      temperature: τ, above 0.
      symmetric: also score each positive against all anchors, and return the mean of the two directions.

    Returns:
      float32[], the mean over the batch.

    Raises:
      ValueError: the shapes differ, or are not [b e].

    References:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748
      Neelakantan et al., Text and Code Embeddings by Contrastive Pre-Training, https://arxiv.org/abs/2201.10005, figure 4
    """
    if anchors.ndim != 2 or anchors.shape != positives.shape:
        raise ValueError(f"anchors {anchors.shape} and positives {positives.shape} must have one shape [b e]")
    anchors, positives = (normalize(jnp.asarray(x, jnp.float32)) for x in (anchors, positives))
    logits = jnp.matmul(anchors, positives.T, precision=jax.lax.Precision.HIGHEST) / temperature
    by_direction = [logits, logits.T] if symmetric else [logits]
    losses = [-jnp.diagonal(jax.nn.log_softmax(scores, axis=1)).mean() for scores in by_direction]
    return jnp.stack(losses).mean()


def normalize(z: jax.Array) -> jax.Array:
    """Scales z[... e] to unit length."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-12))
