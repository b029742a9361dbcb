"""Words and n-grams, filters, and the search for evaluation texts."""

import json
import re
import unicodedata

import numpy as np
import pytest
import zstandard

from contrastive_jax.config import UserError
from contrastive_jax.data.clean import cleaning, decontamination, hash_set, ngrams
from contrastive_jax.data.clean.cleaning import Cleaner, Limits
from contrastive_jax.data.clean.repetition import repetition

RNG = np.random.default_rng(0)
VOCABULARY = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu", "ro") for b in "abcdefghijklmnopqrst"]


def sentence(count: int, rng: np.random.Generator = RNG) -> str:
    """Returns a text of random words."""
    return " ".join(rng.choice(VOCABULARY, count))


def test_words_are_those_of_a_regular_expression_whatever_the_block_they_lie_in(monkeypatch):
    text = "".join(RNG.choice(list("abcXYZ019 ,.\n-éßД中文"), 3000))
    spaced = re.sub("([中文])", r" \1 ", text.lower())
    expected = re.findall(r"[^\W_]+", spaced)
    words = ngrams.words_of(text)
    assert words.sizes.tolist() == [len(word) for word in expected]
    hashes = dict(zip(expected, words.hashes.tolist(), strict=True))
    assert [hashes[word] for word in expected] == words.hashes.tolist()
    assert len(set(hashes.values())) == len(hashes)
    monkeypatch.setattr(ngrams, "_BLOCK", 64)
    ngrams._powers.cache_clear()
    np.testing.assert_array_equal(ngrams.words_of(text).hashes, words.hashes)
    assert len(ngrams.words_of("a" * 100).hashes) == 2  # a word longer than a block is cut
    ngrams._powers.cache_clear()


def test_words_ignore_case_punctuation_white_space_and_the_way_accents_are_spelled():
    same = [ngrams.words_of(text).hashes.tolist() for text in ("Été, l'an 12!", "été\n\tl an… 12", "e\u0301te\u0301 l an 12")]
    assert same[0] == same[1] == same[2]
    assert len(same[0]) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_ngrams_are_equal_exactly_where_the_words_are(size):
    text = sentence(400).split()[:30] * 3
    words = ngrams.words_of(" ".join(text)).hashes
    hashes = ngrams.ngram_hashes(words, size)
    keys = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
    assert len(set(hashes.tolist())) == len(set(keys))
    assert len(set(zip(keys, hashes.tolist(), strict=True))) == len(set(keys))
    begins = np.array([0, 7, len(keys) - 1])
    np.testing.assert_array_equal(ngrams.ngram_hashes_at(words, begins, size), hashes[begins])
    assert not len(ngrams.ngram_hashes(words[: size - 1], size))


def test_a_hash_set_contains_what_it_was_made_of_and_turns_most_others_away():
    hashes = RNG.integers(0, 1 << 64, 20_000, np.uint64)
    inside, others = hashes[:10_000], hashes[10_000:]
    bitmap = hash_set.bitmap_of(inside)
    np.testing.assert_array_equal(hash_set.candidates(bitmap, inside), np.arange(10_000))
    assert len(hash_set.candidates(bitmap, others)) < 50
    assert not len(hash_set.candidates(hash_set.bitmap_of(inside[:0]), others))
    assert hash_set.contains(np.sort(inside), inside).all()
    assert not hash_set.contains(np.sort(inside), others).any()
    assert not hash_set.contains(inside[:0], others).any()


@pytest.mark.parametrize(
    ("limits", "text", "reason"),
    [
        (Limits(min_characters=10), "short", "too short"),
        (Limits(max_characters=10), "longer than that", "too long"),
        (Limits(max_symbols=0.3), "x = {[(<>)]}; // ---", "symbols"),
        (Limits(max_symbols=0.3), "Some prose, with a comma.", ""),
        (Limits(max_word_characters=10), "QmFzZTY0IGlzIG5vdCBwcm9zZQ abc", "long words"),
        (Limits(max_word_characters=10), "", ""),
        (Limits(max_repetition=1), "Buy it now, it is cheap!\n" * 5, "repetition"),
        (Limits(max_repetition=1), sentence(2), ""),
        (Limits(), "", ""),
    ],
)
def test_filters_name_the_reason(limits, text, reason):
    assert Cleaner(limits)(text) == reason


def test_limits_that_cannot_be_meant_are_refused():
    for limits in (Limits(min_characters=-1), Limits(max_symbols=1.5), Limits(min_characters=10, max_characters=5)):
        with pytest.raises(UserError, match="--m"):
            cleaning.check_limits(limits)


def test_repetition_grows_with_what_is_repeated():
    prose = [sentence(12) for _ in range(40)]
    measures = []
    for repeated in (0, 4, 10, 20):
        text = "\n".join(prose[: 40 - repeated] + prose[:repeated])
        measures.append(repetition(text, ngrams.words_of(text)))
    assert measures == sorted(measures)
    assert measures[0] == 0 or measures[0] < 0.3
    assert measures[1] < 1.5 < measures[3]
    phrase = " ".join(f"the more the merrier {word}" for word in VOCABULARY)  # one line; a 4-gram makes up four fifths
    assert repetition(phrase, ngrams.words_of(phrase)) > 4


def write_sets(root):
    """Writes evaluation sets of each format; returns {set: texts}."""
    rng = np.random.default_rng(1)
    texts = {name: [sentence(length, rng) for length in (8, 10, 13, 40)] for name in ("sts/a", "b", "retrieval/c", "d", "e")}
    for folder in texts:
        (root / folder).mkdir(parents=True)
    (root / "sts/a/test.tsv").write_text("".join(f"3.2\t{text}\t{text}\n" for text in texts["sts/a"]))
    (root / "b/all.csv").write_text("label,text\n" + "".join(f'1,"{text}"\n' for text in texts["b"]))
    lines = "".join(json.dumps({"_id": "7", "text": text, "more": [{"title": "x"}]}) + "\n" for text in texts["retrieval/c"])
    (root / "retrieval/c/corpus.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "d/notes.txt").write_text("\n".join(texts["d"]))
    (root / "e/part.json").write_text(json.dumps({"questions": texts["e"], "n": 3}))
    (root / "e/picture.png").write_bytes(b"\x89PNG")
    return texts


def test_planted_evaluation_texts_are_found_and_counted_per_set(tmp_path):
    sets = write_sets(tmp_path)
    collected = decontamination.collect(decontamination.evaluation_texts([str(tmp_path)]))
    assert sorted(collected.names) == sorted(sets)
    assert all(counts["ngrams"] == 1 + 1 + 1 + 28 for counts in collected.report.values())
    rng = np.random.default_rng(2)
    cleaners = [Cleaner(Limits(), collected.ngrams), Cleaner(Limits(), collected.ngrams)]
    for texts in sets.values():
        for number, text in enumerate(texts):
            spelled = re.sub(" ", " -- ", text).upper() + "."
            assert cleaners[number % 2](f"{sentence(300, rng)} {spelled} {sentence(300, rng)}") == "evaluation text"
    for text in (*(text.rsplit(" ", 1)[0] for text in sets["b"][:3]), " ".join(sets["b"][3].split()[:12]), "", "word"):
        assert cleaners[0](f"{sentence(100, rng)}\n{text}") == ""
    found = decontamination.report_of(collected, [cleaner.findings.as_json() for cleaner in cleaners])
    assert all(counts["texts_found"] == counts["documents_removed"] == 4 for counts in found.values())


def test_the_name_of_a_folder_of_evaluation_sets_is_no_glob(tmp_path):
    sets = write_sets(tmp_path / "sets[v2]")
    (tmp_path / "setsv").mkdir()
    (tmp_path / "setsv/other.txt").write_text(sentence(20))
    assert {text.set_name for text in decontamination.evaluation_texts([str(tmp_path / "sets[v2]")])} == {*sets}


def test_the_order_of_evaluation_texts_does_not_matter(tmp_path):
    write_sets(tmp_path)
    texts = list(decontamination.evaluation_texts([str(tmp_path)]))
    tables = [decontamination.collect(order).ngrams for order in (texts, texts[::-1])]
    np.testing.assert_array_equal(tables[0].hashes, tables[1].hashes)
    np.testing.assert_array_equal(tables[0].starts, tables[1].starts)


def test_a_folder_without_evaluation_texts_and_a_broken_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="--decontaminate=.*no file of .jsonl"):
        list(decontamination.evaluation_texts([str(tmp_path / "nothing")]))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="bad.jsonl"):
        list(decontamination.evaluation_texts([str(tmp_path)]))


def test_symbols_are_neither_letters_of_any_spelling_nor_white_space_of_any_script():
    korean = "한국어 문장, 둘."
    assert ngrams.share_of_symbols(korean) == ngrams.share_of_symbols(unicodedata.normalize("NFD", korean)) == 2 / 10
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert "\u3000" in spaces and ngrams.share_of_symbols("語".join(spaces)) == 0
    long = "a,b " * 50_000 + "é!" * 7  # several blocks
    assert ngrams.share_of_symbols(long) == pytest.approx(50_007 / len(long)) and ngrams.share_of_symbols("") == 0
    assert Cleaner(Limits(max_symbols=0.3))(unicodedata.normalize("NFD", korean)) == ""
