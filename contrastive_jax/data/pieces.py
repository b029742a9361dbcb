"""What the pieces of a vocabulary tell about the text: where words begin and where sentences end.

Prepared records are token ids without any text. A table over the vocabulary finds the sentences of millions of tokens with
a few look-ups, and the prepared data needs no format of its own for it.

Dimensions: n records, m units of all of them, t tokens of all of them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from contrastive_jax.data.prepared import RecordBatch

# The control piece of each reserved name.
RESERVED_PIECES = {
    "pad": "<pad>",
    "bos": "<s>",
    "eos": "</s>",
    "mask": "<mask>",
    "x_open": "<x>",
    "x_close": "</x>",
    "y_open": "<y>",
    "y_close": "</y>",
}
RESERVED_IDS = {name: index for index, name in enumerate(RESERVED_PIECES)}  # of the models trained here

# What ends a sentence, if the next piece begins a word; and what does so in scripts that set no space after it.
STOPS, WIDE_STOPS = (".", "?", "!", "…"), ("。", "！", "？", "｡")
# What may stand between a stop and the space after it.
CLOSERS = "\"'”’»)]}*_"


class Tables(NamedTuple):
    """What each piece says. Ids that are no text say nothing.

    Attributes:
      word_start: bool[vocab], the piece begins with white space, so it begins a word. A blank line does not count: it belongs
        to the sentence that it ends.
      sentence_end: bool[vocab], the piece ends with a stop, such as `.` or `?"`, or has a blank line in it.
      word_end: bool[vocab], any piece that follows begins a word: this one ends with white space or a wide stop.
    """

    word_start: np.ndarray
    sentence_end: np.ndarray
    word_end: np.ndarray


def make_tables(texts: Sequence[str]) -> Tables:
    """Makes the tables of a vocabulary from the text of each piece, white space included; "" where an id is no text."""

    def table(holds: Sequence[bool]) -> np.ndarray:
        return np.array(holds, bool)

    has_blank_line = [text.count("\n") > 1 for text in texts]
    stripped = [text.rstrip().rstrip(CLOSERS) for text in texts]
    return Tables(
        table(
            [text[:1].isspace() and not (blank and text.isspace()) for text, blank in zip(texts, has_blank_line, strict=True)]
        ),
        table([text.endswith(STOPS + WIDE_STOPS) or blank for text, blank in zip(stripped, has_blank_line, strict=True)]),
        table([text[-1:].isspace() or text.endswith(WIDE_STOPS) for text in texts]),
    )


class Units(NamedTuple):
    """The units, such as sentences, into which records that lie one after another in one array divide.

    A record begins and ends one, even where it was cut out of the middle of a document.

    Attributes:
      start: int64[m + 1], the position of each unit's first token among the tokens of all records, and t.
      first: int64[n + 1], the number of each record's first unit, and m.
    """

    start: np.ndarray
    first: np.ndarray


def sentences(tokens: np.ndarray, begin: np.ndarray, tables: Tables) -> Units:
    """Finds the sentences of records.

    A sentence ends where a piece ends one and the next piece begins a word.

    Args:
      tokens: uint16 or int32 [t], the tokens of all records, which follow one another without a gap.
      begin: int64[n], the position of each record's first token, ascending.
      tables: of their vocabulary.
    """
    kind = kinds(tables).take(tokens)  # one look-up per token
    starts = np.zeros(len(tokens), bool)
    starts[1:] = ENDS_BEFORE.take(kind[:-1] << 3 | kind[1:])
    starts[begin] = True
    start = np.flatnonzero(starts)
    return Units(np.append(start, len(tokens)), np.append(np.searchsorted(start, begin), len(start)))


class Texts(NamedTuple):
    """The texts of pairs that lie one after another in one array: of each the query, its positives, its hard negatives.

    Attributes:
      start: int64[m + 1], the position of each text's first token among the tokens of all pairs, and t.
      first: int64[n + 1], the number of each pair's first text, and m.
      positives: int32[n], the positives of each pair.
      score: float32[m], a teacher's score of each text, NaN for one without, such as a query.
    """

    start: np.ndarray
    first: np.ndarray
    positives: np.ndarray
    score: np.ndarray


def texts_of_pairs(batch: "RecordBatch", end: int) -> Texts:
    """Returns the texts of pairs, each of which ends with the id `end`."""
    start = np.append(0, np.flatnonzero(batch.tokens == end) + 1)
    return Texts(start, np.append(np.searchsorted(start, batch.begin), len(start) - 1), *batch.numbers_of_texts())


def kinds(tables: Tables) -> np.ndarray:
    """Returns uint8[vocab], what the tables say of each piece as one number below 8."""
    return tables.word_start + 2 * tables.sentence_end.astype(np.uint8) + 4 * tables.word_end.astype(np.uint8)


def _between() -> tuple[np.ndarray, np.ndarray]:
    """Returns bool[64] each, by 8 · the kind of a piece + the kind of the next: does this one begin a word; a sentence?

    White space after white space belongs to the same break.
    """
    word_start, sentence_end, word_end = (np.arange(8) >> bit & 1 == 1 for bit in range(3))
    begins_word = word_start | (word_end[:, None] & ~word_end)
    return begins_word.ravel(), (sentence_end[:, None] & begins_word).ravel()


WORD_BEGINS, ENDS_BEFORE = _between()
