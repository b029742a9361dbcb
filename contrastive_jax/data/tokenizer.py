"""Tokenizers: SentencePiece models are trained, loaded and used, with reserved ids that no text can produce.

    tokenizer = load("data/python")                          a prepared dataset, a workdir, or a file
    tokenizer.encode("two words")                            [2918, 269, 2992]
    tokenizer.reserved["mask"]                               3

A model trained here is lossless: `decode(encode(text)) == text` for every string that UTF-8 can hold. It normalises nothing,
pieces may consist of spaces alone (code is indented), line breaks and tabs are pieces, and characters that are not in the
vocabulary are encoded as their bytes.

Its ids: pad 0, bos 1, eos 2, mask 3, x_open 4, x_close 5, y_open 6, y_close 7, unk 8, then all other pieces. All of these but
unk are SentencePiece *control* pieces: they own an id, but the text "<mask>" is still encoded letter by letter. The four
delimiters mark the two views of CPT-text, `[`x`]` and `{`y`}`. They are reserved so that a bracket in a text never looks like
the end of a view.

A model from elsewhere (T5, Llama, ...) keeps its ids and its normalisation, so it is exactly as lossless as it was. Reserved
names without a control piece in it get ids after its vocabulary; `vocab_size` counts them. These ids follow from the model
alone, so tokenizer.model is the only file needed. A tokenizer.json of the Hugging Face ecosystem is a `JsonTokenizer`.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence

import sentencepiece
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data import pieces
from contrastive_jax.data.pieces import RESERVED_PIECES
from contrastive_jax.data.tokenizer_json import JsonTokenizer

# SentencePiece writes a space as U+2581, so a U+2581 in the text must be encoded in another way: as its bytes.
_SPACE = "▁"
# Line breaks and tabs, pieces of every model trained here.
LINE_PIECES = ["\n", "\n\n", "\t", "\t\t"]


class Tokenizer:
    """A SentencePiece model and its reserved ids.

    Attributes:
      file: the file name of such a tokenizer in a dataset or a workdir.
      model: the serialised SentencePiece model, the content of that file.
      processor: the same model, loaded.
      reserved: {name: id} for pad, bos, eos, mask, x_open, x_close, y_open, y_close; `encode` never returns one of these ids.
      vocab_size: the number of ids, reserved ids included.
      sha256: the SHA-256 of `model`, in hexadecimal.
    """

    file = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.reserved = _reserved_ids(self.processor)
        self.vocab_size = max(self.processor.get_piece_size(), *(index + 1 for index in self.reserved.values()))
        self._reserved_set = frozenset(self.reserved.values())
        byte_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = byte_ids if all(map(self.processor.is_byte, byte_ids)) else None

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without delimiters or any other reserved id."""
        if self._space_ids is None or _SPACE not in text:
            return self.processor.encode(text)
        first, *others = self.processor.encode(text.split(_SPACE))
        for part in others:
            first += self._space_ids + part
        return first

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, as `encode` does."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids. Reserved ids are dropped; bytes that are no whole character become U+FFFD."""
        return self.processor.decode([int(i) for i in ids if i not in self._reserved_set])

    def tables(self) -> pieces.Tables:
        """Returns where words begin and sentences end, by the ids."""
        return pieces.make_tables([self._text(index) for index in range(self.vocab_size)])

    def _text(self, index: int) -> str:
        """Returns the text of a piece, with its spaces; "" for an id that is none, or part of a character."""
        processor = self.processor
        if index >= processor.get_piece_size() or processor.is_control(index) or processor.is_unknown(index):
            return ""
        piece = processor.id_to_piece(index)
        if processor.is_byte(index):
            return bytes([int(piece[1:-1], 16)]).decode(errors="ignore")
        return piece.replace(_SPACE, " ")


def find(folder: epath.Path) -> epath.Path | None:
    """Returns the path of the tokenizer in a prepared dataset, a workdir or a Hugging Face folder; None if it has none."""
    return next((folder / kind.file for kind in (Tokenizer, JsonTokenizer) if (folder / kind.file).exists()), None)


def load(path: str | os.PathLike[str]) -> Tokenizer | JsonTokenizer:
    """Loads a tokenizer.

    Args:
      path: a SentencePiece .model, a tokenizer.json, or a folder that has one (see `find`); "hf:FOLDER" is the same as FOLDER.

    Raises:
      UserError: there is no such file, or it is not a tokenizer.
    """
    file = epath.Path(os.fspath(path).removeprefix("hf:")).expanduser()
    if file.is_dir():
        file = find(file) or file / Tokenizer.file
    if not file.exists():
        raise UserError(f"{file}: no such file; give a SentencePiece .model, a tokenizer.json, or a folder that has one")
    kind, description = (JsonTokenizer, "tokenizer.json") if file.suffix == ".json" else (Tokenizer, "SentencePiece model")
    try:
        return kind(file.read_bytes())
    except UserError as error:
        raise UserError(f"{file.parent}/{error}") from error
    except Exception as error:  # the `tokenizers` library raises no narrower class
        raise UserError(f"{file}: not a {description}; give a SentencePiece .model or a tokenizer.json") from error


def train(sample: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a lossless unigram model (Kudo, https://arxiv.org/abs/1804.10959).

    Args:
      sample: excerpts of text, each of at most 4,096 characters.
      vocab_size: the number of ids. Of these, 8 are reserved, 1 is unk, 4 are line breaks and tabs, and 256 are bytes.

    Raises:
      UserError: the sample is too small for so many pieces, or vocab_size is too small for the pieces that every model has.
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
            # One pass of EM between prunings, and each pruning halves the vocabulary: a third of the time of the defaults (2,
            # 0.75) for as many tokens (3.67 bytes per token either way, on 10 MB of manuals, prose and code).
            num_sub_iterations=1,
            shrinking_factor=0.5,
            # The sums of EM depend on the number of threads. A constant gives the same model on every machine.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip().replace("\n", " ")
        raise UserError(f"--vocab_size={vocab_size} does not fit the text: {reason or 'no reason given'}") from error
    return Tokenizer(model.getvalue())


def _reserved_ids(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Returns the id of the control piece of each reserved name, or an id after the vocabulary where the model has none."""
    special = {"pad": processor.pad_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    reserved = {}
    appended = processor.get_piece_size()
    for name, piece in RESERVED_PIECES.items():
        index = special.get(name, processor.piece_to_id(piece))
        if index < 0 or not processor.is_control(index):
            index, appended = appended, appended + 1
        reserved[name] = index
    return reserved
