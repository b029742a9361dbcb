"""MLP heads between the encoder and a loss. They are trained with the objective, and no exported model has them.

Their batch norm needs no running averages, since a head is never used outside training: its statistics are those of the batch
at hand, per view, and of the whole batch. Heads run after gradient caching and under jit, so that neither micro-batches nor
devices change what "the whole batch" is.

Dimensions: b pairs, v views, e width of the input, f width of the output.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_jax.objectives.objective import Params

EPSILON = 1e-5  # added to the variance, as in the published code


def batch_norm(x: jax.Array) -> jax.Array:
    """Normalises x[b v f] to mean 0 and variance 1 over the batch, for each view and each unit; statistics are float32.

    Ioffe and Szegedy, https://arxiv.org/abs/1502.03167; without scale and shift.
    """
    x = x.astype(jnp.float32)
    centred = x - x.mean(0)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(0) + EPSILON)


class Head(NamedTuple):
    """An MLP: linear, batch norm, ReLU for each hidden layer, then a linear layer.

    Hidden layers have no bias: batch norm takes the mean off, and shifts by a parameter of its own. The output is one of

    * "norm": no bias, then batch norm without scale and shift (SimSiam's projector);
    * "bias": a linear layer with a bias (SimSiam's predictor);
    * "linear": without one (BYOL's projector and predictor).

    Attributes:
      widths: of the layers, from the input e to the output f; of e alone: the identity.
      output: the kind of the last layer.
    """

    widths: tuple[int, ...]
    output: str

    def init(self, rng: jax.Array) -> Params:
        """Returns float32 parameters; kernels are uniform in ±1/√width of their input, as in the published code (PyTorch's)."""
        params: dict[str, Params] = {}
        sizes = list(itertools.pairwise(self.widths))
        for number, (size_in, size_out) in enumerate(sizes):
            key, bound = jax.random.fold_in(rng, number), size_in**-0.5
            layer = {"kernel": jax.random.uniform(key, (size_in, size_out), jnp.float32, -bound, bound)}
            if number < len(sizes) - 1:
                layer |= {"norm_scale": jnp.ones(size_out), "norm_shift": jnp.zeros(size_out)}
            elif self.output == "bias":
                layer["bias"] = jnp.zeros(size_out)
            params[f"layer{number}"] = layer
        return params

    def __call__(self, params: Params, x: jax.Array) -> jax.Array:
        """Maps x[b v e] to float32[b v f]."""
        last = len(self.widths) - 2
        for number in range(last + 1):
            layer = params[f"layer{number}"]
            x = x @ layer["kernel"]
            if number < last:
                x = jax.nn.relu(batch_norm(x) * layer["norm_scale"] + layer["norm_shift"])
            elif self.output == "norm":
                x = batch_norm(x)
            elif self.output == "bias":
                x = x + layer["bias"]
        return x
