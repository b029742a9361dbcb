"""Reads a compiled program (XLA's HLO text): its computations, loops, collectives and what the compiler thinks they cost."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: its name.
      opcode: "fusion", "while", "all-gather-start" ...
      shape: the text of its result's shape.
      operands: names of what it takes.
      line: the whole line.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    line: str

    def attribute(self, name: str) -> str | None:
        """The computation named by `calls=`, `body=`, `condition=` ..., or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.line)
        return found[1] if found else None


class Program(NamedTuple):
    """A module.

    Attributes:
      computations: name → instructions, in the order in which they run.
      entry: name of the one that runs.
      shapes: name of an instruction → the text of its shape; names are unique in a module.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    shapes: dict[str, str]


def parse(text: str) -> Program:
    """Reads the text of a compiled module."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    joined = re.sub(r"\n(?=[\"}])(?!}\n\n|}\n$|}$)", " ", text)  # attributes may hold line breaks
    for line in joined.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*{$", line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (instruction := parse_instruction(line)):
            computations[current].append(instruction)
    return Program(computations, entry, {i.name: i.shape for lines in computations.values() for i in lines})


def parse_instruction(line: str) -> Instruction | None:
    """One line, or None where it is none."""
    start = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    rest = line[start.end() :]
    shape = rest[: closing(rest)] if rest.startswith("(") else rest.split(" ", 1)[0]
    after = re.match(r"\s*([\w\-]+)\(", rest[len(shape) :])
    if not after:
        return None
    arguments = rest[len(shape) + after.end() - 1 :]
    arguments = arguments[: closing(arguments)]
    return Instruction(start[1], after[1], shape, tuple(re.findall(r"%([\w.\-]+)", arguments)), line)


def closing(text: str) -> int:
    """The place after the parenthesis that closes the first one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place + 1
    return len(text)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, sizes) of every array in the text of a shape."""
    found = re.findall(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]", shape)
    return [(kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in found]


def nbytes(shape: str) -> float:
    """Bytes of all arrays in the text of a shape."""

    def one(kind: str) -> float:
        return BYTES[kind] if kind in BYTES else int(re.sub(r"\D.*", "", kind[1:]) or 8) / 8

    return sum(one(kind) * math.prod(sizes) for kind, sizes in arrays(shape))


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a `while` runs its body: its annotation, or the constant that its condition compares with."""
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.line)
    if known:
        return int(known[1])
    pending, constants = [loop.attribute("condition")], []
    while pending:
        for instruction in program.computations.get(pending.pop() or "", []):
            if instruction.opcode == "constant" and (value := re.search(r"constant\((\d+)\)", instruction.line)):
                constants.append(int(value[1]))
            if called := instruction.attribute("calls"):
                pending.append(called)
    return max(constants, default=1)


def product_flops(program: Program, instruction: Instruction) -> float:
    """FLOPs of the matrix products of one instruction, those inside a fusion included."""
    if called := instruction.attribute("calls"):
        return sum(product_flops(program, inner) for inner in program.computations.get(called, []))
    outputs = arrays(instruction.shape)
    if instruction.opcode == "convolution":
        return convolution_flops(program, instruction)
    contracting = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[{\[]([\d,"]*)[}\]]', instruction.line)
    if instruction.opcode == "dot" or (instruction.opcode == "custom-call" and contracting):
        sizes = operand_sizes(program, instruction, 0)
        if contracting and sizes:
            depth = math.prod(sizes[int(axis)] for axis in contracting[1].replace('"', "").split(",") if axis)
            return 2 * math.prod(outputs[0][1]) * depth
    return 0.0


def convolution_flops(program: Program, instruction: Instruction) -> float:
    """FLOPs of a convolution, as which TPU programs write products; padding, by which they write batches, counts nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.line)
    sizes = [operand_sizes(program, instruction, 0), operand_sizes(program, instruction, 1), arrays(instruction.shape)[0][1]]
    if not labels or not all(sizes):
        return 0.0
    data, kernel, out = (dict(zip(text, size, strict=True)) for text, size in zip(labels.groups(), sizes, strict=True))
    # A place of the kernel meets at most every output, and at most every input.
    met = math.prod(kernel[axis] * min(out[axis], data[axis]) for axis in kernel if axis.isdigit())
    return 2.0 * out["b"] * out["f"] * kernel["i"] * met


def operand_sizes(program: Program, instruction: Instruction, place: int) -> tuple[int, ...]:
    """The sizes of one operand, looked up where it is made."""
    shape = program.shapes.get(instruction.operands[place]) if len(instruction.operands) > place else None
    return arrays(shape)[0][1] if shape and arrays(shape) else ()


class Collective(NamedTuple):
    """One transfer between devices.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: what one device holds of its larger side (the gathered array, the array before it is scattered).
      group: numbers of the devices of the first group (a permutation: the first pair), in the order of the mesh.
      asynchronous: whether compute goes on meanwhile.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    asynchronous: bool


def collective_of(program: Program, instruction: Instruction, fused: bool, devices: int) -> Collective | None:
    """What an instruction transfers, or None."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    started = instruction.opcode.endswith("-start")
    moved = nbytes(instruction.shape)
    if started and instruction.shape.startswith("("):  # (operand, result, ...)
        moved = max((nbytes(f"{kind_}[{','.join(map(str, sizes))}]") for kind_, sizes in arrays(instruction.shape)), default=0)
    if kind == "reduce-scatter":
        moved *= len(group_of(instruction.line, devices))
    return Collective(kind, moved, group_of(instruction.line, devices), started or fused)


def group_of(line: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective; all of them where none is named."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(int(device) for device in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return tuple(ordered(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?[^{]*\{([^}]*)\}", line
    ):
        sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
        names = re.findall(r"'([^']+)'=", mesh[1])
        used = set(re.findall(r"'([^']+)'", mesh[4]))
        place: Any = tuple(slice(None) if name in used else 0 for name in names)
        return tuple(ordered(mesh[2] or str(math.prod(sizes)), mesh[3]).reshape(sizes)[place].reshape(-1).tolist())
    return tuple(range(devices))


def ordered(sizes: str, permutation: str | None) -> np.ndarray:
    """The devices of XLA's "[2,4]T(1,0)": counted, in an array of these sizes, its axes permuted, flat."""
    shape = [int(size) for size in sizes.split(",")]
    axes = [int(axis) for axis in permutation.split(",")] if permutation else list(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)


def inside(program: Program, instruction: Instruction) -> Iterator[Instruction]:
    """The instructions of a fusion or of an asynchronous wrapper, and of what these call."""
    for inner in program.computations.get(instruction.attribute("calls") or "", []):
        yield inner
        yield from inside(program, inner)
