"""Says what a long run with --on_bad=skip passed over: per file, as a share, the worst files first.

train-03.jsonl.zst: 1,204 of 7,012,001 lines (0.02 %) were passed over
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from contrastive_jax.data.raw.sources import DAMAGED

SHOWN = 10  # files that the report names; the manifest has all


def losses_of(inputs: Iterable[Mapping[str, Any]], outcomes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the manifest's entry on each file of which anything was passed over, the largest share first.

    Args:
      inputs: the manifest's entries on all files, with "name" and "size".
      outcomes: of the stage "hash": "lines" that were read, (file, number); "rejects" among them, (reason, file, split, domain,
        number); "lost_bytes" of damaged files that could not be read at all, (file, number).

    Returns:
      {"file", "lines", "passed_over", "share", and of a damaged file "lost_bytes", "size"}; `share` is that of the lines, or of
      the bytes if it is larger. Damaged files come first: how much a truncated one has lost is not known.
    """
    lines, bad, lost = (collections.Counter[str]() for _ in range(3))
    outcomes = list(outcomes)
    damaged = {row[1] for outcome in outcomes for row in outcome["rejects"] if row[0] == DAMAGED}
    for outcome in outcomes:
        for counter, rows in ((lines, outcome["lines"]), (bad, outcome["rejects"]), (lost, outcome["lost_bytes"])):
            for row in rows:
                counter[row[1] if counter is bad else row[0]] += row[-1]
    entries = []
    for name, size in ((entry["name"], entry["size"]) for entry in inputs):
        if bad[name] or lost[name]:
            share = max(bad[name] / lines[name], lost[name] / max(size, 1))
            damage = {"lost_bytes": lost[name], "size": size} if name in damaged else {}
            entry = {"file": name, "lines": lines[name], "passed_over": bad[name], "share": round(share, 6)}
            entries.append(entry | damage)
    return sorted(entries, key=lambda entry: ("size" not in entry, -entry["share"], entry["file"]))


def describe(entries: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each of the worst files, and one for the rest."""
    report = []
    for entry in entries[:SHOWN]:
        bad, total = entry["passed_over"], entry["lines"]
        text = f"{entry['file']}: {bad:,} of {total:,} lines ({percent(bad / max(total, 1))}) were passed over"
        if "size" in entry:
            lost = percent(entry["lost_bytes"] / max(entry["size"], 1))
            text += f"; {lost} of its bytes lie behind a damage" if entry["lost_bytes"] else "; its end is missing"
        report.append(text)
    if rest := entries[SHOWN:]:
        bad, total = (sum(entry[name] for entry in rest) for name in ("passed_over", "lines"))
        report.append(f"{len(rest):,} more files: {bad:,} of {total:,} lines ({percent(bad / max(total, 1))}) were passed over")
    return report


def percent(share: float) -> str:
    """Returns a share in percent, with two digits that say something."""
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.0f} %"
