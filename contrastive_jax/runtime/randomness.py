"""Random keys without a state: a key is a function of (seed, name, step), never a chain that a restart would lose."""

import zlib

import jax


def step_key(root: jax.Array, name: str, step: jax.Array) -> jax.Array:
    """Returns the random key for one purpose at one step.

    Args:
      root: the run's random key.
      name: the purpose, for example "init" or "dropout"; its CRC-32 is folded into the key.
      step: int32[].
    """
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)
