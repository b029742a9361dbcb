"""The command prepare: what it writes, what it refuses, and that the same input gives the same dataset."""

import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from contrastive_jax.config import UserError
from contrastive_jax.data import store, tokenizer
from contrastive_jax.data.preparation import dedup, driver, prepare
from contrastive_jax.data.preparation.arguments import Arguments, with_absolute_paths

ROOT = pathlib.Path(__file__).parents[2]
WORDS = pathlib.Path(prepare.__file__).read_text().split(" ")
pytestmark = [
    # Beam and TFDS close sockets and files when they are collected.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    # TFDS 4.9.10 asks protobuf for a label where protobuf 6 has is_repeated.
    pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning"),
]


def text(number: int) -> str:
    rng = random.Random(number)
    return f"document {number}\n" + " ".join(rng.choices(WORDS, k=rng.randrange(20, 120)))


def write_shard(path: pathlib.Path, numbers: list[int], extra: bytes = b"") -> None:
    records = [{"text": text(n), "meta": {"pile_set_name": "ABC"[n % 3]}} for n in numbers]
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + extra)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 4 KB, so that the few documents here are several tasks, some of which find nothing for validation."""
    monkeypatch.setattr(driver, "PART_BYTES", (4000, 4000))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three training shards and a held-out one; document 5 is in all training shards, 7 is also held out."""
    folder = tmp_path_factory.mktemp("raw")
    for shard in range(3):
        write_shard(folder / f"train-{shard}.jsonl", [5, *range(20 * shard, 20 * shard + 20)])
    write_shard(folder / "val.jsonl", [*range(60, 75), 7])
    return folder


def arguments(raw: pathlib.Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "input": (f"{raw}/train-*.jsonl",),
        "validation": (f"{raw}/val.jsonl",),
        "vocab_size": 500,
        "record_tokens": 48,
        "workers": 1,
    }
    return given | changes


@pytest.fixture(scope="module")
def prepared(raw: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("out") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "PART_BYTES", (4000, 4000))
        prepare.prepare(output, **arguments(raw))
    return output


def manifest(output: pathlib.Path) -> dict:
    return json.loads((output / "manifest.json").read_text())


def records(output: pathlib.Path, split: str) -> list[dict]:
    rows = tfds.builder_from_directory(output / "pile" / "1.0.0").as_data_source(split)
    return [row | {name: row[name].decode() for name in ("document", "domain")} for row in rows]


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "contrastive_jax", "prepare", *flags]


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_documents_come_back_whole(prepared: pathlib.Path) -> None:
    tokens = tokenizer.load(prepared)
    windows: dict[str, dict[int, list[int]]] = {}
    for split in ("train", "validation"):
        for record in records(prepared, split):
            assert 0 < len(record["tokens"]) <= 48
            windows.setdefault(record["document"], {})[int(record["position"])] = record["tokens"].tolist()
    found = set()
    for parts in windows.values():
        assert sorted(parts) == list(range(0, 48 * len(parts), 48))
        found.add(tokens.decode([i for _, part in sorted(parts.items()) for i in part]))
    assert found == {text(n) for n in range(75)}


def test_validation_text_leaves_train(prepared: pathlib.Path) -> None:
    documents = {split: {record["document"] for record in records(prepared, split)} for split in ("train", "validation")}
    assert not documents["train"] & documents["validation"]
    assert (len(documents["train"]), len(documents["validation"])) == (59, 16)
    paths = [item["name"] for item in manifest(prepared)["inputs"]]
    duplicates = {path: 1 + ("train-0" in path) for path in paths if "train" in path}
    assert manifest(prepared)["rejects"] == {"duplicate": duplicates}
    assert manifest(prepared)["duplicates"] == 4
    assert manifest(prepared)["rejects_by_domain"] == {"train": {"B": {"duplicate": 1}, "C": {"duplicate": 3}}}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_index_and_manifest_say_what_the_data_source_gives(prepared: pathlib.Path, split: str) -> None:
    rows = records(prepared, split)
    index = {name: np.load(prepared / "index" / f"{split}-{name}.npy") for name in store.COLUMNS}
    domains = manifest(prepared)["domains"]
    assert index["length"].tolist() == [len(row["tokens"]) for row in rows]
    assert [domains[d] for d in np.repeat(index["chunk_domain"], index["chunk_size"])] == [row["domain"] for row in rows]
    assert index["shard_chunks"].sum() == len(index["chunk_size"])
    assert len(index["shard_chunks"]) == len(list(prepared.glob(f"pile/1.0.0/pile-{split}.*"))) > 1
    for path in sorted(prepared.glob(f"pile/1.0.0/pile-{split}.*")):  # sorted by domain, which are random within
        assert path.name.endswith(f"-of-{len(index['shard_chunks']):05d}")

    counts = manifest(prepared)["splits"][split]
    documents = {row["document"] for row in rows}
    assert (counts["documents"], counts["records"], counts["tokens"]) == (len(documents), len(rows), index["length"].sum())
    for name, domain in counts["domains"].items():
        of_domain = [row for row in rows if row["domain"] == name]
        assert domain["records"] == len(of_domain)
        assert domain["tokens"] == sum(len(row["tokens"]) for row in of_domain)
    decoded = tokenizer.load(prepared).decode(np.concatenate([row["tokens"] for row in rows]))
    assert counts["bytes"] == len(decoded.encode())


def test_manifest(prepared: pathlib.Path) -> None:
    trained = tokenizer.load(prepared)
    of = manifest(prepared)
    assert (of["format"], of["window"], of["vocab_size"], of["domains"]) == (3, 48, 500, ["A", "B", "C"])
    assert (of["tokenizer_sha256"], of["reserved"]) == (trained.sha256, trained.reserved)
    assert sorted(path.name for path in prepared.iterdir()) == [
        "index",
        "manifest.json",
        "pile",
        "rejects.jsonl",
        "tokenizer.model",
    ]
    assert [path.name for path in prepared.parent.iterdir()] == ["data"]


def test_same_dataset_with_two_workers(raw: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prepare.prepare(tmp_path / "two", **arguments(raw, workers=2))
    assert manifest(tmp_path / "two") == manifest(prepared)
    names = sorted(path.relative_to(prepared) for path in prepared.rglob("*.npy"))
    assert len(names) == 8
    assert all((prepared / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_parts_of_another_size_hold_the_same_records(
    raw: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PART_BYTES", (10**6, 10**6))
    monkeypatch.setattr(dedup, "ROW_MEMORY", 10**9)  # a partition for each bucket
    prepare.prepare(tmp_path / "large", **arguments(raw, tokenizer=str(prepared)))
    few, many = (manifest(output) for output in (tmp_path / "large", prepared))
    assert (few["splits"], few["rejects"]) == (many["splits"], many["rejects"])
    for split in ("train", "validation"):
        one, two = (records(output, split) for output in (tmp_path / "large", prepared))
        assert sorted(map(repr, one)) == sorted(map(repr, two))


def test_second_call_does_nothing_and_other_arguments_are_refused(
    raw: pathlib.Path, prepared: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    assert prepare.prepare(prepared, **arguments(raw)) == manifest(prepared)
    assert capsys.readouterr().err == f"{prepared} is already prepared with these arguments\n"
    with pytest.raises(UserError, match="was made with other arguments .* --overwrite replaces it"):
        prepare.prepare(prepared, **arguments(raw, record_tokens=49))


def test_paths_mean_the_same_in_another_working_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, absolute in {
        "a.model": f"{tmp_path}/a.model",
        "hf:a": f"hf:{tmp_path}/a",
        "gs://b/a": "gs://b/a",
        "": "",
    }.items():
        assert with_absolute_paths(Arguments(tokenizer=given)).tokenizer == absolute
    assert with_absolute_paths(Arguments(tfds_data_dir="tfds")).tfds_data_dir == f"{tmp_path}/tfds"


def test_overwrite_replaces(raw: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "data"
    given = {"tokenizer": str(prepared), "validation": (), "validation_fraction": 0.3}
    prepare.prepare(output, **arguments(raw, **given))
    splits = manifest(output)["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 60
    assert 8 < splits["validation"]["documents"] < 30
    assert manifest(output)["duplicates"] == 3
    prepare.prepare(output, **arguments(raw, **given, record_tokens=64), overwrite=True)
    assert manifest(output)["window"] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_bad_input_is_counted_or_stops(raw: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    bad = b'{"text": 1, "meta": {"pile_set_name": "A"}}\n{"text": "\xff"}\n{"text": " "}\n'
    write_shard(tmp_path / "a.jsonl", [80, 81], bad + b"no json\n")
    (tmp_path / "b.jsonl.zst").write_bytes(b"")
    given = arguments(raw, input=(f"{raw}/train-*.jsonl", f"{tmp_path}/*"), tokenizer=str(prepared))
    a, b = f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl.zst"
    output = tmp_path / "out"

    with pytest.raises(UserError, match=r"^\S+/a\.jsonl:3: text is not a string|^\S+/b\.jsonl\.zst:0: empty shard"):
        prepare.prepare(output, **given)
    assert not output.exists()

    prepare.prepare(output, **given, on_bad="skip")  # goes on from what the first call has done
    rejects = manifest(output)["rejects"]
    del rejects["duplicate"]
    reasons = ["text is not a string", "invalid UTF-8", "empty text", "not JSON"]
    assert rejects == {reason: {a: 1} for reason in reasons} | {"empty shard": {b: 1}}
    assert manifest(output)["rejects_by_domain"]["train"]["A"] == {"text is not a string": 1}
    named = [json.loads(line)[2] for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert named == [f"{a}:{line}: {reason}" for line, reason in enumerate(reasons, start=3)] + [f"{b}:0: empty shard"]
    assert manifest(output)["splits"]["train"]["documents"] == 61


def test_split_without_documents_is_refused(raw: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given = arguments(raw, validation=(), validation_fraction=1e-9, tokenizer=str(prepared))
    with pytest.raises(UserError, match="no document for the validation split"):
        prepare.prepare(tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ()}, "give one of --input, --pairs, --tfds and --python, not none"),
        ({"python": True}, "not input and python"),
        ({"input": (), "tfds": "imdb"}, "--validation goes with --input"),
        ({"input": ("/nowhere/*.zst",)}, r"--input=/nowhere/\*\.zst: no file matches"),
        ({"validation_fraction": 1.0}, "--validation_fraction=1.0: must lie between 0 and 1"),
        ({"record_tokens": 1}, "--record_tokens=1: must be at least 2"),
        ({"tokenizer": "/nowhere"}, "/nowhere: no such file"),
        ({"vocab_size": 100_000}, "--vocab_size=100000 does not fit the text"),
        ({"input": (), "validation": (), "tfds": "nosuch"}, "--tfds=nosuch: "),
    ],
)
def test_wrong_arguments(raw: pathlib.Path, tmp_path: pathlib.Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepare.prepare(tmp_path / "out", **arguments(raw, **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_user_error_is_one_line_and_status_2(tmp_path: pathlib.Path) -> None:
    result = run("--input=/nowhere/*.zst", f"--output={tmp_path}/out")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: --input=/nowhere/*.zst: no file matches; check the path"
    assert "Traceback" not in result.stderr


def test_python_text_is_prepared(prepared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contrastive_jax.data.raw.python_text.PYTHON_BYTES", 2_000_000)
    output = tmp_path / "out"
    prepare.prepare(output, python=True, tokenizer=str(prepared), validation_fraction=0.1, workers=1)
    splits = manifest(output)["splits"]
    assert 1_800_000 < splits["train"]["bytes"] + splits["validation"]["bytes"] < 2_500_000
    # Which packages fit into the 2 MB depends on what is installed.
    assert "python standard library" in splits["train"]["domains"] and len(splits["train"]["domains"]) > 5
    assert manifest(output)["inputs"][0]["name"].startswith("Python 3.")


TALES = {"train": range(30), "validation": range(30, 40), "test": range(40, 50)}


class Tales(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset with three splits; story n is text(n)."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = pathlib.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"story": tfds.features.Text(), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(numbers) for split, numbers in TALES.items()}

    def _generate_examples(self, numbers: range) -> Iterator[tuple[int, dict]]:
        for number in numbers:
            yield number, {"story": text(number), "label": number}


def test_tfds_dataset_with_its_own_validation_split(prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tales = {"tfds": "tales", "tfds_data_dir": str(tmp_path / "tfds")}
    given: dict[str, Any] = tales | {"tokenizer": str(prepared), "record_tokens": 48, "workers": 1}
    prepare.prepare(tmp_path / "out", **given)
    tokens = tokenizer.load(prepared)
    for split in ("train", "validation"):
        numbers = TALES[split]
        first = [row for row in records(tmp_path / "out", split) if row["position"] == 0]
        assert sorted(tokens.decode(row["tokens"])[:11] for row in first) == sorted(text(n)[:11] for n in numbers)
        assert {row["domain"] for row in first} == {"tales"}
    with pytest.raises(UserError, match="choose --tfds_feature among its text features: story"):
        prepare.prepare(tmp_path / "other", **given, tfds_feature="label")
