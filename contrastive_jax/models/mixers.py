"""What mixes the tokens of a row in a block: attention, and the alternatives to it.

A mixer is a module (x[n l d], context) → [n l d], and its class an entry of MIXERS. Attention alone is in two parts, `mix` and
`project`, between which its result can be saved for the backward pass. None but attention takes packed rows. Those of
FIXED_LENGTH need rows of `config.max_length` tokens; the Transformer pads them. What stands in padding changes nothing.

Dimensions: n rows, l tokens per row (s of keys), d width, h heads, g key-value heads, r = h / g heads per key-value head,
k head width, f feed-forward width, m = h · k.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.models import ops
from contrastive_jax.models.attention import Attend, attention_mask, plain, projects_with_kernel, softmax_of
from contrastive_jax.models.attention_kernel import MASKED
from contrastive_jax.models.fused_attention import project_and_attend
from contrastive_jax.models.layer_context import LayerContext
from contrastive_jax.models.layers import Linear, Norm, kernel_init, parameter
from contrastive_jax.runtime.layout import Layout

# The mixers with a structure over all pairs of places in a row, learned or not.
FIXED_LENGTH = {"fourier", "linear", "mlp", "gmlp", "amlp"}


class Parts(NamedTuple):
    """What a mixer is made with.

    Attributes:
      config: `config.model`.
      layout: how activations and parameters lie on the mesh.
      attend: the attention function.
      out_std: standard deviation of the initial values of a mixer's last kernel.
    """

    config: ConfigDict
    layout: Layout
    attend: Attend
    out_std: float

    @property
    def inner(self) -> int:
        """The inner width m."""
        return self.config.num_heads * self.config.head_dim

    def linear(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], rngs: nnx.Rngs, contract: int = 1, last: bool = False
    ) -> Linear:
        """Returns a linear map; `last` marks the one whose result is added to the residual stream."""
        return Linear(self.config, self.layout, shape, axes, rngs, contract, self.out_std if last else None)


class Attention(nnx.Module):
    """Multi-head attention, full or grouped, with rotary positions if `config.position` says so."""

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        self.config, self.layout, self.attend = parts.config, parts.layout, parts.attend
        d, h, g, k = (self.config[name] for name in ("d_model", "num_heads", "num_kv_heads", "head_dim"))
        self.query = parts.linear((d, h, k), ("embed", "heads", None), rngs)
        self.key = parts.linear((d, g, k), ("embed", "kv_heads", None), rngs)
        self.value = parts.linear((d, g, k), ("embed", "kv_heads", None), rngs)
        self.out = parts.linear((h, k, d), ("heads", None, "embed"), rngs, contract=2, last=True)

    def mix(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to the sums of values of all heads, [n l m], or with `context.only` [n 1 m]."""
        if context.only is not None:
            return self.of_one_token(x, context)
        with jax.named_scope("attention"):
            if projects_with_kernel(self.config, self.layout) and not context.joined:
                query, key, value = (y.weight(x.dtype).reshape(x.shape[2], -1) for y in (self.query, self.key, self.value))
                return project_and_attend(self.config, self.layout, x, (query, key, value), context)
            with jax.named_scope("qkv"):
                projections = (self.query(x), self.key(x), self.value(x))
                # [n l h·k] -> [n l h k]; key and value [n l g·k] -> [n l g k]
                query, key, value = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in projections)
            if self.config.position == "rotary":
                with jax.named_scope("rope"):
                    query = ops.rotate(query, context.position, context.theta)
                    key = ops.rotate(key, context.position, context.theta)
            # Saved as [n l h·k]: in the other shape the TPU's memory layout is one that the kernel would have to copy.
            query, key, value = (
                checkpoint_name(y.reshape(*x.shape[:2], -1), name).reshape(y.shape)
                for y, name in ((query, "query"), (key, "key"), (value, "value"))
            )
            return self.attend(query, key, value, context).reshape(*x.shape[:2], -1)  # [n l h k] -> [n l h·k]

    def project(self, mixed: jax.Array) -> jax.Array:
        """Maps the result of `mix`, [n l m], to [n l d]."""
        with jax.named_scope("attention"), jax.named_scope("out"):
            return self.out(mixed)

    def of_one_token(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Computes `mix` for `context.only` alone, one token per row: x[n l d] → [n 1 m].

        No token needs a key or a value: the kernel K of the keys meets the query first, (q Kᵀ) xᵀ, and that of the values the
        weighted sum of states, (w x) V. The bias of the keys adds the same to all scores of a query, and so cancels in the
        softmax. Rotary positions lie between q and K, so keys that are rotated are computed.
        """
        config = self.config
        n, h, g, k = len(x), config.num_heads, config.num_kv_heads, config.head_dim
        with jax.named_scope("attention"):
            query = self.query(context.chosen(x))
            if config.position == "rotary":
                place = context.chosen(jnp.broadcast_to(context.position, x.shape[:2])[:, :, None])[:, :, 0]
                query = ops.rotate(query.reshape(n, 1, h, k), place, context.theta)
                keys = ops.rotate(self.key(x).reshape(*x.shape[:2], g, k), context.position, context.theta)
                scores = jnp.einsum("ngrk,nsgk->ngrs", query.reshape(n, g, h // g, k), keys, preferred_element_type=jnp.float32)
            else:
                of_heads = jnp.einsum("ngrk,dgk->ngrd", query.reshape(n, g, h // g, k), self.key.weight(x.dtype))
                scores = jnp.einsum("ngrd,nsd->ngrs", of_heads, x, preferred_element_type=jnp.float32)
            mask = attention_mask(config, context)[:, None]  # [n 1 1 s]
            weights, total = softmax_of(config, scores, mask, context, x.dtype)
            pooled = jnp.einsum("ngrs,nsd->ngrd", weights, x, preferred_element_type=jnp.float32) / total
            mixed = jnp.einsum("ngrd,dgk->ngrk", pooled.astype(x.dtype), self.value.weight(x.dtype))
            if self.value.bias is not None:  # weights that dropout has changed do not sum to 1
                share = weights.sum(-1, keepdims=True, dtype=jnp.float32) / total
                mixed = mixed + (share * self.value.bias[...][:, None]).astype(x.dtype)
            return mixed.reshape(n, 1, -1)


class Fourier(nnx.Module):
    """FNet (Lee-Thorp et al., arXiv 2105.03824): the real part of the Fourier transform over tokens and width, no parameters.

    With the cosines C and sines S of 2π j k / size, it is C x C' - S x S': two real products in place of complex numbers.
    """

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        del parts, rngs

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        with jax.named_scope("fourier"):
            x = context.zero_padding(x)
            (cos_l, sin_l), (cos_d, sin_d) = (tuple(jnp.asarray(t, x.dtype) for t in waves(s)) for s in x.shape[1:])
            over_tokens = functools.partial(jnp.einsum, "jl,nld->njd")
            return over_tokens(cos_l, x @ cos_d) - over_tokens(sin_l, x @ sin_d)


@functools.cache
def waves(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of 2π j k / size, float64[size size]."""
    index = np.arange(size)
    angle = 2 * np.pi / size * (np.outer(index, index) % size)
    return np.cos(angle), np.sin(angle)


class TokenLinear(nnx.Module):
    """ResMLP's layer over tokens (Touvron et al., arXiv 2105.03404): one linear map, the same in each channel."""

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        length = parts.config.max_length
        self.tokens = parts.linear((length, length), (None, None), rngs, last=True)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        return self.tokens(context.zero_padding(x).swapaxes(1, 2)).swapaxes(1, 2)


class TokenMlp(nnx.Module):
    """MLP-Mixer's layer over tokens (Tolstikhin et al., arXiv 2105.01601): W₂ gelu(W₁ xᵀ), W₁[l m], the same in each channel.

    With m = 4 l it is that of "Do You Even Need Attention?" (Melas-Kyriazi, arXiv 2105.02723).
    """

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        length = parts.config.max_length
        self.up = parts.linear((length, parts.inner), (None, "mlp"), rngs)
        self.down = parts.linear((parts.inner, length), ("mlp", None), rngs, last=True)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        return self.down(jax.nn.gelu(self.up(context.zero_padding(x).swapaxes(1, 2)))).swapaxes(1, 2)


class SpatialGate(nnx.Module):
    """gMLP's block without its norm and residual (Liu et al., arXiv 2105.08050): V (u · (W norm(v) + b)), W[l l] over tokens.

    u and v are gelu(U x), of width f / 2 each. At initialisation W is 0 and b is 1, so that the gate is open. "amlp" adds
    to the gate an attention over x with one head.
    """

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        config, half = parts.config, parts.config.d_ff // 2
        self.value = parts.linear((config.d_model, half), ("embed", "mlp"), rngs)
        self.gate = parts.linear((config.d_model, half), ("embed", "mlp"), rngs)
        self.gate_norm = Norm(config, rngs, half)
        self.tokens = parameter(rngs, initializers.zeros, (config.max_length, config.max_length), (None, None))
        self.tokens_bias = parameter(rngs, initializers.ones, (config.max_length,), (None,))
        self.attention = TinyAttention(parts, rngs) if config.mixer == "amlp" else None
        self.out = parts.linear((half, config.d_model), ("mlp", "embed"), rngs, last=True)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        with jax.named_scope("gate"):
            gate = context.zero_padding(self.gate_norm(jax.nn.gelu(self.gate(x))))
            gate = jnp.einsum("jl,nlf->njf", self.tokens[...].astype(x.dtype), gate)
            gate += self.tokens_bias[...].astype(x.dtype)[:, None]
            if self.attention is not None:
                gate += self.attention(x, context)
            return self.out(jax.nn.gelu(self.value(x)) * gate)


class TinyAttention(nnx.Module):
    """The attention of aMLP (arXiv 2105.08050, appendix A): one head, no positions, from width d to f / 2."""

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        d, k = parts.config.d_model, parts.config.head_dim
        one_head = ConfigDict(parts.config.to_dict() | {"num_heads": 1, "num_kv_heads": 1})
        self.attend = functools.partial(plain, one_head)
        self.query, self.key, self.value = (parts.linear((d, k), ("embed", None), rngs) for _ in range(3))
        self.out = parts.linear((k, parts.config.d_ff // 2), (None, "mlp"), rngs)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l f/2]."""
        query, key, value = (project(x)[:, :, None] for project in (self.query, self.key, self.value))  # [n l 1 k]
        return self.out(self.attend(query, key, value, context)[:, :, 0])


class ExternalAttention(nnx.Module):
    """External attention (Guo et al., arXiv 2105.02358): two learned memories of m slots in place of keys and values.

    a = softmax over the tokens of x M_kᵀ, divided by its sum over the slots; the output is a M_v.
    """

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        self.keys = parts.linear((parts.config.d_model, parts.inner), ("embed", "mlp"), rngs)
        self.values = parts.linear((parts.inner, parts.config.d_model), ("mlp", "embed"), rngs, last=True)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        with jax.named_scope("external_attention"):
            scores = jnp.where(context.segment[:, :, None] > 0, self.keys(x).astype(jnp.float32), MASKED)
            weights = jax.nn.softmax(scores, axis=1)
            weights /= weights.sum(2, keepdims=True) + 1e-9  # a padding token has weights 0
            return self.values(weights.astype(x.dtype))


class Convolution(nnx.Module):
    """The lightweight convolution (Wu et al., arXiv 1901.10430; pre-trained: Tay et al., arXiv 2105.03322).

    out(Σ_i softmax(w)_i y_{t+i}), y = value(x) · σ(gate(x)), over `config.local_window` tokens on either side; the channels
    of a head share their weights w.
    """

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        d, h, k = (parts.config[name] for name in ("d_model", "num_heads", "head_dim"))
        self.side = parts.config.local_window
        self.value = parts.linear((d, h, k), ("embed", "heads", None), rngs)
        self.gate = parts.linear((d, h, k), ("embed", "heads", None), rngs)
        width = 2 * self.side + 1
        self.taps = parameter(rngs, kernel_init(parts.config, width), (width, h), (None, "heads"))
        self.out = parts.linear((h, k, d), ("heads", None, "embed"), rngs, contract=2, last=True)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        with jax.named_scope("convolution"):
            y = context.zero_padding(self.value(x) * jax.nn.sigmoid(self.gate(x)))
            taps = jax.nn.softmax(self.taps[...], axis=0).astype(x.dtype)
            taps = jnp.repeat(taps, y.shape[2] // taps.shape[1], axis=1)  # [width h] -> [width h·k]
            padded = jnp.pad(y, ((0, 0), (self.side, self.side), (0, 0)))
            return self.out(sum(tap * padded[:, i : i + x.shape[1]] for i, tap in enumerate(taps)))


class Lstm(nnx.Module):
    """A forward LSTM over the first half of the width and a backward one over the second half, each of m units.

    As in ELMo (Peters et al., arXiv 1802.05365) each is projected to its half of the residual stream, and the two never meet:
    without other layers that mix the halves, half of a state knows the tokens up to its own, the other half those from it on.
    """

    def __init__(self, parts: Parts, rngs: nnx.Rngs):
        config, half, m = parts.config, parts.config.d_model // 2, parts.inner
        self.layout = parts.layout
        self.inputs = parameter(rngs, kernel_init(config, half), (2, half, 4, m), (None, "embed", None, "mlp"))
        self.recurrent = parameter(rngs, kernel_init(config, m), (2, m, 4, m), (None, None, None, "mlp"))
        self.gate_bias = parameter(rngs, initializers.zeros, (2, 4, m), (None, None, "mlp"))
        self.out = parameter(rngs, kernel_init(config, m, parts.out_std), (2, m, half), (None, "mlp", "embed"))

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """Maps x[n l d] to [n l d]."""
        with jax.named_scope("lstm"):
            dtype, half = x.dtype, x.shape[2] // 2
            both = jnp.stack([x[..., :half], x[:, ::-1, half:]])  # [2 n l d/2], the second from the last token on
            is_token = jnp.stack([context.segment, context.segment[:, ::-1]]) > 0
            inputs = self.layout.gather(self.inputs[...].astype(dtype), (None, "embed", None, "mlp"))
            gates = jnp.einsum("snld,sdgm->lsngm", both, inputs) + self.gate_bias[...].astype(dtype)[:, None]
            recurrent = self.recurrent[...].astype(dtype)

            def advance(state: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]) -> tuple:
                (hidden, cell), (gates, is_token) = state, now
                gates = (gates + jnp.einsum("snm,smgk->sngk", hidden, recurrent)).astype(jnp.float32)
                enter, forget, leave = (jax.nn.sigmoid(gates[:, :, i]) for i in range(3))
                new_cell = forget * cell + enter * jnp.tanh(gates[:, :, 3])
                new_hidden = (leave * jnp.tanh(new_cell)).astype(dtype)
                # Padding leaves the state as it is: the backward LSTM begins with it.
                keep = is_token[:, :, None]
                return (jnp.where(keep, new_hidden, hidden), jnp.where(keep, new_cell, cell)), new_hidden

            start = jnp.zeros((2, len(x), recurrent.shape[1]), jnp.float32)
            hidden: jax.Array
            _, hidden = jax.lax.scan(advance, (start.astype(dtype), start), (gates, is_token.transpose(2, 0, 1)))
            out = self.layout.gather(self.out[...].astype(dtype), (None, "mlp", "embed"))
            forward, backward = jnp.einsum("lsnm,smd->snld", hidden, out)
            return jnp.concatenate([forward, backward[:, ::-1]], axis=2)


MIXERS: dict[str, Callable[[Parts, nnx.Rngs], nnx.Module]] = {
    "attention": Attention,
    "fourier": Fourier,
    "linear": TokenLinear,
    "mlp": TokenMlp,
    "gmlp": SpatialGate,
    "amlp": SpatialGate,
    "external": ExternalAttention,
    "conv": Convolution,
    "lstm": Lstm,
}


def check_mixer(config: ConfigDict) -> None:
    """Raises UserError if a value of `config.model` does not go with its mixer."""
    name = config.mixer
    if name == "attention":
        return
    windowed, even = name == "conv", {"lstm": "d_model", "gmlp": "d_ff", "amlp": "d_ff"}.get(name)
    for key, mistaken, mend in (
        ("causal", config.causal, "set False"),
        ("position", config.position == "rotary", "choose learned or none"),
        ("local_window", bool(config.local_window) != windowed, "set the tokens on either side" if windowed else "set 0"),
        ("attention_dropout", config.attention_dropout and name != "amlp", "set 0"),
        (even, even and config[even] % 2, "set an even number"),
    ):
        if mistaken:
            raise UserError(f"config.model.{key}={config[key]!r} does not go with config.model.mixer={name!r}: {mend}")
