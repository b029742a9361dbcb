"""Hashes of arrays that do not depend on how the arrays are sharded.

A checkpoint is verified by these hashes, and two runs are compared by them. Each device hashes its own shards, and the hashes
are added: the sum is the same on any mesh and for any number of processes.
"""

import functools
import hashlib
import importlib.metadata
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax.runtime.sharding import path_of

# One salt per 32-bit word of a hash (the fractional bits of square roots, as in SHA-512).
SALTS = (0xF3BCC908, 0x84CAA73B, 0xFE94F82B, 0x5F1D36F1)


def mix(x: jax.Array) -> jax.Array:
    """Maps uint32 to uint32 one to one so that every bit of x changes about half of the result: murmur3's finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def hash_array(x: jax.Array) -> jax.Array:
    """Returns a hash uint32[4] of an array: for each salt, the sum modulo 2**32 over hashes of (element's bits, its index)."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)  # of each element in the flattened array, modulo 2**32
    for axis in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    return jnp.stack([jnp.sum(mix(bits ^ mix(index + jnp.uint32(salt))), dtype=jnp.uint32) for salt in SALTS])


@functools.partial(jax.jit, static_argnames="replicated")
def hash_arrays(arrays: list[jax.Array], replicated: jax.sharding.Sharding | None) -> jax.Array:
    """Returns the hashes uint32[n 4] of n arrays, with the sharding `replicated`; None: the arrays are on one device."""
    hashes = jnp.stack([hash_array(x) for x in arrays])
    return hashes if replicated is None else jax.lax.with_sharding_constraint(hashes, replicated)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, for example "0/mu/encoder/transformer/embedding"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): leaf for path, leaf in leaves}


def types_and_shapes(tree: Any) -> dict[str, str]:
    """Returns type and shape of each leaf by its path: {"embedding": "float32[8192,256]"}.

    Args:
      tree: of arrays or of jax.ShapeDtypeStruct.
    """
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves_by_path(tree).items()}


def hash_tree(tree: Any) -> dict[str, str]:
    """Hashes each array of a tree, to tell whether two trees are equal without comparing them. Every process must call it.

    Args:
      tree: of one jax.Array or more, all on one mesh (or all on one device).

    Returns:
      The hash of each array by its path, as 32 hexadecimal digits; equal on any mesh.
    """
    leaves = leaves_by_path(tree)
    sharding = next(iter(leaves.values())).sharding
    replicated = jax.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.NamedSharding) else None
    hashes = jax.device_get(hash_arrays(list(leaves.values()), replicated).addressable_data(0))
    return {path: hexadecimal(row) for path, row in zip(leaves, hashes, strict=True)}


def hexadecimal(row: np.ndarray) -> str:
    """Returns a hash uint32[4] as 32 hexadecimal digits."""
    return "".join(f"{word:08x}" for word in row)


def hash_code() -> str:
    """Returns a hash of this package's source, by which a checkpoint or a result says which code made it."""
    package = pathlib.Path(__file__).parents[1]
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return source.hexdigest()


def software_versions() -> dict[str, str]:
    """Returns the versions of what compiles a step, and the hash of this package's source.

    {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "not installed", "code": "3f9a..."}
    """
    versions = {}
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions | {"code": hash_code()}


def combine_hashes(hashes: dict[str, str]) -> str:
    """Returns one hash for a whole tree, from the hashes by path that `hash_tree` returns: equal for equal trees."""
    return hashlib.sha256("\n".join(f"{path} {hashes[path]}" for path in sorted(hashes)).encode()).hexdigest()
