"""Refuses on CPU what a GPU or TPU refuses under `jax.transfer_guard("disallow")`: implicit copies from device to host.

A CPU has no such copies, and so JAX never asks the guard there. The arrays of a CPU also hand out their memory to NumPy without
a copy; that way is closed here, because an accelerator does not have it.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src.array import ArrayImpl
from jax._src.lib import guard_lib

BUFFER_PROCEDURES = 160  # the offset in bytes of tp_as_buffer in CPython's PyTypeObject, on 64 bits


class TransferError(Exception):
    """An accelerator would have refused this copy."""


@contextlib.contextmanager
def like_an_accelerator() -> Iterator[None]:
    """Within it, each implicit copy from device to host under the guard raises TransferError; jax.device_get is explicit."""
    value = ArrayImpl._value

    def guarded(array: Any) -> np.ndarray:
        state = guard_lib.thread_local_state()
        if state.device_to_host == guard_lib.TransferGuardLevel.DISALLOW and not state.explicit_device_get:
            raise TransferError(f"implicit copy from device to host: {array.dtype}{list(array.shape)}")
        return value.fget(array)

    procedures = ctypes.c_void_p.from_address(id(ArrayImpl) + BUFFER_PROCEDURES)
    get_buffer = ctypes.c_void_p.from_address(procedures.value)  # the first of the two
    address, get_buffer.value = get_buffer.value, None
    ArrayImpl._value = property(guarded)
    try:
        yield
    finally:
        ArrayImpl._value = value
        get_buffer.value = address


def array_constants(jaxpr: Any) -> list[str]:
    """The types of all arrays and random keys on a device that a traced function, or a function within it, closes over."""
    found, seen = [], set()

    def visit(value: Any) -> None:
        if isinstance(value, jax.Array):  # keys of jax.random.key too
            found.append(f"{value.dtype}{list(value.shape)}")
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            visit(list(value.values()))
        elif isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr) and id(value) not in seen:
            seen.add(id(value))
            visit(list(getattr(value, "consts", ())))
            for equation in value.eqns:
                visit([atom.val for atom in equation.invars if isinstance(atom, jax.extend.core.Literal)])
                visit(equation.params)

    visit(jaxpr)
    return found
