"""Evaluates a traced program in float64: operation by operation, so that no compiler fuses, reorders or rounds anything.

The program stays what it is (hand-written gradients, random masks, loops); only its float32 numbers become float64. Its result
shows what the compiled program would give if its sums were exact.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Primitives that call one program with their own operands, under the name of the parameter that holds it.
CALLS = dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint", "shard_map"), "jaxpr")
CALLS |= dict.fromkeys(("closed_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr")
# Primitives that do nothing on one device, the last ones if they keep the rank of their array.
IDENTITIES = {"sharding_constraint", "optimization_barrier", "psum", "psum_invariant", "ppermute", "pvary", "pcast", "pmean"}
TILED = {"all_gather", "all_gather_invariant", "all_to_all", "reduce_scatter"}


def widen(x: Any) -> Any:
    """Returns x, in float64 if it is float32."""
    if hasattr(x, "dtype") and x.dtype == np.float32:
        return jnp.asarray(x, jnp.float64)
    return x


def evaluate(program: ClosedJaxpr, arguments: Sequence[Any]) -> list[np.ndarray]:
    """Returns what a program of one device computes from its flat arguments, with float64 for each float32."""
    with jax.enable_x64(True):
        results = _evaluate(program.jaxpr, [widen(x) for x in program.consts], [widen(np.asarray(x)) for x in arguments])
        return [np.asarray(x) for x in results]


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    last_use = {v: number for number, each in enumerate(jaxpr.eqns) for v in each.invars if not isinstance(v, Literal)}

    def read(v: Any) -> Any:
        return widen(jnp.asarray(v.val, v.aval.dtype)) if isinstance(v, Literal) else values[v]

    for number, each in enumerate(jaxpr.eqns):
        results = _apply(each, [read(v) for v in each.invars])
        values |= dict(zip(each.outvars, results, strict=True))
        for v in {v for v in each.invars if not isinstance(v, Literal)}:
            if last_use[v] == number and v not in kept:
                del values[v]
    return [read(v) for v in jaxpr.outvars]


def _call(program: Any, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a program within a program, closed or not."""
    if hasattr(program, "consts"):
        return _evaluate(program.jaxpr, [widen(x) for x in program.consts], arguments)
    return _evaluate(program, [], arguments)


def _apply(equation: Any, operands: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        return _call(params[CALLS[name]], operands)
    if name in IDENTITIES or (name in TILED and params["tiled"]):
        return operands
    if name in SPECIAL:
        return SPECIAL[name](params, operands)
    if name == "bitcast_convert_type":  # the bits are those of float32
        operands = [x.astype(jnp.float32) if x.dtype == jnp.float64 else x for x in operands]
    else:
        params = {key: _widen_type(value) for key, value in params.items()}
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
    return [widen(x) for x in (results if equation.primitive.multiple_results else [results])]


def _widen_type(value: Any) -> Any:
    """Returns a parameter of a primitive for float64: a type, or a program, such as how a scatter joins two numbers."""
    if isinstance(value, jax.sharding.Sharding):
        return None  # one device
    if isinstance(value, Jaxpr):
        scalars = [jax.ShapeDtypeStruct((), _widen_type(v.aval.dtype)) for v in value.invars]
        return jax.make_jaxpr(lambda *xs: _evaluate(value, [], xs)[0])(*scalars).jaxpr
    return np.dtype(np.float64) if isinstance(value, np.dtype | type) and value == np.dtype(np.float32) else value


def _scan(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    counts, carries, length = params["num_consts"], params["num_carry"], params["length"]
    consts, carry, xs = operands[:counts], operands[counts : counts + carries], operands[counts + carries :]
    stacked: list[Any] = [None] * length
    for turn in reversed(range(length)) if params["reverse"] else range(length):
        results = _call(params["jaxpr"], [*consts, *carry, *(x[turn] for x in xs)])
        carry, stacked[turn] = results[:carries], results[carries:]
    return [*carry, *(jnp.stack(ys) for ys in zip(*stacked, strict=True))]


def _while(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    of_condition, of_body = params["cond_nconsts"], params["body_nconsts"]
    condition, body = operands[:of_condition], operands[of_condition : of_condition + of_body]
    carry = operands[of_condition + of_body :]
    while bool(_call(params["cond_jaxpr"], [*condition, *carry])[0]):
        carry = _call(params["body_jaxpr"], [*body, *carry])
    return carry


def _cond(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    branches = params["branches"]
    return _call(branches[int(np.clip(operands[0], 0, len(branches) - 1))], operands[1:])


def _all_to_all(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    """Of blocks along an axis, of which there is one."""
    return [jnp.expand_dims(jnp.squeeze(operands[0], params["split_axis"]), params["concat_axis"])]


def _axis_index(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    del params, operands
    return [jnp.int32(0)]


SPECIAL = {"scan": _scan, "while": _while, "cond": _cond, "all_to_all": _all_to_all, "axis_index": _axis_index}
