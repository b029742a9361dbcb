"""Word similarity."""

import pathlib

import numpy as np
import pytest
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.evals import sts, wordsim


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.tsv", "tiger\tcat\t7.35\ncar\tbook\t1\n\nsun\tmoon\t5\n"),
        ("wordsim.csv", "\ufeffWord 1,Word 2,Human (mean),1,2\ntiger,cat,7.35,9,7\ncar,book,1,1,2\nsun,moon,5,4,4\n"),
        ("simlex.tsv", "word1\tword2\tPOS\tSimLex999\ntiger\tcat\tN\t7.35\ncar\tbook\tN\t1\nsun\tmoon\tN\t5\n"),
        ("quoted.csv", '"tiger", cat ,7.35\r\ncar,book,1\r\nsun,moon,5\r\n'),
    ],
)
def test_word_similarities_are_read(name: str, text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_text(text)
    pairs = wordsim.read_word_pairs(epath.Path(tmp_path / name))
    assert pairs.score.tolist() == [7.35, 1, 5]
    assert (pairs.first, pairs.second) == (["tiger", "car", "sun"], ["cat", "book", "moon"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,b,1\nc,d\ne,f,2\n", 2),
        ("a,b,1\nc,d,much\ne,f,2\n", 2),
        ("a b 1\n", 1),
        ("a,b,1\nc,d,nan\n", 2),
        ("x,y,z\na,b,c\n", 2),
    ],
)
def test_a_line_without_a_score_is_named(text: str, line: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / "words.csv").write_text(text)
    with pytest.raises(UserError, match=rf"words.csv:{line}: not word, word, score between tabs or commas"):
        wordsim.read_word_pairs(epath.Path(tmp_path / "words.csv"))


def test_a_line_of_another_encoding_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "words.csv").write_bytes("a,b,1\nfianc\xe9,c,2\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"words.csv:\d: cannot be read .*utf-8"):
        wordsim.read_word_pairs(epath.Path(tmp_path / "words.csv"))


def test_word_similarities_are_scored(tmp_path: pathlib.Path) -> None:
    (tmp_path / "one.csv").write_text("w1,w2,score\na,b,1\na,c,2\na,d,3\na,e,4\n")
    (tmp_path / "two.tsv").write_text("a\tb\t40\na\tc\t30\na\td\t20\na\te\t10\n")
    angles = dict(zip("abcde", [0.0, 0.9, 0.5, 0.7, 0.1], strict=True))  # cosines rank as 1, 3, 2, 4
    encode = sts.cosines(lambda texts, view: np.array([[np.cos(angles[text]), np.sin(angles[text])] for text in texts]))
    rows = sts.score_folder(encode, epath.Path(tmp_path), wordsim.read_word_pairs, wordsim.PATTERN)
    assert rows.keys() == {"one", "two", "all", "mean"}
    assert rows["one"]["spearman"] == pytest.approx(0.8)  # 1 - 6 · 2 / (4 · 15)
    assert rows["two"]["spearman"] == pytest.approx(-0.8)
    assert rows["mean"]["spearman"] == pytest.approx(0, abs=1e-12)
