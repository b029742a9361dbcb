"""Results of evaluations with the protocol that decided them: written, read again, and shown side by side."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError

Rows = dict[str, dict[str, float]]  # row → measure → fraction; a baseline's rows are named "BASELINE: ROW"
# Keys of a protocol that identify or describe a model; they do not say how it was measured.
IDENTITY = ("model", "step", "precision", "parameters", "code", "truncated")
ABSENT = "absent"  # shown for a key that a protocol does not have
# Baselines of the query-key test in results of older versions; every other name in them was the model's.
OLDER_BASELINES = ("chance", "TF-IDF", "BM25", "untrained")


class Result(NamedTuple):
    """One result as `evaluate` wrote it.

    Attributes:
      label: what the result is called in tables.
      task: the task's name.
      protocol: what decided the figures.
      stamp: the hash of the protocol; results of equal stamps can be compared.
      rows: row → measure → fraction.
    """

    label: str
    task: str
    protocol: dict[str, Any]
    stamp: str
    rows: Rows


def hash_protocol(protocol: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that are equal for equal ways of measuring, whatever model was measured."""
    measured = {key: value for key, value in protocol.items() if key not in IDENTITY}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


def write_result(path: epath.Path, task: str, rows: Rows, protocol: dict[str, Any]) -> None:
    """Writes rows with their protocol and its hash: figures of two protocols are not the same measure."""
    result = {"task": task, "protocol": protocol, "protocol_hash": hash_protocol(protocol), "results": rows}
    files.write_text(path, json.dumps(result, indent=2) + "\n")


def read_result(path: epath.Path, label: str) -> Result:
    """Reads what `write_result` wrote, in this version or an older one.

    Raises:
      UserError: the file is missing or is something else; the message names it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give workdirs of runs, and .json that evaluate wrote")
    stored = files.read_json(path)
    try:
        protocol, stamp, rows = dict(stored["protocol"]), str(stored["protocol_hash"]), stored["results"]
        if any(isinstance(value, dict) for row in rows.values() for value in row.values()):
            rows, protocol = flatten_older_rows(rows), protocol | {"input": "tokens"}
            stamp = hash_protocol(protocol)
        rows = {row: {measure: float(value) for measure, value in measures.items()} for row, measures in rows.items()}
        return Result(label, str(stored["task"]), protocol, stamp, rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not what evaluate writes (task, protocol, protocol_hash, results of numbers)") from error


def flatten_older_rows(models: dict[str, dict[str, dict[str, float]]]) -> Rows:
    """Names the rows of an older query-key result as today.

    {"chance": {"mean": {"top1": 0.1}}, "step 500": {"mean": {"top1": 0.7}}} becomes
    {"mean": {"top1": 0.7}, "chance: mean": {"top1": 0.1}}.
    """
    rows, others = {}, {}
    for model, directions in models.items():
        for direction, measures in directions.items():
            if model in OLDER_BASELINES:
                others[f"{model}: {direction}"] = measures
            else:
                rows[direction] = measures
    return rows | others


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (key, first value, second value) for each key by which two protocols measure differently."""
    keys = sorted((first.keys() | second.keys()) - set(IDENTITY))
    pairs = [(key, first.get(key, ABSENT), second.get(key, ABSENT)) for key in keys]
    return [(key, value, other) for key, value, other in pairs if value != other]


def format_table(title: str, rows: Rows) -> str:
    """Formats rows of fractions as a table of percentages."""
    columns = list(dict.fromkeys(measure for measures in rows.values() for measure in measures))
    width = max(map(len, [title, *rows])) + 2
    lines = [f"{title:<{width}}" + "".join(f"{name:>12}" for name in columns)]
    for row, measures in rows.items():
        cells = (f"{100 * measures[name]:>12.2f}" if name in measures else f"{'-':>12}" for name in columns)
        lines.append(f"{row:<{width}}" + "".join(cells))
    return "\n".join(lines)


def compare_results(results: Sequence[Result], any_protocol: bool) -> str:
    """Formats one table per row, with one line per result.

    Raises:
      UserError: there is only one result, two are of different tasks, or (without `any_protocol`) were measured differently.
    """
    if len(results) < 2:
        raise UserError("--compare: give two files or more, --compare A.json B.json")
    first, notes = results[0], []
    for other in results[1:]:
        if other.task != first.task:
            raise UserError(f"--compare: {first.label} is of {first.task}, {other.label} of {other.task}")
        if differing := differences(first.protocol, other.protocol):
            values = ", ".join(f"{key} ({value!r}, {value_of_other!r})" for key, value, value_of_other in differing)
            notes.append(f"{first.label} and {other.label} were measured differently: {values}")
    if notes and not any_protocol:
        raise UserError(f"{'; '.join(notes)}; --any_protocol shows them nevertheless")
    lines = [f"note: {note}" for note in notes]
    for row in dict.fromkeys(row for result in results for row in result.rows):
        by_label = {result.label: result.rows[row] for result in results if row in result.rows}
        lines.append(format_table(f"{first.task} {row}, × 100", by_label))
    return "\n".join(lines)
