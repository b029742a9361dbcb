"""A tokenizer of the Hugging Face ecosystem (tokenizer.json) with the attributes of `tokenizer.Tokenizer`."""

import hashlib
from collections.abc import Iterable, Sequence

import tokenizers

# How pieces of a reserved name are called there.
PIECES = {
    "pad": ("[PAD]", "<pad>"),
    "bos": ("[CLS]", "<s>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
}
EDGES = ("x_open", "x_close", "y_open", "y_close")


class JsonTokenizer:
    """A tokenizer.json and its reserved ids.

    The delimiters of both views are what the tokenizer itself puts around a text, [CLS] and [SEP], if it puts two ids; else,
    like all reserved names that it lacks, ids after its vocabulary.

    Attributes:
      file: its name in a dataset or a workdir.
      model: the bytes of tokenizer.json.
      reserved: name -> id, as `tokenizer.Tokenizer.reserved`; `encode` never returns one.
      wrapped: whether it puts the delimiters itself.
      vocab_size: number of ids, reserved ones included.
      sha256: hex digest of `model`.
    """

    file = "tokenizer.json"

    def __init__(self, model: bytes):
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        around = self._tokenizer.encode("").ids
        self._tokenizer.encode_special_tokens = True  # "[CLS]" in a text is text
        found = {}
        for name, pieces in PIECES.items():
            ids = [self._tokenizer.token_to_id(piece) for piece in pieces]
            found[name] = next((index for index in ids if index is not None), None)
        self.wrapped = len(around) == 2
        found |= dict(zip(EDGES, around * 2, strict=True)) if self.wrapped else dict.fromkeys(EDGES)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.reserved: dict[str, int] = {}
        for name, index in found.items():
            self.reserved[name] = self.vocab_size if index is None else index
            self.vocab_size += index is None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without any reserved id."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [row.ids for row in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, as far as the tokenizer kept it; reserved ids are dropped."""
        reserved = set(self.reserved.values())
        return self._tokenizer.decode([int(i) for i in ids if i not in reserved], skip_special_tokens=False)
