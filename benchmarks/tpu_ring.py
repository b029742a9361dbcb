"""The ring at a million pairs, compiled for a TPU slice that need not be there: memory of a chip, and what overlaps.

  pip install -e '.[plan]'
  python benchmarks/tpu_ring.py --topology=v5e:16x16 --batch=1048576

Nothing runs. The compiler's schedule is read: between the start and the end of each asynchronous collective-permute stand the
operations it overlaps, among them the matrix products.
"""

import os
import pathlib
import re
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from configs import base
from contrastive_jax import sharding
from contrastive_jax.objectives import pairs

TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "Slice to compile for.")
BATCH = flags.DEFINE_integer("batch", 1 << 20, "Pairs of the global batch.")
DIM = flags.DEFINE_integer("dim", 1024, "Width of an embedding.")
WHERE = flags.DEFINE_string("where", "ring", "config.objective.where.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "config.objective.dtype.")
BLOCK = flags.DEFINE_integer("block", base.get_config().objective.block, "Rows and columns of a tile.")
TEXT = flags.DEFINE_string("text", None, "Write the compiled program here.")


def overlaps(text: str) -> list[tuple[str, str, int, int]]:
    """(computation, type, operations, of them products or loops) between start and done of each asynchronous permute."""
    found: list[tuple[str, str, int, int]] = []
    computation, kinds = "", {}
    open_: dict[str, list[int]] = {}
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            computation, open_ = line.split()[0], {}
        name = line.split(" = ")[0].strip().removeprefix("ROOT ")
        if "collective-permute-start(" in line:
            open_[name], kinds[name] = [0, 0], re.findall(r"\w+\[[\d,]*\]", line.split(" = ")[1])[0]
        elif done := re.search(r"collective-permute-done\((?:.* )?(%?[\w.-]+)\)", line):
            key = done.group(1)
            if key in open_:
                operations, products = open_.pop(key)
                found.append((computation, kinds[key], operations, products))
        else:
            for count in open_.values():
                count[0] += 1
                count[1] += any(word in line for word in (" while(", " convolution(", " dot(", "kind=kOutput"))
    return found


def main(argv: list[str]) -> None:
    """Compiles, and prints what the compiler says."""
    del argv
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY.value)
    mesh = sharding.make_mesh(base.get_config().mesh, list(topology.devices))
    config = base.get_config().objective
    config.update(where=WHERE.value, dtype=DTYPE.value, block=BLOCK.value)
    objective = pairs.make(config, 2, DIM.value, mesh, sharding.BATCH[0])
    rows = NamedSharding(mesh, sharding.BATCH)
    b = BATCH.value
    z = jax.ShapeDtypeStruct((b, 2, DIM.value), jnp.float32, sharding=rows)
    ids = {
        "doc": jax.ShapeDtypeStruct((b,), jnp.int32, sharding=rows),
        "text": jax.ShapeDtypeStruct((b, 2), jnp.int32, sharding=rows),
    }
    params = {"log_temperature": jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))}
    step = jax.jit(jax.value_and_grad(lambda *arguments: objective.loss(*arguments)[0], argnums=(0, 2)))
    begin = time.perf_counter()
    compiled = step.lower(z, ids, params).compile()
    memory: Any = compiled.memory_analysis()
    took = time.perf_counter() - begin
    print(f"{TOPOLOGY.value}: {WHERE.value} {DTYPE.value}, batch {b:,} × {DIM.value}, compiled in {took:.0f} s")
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    print(f"memory of a chip: {total / 2**30:.2f} GiB, of which temporaries {memory.temp_size_in_bytes / 2**30:.2f}")
    text = compiled.as_text() or ""
    if TEXT.value:
        pathlib.Path(TEXT.value).write_text(text)
    found = overlaps(text)
    starts, blocking = text.count("collective-permute-start("), text.count(" collective-permute(")
    print(f"collective-permutes: {starts} asynchronous, {blocking} blocking")
    print("between start and end of each, in the loops over hops:")
    for computation, kind, operations, products in found:
        if computation != "ENTRY":
            print(f"  {kind:<18} {operations:>3} operations, of them {products} matrix products or loops of them")


if __name__ == "__main__":
    app.run(main)
