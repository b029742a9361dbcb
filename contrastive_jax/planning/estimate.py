"""From a compiled program to seconds: the compiler's cycles (TPU) or a roofline (GPU, CPU), loops multiplied, transfers added.

What the estimate is made of:

* TPU: XLA writes `estimated_cycles` beside every fusion; a loop's are multiplied by its trip count. Pallas kernels are custom
  calls without an estimate: theirs is the compiler's static schedule of one grid step (instruction bundles, one a cycle) times
  the grid's steps, divided by the cores.
* GPU and CPU: the longer of a kernel's FLOPs at peak and its operands and results at the memory's bandwidth.
* Transfers: bytes over the bandwidth of the links that a group spans. In a computation, asynchronous ones hide behind its
  compute as far as that lasts; the others are added.

All of it assumes that nothing else slows the chip: an upper bound of utilisation.
"""

import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from contrastive_jax.planning import program as program_lib
from contrastive_jax.planning.hardware import Target
from contrastive_jax.planning.program import Collective, Instruction, Program

# Custom calls of TPU programs that mark something and do nothing.
BOOKKEEPING = ("AsyncCollective", "ConcatBitcast", "AllocateBuffer", "Sharding", "AssumeGather")
# Instructions that move nothing.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}


# What a computation costs each time it runs; parts add up. Keys: "seconds" from its start to its end, "compute", "exposed"
# (seconds in which only transfers happen), "kernels" (seconds of attention kernels), "flops" (of products, on one device);
# ("traffic", kind, mesh axes, "count" | "asynchronous" | "bytes" | "seconds"); ("unmodelled", what): how often something ran
# that has no estimate and was counted as nothing.
Cost = Counter[Any]


def times(cost: Cost, count: float) -> Cost:
    """The cost of running it `count` times."""
    return Counter({key: value * count for key, value in cost.items()})


class Model:
    """Costs of the computations of one program on one target."""

    def __init__(self, program: Program, target: Target, mesh: Any, schedules: pathlib.Path | None):
        self._program, self._target, self._mesh = program, target, mesh
        self._schedules = schedules
        self._done: dict[str, Cost] = {}

    def computation(self, name: str) -> Cost:
        """One computation, what it calls included."""
        if name not in self._done:
            self._done[name] = self._sum(self._program.computations.get(name, []))
        return self._done[name]

    def _sum(self, instructions: list[Instruction]) -> Cost:
        total: Cost = Counter()
        here = hidden = added = 0.0
        seen: set[str] = set()
        for instruction in instructions:
            if (nested := self._nested(instruction)) is not None:
                total.update(nested)
                continue
            cost = self._compute(instruction)
            here += cost.pop("seconds", 0.0)
            total.update(cost)
            for collective, key in self._collectives(instruction):
                if key in seen:
                    continue
                seen.add(key)
                taken = transfer_seconds(collective, self._target, self._mesh)
                hidden, added = (hidden + taken, added) if collective.asynchronous else (hidden, added + taken)
                name = ("traffic", collective.kind, axes_of(collective.group, self._mesh))
                total.update({(*name, "count"): 1, (*name, "asynchronous"): int(collective.asynchronous)})
                total.update({(*name, "bytes"): collective.bytes, (*name, "seconds"): taken})
        exposed = added + max(hidden - here, 0.0)
        total.update({"seconds": here + exposed, "compute": here, "exposed": exposed})
        return total

    def _nested(self, instruction: Instruction) -> Cost | None:
        """The cost of a loop, a call or a branch; None for anything else."""
        if instruction.opcode == "while":
            body = self.computation(instruction.attribute("body") or "")
            return times(body, program_lib.trip_count(self._program, instruction))
        if instruction.opcode == "call":
            return self.computation(instruction.attribute("to_apply") or "")
        if instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.line)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            names += [n for n in map(instruction.attribute, ("true_computation", "false_computation")) if n]
            return max((self.computation(name) for name in names), key=lambda cost: cost["seconds"], default=Counter())
        return None

    def _compute(self, instruction: Instruction) -> Cost:
        """Seconds, FLOPs and what has no estimate, of one instruction that calls no computation of its own."""
        chip, line = self._target.chip, instruction.line
        flops = program_lib.product_flops(self._program, instruction)
        if not self._target.kind.startswith("tpu"):
            return self._roofline(instruction, flops)
        if 'custom_call_target="tpu_custom_call"' in line:
            return self._kernel(instruction)
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            return Counter({"seconds": int(cycles[1]) / chip.clock, "flops": flops})
        cost: Cost = Counter({"flops": flops})
        if instruction.opcode == "custom-call":
            name = re.search(r'custom_call_target="([^"]*)"', line)
            if name and not name[1].startswith(BOOKKEEPING):
                cost["unmodelled", name[1]] = 1
        return cost

    def _kernel(self, instruction: Instruction) -> Cost:
        """A Pallas kernel: its grid's steps, each the compiler's static schedule, or its traffic with HBM if that is longer."""
        chip = self._target.chip
        steps = re.search(r"grid_steps\W+(\d+)", instruction.line)
        products = re.search(r"kernel_flops\W+(\d+)", instruction.line)
        bundles = self._bundles(instruction.name)
        if not steps or not bundles:
            return Counter({("unmodelled", f"Pallas kernel {instruction.name}"): 1})
        moved = sum(program_lib.nbytes(self._program.shapes.get(name, "")) for name in instruction.operands)
        moved += program_lib.nbytes(instruction.shape)
        seconds = max(int(steps[1]) * bundles / chip.cores / chip.clock, moved / chip.bandwidth)
        return Counter({"seconds": seconds, "kernels": seconds, "flops": float(products[1]) if products else 0.0})

    def _roofline(self, instruction: Instruction, flops: float) -> Cost:
        chip, opcode = self._target.chip, instruction.opcode
        if opcode in FREE or opcode.removesuffix("-start").removesuffix("-done") in program_lib.COLLECTIVES:
            return Counter()
        attention = "__cudnn$fmha" in instruction.line
        flops = fmha_flops(self._program, instruction) if attention else flops
        moved = program_lib.nbytes(instruction.shape)
        if opcode == "fusion" and "dynamic-update-slice" in instruction.name.replace("_", "-"):
            moved = 0.0  # it writes into its operand; what it writes is counted where it is made
        else:
            moved += sum(program_lib.nbytes(self._program.shapes.get(name, "")) for name in instruction.operands)
        seconds = max(flops / chip.flops, moved / chip.bandwidth)
        return Counter({"seconds": seconds, "flops": flops, "kernels": seconds if attention else 0.0})

    def _bundles(self, name: str) -> int:
        """Scheduled instruction bundles of one grid step of a kernel, from the compiler's dump; 0: there is none."""
        if self._schedules is None:
            return 0
        # The compiler dumps equal kernels once, under the name of one of them.
        patterns = (f"*-{name}-*", f"*-{name.partition('.')[0]}.*")
        paths = [path for pattern in patterns for path in self._schedules.glob(f"{pattern}schedule-analysis_final_bundles.txt")]
        for path in paths:
            if found := re.search(r"total scheduled bundles:\s+(\d+)", path.read_text()):
                return int(found[1])
        return 0

    def _collectives(self, instruction: Instruction) -> list[tuple[Collective, str]]:
        """The transfers that an instruction makes or starts, each with a key that its continuations share."""
        devices, found = self._mesh.size, []
        if own := program_lib.collective_of(self._program, instruction, False, devices):
            return [(own, instruction.name)]
        called = instruction.attribute("calls") or ""
        names = " ".join([called, *(i.line for i in program_lib.inside(self._program, instruction) if "AsyncColl" in i.line)])
        fused = "async" in names.lower()
        for inner in program_lib.inside(self._program, instruction):
            if one := program_lib.collective_of(self._program, inner, fused, devices):
                if called.startswith("all-reduce-scatter"):
                    one = one._replace(kind="reduce-scatter")
                chain = re.search(r'chain_id="(\d+)"', inner.line)
                found.append((one, f"chain {chain[1]}" if chain else inner.name))
        return found


def fmha_flops(program: Program, instruction: Instruction) -> float:
    """FLOPs of cuDNN's attention from its query [n l h k]: two products forward, five backward."""
    query = program_lib.operand_sizes(program, instruction, 0)
    products = 5 if "Backward" in instruction.line else 2
    if len(query) != 4:
        return 0.0
    n, h, length, k = query if query[1] < query[2] else (query[0], query[2], query[1], query[3])
    return products * 2.0 * n * h * length * length * k


def axes_of(group: tuple[int, ...], mesh: Any) -> str:
    """The mesh axes over which a group of devices extends, "data+fsdp"; a ring over all counts as all."""
    sizes = tuple(mesh.shape.values())
    places = np.array([np.unravel_index(device, sizes) for device in group])
    return "+".join(name for name, column in zip(mesh.shape, places.T, strict=True) if len(set(column)) > 1) or "none"


def transfer_seconds(collective: Collective, target: Target, mesh: Any) -> float:
    """Seconds of one transfer by the bandwidth of the links that its group spans."""
    n = len(collective.group)
    if n < 2:
        return 0.0
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(collective.kind, (n - 1) / n)
    return collective.bytes * share / bandwidth(collective, target, mesh)


def bandwidth(collective: Collective, target: Target, mesh: Any) -> float:
    """Bytes/s into each device of a group, all links that it spans taken together."""
    chip, flat = target.chip, list(mesh.devices.flat)
    if target.kind.startswith("tpu"):
        coords = np.array([flat[device].coords for device in collective.group])
        extents = [len(set(column)) for column in coords.T]
        if collective.kind == "collective-permute":
            return chip.link
        # A closed ring is served from both sides.
        links = sum(2 if extent % chip.torus == 0 else 1 for extent in extents if extent > 1)
        return chip.link * max(links, 1)
    if target.kind.startswith("gpu"):
        nodes = Counter(device // target.shape[1] for device in collective.group)
        return chip.link if len(nodes) == 1 else chip.network * min(nodes.values())
    return chip.link


def model_flops(config: Any, params: Any, views: int) -> tuple[float, str]:
    """FLOPs that the step needs, recomputation not counted, and the formula (PaLM's, Chowdhery et al. 2022, appendix B).

    Args:
      config: the recipe.
      params: shapes of `params["encoder"]`.
      views: texts of a pair.
    """
    model, data = config.model, config.data
    blocks = params["transformer"].get("blocks", {})
    weights = sum(math.prod(leaf.shape) for leaf in tree_leaves(blocks, lambda path: path[-1] == "kernel"))
    tokens = data.batch_size // data.pack_pairs * data.pack_rows * views * data.length
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * data.length
    width = model.embedding_dim or model.d_model
    pairs = 6.0 * data.batch_size**2 * width
    total = tokens * (6.0 * weights + attention) + pairs
    return total, (
        f"tokens × (6 × {weights:,} weights in matrix products + 12 × layers × heads × head_dim × length = {attention:,}) "
        f"+ 6 × batch² × {width} for the scores, tokens = {tokens:,}"
    )


def tree_leaves(tree: Any, chosen: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> list[Any]:
    """The leaves of nested dicts whose path is chosen."""
    if not isinstance(tree, dict):
        return [tree] if chosen(path) else []
    return [leaf for key, value in tree.items() for leaf in tree_leaves(value, chosen, (*path, key))]
