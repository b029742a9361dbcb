"""The losses over pairs, each a function of the positive's logit and of sums over the negatives of its row.

A row of the score matrix belongs to one anchor (or, in the other direction, to one positive). Logits are similarities already
divided by the temperature; in the formulas s⁺ is the positive's logit and s_j those of the row's negatives.

A new loss is one entry in `LOSSES`: a `Term`, what each negative adds to the sum (`EXP`, `SOFTPLUS` or your own), and a
function of the positive's logit and those sums. It can then be computed tile by tile, on any mesh, with gradient caching.

The bounds on mutual information are expectations E_P over positives and E_Q over all negatives of the batch: their sums are
pooled over the rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_jax.objectives.tiles import EXP, MASKED, SOFTPLUS, NegativeSums, Term


class PairLoss(NamedTuple):
    """One kind of loss.

    Attributes:
      term: what a negative adds to the sum of its row.
      finish: (positive logit, NegativeSums of its row) → loss; elementwise.
      directions: 2 if anchors (rows) and positives (columns) each have a loss; 1 if that of the rows contains every pair.
      pooled: whether `finish` gets the sums over the negatives of all rows together.
      bias: whether the logits have a trainable bias, which the losses need that change when a constant is added to all logits.
      average: whether the gradient of the pooled total is divided by a moving average of it (MINE).
    """

    term: Term
    finish: Callable[[jax.Array, NegativeSums], jax.Array]
    directions: int
    pooled: bool = False
    bias: bool = False
    average: bool = False


def log_negatives_over_positive(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""Returns the log of :math:`\sum_j e^{s_j - s^+}`, negatives over positive; a finite -1e30 for a row without negatives.

    Computed from the largest logit, not from a rounded log-sum-exp, so that logits of hundreds lose no precision.
    """
    some = negatives.number > 0
    return jax.lax.stop_gradient(negatives.largest) - positive + jnp.log(jnp.where(some, negatives.total, 1.0))


def infonce(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""InfoNCE: the cross-entropy of the positive against itself and the negatives.

    .. math::
      -\log \frac{e^{s^+}}{e^{s^+} + \sum_j e^{s_j}} = \mathrm{softplus}(\log \sum_j e^{s_j - s^+})

    References:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, https://arxiv.org/abs/1807.03748
      Neelakantan et al., Text and Code Embeddings by Contrastive Pre-Training, https://arxiv.org/abs/2201.10005, figure 4
    """
    return jax.nn.softplus(log_negatives_over_positive(positive, negatives))


def dcl(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""Decoupled contrastive learning: InfoNCE without the positive in its denominator.

    A row without negatives has the loss 0, where the formula would have the log of 0.

    .. math::
      -s^+ + \log \sum_j e^{s_j}

    References:
      Yeh et al., Decoupled Contrastive Learning, https://arxiv.org/abs/2110.06848, equation 6
    """
    return jnp.where(negatives.number > 0, log_negatives_over_positive(positive, negatives), 0.0)


def flatnce(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""FlatNCE: identically 1; its gradient is that of :math:`\log \sum_j e^{s_j - s^+}`, hence equal to DCL's.

    .. math::
      \frac{\sum_j e^{s_j - s^+}}{\mathrm{stop\_gradient}(\sum_j e^{s_j - s^+})}

    References:
      Chen et al., Simpler, Faster, Stronger: Breaking The log-K Curse On Contrastive Learners With FlatNCE,
      https://arxiv.org/abs/2107.01152, equation 8
    """
    ratio = dcl(positive, negatives)
    return jnp.exp(ratio - jax.lax.stop_gradient(ratio))


def siglip(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""The sigmoid loss: each pair is a two-class problem of its own; logits have a trainable bias.

    .. math::
      \mathrm{softplus}(-s^+) + \sum_j \mathrm{softplus}(s_j)

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, https://arxiv.org/abs/2303.15343, equation 2
    """
    return jax.nn.softplus(-positive) + negatives.total


def pool(term: Term, sums: NegativeSums) -> NegativeSums:
    """Returns the sums over the negatives of all rows together, as scalars."""
    largest = jax.lax.stop_gradient(sums.largest)
    total = (sums.total * term.rescale(largest, largest.max())).sum()
    return NegativeSums(largest.max(), total, None, sums.number.sum())


def log_mean_exp(negatives: NegativeSums) -> jax.Array:
    r"""Returns :math:`\log E_Q[e^s]` of sums of `EXP`; 0 where there are no negatives."""
    return dcl(jnp.zeros_like(negatives.largest), negatives) - jnp.log(jnp.maximum(negatives.number, 1))


def donsker_varadhan(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""The bound of Donsker and Varadhan, negative: -loss is at most the mutual information of anchor and positive, in nats.

    .. math::
      -\left(E_P[s] - \log E_Q[e^s]\right)

    References:
      Belghazi et al., Mutual Information Neural Estimation, https://arxiv.org/abs/1801.04062, equation 5
    """
    return log_mean_exp(negatives) - positive


def nwj(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""The bound of Nguyen, Wainwright and Jordan, negative: never above DV, equal to it at the best bias.

    .. math::
      -\left(E_P[s] - e^{-1} E_Q[e^s]\right)

    References:
      Poole et al., On Variational Bounds of Mutual Information, https://arxiv.org/abs/1905.06922, equation 5
    """
    return jnp.exp(log_mean_exp(negatives) - 1) - positive


def jsd(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""The Jensen-Shannon objective: a logistic loss that weighs positives and negatives alike, however many there are.

    .. math::
      E_P[\mathrm{softplus}(-s)] + E_Q[\mathrm{softplus}(s)]

    References:
      Hjelm et al., Learning Deep Representations by Mutual Information Estimation and Maximization,
      https://arxiv.org/abs/1808.06670, equation 4
    """
    return jax.nn.softplus(-positive) + negatives.total / jnp.maximum(negatives.number, 1)


def information(positive: jax.Array, negatives: NegativeSums) -> jax.Array:
    r"""Returns InfoNCE's bound on the mutual information in nats, :math:`\log K - L` with K - 1 negatives.

    References:
      van den Oord et al., https://arxiv.org/abs/1807.03748, §2.3
    """
    return jnp.log1p(negatives.number) - infonce(positive, negatives)


def moving_average(negatives: NegativeSums, log_average: jax.Array, decay: float) -> tuple[NegativeSums, jax.Array]:
    r"""Makes the gradient of DV divide by a moving average of :math:`E_Q[e^s]`, not by the batch's own, which is biased.

    Args:
      negatives: pooled sums of `EXP`.
      log_average: float32[], the log of the average before this batch; MASKED before the first one.
      decay: of the average; with 0 the gradient is DV's.

    Returns:
      The sums with that gradient, and the log of the average with this batch.

    References:
      Belghazi et al., Mutual Information Neural Estimation, https://arxiv.org/abs/1801.04062, equation 12
    """
    now, total = jax.lax.stop_gradient((log_mean_exp(negatives), negatives.total))
    before = jnp.where(log_average > MASKED, log_average, now)
    average = jnp.logaddexp(before + jnp.log(decay), now + jnp.log1p(-decay))
    return negatives._replace(total=total + (negatives.total - total) * jnp.exp(now - average)), average


LOSSES = {
    "infonce": PairLoss(EXP, infonce, directions=2),
    "flatnce": PairLoss(EXP, flatnce, directions=2),
    "dcl": PairLoss(EXP, dcl, directions=2),
    "siglip": PairLoss(SOFTPLUS, siglip, directions=1, bias=True),
    "dv": PairLoss(EXP, donsker_varadhan, directions=1, pooled=True),
    "mine": PairLoss(EXP, donsker_varadhan, directions=1, pooled=True, average=True),
    "nwj": PairLoss(EXP, nwj, directions=1, pooled=True, bias=True),
    "jsd": PairLoss(SOFTPLUS, jsd, directions=1, pooled=True, bias=True),
}


def smooth(loss: jax.Array, positive: jax.Array, negatives: NegativeSums, amount: float) -> jax.Array:
    """Adds label smoothing to a cross-entropy: a share `amount` of the target is spread evenly over positive and negatives.

    Without `negatives.linear` the loss is returned unchanged.

    References:
      Szegedy et al., Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567, §7
    """
    if negatives.linear is None:
        return loss
    return loss + amount * (positive - (negatives.linear + positive) / (negatives.number + 1))
