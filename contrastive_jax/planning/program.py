"""Parses a compiled program (XLA's HLO text): its computations, loops, matrix products and collectives."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

# Bytes per element of each element type; `nbytes` derives the size of a type that is not listed from the digits in its name.
ELEMENT_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "token": 0}
# What a convolution's window says per axis where it is not 1, in the order in which `convolution_flops` reads them.
WINDOW = ("stride", "rhs_dilate", "lhs_dilate")
# Transfers between TPU slices are a send and a receive through the hosts; XLA's name for each kind.
BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: the name of the instruction, unique in the program.
      opcode: "fusion", "while", "all-gather-start" ...
      shape: the shape of the result, as text.
      operands: the names of the instructions whose results it takes.
      line: the whole line.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    line: str

    def attribute(self, name: str) -> str | None:
        """Returns the name of the computation after `calls=`, `body=`, `condition=` ..., or None."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.line)
        return match[1] if match else None


class Program(NamedTuple):
    """A compiled program: one HLO module.

    Attributes:
      computations: name of a computation → its instructions, in the order in which they run.
      entry: the name of the computation with which the program starts.
      shapes: name of an instruction → the shape of its result, as text.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    shapes: dict[str, str]


def parse_program(text: str) -> Program:
    """Parses the HLO text of a compiled module."""
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


def device_memory(analysis: Any) -> dict[str, float]:
    """Returns the bytes that a compiled program needs on each device, by part, and their "peak".

    Args:
      analysis: `memory_analysis()` of the compiled program.
    """
    names = ("argument", "output", "alias", "temp", "generated_code")
    parts = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
    total = sum(parts.values()) - 2 * parts["alias"]  # an aliased output lies in the memory of its argument
    return parts | {"peak": max(total, getattr(analysis, "peak_memory_in_bytes", 0))}


def parse_instruction(line: str) -> Instruction | None:
    """Parses one line; returns None if it is not an instruction."""
    start = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    rest = line[start.end() :]
    shape = rest[: end_of_parentheses(rest)] if rest.startswith("(") else rest.split(" ", 1)[0]
    after = re.match(r"\s*([\w\-]+)\(", rest[len(shape) :])
    if not after:
        return None
    arguments = rest[len(shape) + after.end() - 1 :]
    arguments = arguments[: end_of_parentheses(arguments)]
    return Instruction(start[1], after[1], shape, tuple(re.findall(r"%([\w.\-]+)", arguments)), line)


def end_of_parentheses(text: str) -> int:
    """Returns the index after the parenthesis that closes the one with which the text begins."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return index + 1
    return len(text)


def parse_shape(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (element type, sizes) of every array in a shape, which may be a tuple: "(f32[8,4], s32[])"."""
    arrays = re.findall(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]", shape)
    return [(kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in arrays]


def nbytes(shape: str) -> float:
    """Returns the bytes of all arrays in a shape."""

    def element_bytes(kind: str) -> float:
        return ELEMENT_BYTES[kind] if kind in ELEMENT_BYTES else int(re.sub(r"\D.*", "", kind[1:]) or 8) / 8

    return sum(element_bytes(kind) * math.prod(sizes) for kind, sizes in parse_shape(shape))


def trip_count(program: Program, loop: Instruction) -> int:
    """Returns how often a `while` runs its body: from its annotation, or the largest constant in its condition."""
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
    """Returns the FLOPs of the matrix products of one instruction, including those inside a fusion."""
    if called := instruction.attribute("calls"):
        return sum(product_flops(program, inner) for inner in program.computations.get(called, []))
    outputs = parse_shape(instruction.shape)
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
    """Returns the FLOPs of a convolution; multiplications with padding, and with the zeros of a dilation, do not count.

    TPU programs write matrix products as convolutions, and batches of products as convolutions with padding or with a dilated
    input, of which each output sees one element.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.line)
    sizes = [
        operand_sizes(program, instruction, 0),
        operand_sizes(program, instruction, 1),
        parse_shape(instruction.shape)[0][1],
    ]
    if not labels or not all(sizes):
        return 0.0
    data, kernel, out = (dict(zip(text, size, strict=True)) for text, size in zip(labels.groups(), sizes, strict=True))
    said = re.search(r"window={([^}]*)}", instruction.line)
    window = {name: values.split("x") for name, values in re.findall(r"(\w+)=([-\w]+)", said[1] if said else "")}

    def products(axis: str) -> int:
        """Counts the pairs of an output and a kernel element, along a spatial axis, that meet an element of the input."""
        stride, dilation, spread = (int(window[key][int(axis)]) if key in window else 1 for key in WINDOW)
        before = int(window["pad"][int(axis)].partition("_")[0]) if "pad" in window else 0
        place = np.arange(out[axis])[:, None] * stride + np.arange(kernel[axis]) * dilation - before
        return int(((place >= 0) & (place <= (data[axis] - 1) * spread) & (place % spread == 0)).sum())

    return 2.0 * out["b"] * out["f"] * kernel["i"] * math.prod(products(axis) for axis in kernel if axis.isdigit())


def operand_sizes(program: Program, instruction: Instruction, index: int) -> tuple[int, ...]:
    """Returns the sizes of the operand with this index, or () if they are unknown."""
    shape = program.shapes.get(instruction.operands[index]) if len(instruction.operands) > index else None
    return parse_shape(shape)[0][1] if shape and parse_shape(shape) else ()


class Collective(NamedTuple):
    """One transfer between devices.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: the size on one device of the larger of input and output (the gathered array, the array before it is scattered).
      group: the devices of the first group, by their number in the mesh; of a permutation, the first pair; of a transfer
        between slices, the numbers of the slices.
      asynchronous: whether compute continues during the transfer.
      between_slices: whether the transfer goes from slice to slice, over the network of the hosts.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    asynchronous: bool
    between_slices: bool = False


def parse_collective(instruction: Instruction, fused: bool, device_count: int, slices: int = 1) -> Collective | None:
    """Returns the transfer of an instruction, or None if it is no collective.

    Args:
      instruction: the instruction.
      fused: whether it is inside an asynchronous fusion.
      device_count: the number of devices of a slice: a program of several slices numbers those of each slice from 0.
      slices: the number of slices that the program runs on.
    """
    if instruction.opcode == "recv" and (name := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)):
        kind = BETWEEN_SLICES.get(name[1], name[1].lower())
        size = nbytes(instruction.shape) * (slices if kind == "reduce-scatter" else 1)
        return Collective(kind, size, tuple(range(slices)), asynchronous=True, between_slices=True)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    started = instruction.opcode.endswith("-start")
    group = device_group(instruction.line, device_count)
    size = nbytes(instruction.shape)
    if started and instruction.shape.startswith("(("):  # ((operands), (results), ...), of several transfers in one
        end = end_of_parentheses(instruction.shape[1:]) + 1
        size = max(nbytes(instruction.shape[1:end]), nbytes(instruction.shape[end:]))
    elif started and instruction.shape.startswith("("):  # (operand, result, ...)
        arrays = parse_shape(instruction.shape)
        size = max((nbytes(f"{element}[{','.join(map(str, sizes))}]") for element, sizes in arrays), default=0)
    if kind == "reduce-scatter":
        size *= len(group)
    return Collective(kind, size, group, started or fused)


def device_group(line: str, device_count: int) -> tuple[int, ...]:
    """Returns the first replica group of a collective (for a permute, its first pair); all devices if the line names none.

    One group suffices for an estimate: all groups of a collective have the same size and lie along the same mesh axes.

    Args:
      line: the line of the instruction.
      device_count: the number of devices that the program runs on.
    """
    # source_target_pairs={{0,1},{1,2}}
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(pairs[1]), int(pairs[2])
    # replica_groups={{0,2},{1,3}}
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(int(device) for device in listed[1].split(","))
    # replica_groups=[2,4]<=[4,2]T(1,0): 2 groups of 4; `iota_devices` explains the right side.
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return tuple(iota_devices(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    # replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: a group lies along axis b. device_ids may be absent.
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?[^{]*\{([^}]*)\}", line
    ):
        sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
        names = re.findall(r"'([^']+)'=", mesh[1])
        used = set(re.findall(r"'([^']+)'", mesh[4]))
        index: Any = tuple(slice(None) if name in used else 0 for name in names)
        return tuple(iota_devices(mesh[2] or str(math.prod(sizes)), mesh[3]).reshape(sizes)[index].reshape(-1).tolist())
    return tuple(range(device_count))


def iota_devices(sizes: str, permutation: str | None) -> np.ndarray:
    """Returns the device numbers that XLA writes as "[2,4]T(1,0)": 0, 1, ... in an array [2 4], transposed, then flattened."""
    shape = [int(size) for size in sizes.split(",")]
    axes = [int(axis) for axis in permutation.split(",")] if permutation else list(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)


def nested_instructions(program: Program, instruction: Instruction) -> Iterator[Instruction]:
    """Yields the instructions of a fusion or of an asynchronous wrapper, at every depth."""
    for inner in program.computations.get(instruction.attribute("calls") or "", []):
        yield inner
        yield from nested_instructions(program, inner)
