"""SentencePiece: train, load, encode and decode, with ids that no text can produce.

Models trained here are lossless: `decode(encode(text)) == text` for every string that UTF-8 can hold. Nothing is
normalised, the pieces may be spaces only (code is indented), line breaks and tabs are pieces, and what the alphabet
lacks falls back to bytes.

Ids of a model trained here: pad 0, bos 1, eos 2, mask 3, x_open 4, x_close 5, y_open 6, y_close 7, unk 8, then the
rest. All but unk are SentencePiece *control* pieces: they own an id, and the text "<mask>" is still encoded letter by
letter. The four delimiters mark the two views of CPT-text, `[`x`]` and `{`y`}`, and are reserved for the same reason:
a bracket in the text must not look like the end of a view.

A model from elsewhere (T5, Llama, ...) keeps its own ids and its own normalisation, so it is as lossless as it was.
The reserved names it has no control piece for get the ids after its vocabulary; `vocab_size` counts them. The mapping
is a function of the model alone, so `tokenizer.model` is the only file there is. (Or `tokenizer.json`: `JsonTokenizer`.)
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence

import sentencepiece
from etils import epath

from contrastive_jax.data.json_tokenizer import JsonTokenizer
from contrastive_jax.data.sources import DataError

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
_SPACE = "▁"  # SentencePiece writes a space as U+2581, so that a real U+2581 needs a way of its own.
LINE_PIECES = ["\n", "\n\n", "\t", "\t\t"]


class Tokenizer:
    """A SentencePiece model and its reserved ids.

    Attributes:
      model: the serialised SentencePiece model.
      processor: it, loaded.
      reserved: name -> id for pad, bos, eos, mask, x_open, x_close, y_open, y_close; `encode` never returns one.
      vocab_size: number of ids, reserved ones included.
      sha256: hex digest of `model`.
      file: its name in a dataset or a workdir.
    """

    file = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.reserved = _reserved_ids(self.processor)
        self.vocab_size = max(self.processor.get_piece_size(), *(i + 1 for i in self.reserved.values()))
        self._reserved_set = frozenset(self.reserved.values())
        byte_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = byte_ids if all(map(self.processor.is_byte, byte_ids)) else None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without any reserved id."""
        if self._space_ids is None or _SPACE not in text:
            return self.processor.encode(text)
        first, *others = self.processor.encode(text.split(_SPACE))
        for part in others:
            first += self._space_ids + part
        return first

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; reserved ids are dropped, a character cut in its bytes becomes U+FFFD."""
        return self.processor.decode([int(i) for i in ids if i not in self._reserved_set])


def find(folder: epath.Path) -> epath.Path | None:
    """The tokenizer's file in a prepared dataset, a workdir or a Hugging Face folder, if there is one."""
    return next((folder / kind.file for kind in (Tokenizer, JsonTokenizer) if (folder / kind.file).exists()), None)


def load(path: str | os.PathLike[str]) -> Tokenizer | JsonTokenizer:
    """Loads the tokenizer of a folder (see `find`; "hf:FOLDER" is one too), a SentencePiece `.model` or a `tokenizer.json`.

    Raises:
      DataError: nothing is there, or it is neither.
    """
    file = epath.Path(os.fspath(path).removeprefix("hf:")).expanduser()
    if file.is_dir():
        file = find(file) or file / Tokenizer.file
    if not file.exists():
        raise DataError(f"{file}: no such file; give a SentencePiece .model, a tokenizer.json, or a folder that has one")
    kind = JsonTokenizer if file.suffix == ".json" else Tokenizer
    try:
        return kind(file.read_bytes())
    except Exception as error:  # the `tokenizers` library raises no narrower class
        raise DataError(f"{file}: not a {'tokenizer.json' if kind is JsonTokenizer else 'SentencePiece model'}") from error


def train(sample: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a lossless unigram model.

    Args:
      sample: pieces of text, each at most 4,096 characters.
      vocab_size: number of ids, of which 8 are reserved, 1 is unk, 4 are line breaks and tabs, and 256 are bytes.

    Raises:
      DataError: the sample is too small for so many pieces, or the size too small for the pieces every model has.
    """
    model = io.BytesIO()
    pad, bos, eos, *views = RESERVED_PIECES.values()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=0,
            pad_piece=pad,
            bos_id=1,
            bos_piece=bos,
            eos_id=2,
            eos_piece=eos,
            control_symbols=views,
            unk_id=len(RESERVED_PIECES),
            user_defined_symbols=LINE_PIECES,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * 4096,
            shuffle_input_sentence=False,
            # One pass of EM between prunings, halving each time: a third of the time of the defaults (2, 0.75) and no
            # more tokens (3.67 bytes a token either way on 10 MB of manuals, prose and code).
            num_sub_iterations=1,
            shrinking_factor=0.5,
            # The sums of EM depend on the number of threads, so it is a constant: one model on every machine.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip().replace("\n", " ")
        raise DataError(f"--vocab_size={vocab_size} does not fit the text: {reason or 'no reason given'}") from error
    return Tokenizer(model.getvalue())


def _reserved_ids(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Finds the control piece of each reserved name and appends an id for each name that has none."""
    special = {"pad": processor.pad_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    reserved = {}
    appended = processor.get_piece_size()
    for name, piece in RESERVED_PIECES.items():
        index = special.get(name, processor.piece_to_id(piece))
        if index < 0 or not processor.is_control(index):
            index, appended = appended, appended + 1
        reserved[name] = index
    return reserved
