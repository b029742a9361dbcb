"""Reads file shards with random damage: the reader may not crash, hang, fill memory, or lose a good line before the damage.

  python tests/faults/fuzz_shards.py --cases=2000

The lines are good, or have broken JSON or UTF-8, a text that is null, a number, a list or absent, nested meta, lone surrogates,
or 50 MB. The files are plain, gzip, Zstandard, bzip2 or xz, of one frame or several, with the suffix of their format or of
another, whole, empty, truncated, with flipped bits, or decompression bombs. They are read as a whole and in parts of any size.
"""

import argparse
import bz2
import functools
import gzip
import itertools
import json
import lzma
import pathlib
import random
import resource
import sys
import tempfile
import time
import zlib
from typing import NamedTuple

import zstandard

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))

from contrastive_jax.data.raw import sources, text_stream
from contrastive_jax.data.raw.parts import cut

SECONDS = 20
MAX_MEMORY_MB = 1200
KILOBYTE = 1024  # what the reader decodes at once: damage may cost the lines that end in the same kilobyte


class Line(NamedTuple):
    """A line of a file, and the text that must be read from it; None: the line must be rejected."""

    content: bytes
    text: str | None


class Damage(NamedTuple):
    """What was done to a file; the bytes before `first` are unchanged."""

    name: str
    first: int
    content: bytes


def make_line(chance: random.Random, number: int) -> Line:
    """Returns a good line, or, one time in three, a bad or strange one."""
    text = f"{number} " + "".join(chance.choices('abc äöü 漢字 \U0001f600 \\ " \u2028 \r', k=chance.randint(1, 300)))
    good = {"text": text, "meta": {"pile_set_name": chance.choice(["A", "../../B", "x" * 300, ""])}}
    if chance.random() < 0.67:
        return Line(json.dumps(good, ensure_ascii=chance.random() < 0.5).encode(), text)
    deep = b'{"text": "deep", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return chance.choice(
        [
            Line(json.dumps(good).encode()[:-2], None),
            Line(b'{"text": "\xff\xfe"}', None),
            Line(b'{"text": null}', None),
            Line(b'{"text": 17, "meta": 3}', None),
            Line(b'{"text": ["a", "b"]}', None),
            Line(b'{"meta": {"pile_set_name": "A"}}', None),
            Line(b'{"text": ""}', None),
            Line(b'{"text": " \\n\\t "}', None),
            Line(b'{"text": "\\ud800"}', None),
            Line(b'{"text": "a", "meta": {"pile_set_name": "\\udfff"}}', None),
            Line(b"[1, 2]", None),
            Line(b'"text"', None),
            Line(b"\x00\x01\x02", None),
            Line(b'{"text": "nan", "meta": NaN}', "nan"),
            Line(b'{"text": "twice", "text": "last"}', "last"),
            Line(b'{"text": "meta is a list", "meta": [{"pile_set_name": "A"}]}', "meta is a list"),
            Line(b'{"text": "name is nested", "meta": {"pile_set_name": {"a": []}}}', "name is nested"),
            Line(deep, None),
            Line(b'{"text": 1' + b"0" * 10_000 + b"}", None),
        ]
    )


def compress(content: bytes, suffix: str, chance: random.Random) -> bytes:
    """Returns the bytes of a file with this suffix; now and then they have several frames or members."""
    cuts = sorted({0, len(content), *(chance.randint(0, len(content)) for _ in range(chance.choice([0, 0, 3])))})
    parts = [content[a:b] for a, b in itertools.pairwise(cuts)] or [b""]
    if suffix == ".zst":
        options = {"level": chance.choice([1, 3]), "write_checksum": chance.random() < 0.5}
        return b"".join(zstandard.ZstdCompressor(**options).compress(part) for part in parts)
    packers = {".gz": functools.partial(gzip.compress, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress}
    return b"".join(map(packers[suffix], parts)) if suffix in packers else content


def whole_lines(content: bytes, path: pathlib.Path) -> int:
    """Returns how many line feeds can be read from bytes that may end anywhere, with the help of a file."""
    count = 0
    path.write_bytes(content)
    stream = text_stream.TextStream(str(path))
    try:
        for piece in stream.chunks():
            count += piece.count(b"\n")
    except text_stream.DamagedError:
        pass
    finally:
        stream.close()
        path.unlink()
    return count


def damage(content: bytes, chance: random.Random) -> Damage:
    """Truncates or changes the content of a file, or leaves it as it is."""
    kind = chance.choice(["none", "none", "truncated", "flipped", "overwritten"])
    if kind == "none" or not content:
        return Damage("none", len(content), content)
    first = chance.randrange(len(content))
    if kind == "truncated":
        return Damage(kind, first, content[:first])
    if kind == "flipped":
        return Damage(
            kind, first, content[:first] + bytes([content[first] ^ (1 << chance.randrange(8))]) + content[first + 1 :]
        )
    size = chance.randint(1, 100)
    return Damage(kind, first, content[:first] + chance.randbytes(size) + content[first + size :])


def check(path: pathlib.Path, lines: list[Line], suffix: str, done: Damage, part_bytes: int) -> dict[str, int]:
    """Reads one shard, in parts and as a whole, and compares the result with its lines; returns counts."""
    began = time.monotonic()
    accepted: dict[int, str] = {}
    rejected: dict[int, str] = {}
    shard = sources.Shard(str(path), 0, "")
    reader, parts = sources.Reader(), cut(shard, part_bytes)
    items = [item for part in parts for item in reader.read(part)]
    reader.close()
    whole = list(sources.read(sources.Part(shard, 0, 0, 1, 0, True)))
    assert items == whole, f"{len(parts)} parts of {part_bytes} bytes are not the whole"
    if len(parts) < 20:
        alone = [item for part in reversed(parts) for item in reversed(list(sources.read(part)))]
        assert alone == whole[::-1], "a part that is read alone is another"
    for item in items:
        if isinstance(item, sources.Document):
            accepted[item.line] = item.text
        else:
            str(item)
            rejected[item.line] = item.reason
    seconds = time.monotonic() - began
    assert seconds < SECONDS, f"{seconds:.0f} s"
    assert not accepted.keys() & rejected.keys()
    if done.name == "none":
        sound = len(lines)
        assert len(accepted) + len(rejected) == max(len(lines), 1), "accepted + rejected = lines"
    else:
        intact = done.first if suffix == ".jsonl" else done.first // KILOBYTE * KILOBYTE
        sound = whole_lines(done.content[:intact], path.with_name(f"intact{suffix}"))
    for number, line in enumerate(lines[:sound], start=1):
        assert accepted.get(number) == line.text, f"line {number} of {sound} sound ones"
        assert (line.text is None) == (number in rejected), f"line {number}"
    return {"accepted": len(accepted), "rejected": len(rejected), "sound": sound}


def bomb(suffix: str) -> bytes:
    """Returns a gigabyte of zeros, compressed to less than a megabyte."""
    zeros = bytes(1 << 20)
    if suffix == ".zst":
        compressor = zstandard.ZstdCompressor().compressobj()
        return b"".join(compressor.compress(zeros) for _ in range(1024)) + compressor.flush()
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(zeros) for _ in range(1024)) + packer.flush()


def run(cases: int, seed: int, large: bool = True) -> dict[str, int]:
    """Checks `cases` shards; returns counts.

    Args:
      cases: how many.
      seed: of all that is random; with the number of a case it gives the same file again.
      large: whether to include lines of 50 MB and decompression bombs.

    Raises:
      AssertionError: a shard was not read as it should; the message names the case.
    """
    totals = dict.fromkeys(("cases", "damaged", "accepted", "rejected", "sound"), 0)
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            chance = random.Random(f"{seed}-{case}")
            suffix = chance.choice([".jsonl", ".zst", ".zst", ".gz", ".gz", ".bz2", ".xz"])
            lines = [make_line(chance, number) for number in range(chance.choice([0, 1, 20, 200]))]
            if large and case % 100 == 7:
                lines.insert(len(lines) // 2, Line(json.dumps({"text": "z" * 50_000_000}).encode(), "z" * 50_000_000))
            content = b"".join(line.content + b"\n" for line in lines)
            packed = compress(content, suffix, chance)
            name = suffix
            if large and case % 500 == 11 and suffix in (".zst", ".gz"):
                lines, done = [Line(b"", None)], Damage("none", 0, bomb(suffix))
            elif chance.random() < 0.1:  # with the suffix of another format, all of it is damage
                name = chance.choice([".jsonl", ".zst", ".gz", ".bz2", ".xz", ".txt"])
                done = Damage("none" if name == suffix else "misnamed", 0, packed)
                done = done._replace(name="none") if {name, suffix} == {".txt", ".jsonl"} else done
            else:
                done = damage(packed, chance)
            path = pathlib.Path(folder) / f"{case}{name}"
            path.write_bytes(done.content)
            try:
                found = check(path, lines, suffix, done, chance.choice([50, 1000, 20_000, 10**9]))
            except Exception as error:
                raise AssertionError(f"--seed={seed}, case {case}, {name}, {done.name} at {done.first}: {error!r}") from error
            path.unlink()
            totals["cases"] += 1
            totals["damaged"] += done.name != "none"
            for key, value in found.items():
                totals[key] += value
            if case % 200 == 199:
                print(totals, flush=True)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(run(arguments.cases, arguments.seed))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MB")
    assert peak < MAX_MEMORY_MB, "memory"


if __name__ == "__main__":
    main()
