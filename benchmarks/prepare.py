"""Measures `prepare` on a text of any size: MB/s, the peak memory of all its processes, and what a killed run costs.

  python -m benchmarks.prepare --input='corpus/train-*.jsonl.zst' --validation='corpus/val-*.jsonl.zst' --gb=5 --work=/tmp/bench
  python -m benchmarks.prepare ... --memory_gb=3 --kills=8           the same content after SIGKILL at eight random moments
  python -m benchmarks.prepare ... --gb=0 --code=/tmp/older ...           the input as it is, by another checkout

The text is made of copies of the input. Copy k of a document begins with "copy k" on a line of its own, so that no two of its
documents are equal. Copies are dealt to --files large files of .jsonl.zst. The text is kept in --work for the next call.

Memory is the sum of the resident sets of all processes of the run, from /proc, five times a second. Pages that processes share
count for each of them. With --kills the run is started, killed with all its processes (SIGKILL to the group) after a random
time, and started again; each outcome of a task that was there at a kill must still be there, unchanged, at the end.
"""

import glob
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import zstandard
from absl import app, flags

INPUT = flags.DEFINE_string("input", None, "Glob of .jsonl.zst files of the train split.", required=True)
VALIDATION = flags.DEFINE_string("validation", None, "Glob of .jsonl.zst files of the validation split.", required=True)
GB = flags.DEFINE_float("gb", 5.0, "GB of text to make of the input; 0: the input as it is.")
FILES = flags.DEFINE_integer("files", 8, "Files of the train split that are made.")
WORK = flags.DEFINE_string("work", "/tmp/benchmark-prepare", "Folder of the text and the datasets.")
MEMORY_GB = flags.DEFINE_float("memory_gb", 0.0, "Passed on to prepare, unless it is 0.")
WORKERS = flags.DEFINE_integer("workers", 2, "Passed on to prepare, unless it is 0.")
KILLS = flags.DEFINE_integer("kills", 0, "How often the second run is killed.")
SEED = flags.DEFINE_integer("seed", 0, "Of the moments of the kills.")
CODE = flags.DEFINE_string("code", str(pathlib.Path(__file__).parents[1]), "The checkout whose prepare is measured.")
MODULE = flags.DEFINE_string("module", "contrastive_jax prepare", "What runs there: a module and its first argument.")
FLAGS = flags.DEFINE_multi_string("flag", [], "More flags of prepare, such as --flag=--vocab_size=8192.")


class Run(NamedTuple):
    """What a run took: seconds, and the peak memory in bytes."""

    seconds: float
    peak: int


def copied_lines(paths: list[str], copy: int) -> Iterator[bytes]:
    """Yields the lines of a copy of the input."""
    for path in paths:
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            rest = b""
            while chunk := stream.read(1 << 20):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    head, mark, text = line.partition(b'"text": "')
                    yield head + mark + b"copy %d\\n" % copy + text + b"\n"


def make_text(folder: pathlib.Path, size: float) -> tuple[str, str]:
    """Makes the text of about `size` bytes, unless it is there; returns the globs of train and validation."""
    globs = f"{folder}/train-*.jsonl.zst", f"{folder}/val-*.jsonl.zst"
    if (folder / "whole").exists():
        return globs
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train = sorted(glob.glob(INPUT.value))
    of_input = sum(map(len, copied_lines(train, 0)))
    copies = max(1, round(size / of_input))
    for number in range(min(FILES.value, copies)):
        path = folder / f"train-{number:05d}.jsonl.zst"
        with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
            for copy in range(number, copies, FILES.value):
                for line in copied_lines(train, copy):
                    stream.write(line)
    path = folder / "val-00000.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for line in copied_lines(sorted(glob.glob(VALIDATION.value)), 0):
            stream.write(line)
    (folder / "whole").touch()
    return globs


def command(globs: tuple[str, str], output: pathlib.Path) -> list[str]:
    """Returns the command line of a run."""
    more = [f"--{flag.name}={flag.value}" for flag in (MEMORY_GB, WORKERS) if flag.value]
    inputs = [f"--input={globs[0]}", f"--validation={globs[1]}", f"--output={output}"]
    return [sys.executable, "-m", *MODULE.value.split(), *inputs, *more, *FLAGS.value]


def memory_of_group(group: int) -> int:
    """Returns the bytes of the resident sets of all processes of a process group."""
    total = 0
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            fields = pathlib.Path(stat).read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has just ended
        if int(fields[2]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def run(arguments: list[str], kill_after: float | None = None) -> Run | None:
    """Runs a command in a process group of its own; returns None if it was killed."""
    began, peak, ended = time.monotonic(), [0], threading.Event()
    process = subprocess.Popen(arguments, cwd=CODE.value, start_new_session=True)

    def sample() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], memory_of_group(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        status = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    finally:
        ended.set()
        sampler.join()
    if status:
        sys.exit(f"prepare ended with status {status}")
    return Run(time.monotonic() - began, peak[0])


def run_with_kills(arguments: list[str], output: pathlib.Path, seconds: float) -> str:
    """Runs prepare and kills it at random moments; returns what came of it."""
    chance, tasks = random.Random(SEED.value), output.with_name(f"{output.name}.incomplete") / ".work" / "tasks"
    finished: dict[str, float] = {}
    repeated, kills, began = 0, 0, time.monotonic()
    while True:
        # After the last kill, and if a run is whole before its kill, nothing is left to kill.
        ended = run(arguments, chance.uniform(0.2, 1.2 * seconds / KILLS.value) if kills < KILLS.value else None)
        now = {path.name: path.stat().st_mtime for path in tasks.glob("[!.]*")} if tasks.exists() else {}
        repeated += sum(now.get(name, changed) != changed for name, changed in finished.items()) if ended is None else 0
        finished |= now
        if ended:
            break
        kills += 1
        print(f"kill {kills}: {len(now)} tasks were done", flush=True)
    return f"{kills} kills, {repeated} finished tasks ran again, {time.monotonic() - began:.0f} s in all"


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    del arguments
    work = pathlib.Path(WORK.value)
    globs = make_text(work / f"text-{GB.value:g}", GB.value * 1e9) if GB.value else (INPUT.value, VALIDATION.value)
    outputs = [work / name for name in ("whole", "killed")]
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(output.with_name(f"{output.name}.incomplete"), ignore_errors=True)
    whole = run(command(globs, outputs[0]))
    if whole is None:
        sys.exit("prepare was killed")
    manifest = json.loads((outputs[0] / "manifest.json").read_text())
    size = sum(split["bytes"] for split in manifest["splits"].values()) / 1e6
    print(f"{size:,.0f} MB of text in {whole.seconds:.0f} s: {size / whole.seconds:.2f} MB/s, peak {whole.peak / 1e9:.2f} GB")
    if KILLS.value:
        print(run_with_kills(command(globs, outputs[1]), outputs[1], whole.seconds))
        hashes = [json.loads((output / "manifest.json").read_text())["content_hash"] for output in outputs]
        print(f"content {hashes[0][:16]} and {hashes[1][:16]}: {'the same' if hashes[0] == hashes[1] else 'DIFFERENT'}")


if __name__ == "__main__":
    app.run(main)
