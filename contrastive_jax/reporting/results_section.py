"""The section of a report with the results of evaluations: one table per task and protocol."""

import json
from collections.abc import Sequence
from typing import Any

from contrastive_jax.evals import results as results_lib
from contrastive_jax.evals.results import Result
from contrastive_jax.reporting import page


def results_section(results: Sequence[Result]) -> str:
    """Returns the section with all results. Scores measured by different protocols are in different tables."""
    if not results:
        text = "None of these runs has been evaluated yet: `python -m contrastive_jax evaluate --model=WORKDIR`."
        return page.section("results", "Results", page.paragraph(text))
    tasks: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        tasks.setdefault(result.task, {}).setdefault(result.stamp, []).append(result)
    sections = [
        page.section(f"results-{task}", task, *task_parts(list(protocols.values())), level=3)
        for task, protocols in tasks.items()
    ]
    return page.section("results", "Results", *sections)


def task_parts(protocols: Sequence[Sequence[Result]]) -> list[str]:
    """Returns the tables of one task, and a warning above each table whose protocol differs from that of the first.

    Args:
      protocols: the results of the task, those of one protocol together.
    """
    parts, first = [], protocols[0][0]
    for members in protocols:
        protocol = members[0].protocol
        if members[0].stamp != first.stamp:
            changed = [key for key, _, _ in results_lib.differences(protocol, first.protocol)]
            what = "on other data" if changed == ["data"] else "by another protocol"
            difference = describe_difference(protocol, first.protocol)
            parts.append(page.paragraph(f"Measured {what} than {first.stamp}, not comparable with it: {difference}", "flag"))
        parts.append(results_table(members))
    return parts


def results_table(results: Sequence[Result]) -> str:
    """Returns the table of the results of one task and protocol, in percent."""
    measures = list(dict.fromkeys(measure for result in results for scores in result.rows.values() for measure in scores))
    rows: list[list[str | float]] = []
    for result in results:
        for number, (name, scores) in enumerate(result.rows.items()):
            cells = [100 * scores[measure] if measure in scores else "–" for measure in measures]
            rows.append(["" if number else result.label, name, *cells])
    return page.table(["model", "row", *measures], rows, "results", f"Protocol {results[0].stamp}, × 100")


def describe_difference(protocol: dict[str, Any], first: dict[str, Any]) -> str:
    """Returns the keys in which a protocol differs from the first one, with both values."""

    def format_value(value: Any) -> str:
        return page.shorten(value if isinstance(value, str) else json.dumps(value), 40)

    rows = results_lib.differences(protocol, first)
    return "; ".join(f"`{key}` is {format_value(value)} instead of {format_value(other)}" for key, value, other in rows)
