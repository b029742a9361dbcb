"""Compiles the ring loss at a million pairs for a TPU slice that need not be present: memory per chip, and what overlaps.

  pip install -e '.[plan]'
  python -m benchmarks.tpu_ring --target=tpu:v5e:16x16 --batch=1048576

Nothing runs; the compiler's schedule is read. Operations between the start and the end of an asynchronous collective-permute
overlap with its transfer. Expect 0.17 GiB per chip, no blocking permute, and matrix products beside each asynchronous one.
"""

import pathlib
import re
import time
from typing import Any

from absl import app, flags

from benchmarks import common
from contrastive_jax.config import default_config
from contrastive_jax.objectives import pairs
from contrastive_jax.planning import hardware, plan
from contrastive_jax.runtime import sharding

TARGET = flags.DEFINE_string("target", "tpu:v5e:16x16", "The TPU slice to compile for.")
BATCH = flags.DEFINE_integer("batch", 1 << 20, "Pairs of the global batch.")
DIM = flags.DEFINE_integer("dim", 1024, "Width of an embedding.")
WHERE = flags.DEFINE_string("where", "ring", "config.objective.where.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "config.objective.dtype.")
BLOCK = flags.DEFINE_integer("block", default_config().objective.block, "Rows and columns of a tile.")
OUTPUT = flags.DEFINE_string("output", None, "Also write the compiled program, HLO text, to this file.")


def overlaps(text: str) -> list[tuple[str, str, int, int]]:
    """Finds the operations between the start and the end of each asynchronous permute of a compiled program.

    Returns:
      (computation, type of the permuted array, operations, how many of them are matrix products or loops).
    """
    permutes: list[tuple[str, str, int, int]] = []
    computation, kinds = "", {}
    counts: dict[str, list[int]] = {}  # of the permutes that have started: operations, and products or loops
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            computation, counts = line.split()[0], {}
        name = line.split(" = ")[0].strip().removeprefix("ROOT ")
        if "collective-permute-start(" in line:
            counts[name], kinds[name] = [0, 0], re.findall(r"\w+\[[\d,]*\]", line.split(" = ")[1])[0]
        elif done := re.search(r"collective-permute-done\((?:.* )?(%?[\w.-]+)\)", line):
            key = done.group(1)
            if key in counts:
                operations, products = counts.pop(key)
                permutes.append((computation, kinds[key], operations, products))
        else:
            for count in counts.values():
                count[0] += 1
                count[1] += any(opcode in line for opcode in (" while(", " convolution(", " dot(", "kind=kOutput"))
    return permutes


def compile_loss() -> Any:
    """Compiles the loss and its gradient for the target."""
    target = hardware.parse_target(TARGET.value)
    plan.configure_compilers(target)
    mesh = sharding.make_mesh(default_config().mesh, hardware.describe_devices(target))
    config = pairs.pair_config(default_config())
    config.update(where=WHERE.value, dtype=DTYPE.value, block=BLOCK.value)
    shapes = common.loss_shapes(BATCH.value, DIM.value, mesh)
    return common.loss_and_gradients(config, DIM.value, mesh).lower(*shapes).compile()


def main(argv: list[str]) -> None:
    """Prints memory and overlaps."""
    del argv
    begin = time.perf_counter()
    compiled = compile_loss()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    print(f"{TARGET.value}: {WHERE.value} {DTYPE.value}, batch {BATCH.value:,} × {DIM.value}, compiled in {seconds:.0f} s")
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    print(f"memory per chip: {total / 2**30:.2f} GiB, of which temporaries {memory.temp_size_in_bytes / 2**30:.2f}")
    text = compiled.as_text() or ""
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(text)
    starts, blocking = text.count("collective-permute-start("), text.count(" collective-permute(")
    print(f"collective-permutes: {starts} asynchronous, {blocking} blocking")
    print("between the start and the end of each, in the loops over hops:")
    for computation, kind, operations, products in overlaps(text):
        if computation != "ENTRY":
            print(f"  {kind:<18} {operations:>3} operations, {products} of them matrix products or loops of products")


if __name__ == "__main__":
    app.run(main)
