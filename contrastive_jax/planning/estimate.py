"""Estimates the time of a compiled program: loops multiplied by their trip counts, transfers added to compute.

* TPU compute: XLA annotates every fusion with `estimated_cycles`. A Pallas kernel is a custom call without an estimate; its
  time is the length of the compiler's static schedule of one grid step (instruction bundles, one per cycle) times the number of
  grid steps, divided by the number of cores.
* GPU and CPU compute: a roofline. A kernel takes as long as its FLOPs at peak rate, or as moving its operands and results at
  the memory's bandwidth, whichever is longer.
* Transfers: bytes over the bandwidth of the links between the devices of the group, or, between TPU slices, of their hosts'
  network. Asynchronous transfers hide behind the compute of their computation as far as it lasts; the others are added.

Nothing else is assumed to slow the chip down, so the estimated utilisation is an upper bound.
"""

import math
import pathlib
import re
from collections import Counter
from typing import Any

import numpy as np

from contrastive_jax.config.dense import vector_size
from contrastive_jax.objectives.losses import LOSSES
from contrastive_jax.planning import program as program_lib
from contrastive_jax.planning.hardware import Target
from contrastive_jax.planning.program import Collective, Instruction, Program
from contrastive_jax.training.build import computes_one_token
from contrastive_jax.training.views import cut_tokens, views_with_targets

# Names of custom calls in TPU programs that only mark something and take no time.
MARKERS = ("AsyncCollective", "ConcatBitcast", "AllocateBuffer", "Sharding", "AssumeGather", "SliceId")
# Instructions that move no data.
FREE_OPCODES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}


# The cost of running a computation once; costs of parts add up. Keys:
#   "seconds"   from its start to its end
#   "compute"   seconds of compute
#   "exposed"   seconds in which only transfers happen
#   "kernels"   seconds of attention kernels
#   "flops"     FLOPs of matrix products on one device
#   "network"   bytes that one device receives from other slices
#   ("traffic", kind, mesh axes, quantity)   quantity: "count", "asynchronous", "bytes" or "seconds"
#   ("unmodelled", name)   how often an operation ran that has no estimate and was counted as nothing
Cost = Counter[Any]


def scale_cost(cost: Cost, count: float) -> Cost:
    """Returns the cost of running something `count` times."""
    return Counter({key: value * count for key, value in cost.items()})


class CostModel:
    """Estimates the cost of each computation of one program on one machine.

    Args:
      program: the compiled program.
      target: the machine.
      mesh: the mesh that the program was compiled for.
      schedules: the folder with the TPU compiler's schedules of Pallas kernels, or None.
    """

    def __init__(self, program: Program, target: Target, mesh: Any, schedules: pathlib.Path | None):
        self._program, self._target, self._mesh = program, target, mesh
        self._schedules = schedules
        self._known: dict[str, Cost] = {}

    def of_computation(self, name: str) -> Cost:
        """Returns the cost of one computation, including the computations that it calls."""
        if name not in self._known:
            self._known[name] = self._sum(self._program.computations.get(name, []))
        return self._known[name]

    def _sum(self, instructions: list[Instruction]) -> Cost:
        """Adds up the instructions of one computation; its asynchronous transfers hide behind its compute."""
        total: Cost = Counter()
        compute = asynchronous = synchronous = 0.0  # seconds of this computation's own compute and transfers
        seen: set[str] = set()
        for instruction in instructions:
            if (nested := self._cost_of_calls(instruction)) is not None:
                total.update(nested)
                continue
            cost = self._compute(instruction)
            compute += cost.pop("seconds", 0.0)
            total.update(cost)
            for collective, key in self._collectives(instruction):
                if key in seen:
                    continue
                seen.add(key)
                seconds = transfer_seconds(collective, self._target, self._mesh)
                if collective.asynchronous:
                    asynchronous += seconds
                else:
                    synchronous += seconds
                axes = "slices" if collective.between_slices else axes_of(collective.group, self._mesh)
                name = ("traffic", collective.kind, axes)
                if collective.between_slices:
                    total.update({"network": received_bytes(collective)})
                total.update({(*name, "count"): 1, (*name, "asynchronous"): int(collective.asynchronous)})
                total.update({(*name, "bytes"): collective.bytes, (*name, "seconds"): seconds})
        exposed = synchronous + max(asynchronous - compute, 0.0)
        total.update({"seconds": compute + exposed, "compute": compute, "exposed": exposed})
        return total

    def _cost_of_calls(self, instruction: Instruction) -> Cost | None:
        """Returns the cost of a loop, a call or a branch (the slowest one); None for any other instruction."""
        if instruction.opcode == "while":
            body = self.of_computation(instruction.attribute("body") or "")
            return scale_cost(body, program_lib.trip_count(self._program, instruction))
        if instruction.opcode == "call":
            return self.of_computation(instruction.attribute("to_apply") or "")
        if instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.line)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            names += [n for n in map(instruction.attribute, ("true_computation", "false_computation")) if n]
            return max((self.of_computation(name) for name in names), key=lambda cost: cost["seconds"], default=Counter())
        return None

    def _compute(self, instruction: Instruction) -> Cost:
        """Returns seconds and FLOPs of one instruction that is no loop, call or branch, or counts it as unmodelled."""
        chip, line = self._target.chip, instruction.line
        flops = program_lib.product_flops(self._program, instruction)
        if not self._target.is_tpu:
            return self._roofline(instruction, flops)
        if 'custom_call_target="tpu_custom_call"' in line:
            return self._kernel(instruction)
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            return Counter({"seconds": int(cycles[1]) / chip.clock, "flops": flops})
        cost: Cost = Counter({"flops": flops})
        if instruction.opcode == "custom-call":
            name = re.search(r'custom_call_target="([^"]*)"', line)
            if name and not name[1].startswith(MARKERS):
                cost["unmodelled", name[1]] = 1
        return cost

    def _kernel(self, instruction: Instruction) -> Cost:
        """Returns the cost of a Pallas kernel: its schedule times its grid steps, or its HBM traffic if that is longer."""
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
        """Returns the cost of one GPU or CPU instruction with these FLOPs of matrix products (attention counts its own)."""
        chip, opcode = self._target.chip, instruction.opcode
        if opcode in FREE_OPCODES or opcode.removesuffix("-start").removesuffix("-done") in program_lib.COLLECTIVES:
            return Counter()
        attention = "__cudnn$fmha" in instruction.line
        flops = fmha_flops(self._program, instruction) if attention else flops
        moved = program_lib.nbytes(instruction.shape)
        if opcode == "fusion" and "dynamic-update-slice" in instruction.name.replace("_", "-"):
            moved = 0.0  # it writes in place; the data it writes were counted where they were computed
        else:
            moved += sum(program_lib.nbytes(self._program.shapes.get(name, "")) for name in instruction.operands)
        seconds = max(flops / chip.flops, moved / chip.bandwidth)
        return Counter({"seconds": seconds, "flops": flops, "kernels": seconds if attention else 0.0})

    def _bundles(self, name: str) -> int:
        """Returns the number of instruction bundles in one grid step of a Pallas kernel; 0 if it is unknown.

        The number stands in the schedules that the TPU compiler wrote.

        Args:
          name: the name of the kernel's instruction, "attention.3".
        """
        if self._schedules is None:
            return 0
        # The compiler writes equal kernels once, under the name of one of them: look for "attention.3", then for "attention.*".
        patterns = (f"*-{name}-*", f"*-{name.partition('.')[0]}.*")
        paths = [path for pattern in patterns for path in self._schedules.glob(f"{pattern}schedule-analysis_final_bundles.txt")]
        for path in paths:
            if bundles := re.search(r"total scheduled bundles:\s+(\d+)", path.read_text()):
                return int(bundles[1])
        return 0

    def _collectives(self, instruction: Instruction) -> list[tuple[Collective, str]]:
        """Returns the transfers that an instruction makes or starts, each with a key; parts of one transfer share a key."""
        slices = self._target.slices
        devices = self._mesh.size // slices
        if collective := program_lib.parse_collective(instruction, False, devices, slices):
            return [(collective, instruction.name)]
        called = instruction.attribute("calls") or ""
        nested = list(program_lib.nested_instructions(self._program, instruction))
        asynchronous = "async" in " ".join([called, *(inner.line for inner in nested if "AsyncColl" in inner.line)]).lower()
        collectives = []
        for inner in nested:
            if collective := program_lib.parse_collective(inner, asynchronous, devices):
                if called.startswith("all-reduce-scatter"):
                    collective = collective._replace(kind="reduce-scatter")
                chain = re.search(r'chain_id="(\d+)"', inner.line)
                collectives.append((collective, f"chain {chain[1]}" if chain else inner.name))
        return collectives


def fmha_flops(program: Program, instruction: Instruction) -> float:
    """Returns the FLOPs of a cuDNN attention call from its query [n l h k] or [n h l k]: 2 products forward, 5 backward.

    A causal mask lets it skip half of each product.
    """
    query = program_lib.operand_sizes(program, instruction, 0)
    products = 5 if "Backward" in instruction.line else 2
    if len(query) != 4:
        return 0.0
    n, h, length, k = query if query[1] < query[2] else (query[0], query[2], query[1], query[3])
    share = 0.5 if re.search(r'"mask_type": ?"(PADDING_)?CAUSAL"', instruction.line) else 1.0
    return share * products * 2.0 * n * h * length * length * k


def axes_of(group: tuple[int, ...], mesh: Any) -> str:
    """Returns the mesh axes along which the devices of a group differ, joined: "data+fsdp"; "none" for a single device."""
    sizes = tuple(mesh.shape.values())
    coordinates = np.array([np.unravel_index(device, sizes) for device in group])
    return "+".join(name for name, column in zip(mesh.shape, coordinates.T, strict=True) if len(set(column)) > 1) or "none"


def received_bytes(collective: Collective) -> float:
    """Returns the bytes that one device receives in a transfer."""
    n = len(collective.group)
    fraction = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(collective.kind, (n - 1) / n)
    return collective.bytes * fraction


def transfer_seconds(collective: Collective, target: Target, mesh: Any) -> float:
    """Returns the seconds of one transfer at the bandwidth of the links between the devices of its group."""
    if len(collective.group) < 2:
        return 0.0
    return received_bytes(collective) / bandwidth(collective, target, mesh)


def bandwidth(collective: Collective, target: Target, mesh: Any) -> float:
    """Returns the bytes/s into each device of a group, over all links that the group uses together."""
    chip, flat = target.chip, list(mesh.devices.flat)
    if collective.between_slices:
        return chip.network
    if target.is_tpu:
        coords = np.array([flat[device].coords for device in collective.group])
        extents = [len(set(column)) for column in coords.T]
        if max(extents) == 1 and chip.inside:
            return chip.inside
        # The devices of a chip share its links, unless they belong to one group, whose data then come to the chip once.
        link = (
            chip.link
            if len({getattr(flat[device], "core_on_chip", 0) for device in collective.group}) > 1
            else chip.link / chip.per_chip
        )
        if collective.kind == "collective-permute":
            return link
        # Data travel around a closed ring in both directions.
        links = sum(2 if extent % chip.torus == 0 else 1 for extent in extents if extent > 1)
        return link * max(links, 1)
    if target.kind.startswith("gpu"):
        nodes = Counter(device // target.shape[1] for device in collective.group)
        return chip.link if len(nodes) == 1 else chip.network * min(nodes.values())
    return chip.link


def model_flops(config: Any, params: Any, views: int) -> tuple[float, str]:
    """Returns the FLOPs that a step needs without recomputation, and the formula as text (PaLM: Chowdhery et al. 2022, app. B).

    Attention is counted over the length of a training row, data.length (twice that with data.join); model.max_length, which may
    be longer, costs parameters but no FLOPs. Of other mixers only the kernels are counted, of losses only scores and logits.
    Where a vector is the state of one token and nothing reads the others, the last block counts for that token alone,
    without the keys that the step computes where positions are rotary.

    Args:
      config: the recipe.
      params: the shapes of `params["encoder"]`.
      views: the number of views of a pair.
    """
    model, data = config.model, config.data
    blocks = params["transformer"].get("blocks", {})
    weights = sum(math.prod(leaf.shape) for leaf in leaves_named(blocks, "kernel"))
    length, rows = data.length * (2 if data.join else 1), 1 if data.join == "next" else views
    tokens = data.batch_size // data.pack_pairs * (data.pack_rows * rows * length - cut_tokens(data))
    one_token = model.mixer == "attention" and computes_one_token(config)
    layers = model.num_layers - one_token
    attention = 12 * layers * model.num_heads * model.head_dim * length * (model.mixer == "attention")
    width = vector_size(model)
    of_last = weights // model.num_layers if one_token else 0
    total = tokens * (6.0 * (weights - of_last) + attention)
    formula = (
        f"tokens × (6 × {weights - of_last:,} weights in matrix products + 12 × layers × heads × head_dim × length ="
        f" {attention:,})"
    )
    if one_token:
        mixing = 12 * model.num_heads * model.d_model
        total += tokens * mixing + 6.0 * tokens // length * of_last
        formula += f" + tokens × {mixing:,} + 6 × {tokens // length:,} rows × {of_last:,} for the last block, of one token"
    if scores := score_matrices(config, views):
        total += 6.0 * scores * data.batch_size**2 * width
        formula += f" + 6 × {scores} × batch² × {width} for the scores"
    if config.tokens.name not in ("", "replaced") and config.tokens.weight:
        places, table = min(config.tokens.positions or length, length), math.prod(params["transformer"]["embedding"].shape)
        predicted = tokens // (rows * length) * len(views_with_targets(config, rows)) * places
        total += 6.0 * predicted * table
        formula += f" + 6 × {predicted:,} predicted tokens × {table:,}"
    return total, f"{formula}, tokens = {tokens:,}"


def score_matrices(config: Any, views: int) -> int:
    """Returns how many batch × batch matrices of scores a step needs, for v views; 0 for a loss without negatives."""
    objective = config.objective
    if not objective.weight or objective.name not in LOSSES:
        return 0
    if objective.locals:
        return objective.locals
    if config.memory.kind == "queue":
        return config.memory.queue
    if objective.pairing == "both":  # both views of all pairs see both views
        return 4
    if objective.pairing == "all":
        return math.comb(views, 2)
    positives = 1 if objective.positives == "mean" else views - 1 - config.data.hard_negatives
    keys = positives + config.data.hard_negatives
    of_one_side = {"query_query": 1, "document_document": positives * keys}
    return keys + sum(of_one_side.get(direction, 0) for direction in objective.joint)


def leaves_named(tree: dict[str, Any], name: str) -> list[Any]:
    """Returns the leaves of nested dicts whose last key is `name`."""
    leaves = []
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves += leaves_named(value, name)
        elif key == name:
            leaves.append(value)
    return leaves
