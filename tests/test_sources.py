"""Raw documents: every good line before any damage, and every bad line by file, line and reason."""

import gzip
import json
import os
import pathlib
import tracemalloc

import pytest
import zstandard
from etils import epath
from faults import fuzz_shards

from contrastive_jax.data import sources
from contrastive_jax.data.sources import DataError, Document, Reject, Shard


def line(text: object, domain: object = "A") -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}}).encode() + b"\n"


def read(path: pathlib.Path) -> tuple[list[str], list[tuple[int, str]]]:
    items = list(sources.read(Shard(str(path), 0, "")))
    texts = [item.text for item in items if isinstance(item, Document)]
    return texts, [(item.line, item.reason) for item in items if isinstance(item, Reject)]


def text(number: int) -> str:
    return f"text {number} " + os.urandom(500).hex()  # hardly compressible, so that a cut file loses few lines


COMPRESS = {
    ".jsonl": lambda content: content,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_formats(tmp_path: pathlib.Path, suffix: str) -> None:
    texts = [text(i) for i in range(50)]
    parts = [b"".join(map(line, texts[:20])), b"\n" + b"".join(map(line, texts[20:]))[:-1]]
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(b"".join(map(COMPRESS[suffix], parts)))  # two frames, a blank line, no line feed at the end
    assert read(path) == (texts, [])
    assert [item.line for item in sources.read(Shard(str(path), 0, ""))][19:22] == [20, 22, 23]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_file_keeps_the_lines_before(tmp_path: pathlib.Path, suffix: str) -> None:
    texts = [text(i) for i in range(3000)]
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


def test_domain_is_unknown_where_it_is_missing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b", "meta": {}}\n{"text": "c", "meta": "x"}\n' + line("d", 7) + line("e"))
    assert [item.domain for item in sources.read(Shard(str(path), 0, ""))] == ["unknown"] * 4 + ["A"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_empty_shard(tmp_path: pathlib.Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(COMPRESS[suffix](content) if content else b"")
    assert read(path) == ([], [(0, "empty shard")])


def test_a_bomb_is_one_bad_line_in_bounded_memory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
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


def test_globs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["b.jsonl", "a.jsonl", "c.txt"]:
        (tmp_path / name).write_bytes(line("x"))
    shards = sources.file_shards([f"{tmp_path}/b*", f"{tmp_path}/*.jsonl"], "train", "input")
    assert [(pathlib.Path(s.name).name, s.order, s.split) for s in shards] == [
        ("b.jsonl", 0, "train"),
        ("a.jsonl", 1, "train"),
    ]
    monkeypatch.chdir(tmp_path)
    assert [shard.name for shard in sources.file_shards(["c.txt"], "", "input")] == ["c.txt"]
    with pytest.raises(DataError, match=r"--validation=nowhere-\*\.zst: no file matches"):
        sources.file_shards(["nowhere-*.zst"], "validation", "validation")


@pytest.fixture
def installation(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A small Python installation: a standard library, two packages, and what must not be taken."""
    prose = [" ".join(f"reads line{i} word{j}" for j in range(8)) for i in range(60)]
    body = [
        "\n".join(prose[i : i + 5]) + f"\n# module {'abcdefghijkl'[i // 5]} has an ending of its own\n" for i in range(0, 60, 5)
    ]
    licence = "# Copyright someone\n# Licensed under the Apache License\n\n"
    files = {
        "lib/json.py": body[0],
        "lib/test/test_json.py": body[1],
        "site/alpha/one.py": licence + body[2],
        "site/alpha/README.md": body[3],
        "site/alpha/copy.py": "\n" + body[2] + "  \n",
        "site/alpha/LICENSE.txt": body[4],
        "site/alpha/_vendor/beta/two.py": body[5],
        "site/alpha/table.py": "x = [\n" + "0x12, 0x34, 0x56,\n" * 50 + "]\n",
        "site/alpha/made_pb2.py": body[6],
        "site/alpha/made.py": "# Generated by a tool. DO NOT EDIT\n" + body[7],
        "site/alpha/short.py": "words = 1\n",
        "site/alpha-1.dist-info/METADATA": "Name: alpha\nVersion: 1\n\n" + body[8],
        "site/beta.py": body[9],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    paths = {"stdlib": str(tmp_path / "lib"), "purelib": str(tmp_path / "site"), "platlib": str(tmp_path / "site")}
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(sources.pydoc_data.topics, "topics", {"loops": body[10]})
    return tmp_path


def documents(directory: pathlib.Path) -> list[tuple[str, str]]:
    directory.mkdir()
    sources.write_python_documents(epath.Path(directory))
    items = list(sources.read(Shard(f"{directory}/python.jsonl", 0, "")))
    found = [(item.domain, item.text) for item in items if isinstance(item, Document)]
    assert len(found) == len(items)
    return found


def test_python_documents(installation: pathlib.Path) -> None:
    found = documents(installation / "out")
    domains = sorted(domain for domain, _ in found)
    assert domains == ["alpha"] * 3 + ["beta", "python reference", "python standard library"]
    assert not any("Copyright" in text or text.startswith("Name:") for _, text in found)


def test_python_documents_do_not_depend_on_the_listing(installation: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PYTHON_BYTES_A_PACKAGE", 1000)
    found = documents(installation / "out")
    assert sum(domain == "alpha" for domain, _ in found) < 3
    walk = os.walk
    monkeypatch.setattr(sources.os, "walk", lambda top: ((a, b, c[::-1]) for a, b, c in reversed(list(walk(top)))))
    assert documents(installation / "again") == found


def test_random_damage_is_told_and_costs_no_line_before_it() -> None:
    found = fuzz_shards.run(cases=300, seed=1, large=False)
    assert found["sound"] > 1000 and found["damaged"] > 10
