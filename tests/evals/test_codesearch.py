"""Code search."""

import gzip
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.evals import (
    codesearch,
)


def write_code(path: pathlib.Path, names: Sequence[str], **more: object) -> None:
    lines = [json.dumps({"docstring": f"doc {name}", "code": f"def {name}"} | more) for name in names]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_reciprocal_ranks_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.6], [0.3, 0.7, 0.7]])  # ranks 1, 3, and 2: a tie counts against it
    np.testing.assert_allclose(codesearch.reciprocal_ranks(scores), [1, 1 / 3, 1 / 2])


def test_code_is_searched_in_batches_of_a_thousand(tmp_path: pathlib.Path) -> None:
    calls: list[tuple[str, list[str]]] = []
    names = [f"n{i}" for i in range(2500)]
    write_code(tmp_path / "java_0.jsonl", names[:7], language="java")
    write_code(tmp_path / "python_0.jsonl.gz", names, language="python")
    write_code(tmp_path / "go.jsonl", names[:1], docstring_tokens=["doc", "of"], code_tokens=["func", "x"])

    def encode(texts: list[str], view: str) -> np.ndarray:
        calls.append((texts[0].split()[0], texts))
        numbers = np.array([int(text.split()[1].removeprefix("n")) if text[-1].isdigit() else 0 for text in texts])
        if view == "document" and len(texts) == 7:
            numbers = np.where(numbers == 3, 4, numbers)  # 3 is found by nobody, 4 by two
        return np.stack([np.cos(numbers / 2500), np.sin(numbers / 2500)], axis=1)

    rows = codesearch.score_encoder(encode, epath.Path(tmp_path))
    assert list(rows) == ["go", "java", "python", "mean"]
    assert rows["python"]["mrr"] == rows["go"]["mrr"] == 1
    # The code of 3 lies where that of 4 does: 3 has 2 and both before it or beside it, 4 has two.
    assert rows["java"]["mrr"] == pytest.approx((5 + 1 / 3 + 1 / 2) / 7)
    assert rows["mean"]["mrr"] == pytest.approx(np.mean([row["mrr"] for row in list(rows.values())[:3]]))
    assert [len(texts) for _, texts in calls] == [1, 1, 7, 7, *[1000] * 4]  # what is left of 2,500 is dropped
    assert calls[0][1] == ["doc of"] and calls[1][1] == ["func x"]
    assert len({text for kind, texts in calls[4:] if kind == "doc" for text in texts}) == 2000
    assert codesearch.bm25_scores(["the sum", "a list"], ["sum of all", "list of them"]).argmax(1).tolist() == [0, 1]


def test_bad_code_is_named(tmp_path: pathlib.Path) -> None:
    data = epath.Path(tmp_path)
    with pytest.raises(UserError, match=r"no .jsonl or .jsonl.gz of docstring and code there"):
        codesearch.read_folder(data)
    for line in ('{"docstring": "a"}', '{"docstring": "a", "code": " "}', '{"docstring": "a", "code_tokens": [1]}'):
        (tmp_path / "go.jsonl").write_text('{"docstring": "a", "code": "b"}\n' + line + "\n")
        with pytest.raises(UserError, match=r"go.jsonl:2: no text in code or code_tokens"):
            codesearch.read_folder(data)
    (tmp_path / "go.jsonl").unlink()
    write_code(tmp_path / "go.jsonl.gz", [f"n{i}" for i in range(100)])
    (tmp_path / "go.jsonl.gz").write_bytes((tmp_path / "go.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"go.jsonl.gz:\d+: cannot be read"):
        codesearch.read_folder(data)
