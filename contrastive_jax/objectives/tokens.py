"""Token losses: what the encoder learns from its token states, in the same pass as from its embeddings.

A token loss never sees embeddings. It runs inside the encoder's (micro-)batch and leaves sums per row, so that no array of the
vocabulary's size outlives a micro-batch; the loss is the sum of all rows over their count, and equal for any micro-batch and
mesh. A new one is an entry in `TOKEN_LOSSES`, and its name in the rule of `tokens.name` in `config/keys.py`.

Dimensions: n rows, l tokens per row, k places per row, d width, w ids of the vocabulary, t >= w rows of the embedding table.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.objectives.objective import Metrics, Params
from contrastive_jax.objectives.tiles import MASKED


class Teacher(NamedTuple):
    """What a frozen target makes of rows: token states [n l d'], with its embedding table [t d'] and its head's parameters."""

    head: Params
    table: jax.Array
    states: jax.Array


class Targets(NamedTuple):
    """What a row has to tell.

    Attributes:
      picked: bool[n l], the places that noise has chosen; for language models, those whose next token is to be predicted.
      token: int32[n l], the tokens of the text before noise; for language models, the next tokens.
      real: bool[n l], the places that are no padding.
      teacher: what a frozen target makes of the row, for losses that are taught, or None.
    """

    picked: jax.Array
    token: jax.Array
    real: jax.Array
    teacher: Teacher | None = None


class TokenSums(NamedTuple):
    """Sums over the places of each row that count, float32[n] each.

    Attributes:
      loss: of the loss.
      number: of these places.
      right: how many of them are predicted rightly.
    """

    loss: jax.Array
    number: jax.Array
    right: jax.Array


Terms = TokenSums | dict[str, TokenSums]


class TokenLoss(NamedTuple):
    """A loss of token states, with the parameters of its head.

    Attributes:
      init: random key → params, a nested dict of float32 arrays; the optimiser trains them beside the encoder's.
      loss: (params, embedding table [t d], states [n l d], Targets) → TokenSums, or those of several terms by their names.
      taught: whether it learns from `Targets.teacher`.
    """

    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, jax.Array, jax.Array, Targets], Terms]
    taught: bool = False


# (the config of the run, d, w) → TokenLoss. A builder raises UserError where values of the config do not go together.
Builder = Callable[[ConfigDict, int, int], TokenLoss]


def sums(loss: jax.Array, right: jax.Array, counts: jax.Array) -> TokenSums:
    """Sums loss [n k] and right [n k] over the places that count, bool[n k]."""
    masked = [jnp.where(counts, x, 0).astype(jnp.float32).sum(1) for x in (loss, counts, right)]
    return TokenSums(*masked)


def mean(of_rows: Terms) -> tuple[jax.Array, Metrics]:
    """Returns the mean loss over all places that count in the global batch, and the metrics.

    Each of several terms has its own mean; the loss is their sum, and the accuracy that of "mlm", or of the last by name.
    """
    terms = of_rows if isinstance(of_rows, dict) else {"": of_rows}
    means = {
        name: [x.sum() / jnp.maximum(term.number.sum(), 1) for x in (term.loss, term.right)] for name, term in terms.items()
    }
    value = jnp.stack([loss for loss, _ in means.values()]).sum()
    metrics = {"token_loss": value, "token_accuracy": means.get("mlm", means[max(means)])[1]}
    return value, jax.lax.stop_gradient(metrics | {f"{name}_loss": loss for name, (loss, _) in means.items() if name})


def init_hidden(config: ConfigDict, d: int, rng: jax.Array) -> Params:
    """Returns the parameters of `hidden`: none for a linear head."""
    if config.tokens.head == "linear":
        return {}
    kernel = config.model.init_std * jax.random.normal(rng, (d, d))
    return {"dense": {"kernel": kernel, "bias": jnp.zeros(d)}, "norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)}}


def hidden(params: Params, x: jax.Array) -> jax.Array:
    """What a head sees of states x[n k d]: themselves (linear), or BERT's transform, LayerNorm(gelu(x W + b))."""
    if not params:
        return x
    dense, norm = jax.tree.map(lambda p: p.astype(x.dtype), params["dense"]), params["norm"]
    y = jax.nn.gelu(x @ dense["kernel"] + dense["bias"], approximate=False).astype(jnp.float32)
    y = jax.nn.standardize(y, epsilon=1e-12) * norm["scale"] + norm["bias"]
    return y.astype(x.dtype)


def choose(picked: jax.Array, positions: int) -> tuple[jax.Array, jax.Array]:
    """Chooses at most `positions` of the picked places of each row, the first ones; 0: as many as a row has tokens.

    Returns:
      Their indices int32[n k], and whether each is one of the picked, bool[n k].
    """
    order = jnp.argsort(~picked, axis=1, stable=True)[:, : positions or picked.shape[1]]
    return order, jnp.take_along_axis(picked, order, axis=1)


def logits_of(x: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the logits x · table + bias, float32[n k t], of x[n k d] and table[t d]; no id but the w of bias has a chance."""
    logits = jnp.einsum("nkd,td->nkt", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
    return logits + jnp.pad(bias, (0, len(table) - len(bias)), constant_values=MASKED)


def cross_entropy(x: jax.Array, table: jax.Array, bias: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Predicts tokens by the embedding table: logits are x · table + bias, over the w ids that have a bias.

    Args:
      x: [n k d].
      table: float32[t d].
      bias: float32[w]; the other rows of the table belong to no id.
      token: int32[n k], what is to be predicted.

    Returns:
      The cross-entropy float32[n k], and whether the largest logit is the token's, bool[n k].
    """
    logits = logits_of(x, table, bias)
    of_token = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - of_token, logits.argmax(-1) == token


def predicted_tokens(config: ConfigDict, d: int, w: int) -> TokenLoss:
    r"""Predicts the tokens of the picked places M, of which at most `tokens.positions` of a row meet the vocabulary.

    .. math::
      -\frac{1}{|M|} \sum_{i \in M} \log \mathrm{softmax}(E\, f(h_i) + c)_{x_i}

    with E the embedding table, c a bias, and f the identity or, with tokens.head="mlp", BERT's transform. A masked language
    model ("mlm") predicts what noise has picked; "lm" and "seq2seq" predict the next token of a text, or of the second one of
    a joined row.

    References:
      Devlin et al., BERT, https://arxiv.org/abs/1810.04805, §3.1
      Radford et al., GPT, 2018, §3.1; joined rows: Dong et al., UniLM, https://arxiv.org/abs/1905.03197, §2.3
    """

    def init(rng: jax.Array) -> Params:
        return {"hidden": init_hidden(config, d, rng), "bias": jnp.zeros(w)}

    def loss(params: Params, table: jax.Array, states: jax.Array, targets: Targets) -> TokenSums:
        index, chosen = choose(targets.picked, config.tokens.positions)
        x = jnp.take_along_axis(states, index[:, :, None], axis=1)  # [n l d] -> [n k d]
        token = jnp.take_along_axis(targets.token, index, axis=1)
        values, right = cross_entropy(hidden(params["hidden"], x), table, params["bias"], token)
        return sums(values, right, chosen)

    return TokenLoss(init, loss)


def replaced_logit(params: Params, states: jax.Array) -> jax.Array:
    """Returns the logit float32[n l] of being replaced, of states[n l d], by the head of `replaced`."""
    return hidden(params["hidden"], states).astype(jnp.float32) @ params["kernel"] + params["bias"]


def replaced(config: ConfigDict, d: int, w: int) -> TokenLoss:
    r"""Tells at each place whether noise has picked it, with one logit s.

    .. math::
      \frac{1}{N} \sum_t \mathrm{softplus}(s_t) - y_t s_t

    References:
      Clark et al., ELECTRA, https://arxiv.org/abs/2003.10555, equation 2, whose generator here is the noise
    """

    def init(rng: jax.Array) -> Params:
        first, second = jax.random.split(rng)
        kernel = config.model.init_std * jax.random.normal(second, (d,))
        return {"hidden": init_hidden(config, d, first), "kernel": kernel, "bias": jnp.float32(0)}

    def loss(params: Params, table: jax.Array, states: jax.Array, targets: Targets) -> TokenSums:
        del table
        logit = replaced_logit(params, states)
        return sums(jax.nn.softplus(logit) - targets.picked * logit, (logit > 0) == targets.picked, targets.real)

    return TokenLoss(init, loss)


def bidirectional_language_model(config: ConfigDict, d: int, w: int) -> TokenLoss:
    r"""ELMo's biLM: one half of a token's state predicts the next token, the other half the one before.

    .. math::
      -\frac{1}{N} \sum_t \log p(x_{t+1} | x_{\le t}) + \log p(x_{t-1} | x_{\ge t})

    with N the number of predictions of both directions. Each has a linear map to the width of the embedding table, which both
    share, as they do the bias.

    References:
      Peters et al., https://arxiv.org/abs/1802.05365, §3.1

    Raises:
      UserError: the halves of the states are not of one direction each, or a row has the spans of several pairs.
    """
    needed = {"mixer": "lstm", "mlp": "none", "norm": "affine", "ngrams": ()}
    wrong = ", ".join(f"config.model.{key}={value!r}" for key, value in needed.items() if config.model[key] != value)
    if wrong:
        raise UserError(f"config.tokens.name='bilm': each half of a state must know one direction alone; set {wrong}")

    if config.data.pack_pairs > 1:
        raise UserError(
            f"config.data.pack_pairs={config.data.pack_pairs}: config.tokens.name='bilm' would predict the token of one span "
            "from another; set config.data.pack_pairs=1"
        )

    def init(rng: jax.Array) -> Params:
        return {"kernel": config.model.init_std * jax.random.normal(rng, (2, d // 2, d)), "bias": jnp.zeros(w)}

    def loss(params: Params, table: jax.Array, states: jax.Array, targets: Targets) -> TokenSums:
        kernels, of_directions = params["kernel"].astype(states.dtype), []
        for number, step in enumerate((-1, 1)):  # the predicted token comes to the place that predicts it
            index, chosen = choose(targets.real & neighbour(targets.real, step), config.tokens.positions)
            x = jnp.take_along_axis(jnp.split(states, 2, axis=2)[number], index[:, :, None], axis=1) @ kernels[number]
            token = jnp.take_along_axis(neighbour(targets.token, step), index, axis=1)
            of_directions.append(sums(*cross_entropy(x, table, params["bias"], token), chosen))
        return jax.tree.map(jnp.add, *of_directions)

    return TokenLoss(init, loss)


def neighbour(x: jax.Array, step: int) -> jax.Array:
    """Moves x[n l] by one place, step = -1 or 1; zeros, or False, come in at the end."""
    padded = jnp.pad(x, ((0, 0), (1, 1)))
    return padded[:, 1 - step : padded.shape[1] - 1 - step]


def distilled(config: ConfigDict, d: int, w: int) -> TokenLoss:
    r"""DistilBERT: the student predicts masked tokens, its teacher's predictions t of every token, and its states h'.

    .. math::
      2\, \mathrm{MLM} + 5\, T^2\, \mathrm{KL}(\mathrm{softmax}(t / T) \| \mathrm{softmax}(s / T)) + (1 - \cos(h, h'))

    The weights are `tokens.distil`, T is `tokens.temperature`. MLM is a mean over the picked tokens, the rest over all. Both
    models see the same noise, and `tokens.positions` does not count: all tokens meet the vocabulary.

    References:
      Sanh et al., DistilBERT, https://arxiv.org/abs/1910.01108, §2

    Raises:
      UserError: there is no teacher, or a weight has no term.
    """
    weights, t = {name: weight for name, weight in config.tokens.distil if weight}, config.tokens.temperature
    if config.memory.kind != "frozen":
        raise UserError("config.tokens.name='distil': needs a teacher; set config.memory.kind='frozen' and memory.source")
    if not weights or not weights.keys() <= {"mlm", "kl", "cosine"}:
        raise UserError(f"config.tokens.distil={config.tokens.distil}: give weights of mlm, kl and cosine")

    def loss(params: Params, table: jax.Array, states: jax.Array, targets: Targets) -> Terms:
        teacher = targets.teacher
        assert teacher is not None
        ours, theirs = (
            logits_of(hidden(head["hidden"], x), e, head["bias"]) for head, e, x in ((params, table, states), teacher)
        )
        of_token = jnp.take_along_axis(ours, targets.token[..., None], axis=-1)[..., 0]
        p, q = jax.nn.log_softmax(theirs / t), jax.nn.log_softmax(ours / t)
        best, right = ours.argmax(-1), jnp.zeros(targets.real.shape, bool)
        terms = {
            "mlm": lambda: (jax.nn.logsumexp(ours, axis=-1) - of_token, best == targets.token, targets.picked),
            "kl": lambda: (t**2 * (jnp.exp(p) * (p - q)).sum(-1), best == theirs.argmax(-1), targets.real),
            "cosine": lambda: (1 - cosine(states, teacher.states), right, targets.real),
        }
        of_terms = {name: sums(*terms[name]()) for name in weights}
        return {name: x._replace(loss=weights[name] * x.loss) for name, x in of_terms.items()}

    return TokenLoss(predicted_tokens(config, d, w).init, loss, taught=True)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the cosines float32[n l] of x[n l d] and y[n l d]."""
    x, y = (z.astype(jnp.float32) for z in (x, y))
    norms = jnp.square(x).sum(-1) * jnp.square(y).sum(-1)
    return (x * y).sum(-1) * jax.lax.rsqrt(jnp.maximum(norms, 1e-24))


TOKEN_LOSSES: dict[str, Builder] = {
    "mlm": predicted_tokens,
    "replaced": replaced,
    "bilm": bidirectional_language_model,
    "lm": predicted_tokens,
    "seq2seq": predicted_tokens,
    "distil": distilled,
}


def make_token_loss(config: ConfigDict, d: int, w: int) -> TokenLoss | None:
    """Builds the token loss that `config.tokens` names; None without a name, or with the weight 0.

    Args:
      config: of the run.
      d: the width of a token state.
      w: the ids of the vocabulary.

    Raises:
      UserError: two config keys do not go together; the message names them.
    """
    return TOKEN_LOSSES[config.tokens.name](config, d, w) if config.tokens.name and config.tokens.weight else None
