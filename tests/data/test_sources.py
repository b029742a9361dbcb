"""Raw documents: every good line before any damage, and every bad line by file, line and reason."""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import random
import tracemalloc

import aiohttp
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from faults import fuzz_shards

from contrastive_jax.config import UserError
from contrastive_jax.data.raw import schemas, sources, text_stream
from contrastive_jax.data.raw.parts import cut
from contrastive_jax.data.raw.sources import Document, Part, Reject, Shard
from contrastive_jax.files import MachineError, listing


def line(text: object, domain: object = "A") -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}}).encode() + b"\n"


def whole(path: pathlib.Path) -> Part:
    """The part that is all of a file."""
    return Part(Shard(str(path), 0, ""), 0, 0, 1, 0, True)


def read(path: pathlib.Path) -> tuple[list[str], list[tuple[int, str]]]:
    items = list(sources.read(whole(path)))
    texts = [item.text for item in items if isinstance(item, Document)]
    return texts, [(item.line, item.reason) for item in items if isinstance(item, Reject)]


def text(number: int) -> str:
    # hardly compressible, so that a cut file loses few lines
    return f"text {number} {random.Random(number).randbytes(500).hex()}"


COMPRESS = {
    ".jsonl": lambda content: content,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
    ".jsonl.bz2": bz2.compress,
    ".json.xz": lambda content: lzma.compress(content, preset=0),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_formats(tmp_path: pathlib.Path, suffix: str) -> None:
    texts = [text(i) for i in range(50)]
    parts = [b"".join(map(line, texts[:20])), b"\n" + b"".join(map(line, texts[20:]))[:-1]]
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(b"".join(map(COMPRESS[suffix], parts)))  # two frames, a blank line, no line feed at the end
    assert read(path) == (texts, [])
    assert [item.line for item in sources.read(whole(path))][19:22] == [20, 22, 23]


@pytest.mark.parametrize("suffix", list(COMPRESS)[1:])
def test_truncated_file_keeps_the_lines_before(tmp_path: pathlib.Path, suffix: str) -> None:
    texts = [text(i) for i in range(3000)]  # several blocks of bzip2
    content = COMPRESS[suffix](b"".join(map(line, texts)))
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(content[: len(content) * 2 // 3])
    kept, rejects = read(path)
    assert kept == texts[: len(kept)]
    assert 1700 < len(kept) < 2001
    assert rejects == [(len(kept) + 1, "damaged file: truncated")]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damaged_file_keeps_the_lines_before(tmp_path: pathlib.Path, suffix: str) -> None:
    texts = [text(i) for i in range(3000)]
    parts = [bytearray(COMPRESS[suffix](b"".join(map(line, part)))) for part in (texts[:1000], texts[1000:])]
    parts[1][:4] = b"none"  # the head of the second frame
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(b"".join(parts))
    kept, rejects = read(path)
    assert kept == texts[: len(kept)]
    assert 990 < len(kept) <= 1000
    assert len(rejects) == 1 and rejects[0][1].startswith("damaged file: ")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.xz"])
def test_zeros_may_follow_compressed_text(tmp_path: pathlib.Path, suffix: str) -> None:
    texts = [text(i) for i in range(50)]
    first, second = (COMPRESS[suffix](b"".join(map(line, part))) for part in (texts[:20], texts[20:]))
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(first + bytes(4000) + second + bytes(40_000))
    assert read(path) == (texts, [])
    parts = cut(Shard(str(path), 0, "", size=path.stat().st_size), 10_000)
    assert {part.frame_file for part in parts} == {0, len(first) + 4000}
    assert [item.text for item in sources.read(parts[-1])] == texts[parts[-1].line - 1 :]  # type: ignore[union-attr]
    path.write_bytes(bytes(4000))  # a file whose content was lost is no padding
    assert read(path)[1][0][1].startswith("damaged file: ")


def test_bad_lines(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "shard.jsonl"
    bad = {
        b"{\n": "not JSON",
        b'"text"\n': "not a JSON object",
        b"{}\n": "no text",
        line(None): "no text",
        line(7): "text is not a string",
        b'{"text": "\xff"}\n': "invalid UTF-8",
        b'{"text": "\\ud800"}\n': "lone surrogate",
        line(" \n"): "empty text",
        b"[" * 100_000 + b"\n": "not JSON",
    }
    path.write_bytes(line("first") + b"".join(bad) + line("last"))
    texts, rejects = read(path)
    assert texts == ["first", "last"]
    assert rejects == list(enumerate(bad.values(), start=2))


def test_the_domain_is_the_name_of_the_file_where_no_document_names_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "news-train-00003-of-00007.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b", "meta": {}}\n{"text": "c", "meta": "x"}\n' + line("d", 7) + line("e"))
    assert [item.domain for item in sources.read(whole(path))] == ["news"] * 4 + ["A"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_empty_shard(tmp_path: pathlib.Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(COMPRESS[suffix](content) if content else b"")
    assert read(path) == ([], [(0, "empty shard")])


def test_a_bomb_is_one_bad_line_in_bounded_memory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "shard.jsonl.zst"
    with zstandard.ZstdCompressor().stream_writer(path.open("wb")) as file:
        file.write(line("before"))
        for _ in range(1000):
            file.write(bytes(1 << 20))
        file.write(b"\n" + line("after"))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    texts, rejects = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["before", "after"]
    assert rejects == [(2, "line longer than 1 MB")]
    assert peak < 200 << 20


def test_random_damage_is_told_and_costs_no_line_before_it() -> None:
    found = fuzz_shards.run(cases=300, seed=1, large=False)
    assert found["sound"] > 1000 and found["damaged"] > 10


def frames(suffix: str, texts: list[str]) -> bytes:
    """A file of three frames; the second begins within a line."""
    content = b"".join(map(line, texts))
    parts = content[:1000], content[1000:50_000], content[50_000:]
    return b"".join(map(COMPRESS[suffix], parts))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_parts_are_the_same_for_everyone_and_together_the_whole(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(frames(suffix, [text(i) for i in range(200)]))
    shard, expected = Shard(str(path), 0, "", size=path.stat().st_size), list(sources.read(whole(path)))
    parts = cut(shard, 20_000)
    assert parts == cut(shard, 20_000)
    assert 8 <= len(parts) <= 11 and all(10_000 <= part.end - part.start < 31_000 for part in parts)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    for part in random.Random(0).sample(parts, 4):  # alone
        end = 201 if part.is_last else parts[parts.index(part) + 1].line
        assert [item._replace(shard=expected[0].shard) for item in sources.read(part)] == expected[part.line - 1 : end - 1]
    if suffix != ".jsonl":
        assert {part.frame_text for part in parts} == {0, 1000, 50_000}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_reader_that_stays_open_reads_each_byte_once(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(frames(suffix, [text(i) for i in range(200)]))
    reader = sources.Reader()
    parts = cut(Shard(str(path), 0, "", size=path.stat().st_size), 20_000)
    lines = [item.line for part in parts for item in reader.read(part)]
    reader.close()
    assert lines == list(range(1, 201))
    assert reader.file_bytes == path.stat().st_size
    assert reader.text_bytes == sum(part.text_bytes for part in parts) == sum(len(line(text(i))) for i in range(200))


def test_a_small_plain_file_is_one_part_and_is_not_read(tmp_path: pathlib.Path) -> None:
    (part,) = cut(Shard(str(tmp_path / "nowhere.jsonl"), 0, "", size=1000), 1000)
    assert part.is_last and (part.start, part.line, part.text_bytes) == (0, 1, 1000)


@pytest.mark.parametrize("suffix", list(COMPRESS)[1:])
def test_a_small_file_of_much_text_is_cut(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(COMPRESS[suffix](line("again and " * 100) * 2000))
    size = path.stat().st_size
    assert size < 20_000
    parts = cut(Shard(str(path), 0, "", size=size), 200_000)
    assert len(parts) > 8 and all(part.text_bytes <= 300_000 for part in parts)
    (part,) = cut(Shard(str(path), 0, "", size=size), 10_000_000)
    assert part.text_bytes == 2000 * len(line("again and " * 100))


@pytest.mark.parametrize("suffix", list(COMPRESS)[1:])
def test_damage_is_found_once_in_the_part_in_which_it_lies(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    content = frames(suffix, [text(i) for i in range(200)])
    path.write_bytes(content[:-4000])
    shard = Shard(str(path), 0, "", size=len(content) - 4000)
    parts = cut(shard, 20_000)
    items = [list(sources.read(part)) for part in parts]
    rejects = [item for part in items for item in part if isinstance(item, Reject)]
    assert len(rejects) == 1 and rejects[0] is items[-1][-1] and rejects[0].reason.startswith("damaged file: ")
    assert [item.line for part in items for item in part] == list(range(1, rejects[0].line + 1))


def test_a_file_that_has_changed_since_it_was_cut_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "shard.jsonl.gz"
    path.write_bytes(frames(".jsonl.gz", [text(i) for i in range(200)]))
    parts = cut(Shard(str(path), 0, "", size=path.stat().st_size), 20_000)
    path.write_bytes(gzip.compress(line("other")))
    with pytest.raises(UserError, match="shard.jsonl.gz: has changed"):
        list(sources.read(parts[-1]._replace(frame_file=0, frame_text=0)))


@pytest.mark.parametrize("limit", [{"max_lines": 70}, {"max_bytes": 70 * len(line(text(1)))}])
@pytest.mark.parametrize("part_bytes", [5000, 20_000, 10**9])
def test_a_limit_takes_the_head_of_a_file(tmp_path: pathlib.Path, limit: dict, part_bytes: int) -> None:
    path = tmp_path / "shard.jsonl.zst"
    path.write_bytes(frames(".jsonl.zst", [text(i) for i in range(200)]))
    parts = cut(Shard(str(path), 0, "", size=path.stat().st_size, **limit), part_bytes)
    lines = [item.line for part in parts for item in sources.read(part)]
    assert lines == list(range(1, lines[-1] + 1)) and 70 <= lines[-1] <= 71
    assert "max_bytes" in limit or lines[-1] == 70
    (small,) = cut(Shard(str(path), 0, "", size=path.stat().st_size, max_lines=1000), 10**9)
    assert small.is_last


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_b5_a_zst_file_of_any_window_is_read(tmp_path: pathlib.Path, window_log: int) -> None:
    """As `zstd --long=31` writes it: the frame asks for a window of two gigabytes, whatever the file holds."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    path = tmp_path / "shard.jsonl.zst"
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(path.open("wb")) as file:
        for number in range(50):
            file.write(line(text(number)))
    assert read(path) == ([text(number) for number in range(50)], [])
    (part,) = cut(Shard(str(path), 0, "", size=path.stat().st_size), 40_000)
    assert part.window_bytes == 1 << window_log


SAMPLES = {
    # name of the file: (a document as the corpus has it, its text, its domain)
    "pile/train/00.jsonl.zst": ({"text": "a", "meta": {"pile_set_name": "ArXiv"}}, "a", "ArXiv"),
    "en/c4-train.00000-of-01024.json.gz": ({"text": "a", "timestamp": "2019-04-25", "url": "http://x"}, "a", "c4"),
    "multilingual/c4-af.tfrecord-00000-of-00064.json.gz": ({"text": "a", "timestamp": "", "url": "http://x"}, "a", "c4-af"),
    "dolma/books-0000.json.gz": ({"id": "1", "text": "a", "source": "books", "added": "", "metadata": {}}, "a", "books"),
    "SlimPajama/train/chunk1/example_0.jsonl.zst": (
        {"text": "a", "meta": {"redpajama_set_name": "RedPajamaC4"}},
        "a",
        "RedPajamaC4",
    ),
    "fineweb/sample/10BT/000_00000.jsonl": (
        {"text": "a", "id": "1", "dump": "CC-MAIN-2013-20", "url": "http://x", "language": "en", "token_count": 1},
        "a",
        "CC-MAIN-2013-20",
    ),
    "the-stack/data/python/train-00000-of-00206.jsonl": ({"content": "a", "lang": "Python", "ext": "py"}, "a", "Python"),
    "codeparrot/file-000000000001.json.gz": ({"content": "a", "repo_name": "x/y", "path": "z.py"}, "a", "file"),
    # a source per document is no domain
    "news-2020_00001.jsonl": ({"id": "1", "text": "a", "source": "https://example.org/1"}, "a", "news"),
    "data/train-00000-of-00001.jsonl": ({"text": "a"}, "a", ""),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_known_schemas_need_no_flags(tmp_path: pathlib.Path, name: str) -> None:
    document, expected, domain = SAMPLES[name]
    path = tmp_path / "corpus" / name
    path.parent.mkdir(parents=True)
    compress = COMPRESS.get(f".jsonl.{name.rpartition('.')[2]}", bytes)
    path.write_bytes(compress(json.dumps(document).encode()))
    assert [(item.text, item.domain) for item in sources.read(whole(path))] == [(expected, domain or "corpus")]


def test_fields_may_be_named_by_dotted_paths(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "web.jsonl"
    document = {"text": "no", "meta": {"pile_set_name": "no"}, "page": {"body": "yes", "site": {"name": "news"}}, "year": 7}
    path.write_text(json.dumps(document) + "\n" + json.dumps({"text": "no"}))
    shard = Shard(str(path), 0, "", text_field="page.body", domain_field="page.site.name")
    good, bad = sources.read(Part(shard, 0, 0, 1, 0, True))
    assert (good.text, good.domain) == ("yes", "news")
    assert bad.reason == "no text" and "--text_field=NAME says where the text is" in sources.stop_message(bad)
    numbered = Shard(str(path), 0, "", domain_field="year")
    assert [item.domain for item in sources.read(Part(numbered, 0, 0, 1, 0, True))] == ["7", "unknown"]
    named = shard._replace(domain="mine")
    assert next(sources.read(Part(named, 0, 0, 1, 0, True))).domain == "mine"


def write_parquet(path: pathlib.Path, rows: list[dict], group: int) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"use_dictionary": False, "data_page_size": 50_000, "write_batch_size": 16, "write_page_checksum": True}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group, **options)
    return Shard(str(path), 0, "", size=path.stat().st_size)


def test_parquet_is_read_by_row_groups(tmp_path: pathlib.Path) -> None:
    rows = [{"text": text(i), "id": str(i), "dump": f"CC-{i % 2}", "url": "http://x", "language": "en"} for i in range(300)]
    shard = write_parquet(tmp_path / "data/000_00000.parquet", [*rows[:298], rows[298] | {"text": None}, rows[299]], 50)
    parts = cut(shard, 90_000)
    assert [(part.start, part.end, part.line, part.is_last) for part in parts] == [
        (0, 100, 1, False),
        (100, 200, 101, False),
        (200, 300, 201, True),
    ]
    reader = sources.Reader()
    items = [item for part in parts for item in reader.read(part)]
    assert [item.line for item in items] == list(range(1, 301))
    assert [(item.text, item.domain) for item in items[:298]] == [(row["text"], row["dump"]) for row in rows[:298]]
    assert items[298] == Reject(shard, 299, "no text", "CC-0")
    assert list(sources.read(parts[1])) == items[100:200]
    assert reader.text_bytes == sum(part.text_bytes for part in parts) and 0 < reader.file_bytes < shard.size
    for limit in ({"max_lines": 130}, {"max_bytes": 130_000}):
        head = cut(shard._replace(**limit), 90_000)
        assert 110 < sum(len(list(sources.read(part))) for part in head) < 140 and not head[-1].is_last


def test_parquet_has_nested_fields(tmp_path: pathlib.Path) -> None:
    rows = [{"text": "a", "meta": {"redpajama_set_name": "C4", "more": 1}, "tags": ["x"], "page": {"body": "b"}}]
    shard = write_parquet(tmp_path / "a.parquet", rows, 10)
    (part,) = cut(shard, 1000)
    assert [item[:2] for item in sources.read(part)] == [("a", "C4")]
    (part,) = cut(shard._replace(text_field="page.body"), 1000)
    assert [item[:2] for item in sources.read(part)] == [("b", "C4")]


def test_damaged_parquet_costs_its_row_group_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.parquet"
    shard = write_parquet(path, [{"text": text(i)} for i in range(300)], 100)
    content = bytearray(path.read_bytes())
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 2000] = bytes(2000)
    path.write_bytes(content)
    items = [item for part in cut(shard, 100_000) for item in sources.read(part)]
    (reject,) = (item for item in items if isinstance(item, Reject))
    assert reject.line == 101 and reject.reason.startswith("damaged file: ") and 0 < reject.lost_bytes < shard.size / 2
    assert [item.text for item in items if isinstance(item, Document)] == [text(i) for i in (*range(100), *range(200, 300))]
    path.write_bytes(content[:-100])
    (reject,) = (item for part in cut(shard, 100_000) for item in sources.read(part))
    assert (reject.line, reject.lost_bytes) == (0, shard.size) and reject.reason.startswith("damaged file: ")


class Unreliable(io.BytesIO):
    """A file whose connection breaks at the first read behind `reads` others."""

    def __init__(self, content: bytes, error: Exception, reads: int):
        super().__init__(content)
        self.error, self.left = error, reads

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("reads", [0, 2])
@pytest.mark.parametrize("error", [TimeoutError(), aiohttp.ClientError("reset"), aiohttp.ClientOSError(), OSError("Forbidden")])
def test_a_broken_connection_is_no_damage_of_a_parquet_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reads: int
) -> None:
    """None of these errors has a number."""
    shard = write_parquet(tmp_path / "a.parquet", [{"text": text(i)} for i in range(300)], 100)
    content = pathlib.Path(shard.name).read_bytes()
    monkeypatch.setattr(listing, "open_binary", lambda name: Unreliable(content, error, reads))
    with pytest.raises(type(error)):
        list(sources.read(Part(shard, 0, 300, 1, 0, True)))
    on_hub = shard._replace(name="hf://datasets/org/set/a.parquet")
    with pytest.raises(MachineError, match=r"hf://datasets/org/set/a\.parquet: the Hugging Face Hub failed"):
        list(sources.read(Part(on_hub, 0, 300, 1, 0, True)))
    if not reads:
        with pytest.raises(type(error)):
            cut(shard, 100_000)


def test_a_large_row_group_is_cut_too(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.parquet"
    shard = write_parquet(path, [{"text": text(i)} for i in range(1000)], 1000)
    parts = cut(shard, 100_000)
    assert 9 < len(parts) < 13 and parts[-1].is_last and parts[-1].end == 1000
    reader = sources.Reader()
    items = [item for part in parts for item in reader.read(part)]
    assert [item.line for item in items] == list(range(1, 1001)) and items[-1].text == text(999)
    assert reader.file_bytes <= shard.size
    assert list(sources.read(parts[7])) == items[parts[7].start : parts[7].end] == list(reader.read(parts[7]))
    reader.close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    for read_part in (sources.read, sources.Reader().read):
        items = [item for part in parts for item in read_part(part)]
        assert [item.line for item in items] == list(range(1, len(items) + 1)) and 300 < len(items) < 600
        assert [isinstance(item, Reject) for item in items] == [False] * (len(items) - 1) + [True]


def test_a_large_row_group_is_read_in_little_memory(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([f"{i} {'long text ' * 4000}" for i in range(1000)])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "other": texts}), path, use_dictionary=False, write_batch_size=16)
    del texts
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    (part,) = cut(Shard(str(path), 0, "", size=path.stat().st_size), 1 << 30)
    peak = 0
    for _ in sources.read(part):
        peak = max(peak, pool.bytes_allocated() - before)
    assert part.text_bytes > 35 << 20 and peak < 20 << 20


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("sts/train.tsv", "sts"),
        ("sts/dev.tsv", "sts"),
        ("nq/dev.jsonl", "nq"),
        ("nli/dev.csv.gz", "nli"),
        ("sts-dev.csv", "sts"),
        ("quora_pairs.tsv.zst", "quora_pairs"),
        ("devices.tsv", "devices"),
    ],
)
def test_the_domain_of_a_file_has_no_split_and_no_suffix(path: str, domain: str) -> None:
    assert schemas.name_of_corpus(path) == domain
