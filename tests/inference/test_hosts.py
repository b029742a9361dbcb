"""Several processes evaluate and encode together, with the results of one."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import evaluation, finish, free_address, start
from hf_folders import write_folder, write_run
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from contrastive_jax.data import tokenizer
from contrastive_jax.inference import forward, hosts, text_model
from contrastive_jax.inference.tokenize import TokenizedTexts
from contrastive_jax.runtime import sharding

TEXTS = [f"the cat {i} sat on a mat " * (1 + i % 9) for i in range(61)] + [""]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, "bert", tokenizer.train([f"the cat {i} sat on a mat, a dog {i * i} ran" for i in range(80)], 300))
    return folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One folder with the data of two tasks."""
    folder = tmp_path_factory.mktemp("pets")
    lines = [f"{i}\tthe cat {i} ran\ta dog {i * i} sat on a mat {'and ran ' * i}" for i in range(13)]
    (folder / "dev.tsv").write_text("\n".join(lines) + "\n")
    documents = [{"_id": f"d{i}", "text": f"the cat {i} sat on a mat {'on a mat ' * (i % 5)}"} for i in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": f"q{i}", "text": f"a cat {i}"}) for i in range(7)))
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(7)))
    return folder


def two_processes(arguments: list[str]) -> list[subprocess.Popen]:
    together = [f"--coordinator={free_address()}", "--num_processes=2"]
    return [start([*arguments, *together, f"--process_id={i}"], devices=2) for i in range(2)]


@pytest.mark.parametrize("task", ["sts", pytest.param("retrieval", marks=pytest.mark.slow)])
def test_two_processes_score_as_one(task: str, run: pathlib.Path, pets: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def results(name: str) -> dict:
        return json.loads((tmp_path / name).read_text())

    arguments = evaluation(f"--model={run}", f"--tasks={task}", f"--data={pets}", "--baselines", "--max_tokens=24")
    alone = start([*arguments, f"--output={tmp_path}/one.json"], devices=1)
    _, *outputs = finish(alone, *two_processes([*arguments, f"--output={tmp_path}/two.json"]))
    assert task in outputs[0] and f"{task} {pets}" not in outputs[1]  # process 0 alone prints
    one, two = results("one.json"), results("two.json")
    assert one["protocol"] == two["protocol"] and 0 < one["protocol"].get("truncated", 0) < 1
    assert one["results"].keys() == two["results"].keys() and "untrained: " in " ".join(one["results"])
    for row, measures in one["results"].items():
        assert two["results"][row] == pytest.approx(measures, abs=1e-6)


def test_two_processes_encode_as_one(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "bert", "bert")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:-1]) + "\n")
    arguments = [sys.executable, "-m", "contrastive_jax", "encode", f"--model=hf:{folder}", f"--input={tmp_path}/texts.txt"]
    finish(start([*arguments, f"--output={tmp_path}/one.npy"]), *two_processes([*arguments, f"--output={tmp_path}/two.npy"]))
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert one.shape == (61, 16)
    np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.slow
def test_two_processes_mine_as_one(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "bert", "bert")
    pairs = [{"query": text, "positive": other} for text, other in zip(TEXTS[:30], TEXTS[30:60], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    arguments = [sys.executable, "-m", "contrastive_jax", "mine", f"--model=hf:{folder}", f"--pairs={tmp_path}/pairs.jsonl"]
    finish(start([*arguments, f"--output={tmp_path}/1.jsonl"]), *two_processes([*arguments, f"--output={tmp_path}/2.jsonl"]))
    one, two = (list(map(json.loads, (tmp_path / name).read_text().splitlines())) for name in ("1.jsonl", "2.jsonl"))
    assert len(one) == 30
    for line, other in zip(one, two, strict=True):
        np.testing.assert_allclose(line.pop("neg_scores"), other.pop("neg_scores"), atol=2e-6)
        np.testing.assert_allclose(line.pop("pos_scores"), other.pop("pos_scores"), atol=2e-6)
        assert line == other and len(line["neg"]) == 5


def test_all_processes_end_with_the_mistake_of_the_user(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "dev.tsv").write_text("5 the cat\n")
    outputs = finish(*two_processes(evaluation(f"--model={run}", "--tasks=sts", f"--data={tmp_path}")), status=2)
    assert any(f"error: {tmp_path}/dev.tsv:1: not score, text, text between tabs" in output for output in outputs)


def test_parameters_and_embeddings_are_nowhere_whole(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model.load(str(run))
    kernel = model.params["transformer"]["blocks"]["mlp"]["up"]["kernel"]  # [layers d f]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor") and kernel.sharding.mesh.shape["fsdp"] == 8
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert sharding.dividing_spec(("embed", "mlp"), (12, 24), kernel.sharding.mesh) == P(None, "tensor")  # 12 / 8
    copied = []
    monkeypatch.setattr(forward, "to_host", lambda z, mesh: copied.append(z) or jax.device_get(z))
    model.encode(TEXTS)
    assert copied and all(z.addressable_shards[0].data.shape[0] * 8 == len(z) for z in copied)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize("piece", [1, 3 * 8 * 5 * 4, 2**20])
def test_pieces_between_processes_are_the_whole(piece: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where some shards are on devices of other processes; pieces of one row, of three of seven, of all rows of a shard."""
    monkeypatch.setattr(forward, "PIECE_BYTES", piece)
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    x = np.random.default_rng(0).normal(size=(4 * 7, *shape)).astype(np.float32)
    z = sharding.to_global(x, np.arange(len(x)), len(x), mesh)
    sizes = []
    real = forward.replicate_piece
    monkeypatch.setattr(forward, "replicate_piece", lambda *a: sizes.append(a[1]) or real(*a))
    monkeypatch.setattr(type(z), "is_fully_addressable", property(lambda _: False))
    np.testing.assert_array_equal(forward.to_host(z, mesh), x)
    assert max(sizes) * 4 * 5 * 4 <= max(piece, 4 * 5 * 4)


@pytest.mark.parametrize(("count", "processes"), [(len(TEXTS), 3), (5, 4), (1, 3)], ids=["all", "one without", "one with"])
def test_parts_of_the_texts_are_put_together_in_order(count: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenize(texts: list[str], view: str) -> TokenizedTexts:
        return TokenizedTexts([list(range(len(text))) for text in texts], [len(text) > 30 for text in texts])

    texts = TEXTS[:count]
    alone = hosts.tokenize_together(tokenize, texts, "query")
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    sent: dict[int, list[np.ndarray]] = {process: [] for process in range(processes)}
    # Each process in turn says what it has; the last round hears all. Arrays that depend on others' sizes come in the second.
    for _ in range(2):
        for process in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            calls = iter(range(2))

            def gather(array: np.ndarray, process: int = process, calls: object = calls) -> np.ndarray:
                number = next(calls)
                del sent[process][number:]
                sent[process].append(array)
                heard = [other[number] if len(other) > number else array for other in sent.values()]
                return np.stack([np.resize(x, array.shape) if x.shape != array.shape else x for x in heard])

            monkeypatch.setattr(hosts, "gather", gather)
            together = hosts.tokenize_together(tokenize, texts, "query")
    assert together == alone
