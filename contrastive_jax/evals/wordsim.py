"""Word similarity: WordSim-353 (Finkelstein et al., 2002), SimLex-999 (Hill et al., arXiv 1408.3456) or MEN."""

import csv
import math

import numpy as np
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import sts

PATTERN = "*.[ct]sv"


def parse_score(cell: str) -> float | None:
    """Returns the finite number in a cell, or None where there is none."""
    try:
        return value if math.isfinite(value := float(cell)) else None
    except ValueError:
        return None


def read_word_pairs(path: epath.Path) -> sts.ScoredPairs:
    """Reads two words and their score per line, between tabs or else commas; a header and further columns are left out.

    The score stands in the first column of numbers in the last line (SimLex-999 has the part of speech before it). A first
    line without a number in that column is the header.

    Raises:
      UserError: a line has no score, or is not UTF-8; the message names it.
    """
    text = "\n".join(line for _, line in files.read_lines(path)).removeprefix("\ufeff")
    reader = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ",")
    lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    last = lines[-1][1] if lines else []
    column = next((index for index, cell in enumerate(last) if index > 1 and parse_score(cell) is not None), 2)
    scores, first, second = [], [], []
    for index, (line, cells) in enumerate(lines):
        score = parse_score(cells[column]) if len(cells) > column else None
        if score is not None:
            scores.append(score)
            first.append(cells[0])
            second.append(cells[1])
        elif index > 0 or len(cells) <= column:
            raise UserError(f"{path}:{line}: not word, word, score between tabs or commas")
    return sts.ScoredPairs(np.array(scores), first, second)


TASK = sts.make_correlation_task("wordsim", read_word_pairs, PATTERN)
