"""Reads shards with random damage: nothing may crash, hang, fill memory, or lose a good line that lies before the damage.

  python tests/faults/fuzz_shards.py --cases=2000

Lines: good ones, broken JSON and UTF-8, null, number, list or absent text, nested meta, lone surrogates, 50 MB. Files: plain,
gzip, Zstandard, of one frame or several, under their own name or another's, empty, truncated, with flipped bits; decompression
bombs.
"""

import argparse
import gzip
import itertools
import json
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

from contrastive_jax.data import sources

SECONDS = 20
MAX_MEMORY_MB = 1200
KILOBYTE = 1024  # the reader's: damage costs what ends in the same one


class Line(NamedTuple):
    """What stands in a file, and the text that shall be read from it; None: to be rejected."""

    content: bytes
    text: str | None


class Damage(NamedTuple):
    """What was done to a file; bytes before `first` are as they were."""

    name: str
    first: int
    content: bytes


def make_line(chance: random.Random, number: int) -> Line:
    """A good line, or, one time in three, a bad one."""
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
    """The bytes of a file of this suffix; several frames or members now and then."""
    cuts = sorted({0, len(content), *(chance.randint(0, len(content)) for _ in range(chance.choice([0, 0, 3])))})
    parts = [content[a:b] for a, b in itertools.pairwise(cuts)] or [b""]
    if suffix == ".zst":
        options = {"level": chance.choice([1, 3]), "write_checksum": chance.random() < 0.5}
        return b"".join(zstandard.ZstdCompressor(**options).compress(part) for part in parts)
    if suffix == ".gz":
        return b"".join(gzip.compress(part, mtime=0) for part in parts)
    return content


def whole_lines(content: bytes, suffix: str) -> int:
    """How many line feeds can be read from bytes that may end anywhere."""
    if suffix == ".jsonl":
        return content.count(b"\n")
    count = 0
    try:
        for piece in sources._decompressed(
            iter([content[i : i + KILOBYTE] for i in range(0, len(content), KILOBYTE)]),
            zstandard.ZstdDecompressor().decompressobj if suffix == ".zst" else lambda: zlib.decompressobj(wbits=31),
        ):
            count += piece.count(b"\n")
    except (EOFError, zlib.error, zstandard.ZstdError):
        pass
    return count


def damage(content: bytes, chance: random.Random) -> Damage:
    """Truncates or changes a file, or leaves it."""
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


def check(path: pathlib.Path, lines: list[Line], suffix: str, done: Damage) -> dict[str, int]:
    """Reads one shard and compares it with what stands in it."""
    began = time.monotonic()
    accepted: dict[int, str] = {}
    rejected: dict[int, str] = {}
    for item in sources.read(sources.Shard(str(path), 0, "")):
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
        sound = whole_lines(done.content[:intact], suffix)
    for number, line in enumerate(lines[:sound], start=1):
        assert accepted.get(number) == line.text, f"line {number} of {sound} sound ones"
        assert (line.text is None) == (number in rejected), f"line {number}"
    return {"accepted": len(accepted), "rejected": len(rejected), "sound": sound}


def bomb(suffix: str) -> bytes:
    """A gigabyte of zeros in less than a megabyte."""
    zeros = bytes(1 << 20)
    if suffix == ".zst":
        compressor = zstandard.ZstdCompressor().compressobj()
        return b"".join(compressor.compress(zeros) for _ in range(1024)) + compressor.flush()
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(zeros) for _ in range(1024)) + packer.flush()


def run(cases: int, seed: int, large: bool = True) -> dict[str, int]:
    """Checks so many shards; returns counts.

    Raises:
      AssertionError: the message names the case, which --seed and its number give again.
    """
    totals = dict.fromkeys(("cases", "damaged", "accepted", "rejected", "sound"), 0)
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            chance = random.Random(f"{seed}-{case}")
            suffix = chance.choice([".jsonl", ".zst", ".gz"])
            lines = [make_line(chance, number) for number in range(chance.choice([0, 1, 20, 200]))]
            if large and case % 100 == 7:
                lines.insert(len(lines) // 2, Line(json.dumps({"text": "z" * 50_000_000}).encode(), "z" * 50_000_000))
            content = b"".join(line.content + b"\n" for line in lines)
            packed = compress(content, suffix, chance)
            name = suffix
            if large and case % 500 == 11 and suffix != ".jsonl":
                lines, done = [Line(b"", None)], Damage("none", 0, bomb(suffix))
            elif chance.random() < 0.1:  # under another's name everything is damage
                name = chance.choice([".jsonl", ".zst", ".gz", ".txt"])
                done = Damage("none" if name == suffix else "misnamed", 0, packed)
                done = done._replace(name="none") if {name, suffix} == {".txt", ".jsonl"} else done
            else:
                done = damage(packed, chance)
            path = pathlib.Path(folder) / f"{case}{name}"
            path.write_bytes(done.content)
            try:
                found = check(path, lines, suffix, done)
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
