"""Word similarity for `sts`: WordSim-353 (Finkelstein et al., 2002), SimLex-999 (Hill et al., arXiv 1408.3456) or MEN."""

import csv
import math

import numpy as np
from etils import epath

from contrastive_jax.evals import sts

PATTERN = "*.[ct]sv"


def number(cell: str) -> float | None:
    """A finite number, or None."""
    try:
        return value if math.isfinite(value := float(cell)) else None
    except ValueError:
        return None


def read(path: epath.Path) -> sts.Sentences:
    """Reads two words and their score a line, between tabs or else commas; a header and further columns are left out.

    The score's column is the first of numbers in the last line (SimLex-999 has the part of speech before it); a first line
    that has no number there is the header.

    Raises:
      ValueError: a line that is not so; the message names it.
    """
    text = path.read_text().removeprefix("\ufeff")
    cells = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ",")
    lines = [(cells.line_num, [cell.strip() for cell in line]) for line in cells if line]
    last = lines[-1][1] if lines else []
    column = next((place for place, cell in enumerate(last) if place > 1 and number(cell) is not None), 2)
    scores, first, second = [], [], []
    for place, (line, row) in enumerate(lines):
        score = number(row[column]) if len(row) > column else None
        if score is not None:
            scores.append(score)
            first.append(row[0])
            second.append(row[1])
        elif place > 0 or len(row) <= column:
            raise ValueError(f"{path}:{line}: not word, word, score between tabs or commas")
    return sts.Sentences(np.array(scores), first, second)
