"""The tokenizer: every string survives, and no text reaches a reserved id."""

import io
import pathlib
import random

import pytest
import sentencepiece
import tokenizers

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer

NASTY = [
    "",
    " ",
    "\n",
    "  two  spaces  ",
    "\t\tif x:\n\t\t\treturn\r\n\r\n",
    "\n\n\n\n\n",
    " \n \n",
    "▁",
    "a▁b ▁ ▁▁c",
    "nul \0 and \x01\x07\x0b\x0c\x1b\x1f\x7f\x85",
    "<mask>[x]{y}<pad><s></s><unk><x></x><y></y><0x41>",
    "\N{REPLACEMENT CHARACTER}\N{QUADRANT UPPER RIGHT AND LOWER LEFT AND LOWER RIGHT}\N{DOUBLE QUESTION MARK}",
    "😀👩‍👩‍👧🇩🇪 é ﬁ ① \ufeff\u2028\u2029\xa0",
    "日本語 ру́сский العربية",
    "\U0010ffff\ue000",
    "x" * 5000 + " " * 300,
]


def sample() -> list[str]:
    words = pathlib.Path(tokenizer.__file__).read_text().split(" ")
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=200)) for _ in range(60)]


@pytest.fixture(scope="module")
def trained() -> tokenizer.Tokenizer:
    return tokenizer.train(sample(), 500)


def test_reserved_ids_come_first_and_in_order(trained: tokenizer.Tokenizer) -> None:
    names = ["pad", "bos", "eos", "mask", "x_open", "x_close", "y_open", "y_close"]
    assert trained.reserved == {name: index for index, name in enumerate(names)}
    assert trained.vocab_size == 500


@pytest.mark.parametrize("text", NASTY)
def test_round_trip(trained: tokenizer.Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not set(ids) & set(trained.reserved.values())
    assert all(0 <= i < trained.vocab_size for i in ids)


def test_round_trip_of_random_characters(trained: tokenizer.Tokenizer) -> None:
    rng = random.Random(1)
    alphabet = [*"abc \n\t\r▁<>[]{}mask", "\0", "é", "\N{SNOWMAN}", "😀", "\ud7ff", "\U00012345"]
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(60)))
        assert trained.decode(trained.encode(text)) == text


def test_decode_drops_reserved_ids(trained: tokenizer.Tokenizer) -> None:
    ids = trained.encode("two words")
    assert trained.decode([4, *ids[:1], 0, *ids[1:], 5, 0, 0]) == "two words"


def test_line_breaks_and_tabs_are_whole_pieces(trained: tokenizer.Tokenizer) -> None:
    assert [len(trained.encode(text)) for text in ["\n", "\n\n", "\t", "\t\t", "\n\n\n\n"]] == [1, 1, 1, 1, 2]


def test_same_sample_same_model(trained: tokenizer.Tokenizer) -> None:
    assert tokenizer.train(sample(), 500).sha256 == trained.sha256


def test_foreign_model_gets_the_missing_ids_after_its_vocabulary(tmp_path: pathlib.Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample()),
        model_writer=model,
        vocab_size=200,
        pad_id=3,
        user_defined_symbols=["<mask>"],  # text can reach it, so it cannot serve as the reserved one
        minloglevel=2,
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    foreign = tokenizer.load(path)
    appended = {"mask": 200, "x_open": 201, "x_close": 202, "y_open": 203, "y_close": 204}
    assert foreign.reserved == {"pad": 3, "bos": 1, "eos": 2} | appended
    assert foreign.vocab_size == 205
    ids = foreign.encode("def train <mask> text")
    assert not set(ids) & set(foreign.reserved.values())
    assert foreign.decode([201, *ids, 202, 3]) == "def train <mask> text"


def test_errors_name_the_mend(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.model: no such file"):
        tokenizer.load(tmp_path / "nowhere.model")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"not a SentencePiece model"):
        tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"--vocab_size=90000 does not fit"):
        tokenizer.train(sample(), 90000)


def test_b10_ids_of_a_tokenizer_json_may_have_holes(tmp_path: pathlib.Path) -> None:
    model = tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "cat": 9}, "[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path)
    assert loaded.encode("cat") == [9]
    assert sorted(loaded.reserved.values()) == [1, *range(10, 17)] and loaded.vocab_size == 17


def unigram_json(folder: pathlib.Path) -> tokenizer.Tokenizer:
    """A tokenizer.json as XLM-R and T5 have it: their special tokens are pieces with a score of 0, the best of all."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(set("".join(special)) | set("two words in a row"))
    scores = [(piece, 0.0) for piece in special] + [("▁", -2.0), *((letter, -3.0) for letter in letters if letter != " ")]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=3))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    made.add_special_tokens(special)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    made.save(str(folder / "tokenizer.json"))
    return tokenizer.load(folder)


def test_no_text_reaches_a_reserved_id_of_a_unigram_model(tmp_path: pathlib.Path) -> None:
    loaded = unigram_json(tmp_path)
    assert {loaded.reserved[name] for name in ("bos", "pad", "eos", "mask")} == {0, 1, 2, 4}
    texts = ["two words", "</s>", "two</s>words in<mask> a <pad> row<s>", ""]
    encoded = loaded.encode_batch(texts)
    assert encoded == [loaded.encode(text) for text in texts]
    assert all({0, 1, 2, 4}.isdisjoint(ids) for ids in encoded)
    assert [loaded.decode(ids).split() for ids in encoded] == [["two", "words"], [], ["two", "words", "in", "a", "row"], []]
