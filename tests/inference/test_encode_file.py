"""A file of texts to a file of vectors."""

import json
import pathlib
import re

import numpy as np
import pytest
from etils import epath
from hf_folders import WORDS, write_folder

from contrastive_jax.config import UserError
from contrastive_jax.inference import encode_file, text_model


def test_rows_are_written_in_the_order_of_the_texts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model.load(f"hf:{write_folder(tmp_path / 'bert', 'bert')}")
    folder = epath.Path(tmp_path)
    texts = [" ".join(np.random.default_rng(i).choice(WORDS[4:], 1 + i % 30)) for i in range(100)]
    source, out = folder / "texts.txt", folder / "z.npy"
    source.write_text("\n".join(texts) + "\n")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(encode_file, "BLOCK", 33)
    z = model.encode(texts)
    for name in ("texts.txt", "texts.jsonl"):
        encode_file.encode_file(model, folder / name, out)
        np.testing.assert_allclose(np.load(out), z, atol=1e-6)
    encode_file.encode_file(model, source, out, "float16", dim=8)
    assert np.load(out).dtype == np.float16
    np.testing.assert_allclose(np.load(out), z[:, :8] / np.linalg.norm(z[:, :8], axis=1, keepdims=True), atol=1e-3)
    encode_file.encode_file(model, source, out, "int8")
    np.testing.assert_allclose(np.load(out) / 127, z, atol=0.51 / 127)
    encode_file.encode_file(model, source, out, "binary")
    np.testing.assert_array_equal(np.unpackbits(np.load(out), axis=1), z > 0)
    (folder / "bad.jsonl").write_text('{"text": "the cat"}\n{"text": 3}\n')
    (folder / "empty.txt").write_text("")
    for arguments, message in (
        ((folder / "bad.jsonl", out), "bad.jsonl:2: no text under 'text'"),
        ((folder / "empty.txt", out), "empty.txt: it has no text"),
        ((source, out, "float32", 17), "--dim=17: the model's vectors have 16 coordinates"),
        ((source, folder / "z.bin"), "give a .npy in a folder that exists"),
        ((folder / "absent", out), "no such file"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            encode_file.encode_file(model, *arguments)
