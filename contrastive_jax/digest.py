"""Hashes of arrays that no layout changes: computed where the shards lie, equal on any mesh and for any number of processes."""

import functools
import hashlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

# One for each word of a digest (the fractional bits of square roots, as in SHA-512).
SALTS = (0xF3BCC908, 0x84CAA73B, 0xFE94F82B, 0x5F1D36F1)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32: murmur3's finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def of_array(x: jax.Array) -> jax.Array:
    """A hash uint32[4] of the bits of x and their places; the sum modulo 2**32 over elements depends on no order."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    return jnp.stack([jnp.sum(mix(bits ^ mix(place + jnp.uint32(salt))), dtype=jnp.uint32) for salt in SALTS])


@functools.partial(jax.jit, static_argnames="whole")
def of_arrays(arrays: list[jax.Array], whole: jax.sharding.Sharding | None) -> jax.Array:
    """Their hashes uint32[n 4], laid out as `whole`."""
    hashes = jnp.stack([of_array(x) for x in arrays])
    return hashes if whole is None else jax.lax.with_sharding_constraint(hashes, whole)


def names(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, "0/mu/encoder/transformer/embedding"."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def describe(tree: Any) -> dict[str, str]:
    """Type and shape of each leaf by its path, "float32[8192,256]"; of arrays or of jax.ShapeDtypeStruct."""
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in names(tree).items()}


def of_tree(tree: Any) -> dict[str, str]:
    """The hash of each leaf by its path, as hexadecimal digits; every process must call it."""
    leaves = names(tree)
    lies = next(iter(leaves.values())).sharding
    whole = jax.NamedSharding(lies.mesh, jax.P()) if isinstance(lies, jax.NamedSharding) else None
    words = jax.device_get(of_arrays(list(leaves.values()), whole).addressable_data(0))
    return {name: "".join(f"{word:08x}" for word in row) for name, row in zip(leaves, words, strict=True)}


def of_code() -> str:
    """A hash of this package's source: by it a checkpoint or a result says which code made it."""
    package = pathlib.Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def summary(digests: dict[str, str]) -> str:
    """One hash of all leaves: equal summaries, equal trees."""
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()
