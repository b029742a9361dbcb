"""Corpora as they are published, prepared with --input alone; names, limits, trials; what was passed over."""

import gzip
import json
import pathlib
import random
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from contrastive_jax.config import UserError
from contrastive_jax.data.preparation import prepare, stages


def texts(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 7))) for _ in range(200)]
    return [" ".join(chance.choices(words, k=30)) for _ in range(count)]


def lines(documents: list[dict]) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def write(path: pathlib.Path, documents: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), path, row_group_size=40)
    else:
        compress = {".gz": gzip.compress, ".zst": zstandard.compress, ".jsonl": bytes}[path.suffix]
        path.write_bytes(compress(lines(documents)))


SAMPLES = {
    # names of the files, the fields beside the text, and the domains
    "c4": ("en/c4-train.{:05d}-of-00002.json.gz", {"timestamp": "2019-04-25T12:57:54Z", "url": "http://x"}, {"c4"}),
    "dolma": ("wiki-{:04d}.json.gz", {"id": "1", "source": "wiki", "added": "2023", "metadata": {"length": 1}}, {"wiki"}),
    "slimpajama": (
        "train/chunk1/example_train_{}.jsonl.zst",
        {"meta": {"redpajama_set_name": "RedPajamaBook"}},
        {"RedPajamaBook"},
    ),
    "fineweb": (
        "sample/10BT/{:03d}_00000.parquet",
        {"id": "<urn:uuid:1>", "dump": "CC-MAIN-2013-20", "url": "http://x", "language": "en", "token_count": 30},
        {"CC-MAIN-2013-20"},
    ),
    "parquet": ("train-{:05d}-of-00002.parquet", {"title": "x", "tags": ["a", "b"]}, {"parquet"}),
}


def make(folder: pathlib.Path, **arguments: object) -> dict:
    return prepare.prepare(folder / "out", vocab_size=300, record_tokens=64, workers=1, **arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_known_corpora_are_prepared_with_input_alone(tmp_path: pathlib.Path, name: str) -> None:
    pattern, fields, domains = SAMPLES[name]
    for number in range(2):
        write(tmp_path / name / pattern.format(number), [{"text": text} | fields for text in texts(60, number)])
    manifest = make(tmp_path, input=str(tmp_path / name / re.sub("{.*?}", "*", pattern)))
    assert manifest["domains"] == sorted(domains)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 120
    assert manifest["losses"] == [] and manifest["rejects"] == {}


def test_b5_a_zst_file_of_any_window_is_prepared(tmp_path: pathlib.Path) -> None:
    """As `zstd --long=31` writes it; at first such a shard was lost as damaged, with one bad line to show for it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer((tmp_path / "a.jsonl.zst").open("wb")) as file:
        file.write(lines([{"text": text, "meta": {"pile_set_name": "A"}} for text in texts(100, 0)]))
    manifest = make(tmp_path, input=f"{tmp_path}/*.zst", validation_fraction=0.2, on_bad="skip")
    assert sum(split["documents"] for split in manifest["splits"].values()) == 100 and not manifest["rejects"]
    with pytest.raises(UserError, match=r"--memory_gb=2: one worker and the main process need 2\.\d GB"):
        prepare.prepare(tmp_path / "other", input=f"{tmp_path}/*.zst", memory_gb=2)


def test_a_domain_field_that_is_misspelt_or_names_everything_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", [{"text": text, "url": f"http://x/{i}"} for i, text in enumerate(texts(100, 0))])
    with pytest.raises(UserError, match=r"--domain_field=source: the first documents of .*a\.jsonl lack it; check its name"):
        make(tmp_path, input=f"{tmp_path}/*.jsonl", domain_field="source")
    monkeypatch.setattr(stages, "MAX_DOMAINS", 50)
    with pytest.raises(UserError, match=r"more than 50 domains, such as http://x/0; --domain_field names"):
        make(tmp_path, input=f"{tmp_path}/*.jsonl", domain_field="url", validation_fraction=0.2)


@pytest.mark.parametrize(("part_mb", "hashed"), [(0, 0), (1, 2)])
def test_too_many_domains_end_the_run_in_the_piece_that_has_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, part_mb: int, hashed: int
) -> None:
    """With one piece at its document too many; with two pieces of 60 domains each, when both are known."""
    documents = [{"text": f"{text} {'long ' * 4000}", "url": f"http://x/{i}"} for i, text in enumerate(texts(120, 0))]
    write(tmp_path / "a.jsonl", documents)
    monkeypatch.setattr(stages, "MAX_DOMAINS", 80)
    with pytest.raises(UserError, match="more than 80 domains"):
        make(tmp_path, input=f"{tmp_path}/*.jsonl", domain_field="url", validation_fraction=0.2, part_mb=part_mb)
    assert len([*tmp_path.glob("out.incomplete/.work/tasks/hash-*")]) == hashed


def test_small_files_of_much_text_are_spread_over_the_tasks(tmp_path: pathlib.Path) -> None:
    """A task takes files of as much text as a part has, however small they are before they are unpacked."""
    for number in range(20):
        write(tmp_path / f"{number}.jsonl.gz", [{"text": f"{text} {'long ' * 2000}"} for text in texts(20, number)])
    assert (tmp_path / "0.jsonl.gz").stat().st_size * 20 < 10**6
    manifest = make(tmp_path, input=f"{tmp_path}/*.gz", part_mb=1, validation_fraction=0.2)
    assert len([*(tmp_path / "out/pile/1.0.0").glob("*-train.array_record*")]) == 4
    assert sum(split["documents"] for split in manifest["splits"].values()) == 400


def test_names_limits_and_a_trial(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "web/0.jsonl.zst", [{"text": text, "meta": {"pile_set_name": "A"}} for text in texts(100, 0)])
    write(tmp_path / "code/1.parquet", [{"content": text, "lang": f"L{i % 2}"} for i, text in enumerate(texts(100, 1))])
    given = [f"mine={tmp_path}/web/*@40", f"{tmp_path}/code/*"]
    manifest = make(tmp_path, input=given, validation_fraction=0.2)
    counts = {name: 0 for name in manifest["domains"]}
    for split in manifest["splits"].values():
        for name, numbers in split["domains"].items():
            counts[name] += numbers["documents"]
    assert counts == {"L0": 50, "L1": 50, "mine": 40}
    trial = [make(tmp_path, input=given, validation_fraction=0.2, limit=60, part_mb=part, overwrite=True) for part in (0, 1)]
    assert sum(split["documents"] for split in trial[0]["splits"].values()) in range(56, 61)
    assert trial[0]["content_hash"] == trial[1]["content_hash"]


def test_the_share_of_each_file_that_was_passed_over_is_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    documents = lines([{"text": text} for text in texts(100, 0)])
    (tmp_path / "a.jsonl").write_bytes(documents + b"{\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines([{"text": text} for text in texts(2000, 1)]))[:-30_000])
    (tmp_path / "c.jsonl").write_bytes(lines([{"text": text} for text in texts(50, 2)]))
    manifest = make(tmp_path, input=f"{tmp_path}/*.jsonl*", on_bad="skip")
    damaged, bad = manifest["losses"]
    assert bad == {"file": f"{tmp_path}/a.jsonl", "lines": 101, "passed_over": 1, "share": 0.009901}
    assert damaged["file"] == f"{tmp_path}/b.jsonl.gz" and damaged["passed_over"] == 1 and damaged["lost_bytes"] == 0
    said = capsys.readouterr().err
    assert f"{tmp_path}/a.jsonl: 1 of 101 lines (0.99 %) were passed over\n" in said
    assert "were passed over; its end is missing\n" in said


def test_the_first_file_may_be_empty_damaged_or_of_another_schema(tmp_path: pathlib.Path) -> None:
    """None of these has a byte of text; as a later file each gave one bad line, and as the first one an IndexError."""
    (tmp_path / "empty/a.jsonl").parent.mkdir()
    (tmp_path / "empty/a.jsonl").write_bytes(b"")
    write(tmp_path / "damaged/a.parquet", [{"text": text} for text in texts(20, 1)])
    (tmp_path / "damaged/a.parquet").write_bytes((tmp_path / "damaged/a.parquet").read_bytes()[:-100])
    write(tmp_path / "other/a.parquet", [{"body": text} for text in texts(20, 2)])
    for folder, reason, rejects in (
        ("empty", "a.jsonl:0: empty shard", {"empty shard": 1}),
        ("damaged", "a.parquet:0: damaged file", {"damaged file": 1}),
        ("other", r"a.parquet:1: no text \(--text_field=NAME says where the text is", {"no text": 20}),
    ):
        with pytest.raises(UserError, match=reason):
            make(tmp_path / folder, input=f"{tmp_path / folder}/a.*")
        write(tmp_path / folder / "b.jsonl", [{"text": text} for text in texts(60, 3)])
        manifest = make(
            tmp_path / folder, input=f"{tmp_path / folder}/[ab].*", validation_fraction=0.2, on_bad="skip", overwrite=True
        )
        assert sum(split["documents"] for split in manifest["splits"].values()) == 60
        assert {name: sum(files.values()) for name, files in manifest["rejects"].items()} == rejects
