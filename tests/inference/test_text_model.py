"""The model handle: names, views, lengths of texts, and the protocol."""

import json
import pathlib

import numpy as np
import pytest
from conftest import evaluation, finish, start
from hf_folders import TEXTS, write_folder, write_run

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.inference import text_model

LONG = "the cat sat on a mat " * 50  # 300 words


@pytest.fixture(scope="module")
def trained() -> tokenizer.Tokenizer:
    return tokenizer.train([f"the cat {i} sat on a mat, a dog {i * i} ran" for i in range(80)], 300)


def test_the_command_on_a_folder(tmp_path: pathlib.Path) -> None:
    folder, data = write_folder(tmp_path / "bert", "bert"), tmp_path / "sts"
    data.mkdir()
    (data / "dev.tsv").write_text("5\tthe cat\tthe cat\n1\ta red hat\tone big dog\n3\ta mat\ta blue mat\n")
    more = ["--tasks=sts", f"--data={data}", f"--output={tmp_path}/sts.json"]
    output = finish(start(evaluation(f"--model=hf:{folder}", *more)))[0]
    assert "spearman" in output
    result = json.loads((tmp_path / "sts.json").read_text())
    assert result["protocol"]["pooling"] == "mean" and len(result["protocol_hash"]) == 16
    assert result["results"]["dev"]["spearman"] <= 1


def test_a_run_is_read_up_to_its_max_length_and_not_to_its_rows(trained: tokenizer.Tokenizer, tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, "bert", trained)  # rows of 66 tokens, 200 positions
    model = text_model.load(str(tmp_path))
    assert model.config is not None and model.config.data.length == 66
    rows = model.tokenize(["the cat", LONG], "document")
    assert len(rows[0]) < 66 and len(rows[1]) == model.max_tokens == 200
    assert rows[1][0] == trained.reserved["y_open"] and rows[1][-1] == trained.reserved["y_close"]
    model.encode(["the cat", LONG, "a dog"])
    assert (model.truncation.texts, model.truncation.truncated) == (3, 1)
    model.truncation.reset()
    assert model.truncation.share == 0
    short = text_model.load(str(tmp_path), max_tokens=10)
    assert len(short.tokenize([LONG])[0]) == 10 and short.protocol()["max_tokens"] == 10
    with pytest.raises(UserError, match="--max_tokens=2: two tokens are delimiters and leave no room"):
        text_model.load(str(tmp_path), max_tokens=2)
    with pytest.raises(UserError, match=r"--max_tokens=201: the run has positions for 200 tokens; lower it"):
        text_model.load(str(tmp_path), max_tokens=201)


@pytest.mark.parametrize("family", ["bag", "starcoder2"])
def test_bags_and_rotary_positions_take_any_length(family: str, trained: tokenizer.Tokenizer, tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, family, trained)
    short, long = text_model.load(str(tmp_path)), text_model.load(str(tmp_path), max_tokens=1000)
    size = len(long.tokenize([LONG])[0])
    assert len(short.tokenize([LONG])[0]) == 200 < size < 1000
    assert np.abs(short.encode([LONG]) - long.encode([LONG])).max() > 1e-3
    assert (short.truncation.share, long.truncation.share) == (1, 0)


def test_names_of_models(trained: tokenizer.Tokenizer, tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, "bag", trained)
    assert text_model.load(f"{tmp_path}@1").step == 1
    for name, message in (
        (f"{tmp_path}@7", r"no checkpoint 7; there are \[1\]"),
        (f"{tmp_path}@best", "@best: no checkpoint has a score"),
        (str(tmp_path / "absent"), "no config.json there"),
        (f"hf:{tmp_path / 'absent'}", "no config.json there"),
    ):
        with pytest.raises(UserError, match=message):
            text_model.load(name)


def test_a_folder_and_its_limits(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "bert", "bert")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    model, whole = text_model.load(str(folder)), text_model.load(f"hf:{folder}", max_tokens=40)
    assert model.name == whole.name == f"hf:{folder}" and model.config is None and model.untrained() is None
    assert len(model.tokenize([LONG])[0]) == 16 and len(whole.tokenize([LONG])[0]) == 40
    model.encode([LONG, "the cat", " ".join(["cat"] * 14)])  # 14 words and [CLS], [SEP] just fit
    assert model.truncation.share == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="--max_tokens=2: special tokens leave no room"):
        text_model.load(f"hf:{folder}", max_tokens=2).encode(TEXTS)
    with pytest.raises(UserError, match="has positions for 40 tokens"):
        text_model.load(f"hf:{folder}", max_tokens=41)


def test_views_similarities_and_the_protocol(trained: tokenizer.Tokenizer, tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, "starcoder2", trained)
    model = text_model.load(str(tmp_path))
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS[:2])
    assert queries.dtype == np.float32 and queries.shape == (4, 8) and model.dim == 8
    assert np.abs(queries[:2] - documents).max() > 1e-3  # the delimiters differ
    np.testing.assert_allclose(model.similarity(2 * queries, documents), queries @ documents.T, atol=1e-6)
    assert model.encode([]).shape == (0, 8)
    with pytest.raises(TypeError, match="give a list of texts"):
        model.encode("the cat")
    with pytest.raises(ValueError, match="choose one of query, document"):
        model.encode(TEXTS, "x")
    untrained = model.untrained()
    assert untrained is not None and np.abs(untrained.encode(TEXTS) - queries).max() > 1e-3
    protocol = model.protocol()
    assert protocol["model"] == str(tmp_path) and protocol["step"] == 1 and protocol["max_tokens"] == 200
    assert protocol["prompts"] == "[x], {y}" and protocol["pooling"] == "mean" and len(protocol["parameters"]) == 64
