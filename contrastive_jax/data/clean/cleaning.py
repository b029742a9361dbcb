"""Filters that look at one document at a time: its length, its symbols, how it repeats itself, evaluation texts in it."""

from typing import NamedTuple

from contrastive_jax.config import UserError
from contrastive_jax.data.clean import decontamination, ngrams
from contrastive_jax.data.clean.decontamination import Findings, Ngrams
from contrastive_jax.data.clean.ngrams import Words
from contrastive_jax.data.clean.repetition import repetition

TOO_SHORT, TOO_LONG, SYMBOLS, LONG_WORDS = "too short", "too long", "symbols", "long words"
REPETITION, EVALUATION_TEXT = "repetition", "evaluation text"


class Limits(NamedTuple):
    """What a document may be; 0 sets no limit.

    Attributes:
      min_characters, max_characters: of the text.
      max_symbols: the share of its characters that are neither letters, digits nor white space.
      max_word_characters: the mean length of its words.
      max_repetition: how much it may repeat itself; 1 is what Gopher allows, 2 is twice as much. See `data.clean.repetition`.
    """

    min_characters: int = 0
    max_characters: int = 0
    max_symbols: float = 0.0
    max_word_characters: float = 0.0
    max_repetition: float = 0.0


def check_limits(limits: Limits) -> None:
    """Checks the limits.

    Raises:
      UserError: a limit is negative, is no share, or leaves nothing.
    """
    for name, value in limits._asdict().items():
        if value < 0:
            raise UserError(f"--{name}={value}: must be at least 0; 0 sets no limit")
    if limits.max_symbols > 1:
        raise UserError(f"--max_symbols={limits.max_symbols}: is a share, so it must lie between 0 and 1")
    if 0 < limits.max_characters < limits.min_characters:
        raise UserError(f"--max_characters={limits.max_characters}: must be at least --min_characters={limits.min_characters}")


class Cleaner:
    """Tells why documents are dropped.

        cleaner = Cleaner(Limits(min_characters=200))
        cleaner("a stub")       # "too short"

    Attributes:
      findings: what the documents so far had of the evaluation texts; None if these are not looked for.
    """

    def __init__(self, limits: Limits, evaluation: Ngrams | None = None):
        """Makes a cleaner with these limits that looks for the n-grams of these evaluation texts."""
        self._limits, self._evaluation = limits, evaluation
        self.findings = None if evaluation is None else Findings(evaluation)
        self._text, self._words = "", ngrams.words_of("")

    def words(self, text: str) -> Words:
        """Returns the words of a text; those of the last text are kept, because several filters ask for them."""
        if text is not self._text:
            self._text, self._words = text, ngrams.words_of(text)
        return self._words

    def __call__(self, text: str) -> str:
        """Returns the reason for which a document is dropped; "" to keep it."""
        limits = self._limits
        checks = (  # the cheap ones first; only where one is asked for, and the earlier ones pass, are words made
            (TOO_SHORT, lambda: len(text) < limits.min_characters),
            (TOO_LONG, lambda: 0 < limits.max_characters < len(text)),
            (SYMBOLS, lambda: 0 < limits.max_symbols < ngrams.share_of_symbols(text)),
            (LONG_WORDS, lambda: 0 < limits.max_word_characters < mean_size(self.words(text))),
            (REPETITION, lambda: 0 < limits.max_repetition < repetition(text, self.words(text))),
            (EVALUATION_TEXT, lambda: self._has_evaluation_text(text)),
        )
        return next((reason for reason, is_so in checks if is_so()), "")

    def _has_evaluation_text(self, text: str) -> bool:
        """Returns whether a document has evaluation texts in it, and keeps which."""
        if self._evaluation is None or self.findings is None:
            return False
        texts = decontamination.texts_in(self._evaluation, self.words(text).hashes)
        if len(texts):
            self.findings.add(texts)
        return bool(len(texts))


def mean_size(words: Words) -> float:
    """Returns the mean number of characters per word."""
    return float(words.sizes.sum()) / max(len(words.sizes), 1)
