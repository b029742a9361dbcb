"""XLA's options for the train step: what its defaults leave slow, by platform, and which of them the installed XLA knows."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, SingleDeviceSharding

from contrastive_jax.config import UserError

Options = dict[str, bool | int | str]

# Each entry is one thing to set, under the names that it has in different versions of XLA, the newest first.
# On TPU, XLA splits each weight-gradient matmul into one piece per FSDP device; at 64 columns (S on v5e:4x4) the pieces are too
# narrow for the MXU and take, by XLA's own estimate, twice as long as one matmul and a reduce-scatter. This threshold disables
# the split.
TPU_OPTIONS: tuple[Options, ...] = ({"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},)

# On several GPUs, with the parameters sharded over `fsdp` and the layers in a loop, every layer begins with an all-gather of
# its parameters, and in the backward pass ends with a reduce-scatter of their gradients.
GPU_OPTIONS: tuple[Options, ...] = (
    # Starts transfers as early and ends them as late as their data allow, so that they run beside compute. The default is off.
    {"xla_gpu_enable_latency_hiding_scheduler": True},
    # Gathers the parameters of the next layer during this one. Without it, a gather has only the first norm of its own layer to
    # hide behind.
    {"xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON", "xla_gpu_enable_pipelined_all_gather": True},
    {"xla_gpu_pipeline_reduce_scatter": "COLLECTIVE_PIPELINING_MODE_ON", "xla_gpu_enable_pipelined_reduce_scatter": True},
    # One transfer per layer and direction, in place of one per 30 MB: small ones do not fill the network.
    {"xla_gpu_all_gather_combine_threshold_bytes": 2**28},
    {"xla_gpu_reduce_scatter_combine_threshold_bytes": 2**28},
    # The pipelined gather otherwise costs a copy of each layer's parameters, which the loop passes on to its next turn. With
    # two layers per turn, the two sets of parameters stay in place.
    {"xla_gpu_enable_while_loop_double_buffering": True},
)


# The platform of an option by how its name begins; any other is for all.
PLATFORMS = {"xla_tpu_": "tpu", "xla_jf_": "tpu", "xla_gpu_": "gpu", "xla_cpu_": "cpu"}


def options_for(mesh: Mesh, chosen: Sequence[tuple[str, str]] = ()) -> Options | None:
    """Returns the options with which the train step is compiled for the devices of a mesh; None: XLA's defaults.

    XLA refuses to compile with an option that it does not know, and its options come and go with its versions: of those set
    here, an unknown one is left out, with a warning. An option that the environment variable XLA_FLAGS names stays as it is set
    there.

    Args:
      mesh: the mesh.
      chosen: `config.xla_options`, which win over the ones that are set here. Those of another platform are left out.

    Raises:
      UserError: XLA does not know one of `chosen`, or refuses its value.
    """
    entries: tuple[Options, ...] = ()
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        entries = TPU_OPTIONS
    elif platform in ("gpu", "cuda") and mesh.size > 1:
        entries = GPU_OPTIONS
    flags = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    entries = tuple(names for names in entries if not any(name in flags for name in names))
    kind = "gpu" if platform == "cuda" else platform
    own: dict[str, Options] = {}
    for name, value in chosen:
        if next((owner for prefix, owner in PLATFORMS.items() if name.startswith(prefix)), kind) == kind:
            own[name] = {name: {"true": True, "false": False}.get(value, value)}
    try:
        options = known_options(tuple(own.values()), mesh)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"config.xla_options={tuple(chosen)}: {error}") from error
    if unknown := ", ".join(sorted(own.keys() - options.keys())):
        raise UserError(f"config.xla_options: the installed XLA knows no option {unknown} for {kind}; leave it out")
    return known_options(tuple(names for names in entries if not own.keys() & names.keys()), mesh) | options or None


def known_options(entries: tuple[Options, ...], mesh: Mesh) -> Options:
    """Returns the first option of each entry with which XLA compiles a trivial program for a device of the mesh."""
    # A device of this process, or, where all are only described, any.
    flat = mesh.devices.flat
    device = next((device for device in flat if device.process_index == jax.process_index()), flat[0])
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))

    def compiles(options: Options) -> bool:
        try:
            jax.jit(lambda x: x, compiler_options=options).lower(scalar).compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    known: Options = {}
    for names in entries:
        option = next(({name: value} for name, value in names.items() if compiles({name: value})), {})
        if not option:
            logging.warning("this XLA knows no option %s; compiling without it", " or ".join(names))
        known |= option
    return known
