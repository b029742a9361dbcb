"""The tokenizer.json of the Hugging Face ecosystem, with the attributes and methods of `tokenizer.Tokenizer`."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, normalizers

from contrastive_jax.config import UserError
from contrastive_jax.data import pieces

# The names that tokenizers of that ecosystem give to the pieces of each reserved name; the first that exists is taken.
PIECES = {
    "pad": ("[PAD]", "<pad>"),
    "bos": ("[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("[SEP]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
}
# The reserved names of the opening and the closing delimiter of each view.
DELIMITERS = (("x_open", "x_close"), ("y_open", "y_close"))
# The letter that stands for each byte in the pieces of a byte-level vocabulary (GPT-2): itself if it is printable, and else one
# of the letters from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + number): byte for number, byte in enumerate(_OTHERS)}


def read_template(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that a tokenizer puts before a text, and those that it puts after it: one at most of each.

    Raises:
      UserError: there are more.
    """
    if not tokenizer.encode("").ids:
        return [], []
    encodings = map(tokenizer.encode, itertools.chain("a", tokenizer.get_vocab()))
    encoding = next(encoding for encoding in encodings if 0 in encoding.special_tokens_mask)  # of a text that has tokens
    first = encoding.special_tokens_mask.index(0)
    last = len(encoding) - encoding.special_tokens_mask[::-1].index(0)
    opening, closing = encoding.ids[:first], encoding.ids[last:]
    if max(len(opening), len(closing)) > 1:
        raise UserError(
            f"tokenizer.json: its template puts {len(opening)} tokens before a text and {len(closing)} after it, and one of "
            "each at most is possible here; choose another tokenizer"
        )
    return opening, closing


def find_blanking(tokenizer: tokenizers.Tokenizer, reserved: Iterable[int]) -> normalizers.Normalizer | None:
    """Returns what puts a space in the place of each reserved piece that a text reaches; None: a text reaches none.

    Special tokens are encoded as text. But to a Unigram model (T5, XLM-R) "</s>" is a piece like any other, and the best one
    for the text "</s>". (Tokens that were added as others than special ones are still found, as <mask> of Gemma.)

    Args:
      tokenizer: encodes special tokens as text.
      reserved: the reserved ids.
    """
    names = [name for index in dict.fromkeys(reserved) if (name := tokenizer.id_to_token(index)) is not None]
    # With white space before it, and without.
    ids = {name: tokenizer.encode(f"{name} a{name}a", add_special_tokens=False).ids for name in names}
    reached = [re.escape(name) for name in names if tokenizer.token_to_id(name) in ids[name]]
    return normalizers.Replace(Regex("|".join(reached)), " ") if reached else None


class JsonTokenizer:
    """A tokenizer.json and its reserved ids.

    If the tokenizer's template puts an id before a text, after it, or both, such as [CLS] and [SEP], these are the delimiters
    of both views; where it puts none, they have none. Without a template the delimiters, like all reserved names that the
    tokenizer lacks, get ids after its vocabulary.

    Attributes:
      file: the file name of such a tokenizer in a dataset or a workdir.
      model: the bytes of tokenizer.json.
      reserved: {name: id}, as in `tokenizer.Tokenizer`, but without the delimiters that a template lacks; `encode` never
        returns one of these ids, unless tokenizer.json adds it as a token that is not special.
      blanking: puts a space in the place of each reserved piece that a text would reach; None: a text reaches none.
      has_template: whether the tokenizer puts the delimiters around a text itself.
      vocab_size: the number of ids, reserved ids included.
      sha256: the SHA-256 of `model`, in hexadecimal.
    """

    file = "tokenizer.json"

    def __init__(self, model: bytes):
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        opening, closing = read_template(self._tokenizer)
        self.has_template = bool(opening or closing)
        self._tokenizer.encode_special_tokens = True  # the text "[CLS]" is encoded as text
        known_ids: dict[str, int | None] = {}
        for name, choices in PIECES.items():
            ids = [self._tokenizer.token_to_id(piece) for piece in choices]
            known_ids[name] = next((index for index in ids if index is not None), None)
        for names in DELIMITERS:
            for name, of_template in zip(names, (opening, closing), strict=True):
                if of_template or not self.has_template:
                    known_ids[name] = next(iter(of_template), None)
        if known_ids["pad"] is None:  # no row attends to padding, so that any id will do that a text never has
            known_ids["pad"] = next(iter(closing or opening), None)
        lacking = [name for name, known_id in known_ids.items() if known_id is None]
        size = max(self._tokenizer.get_vocab().values()) + 1  # there may be fewer tokens than that
        self.vocab_size = size + len(lacking)
        self.reserved: dict[str, int] = {
            name: size + lacking.index(name) if known_id is None else known_id for name, known_id in known_ids.items()
        }
        self.blanking = find_blanking(self._tokenizer, self.reserved.values())
        if self.blanking:
            before = self._tokenizer.normalizer
            self._tokenizer.normalizer = normalizers.Sequence([*([before] if before else []), self.blanking])

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without delimiters or any other reserved id."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, as `encode` does."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids, as far as the tokenizer preserves it. Reserved ids are dropped."""
        reserved = set(self.reserved.values())
        return self._tokenizer.decode([int(i) for i in ids if i not in reserved], skip_special_tokens=False)

    def tables(self) -> pieces.Tables:
        """Returns where words begin and sentences end, by the ids.

        WordPiece drops spaces: every piece that continues no word begins one, also the 14 of 3.14.
        """
        texts = [""] * self.vocab_size
        for piece, index in self._tokenizer.get_vocab().items():
            texts[index] = self._text(piece)
        for index in self.reserved.values():
            texts[index] = ""
        return pieces.make_tables(texts)

    def _text(self, piece: str) -> str:
        """Returns the text of a piece, with its spaces."""
        model = self._tokenizer.model
        if isinstance(model, tokenizers.models.WordPiece):
            return piece.removeprefix(prefix) if piece.startswith(prefix := model.continuing_subword_prefix) else f" {piece}"
        if isinstance(model, tokenizers.models.WordLevel):
            return f" {piece}"
        if isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel):
            return bytes(BYTES.get(letter, 0) for letter in piece).decode(errors="ignore")
        return piece.replace("▁", " ").replace("</w>", " ")
