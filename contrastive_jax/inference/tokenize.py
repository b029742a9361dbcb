"""Texts to rows of token ids, as an encoder was trained to take them, with a count of the texts that were truncated."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tokenizers

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer as tokenizer_lib
from contrastive_jax.huggingface.fast_tokenizer import DELIMITERS

AnyTokenizer = tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer

VIEWS = ("query", "document")
# The view of texts that are on neither side, as those of similarity and classification.
NO_SIDE = "no side"


def valid(text: str) -> str:
    """Returns a text with "?" for each lone surrogate, half of a character outside the BMP, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


class TokenizedTexts(NamedTuple):
    """The rows of some texts.

    Attributes:
      rows: the token ids of each text, delimiters or special tokens included.
      truncated: per text, whether it was longer than the limit and lost its end.
    """

    rows: list[list[int]]
    truncated: list[bool]


class TruncationCount:
    """Counts the texts that a model read, and those of them that were truncated.

    An evaluation calls `reset`, encodes its texts, and stores `share` beside its scores.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts counting from zero."""
        self.texts = self.truncated = 0

    def add(self, truncated: Sequence[bool]) -> None:
        """Counts texts, by whether each was truncated."""
        self.texts += len(truncated)
        self.truncated += sum(truncated)

    @property
    def share(self) -> float:
        """The share of the texts that were truncated; 0 where there were none."""
        return self.truncated / self.texts if self.texts else 0.0


@dataclasses.dataclass(frozen=True)
class RunTokenize:
    """Tokenizes as a training run does: texts are stripped, truncated, and put between the delimiters of their view.

    Attributes:
      load: loads the tokenizer; called on first use, since scores of token spans need none.
      delimiters: `config.data.delimiters`.
      max_tokens: ids per row at most, delimiters included.
      own_prompts: view, or another name that ends in "_query" or "_document" → what the sources of its pairs put before texts.

    Raises:
      UserError: `max_tokens` leaves no room between the delimiters.
    """

    load: Callable[[], AnyTokenizer]
    delimiters: bool
    max_tokens: int
    own_prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_tokens <= 2 * self.delimiters:
            raise UserError(f"--max_tokens={self.max_tokens}: two tokens are delimiters and leave no room; raise it")

    @functools.cached_property
    def tokenizer(self) -> AnyTokenizer:
        """The run's tokenizer."""
        return self.load()

    @property
    def prompts(self) -> str | Mapping[str, str]:
        """How the views are told apart, for the protocol."""
        return self.own_prompts or ("[x], {y}" if self.delimiters else "none")

    @property
    def default_prompt(self) -> str | None:
        """The name of the prompt of texts on no side, for the protocol: none, since they are queries."""
        return None

    @property
    def views(self) -> tuple[str, ...]:
        """The sides, NO_SIDE, and the names of all other prompts."""
        return (*VIEWS, NO_SIDE, *(name for name in self.own_prompts if name not in VIEWS))

    def prompt_tokens(self, view: str) -> int:
        """Returns how many tokens of each row are not pooled: none."""
        return 0

    def __call__(self, texts: Sequence[str], view: str) -> TokenizedTexts:
        """Tokenizes n texts of a view: "query", "document", the name of another prompt, or NO_SIDE, which is "query"."""
        view = "query" if view == NO_SIDE else view
        reserved, prompt = self.tokenizer.reserved, self.own_prompts.get(view, "")
        names = DELIMITERS[view.rpartition("_")[2]] if self.delimiters else ("", "")
        opening, closing = ([reserved[name]] if name in reserved else [] for name in names)
        room = self.max_tokens - len(opening) - len(closing)
        ids = self.tokenizer.encode_batch([valid(prompt + text).strip() for text in texts])
        return TokenizedTexts(
            rows=[opening + text_ids[:room] + closing for text_ids in ids],
            truncated=[len(text_ids) > room for text_ids in ids],
        )


@dataclasses.dataclass(frozen=True)
class FolderTokenize:
    """Tokenizes as sentence-transformers does from a folder, prompts and special tokens included.

    Attributes:
      file: the tokenizer.json.
      max_tokens: ids per row at most, special tokens included.
      prompts: view, or another name → the text put before the texts that are encoded under it; or "none".
      default_prompt: the name of the prompt of texts on no side; None: they have none.
      include_prompt: whether the tokens of the prompt are pooled too.
      lower_case: whether texts are lower-cased first.
      special_tokens: whether the tokenizer adds its special tokens; a StaticEmbedding goes without.
      split_special_tokens: whether a special token's name in a text, "[PAD]", is text like any other.
    """

    file: pathlib.Path
    max_tokens: int
    prompts: str | Mapping[str, str] = "none"
    default_prompt: str | None = None
    include_prompt: bool = True
    lower_case: bool = False
    special_tokens: bool = True
    split_special_tokens: bool = False

    @functools.cached_property
    def tokenizer(self) -> AnyTokenizer:
        """The folder's tokenizer, for ids without special tokens."""
        return tokenizer_lib.load(self.file)

    @functools.cached_property
    def _truncating(self) -> tokenizers.Tokenizer:
        truncating = tokenizers.Tokenizer.from_file(str(self.file))
        if self.special_tokens and self.max_tokens <= truncating.num_special_tokens_to_add(is_pair=False):
            raise UserError(f"--max_tokens={self.max_tokens}: special tokens leave no room for the text; raise it")
        truncating.enable_truncation(self.max_tokens)
        truncating.no_padding()
        truncating.encode_special_tokens = self.split_special_tokens
        if self.lower_case:
            own = [truncating.normalizer] if truncating.normalizer else []
            truncating.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *own])
        return truncating

    @property
    def views(self) -> tuple[str, ...]:
        """The sides, NO_SIDE, and the names of all other prompts."""
        return (*VIEWS, *(name for name in self._prompts if name not in VIEWS))

    @property
    def _prompts(self) -> Mapping[str, str]:
        prompts = {} if isinstance(self.prompts, str) else self.prompts
        return {**prompts, NO_SIDE: prompts.get(self.default_prompt or "", "")}

    def prompt_tokens(self, view: str) -> int:
        """Returns how many tokens of each row of a view are not pooled: those before the text, where the prompt is left out."""
        prompt = self._prompts.get(view)
        if self.include_prompt or not prompt:
            return 0
        encoding = self._truncating.encode(prompt, add_special_tokens=self.special_tokens)
        return len(encoding.ids) - encoding.special_tokens_mask[-1]  # what the template puts last comes after the text

    def __call__(self, texts: Sequence[str], view: str) -> TokenizedTexts:
        """Tokenizes n texts of a view: "query", "document", NO_SIDE, or the name of another prompt."""
        prompt = self._prompts.get(view, "")
        shown = [valid(prompt + text) for text in texts]
        encodings = self._truncating.encode_batch(shown, add_special_tokens=self.special_tokens)
        rows = [encoding.ids for encoding in encodings]
        # `overflowing` copies what was cut off: it is asked for only where a row is full.
        full = (len(row) >= self.max_tokens for row in rows)
        truncated = [is_full and bool(encoding.overflowing) for is_full, encoding in zip(full, encodings, strict=True)]
        return TokenizedTexts(rows, truncated)


Tokenize = RunTokenize | FolderTokenize
