"""Results of evaluations with the protocol that decided them: written, read again, and put side by side."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

Rows = dict[str, dict[str, Any]]  # row → figures, as fractions; of the query-key test row → direction → figures
# What identifies a model is no part of how it was measured.
IDENTITY = ("model", "step", "parameters", "code")
ABSENT = "absent"


class Result(NamedTuple):
    """What evaluate wrote: rows of (row, direction or "", measure → fraction)."""

    label: str
    task: str
    protocol: dict[str, Any]
    stamp: str
    rows: list[tuple[str, str, dict[str, float]]]


def write(path: epath.Path, task: str, rows: Rows, protocol: dict[str, Any]) -> None:
    """Writes rows with their protocol and its hash: figures of two protocols are not the same measure."""
    how = {key: value for key, value in protocol.items() if key not in IDENTITY}
    stamp = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
    result = {"task": task, "protocol": protocol, "protocol_hash": stamp, "results": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")


def read(path: epath.Path, label: str) -> Result:
    """Reads what `write` wrote.

    Raises:
      ValueError: it is not that; the message names the file.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give workdirs of runs, and .json that evaluate wrote")
    try:
        found = json.loads(path.read_text())
        rows: list[tuple[str, str, dict[str, float]]] = []
        for name, value in found["results"].items():
            nested = all(isinstance(inner, dict) for inner in value.values())
            for direction, measures in value.items() if nested else [("", value)]:
                rows.append((name, direction, {key: float(figure) for key, figure in measures.items()}))
        return Result(label, str(found["task"]), dict(found["protocol"]), str(found["protocol_hash"]), rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not what evaluate writes (task, protocol, protocol_hash, results of numbers)") from error


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value, value) of all by which two protocols measure differently."""
    keys = sorted((first.keys() | second.keys()) - set(IDENTITY))
    values = [(key, first.get(key, ABSENT), second.get(key, ABSENT)) for key in keys]
    return [row for row in values if row[1] != row[2]]


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Rows of fractions as percentages."""
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
    width = max(map(len, [title, *rows])) + 2
    lines = [f"{title:<{width}}" + "".join(f"{name:>12}" for name in columns)]
    for name, found in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{100 * found[c]:>12.2f}" if c in found else f"{'-':>12}" for c in columns))
    return "\n".join(lines)


def compare(found: Sequence[Result], any_protocol: bool) -> str:
    """The rows of results side by side.

    Raises:
      ValueError: there is one only, they are of two tasks, or were measured differently (unless that is meant).
    """
    if len(found) < 2:
        raise ValueError("--compare: give two files or more, --compare A.json B.json")
    first, told = found[0], []
    for other in found[1:]:
        if other.task != first.task:
            raise ValueError(f"--compare: {first.label} is of {first.task}, {other.label} of {other.task}")
        if differ := differences(first.protocol, other.protocol):
            values = ", ".join(f"{key} ({one!r}, {two!r})" for key, one, two in differ)
            told.append(f"{first.label} and {other.label} were measured differently: {values}")
    if told and not any_protocol:
        raise ValueError(f"{'; '.join(told)}; --any_protocol shows them nevertheless")
    lines = [f"note: {note}" for note in told]
    for row, direction in dict.fromkeys(row[:2] for result in found for row in result.rows):
        figures = {result.label: figures for result in found for *name, figures in result.rows if name == [row, direction]}
        lines.append(table(f"{first.task} {row} {direction}".rstrip() + ", × 100", figures))
    return "\n".join(lines)
