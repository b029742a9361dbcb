"""Learning from another model: from the embeddings of a target, or from the scores that a teacher gave a pair's documents.

Dimensions: b pairs, v views, k = v - 1 documents of a pair, n = b v rows, e and f the widths of the embeddings.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives.labels import mean_where
from contrastive_jax.objectives.objective import NOTHING, Given, Metrics, Objective, PairIds, Params, losses_of
from contrastive_jax.objectives.tiles import MASKED

SCALE = 100.0
SCORED = ("margin_mse", "kl")  # the losses that learn from the scores of a teacher


def gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x' y, of x[n e] and y[n f]: [e f]. A difference of such sums follows, which needs all of float32."""
    return jnp.einsum("ne,nf->ef", x, y, precision=jax.lax.Precision.HIGHEST)


def mean_square(v: jax.Array, t: jax.Array) -> jax.Array:
    r"""Returns the mean square of :math:`V V^\top - T T^\top`, of V[n e] and T[n f], whose n × n cosines are never stored.

    .. math::
      \|V V^\top - T T^\top\|^2 = \|V^\top V\|^2 - 2 \|V^\top T\|^2 + \|T^\top T\|^2
    """
    squares = [jnp.square(gram(x, y)).sum() for x, y in ((v, v), (v, t), (t, t))]
    return (squares[0] - 2 * squares[1] + squares[2]) / len(v) ** 2


def check_scores(config: ConfigDict, numbers: Sequence[str]) -> None:
    """Checks that the data has the scores that the objective of the run learns from.

    Args:
      config: of the run.
      numbers: what the data has of each pair, "numbers" of the manifest.

    Raises:
      UserError: it has none.
    """
    for name in sorted(losses_of(config.objective) & set(SCORED)):
        if "scores" not in numbers:
            raise UserError(f"config.objective: {name!r}: the pairs of config.data.dir={config.data.dir} have no scores")


def check_target(config: ConfigDict, name: str) -> None:
    """Raises UserError if no target embeds all views, which the loss `name` needs; `config` is that of the run."""
    if config.memory.kind not in ("frozen", "average"):
        raise UserError(f"config.objective: {name!r} needs a target; set config.memory.kind='frozen' and memory.source")


def similarity(config: ConfigDict, views: int, dim: int) -> Objective:
    r"""The cosines among all rows of a batch follow those of a target, whose embeddings may have another width.

    With the rows' unit vectors V, and the target's T:

    .. math::
      \frac{100}{n^2} \sum_{ij} (V V^\top - T T^\top)_{ij}^2

    References:
      Su, RoFormer-Sim (its second stage), https://kexue.fm/archives/8454, https://github.com/ZhuiyiTechnology/roformer-sim

    Raises:
      UserError: there is no target that embeds all views.
    """
    del views, dim
    check_target(config, "similarity")

    def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
        assert given.z is not None  # frozen and average give it
        error = mean_square(*(x.reshape(-1, x.shape[2]) for x in (z, given.z)))
        return SCALE * error, jax.lax.stop_gradient({"similarity_error": jnp.sqrt(jnp.maximum(error, 0))})

    return Objective(lambda rng: {}, loss)


def embedding(config: ConfigDict, views: int, dim: int) -> Objective:
    r"""Each embedding z follows the target's embedding t of the same row.

    .. math::
      \frac{1}{n} \sum_i (1 - z_i \cdot t_i)

    Of unit vectors that is e / 2 times their mean squared difference.

    References:
      Kim et al., EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval, https://arxiv.org/abs/2301.12005

    Raises:
      UserError: there is no target that embeds all views; when it is called, that the target has another width.
    """
    del views
    check_target(config, "embedding")

    def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
        assert given.z is not None  # frozen and average give it
        if given.z.shape[-1] != dim:
            raise UserError(
                f"config.objective: 'embedding' follows vectors of {given.z.shape[-1]} numbers with vectors of {dim}; set "
                f"config.model.embedding_dim={given.z.shape[-1]}"
            )
        return 1 - (z * given.z).sum(-1).mean(), {}

    return Objective(lambda rng: {}, loss)


def of_scores(value: Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]) -> Callable[..., Objective]:
    """Makes the builder of a loss of view 0's cosines to all other views, and of a teacher's scores of these.

    Args:
      value: (cosines / `config.scores.temperature`, scores / `config.scores.teacher_temperature`, where there are scores: each
        [b k], the first of these temperatures) → loss.
    """

    def build(config: ConfigDict, views: int, dim: int) -> Objective:
        del dim
        name, student, teacher = value.__name__, config.scores.temperature, config.scores.teacher_temperature
        if config.data.sampler != "fields" or config.data.copies > 1 or views < 3:
            raise UserError(
                f"config.objective: {name!r} compares the documents of a pair by a teacher's scores; set "
                "config.data.sampler='fields', config.data.views=3 or more and config.data.copies=1"
            )

        def loss(z: jax.Array, ids: PairIds, params: Params, given: Given = NOTHING) -> tuple[jax.Array, Metrics]:
            del params, given
            if ids.scores is None:
                raise UserError(f"config.objective: {name!r}: the pairs of config.data.dir={config.data.dir} have no scores")
            cosine = jnp.einsum("be,bke->bk", z[:, 0], z[:, 1:views], precision=jax.lax.Precision.HIGHEST)
            known = ~jnp.isnan(ids.scores)
            return value(cosine / student, jnp.where(known, ids.scores, 0) / teacher, known, student), {}

        return Objective(lambda rng: {}, loss)

    return build


@of_scores
def margin_mse(own: jax.Array, taught: jax.Array, known: jax.Array, temperature: float) -> jax.Array:
    r"""By how much the first document is better than each other one: the mean square of what the teacher says otherwise.

    .. math::
      \mathrm{mean}_{ij} [(s_{i1} - s_{ij}) - (t_{i1} - t_{ij})]^2

    References:
      Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation,
      https://arxiv.org/abs/2010.02666
    """
    del temperature
    excess = own - taught
    return mean_where(jnp.square(excess[:, :1] - excess[:, 1:]), known[:, :1] & known[:, 1:])


@of_scores
def kl(own: jax.Array, taught: jax.Array, known: jax.Array, temperature: float) -> jax.Array:
    r"""The divergence of the softmax over a pair's documents from the teacher's, :math:`\tau^2 KL(p_t \| p_s)`.

    The mean is over the pairs with two scores or more; the τ of the own cosines keeps the size of the gradient.

    References:
      Lin et al., Distilling Dense Representations for Ranking using Tightly-Coupled Teachers, https://arxiv.org/abs/2010.11386
    """
    log_q, log_p = (jax.nn.log_softmax(jnp.where(known, x, MASKED)) for x in (own, taught))
    of_pair = jnp.where(known, jnp.exp(log_p) * (log_p - log_q), 0).sum(1)
    return temperature**2 * mean_where(of_pair, known.sum(1) > 1)
