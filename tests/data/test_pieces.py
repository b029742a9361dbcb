"""Where words begin and sentences end, from a table over the vocabulary."""

import itertools
import pathlib
import pydoc_data.topics
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from contrastive_jax.data import pieces, tokenizer

# A sentence ends at a stop, which quotes and brackets may follow, before white space; or at a blank line.
BREAK = re.compile(r"(?<=[.?!…])(?:[\"'”’»)\]}*_]*)(?=\s)|\n\n+")
PARAGRAPH = re.compile(r"(?:^|\n\n)((?:[A-Z][^\n]*)(?:\n\S[^\n]*)*\.)(?=\n\n)")


def prose() -> list[str]:
    """Paragraphs of Python's manual, with its line breaks, without its code, lists and dotted names."""
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    return [found for found in PARAGRAPH.findall(text) if not re.search(r"[.?!][\w.]", found)]


def regex_starts(text: str) -> list[int]:
    """The positions in the text, white space not counted, at which a regular expression lets sentences begin."""
    cuts = [0, *(found.end() for found in BREAK.finditer(text))]
    return sorted({len("".join(text[:cut].split())) for cut in cuts if text[cut:].strip()})


def table_starts(text: str, reader: tokenizer.Tokenizer | tokenizer.JsonTokenizer, tables: pieces.Tables) -> list[int]:
    """The positions, as in `regex_starts`, at which the table lets them begin."""
    ids = np.array(reader.encode(text))
    found = pieces.sentences(ids, np.array([0]), tables)
    return [len("".join(reader.decode(ids[:start]).split())) for start in found.start[:-1]]


def trained_json(kind: str, texts: list[str], folder: pathlib.Path) -> tokenizer.JsonTokenizer:
    """A tokenizer.json as the ecosystem makes it: BERT's, GPT-2's or T5's kind."""
    if kind == "WordPiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    elif kind == "ByteLevel":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=2000, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.save(str(folder / "tokenizer.json"))
    loaded = tokenizer.load(folder)
    assert isinstance(loaded, tokenizer.JsonTokenizer)
    return loaded


@pytest.mark.parametrize("kind", ["SentencePiece", "WordPiece", "ByteLevel", "Metaspace"])
def test_row46_the_table_finds_the_sentences_of_plain_prose(kind: str, tmp_path: pathlib.Path) -> None:
    texts = prose()
    reader = tokenizer.train(texts, 2000) if kind == "SentencePiece" else trained_json(kind, texts, tmp_path)
    tables, expected, found = reader.tables(), set(), set()
    for number, text in enumerate(texts):
        expected |= {(number, start) for start in regex_starts(text)}
        found |= {(number, start) for start in table_starts(text, reader, tables)}
        if len(expected) >= 200:
            break
    assert len(expected) >= 200
    assert len(expected & found) / len(expected | found) >= 0.95
    reserved = list(reader.reserved.values())
    assert all(table.shape == (reader.vocab_size,) and not table[reserved].any() for table in tables)


VOCABULARY = ["", " The", " end", "ing", ".", '."', "\n", "\n\n", "    ", "14", "。", "了", "?\n"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (" The| end|.| The| end", [" The end.", " The end"]),
        (" end|.|14| end|.|\n|The| end", [" end.14 end.", "\nThe end"]),  # 3.14; a line break before a sentence
        (' end|."| The', [' end."', " The"]),
        (" end|\n| The| end", [" end\n The end"]),  # prose with line breaks
        (" The|\n\n|ing", [" The\n\n", "ing"]),  # a heading
        (" end|.|\n\n|\n\n|ing", [" end.\n\n\n\n", "ing"]),  # no sentence of white space alone
        (" The|\n\n|    | end", [" The\n\n", "     end"]),
        ("了|。|了", ["了。", "了"]),
        (" end|?\n|14", [" end?\n", "14"]),
        (" end|ing|.", [" ending."]),
    ],
)
def test_row46_a_sentence_ends_at_a_stop_before_a_word_or_at_a_blank_line(text: str, sentences: list[str]) -> None:
    vocabulary = [*VOCABULARY, "The"]
    ids = np.array([vocabulary.index(piece) for piece in text.split("|")], np.uint16)
    found = pieces.sentences(ids, np.array([0]), pieces.make_tables(vocabulary))
    cut = ["".join(vocabulary[i] for i in ids[a:b]) for a, b in itertools.pairwise(found.start.tolist())]
    assert cut == sentences and found.first.tolist() == [0, len(sentences)]


def test_row46_every_record_begins_a_sentence_and_no_sentence_crosses_two() -> None:
    rng = np.random.default_rng(0)
    tables = pieces.Tables(*(rng.random((3, 50)) < 0.3))
    length = rng.integers(1, 40, 300)
    tokens, begin = rng.integers(0, 50, length.sum()).astype(np.uint16), np.cumsum(length) - length
    found = pieces.sentences(tokens, begin, tables)
    expected, first = [], [0]
    for at, size in zip(begin.tolist(), length.tolist(), strict=True):
        expected.append(at)
        for i in range(at + 1, at + size):
            before, after = tokens[i - 1], tokens[i]
            begins_word = tables.word_start[after] or (tables.word_end[before] and not tables.word_end[after])
            expected += [i] * bool(tables.sentence_end[before] and begins_word)
        first.append(len(expected))
    assert found.start.tolist() == [*expected, len(tokens)] and found.first.tolist() == first
