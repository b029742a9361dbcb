"""Kills a run with SIGKILL at random moments, starts it again each time, and compares it with an unbroken run.

  python tests/faults/kill_resume.py --kills=50                   one process
  python tests/faults/kill_resume.py --kills=10 --processes=2     two processes; kills one of them, or both
  python tests/faults/kill_resume.py --kills=5 --prepare          kills the preparation of a dataset instead
  python tests/faults/kill_resume.py --kills=10 --recipe=finetune the run of another recipe

The run is by default the MoCo recipe with dropout and a checkpoint every few steps, on a small dataset made here; it takes
minutes.
Exit status 1 if parameters, losses or batches differ from those of the unbroken run.
"""

import argparse
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).parent.parent), str(pathlib.Path(__file__).parent.parent.parent)]

import conftest
import numpy as np

OPTIONS = [
    "--config.model.dropout=0.2",
    "--config.log_every=10",
    "--silent_seconds=10",
    "--hang_seconds=40",
    "--join_seconds=20",
]


def launch(arguments: argparse.Namespace, dataset: pathlib.Path, workdir: pathlib.Path) -> list[subprocess.Popen]:
    """Starts the run, in one process or two."""
    more = [
        *OPTIONS,
        *(f"--{option}" for option in arguments.option),
        f"--config.steps={arguments.steps}",
        f"--config.checkpoint_every={arguments.every}",
    ]
    if arguments.processes == 2:
        return conftest.peers(dataset, workdir, *more, name=arguments.recipe, devices=1)
    return [conftest.start(conftest.command(dataset, workdir, *more, name=arguments.recipe))]


def reached(workdir: pathlib.Path) -> int:
    """Returns the newest step in metrics.jsonl, or 0."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
    return int(steps[-1]) if steps else 0


def kill_at_random(team: list[subprocess.Popen], workdir: pathlib.Path, chance: random.Random) -> bool:
    """Kills a run after a random time; returns whether it was still running."""
    before, began = reached(workdir), time.monotonic()
    if chance.random() < 0.8:  # else in the start: imports, restoring, compiling
        while reached(workdir) <= before and all(process.poll() is None for process in team):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 3))
    else:
        time.sleep(chance.uniform(0, 12))
    victims = [process for process in chance.sample(team, chance.randint(1, len(team))) if process.poll() is None]
    for process in victims:
        process.kill()
    moment = time.monotonic()
    ends = [process.communicate(timeout=60)[0] for process in team]
    for process, output in zip(team, ends, strict=True):
        if process not in victims and process.returncode:
            named = re.search(r"(?m)^error: (process \d .*)$", output)
            print(
                f"  the other ended {time.monotonic() - moment:.1f} s later: {named[1] if named else output[-2000:]}",
                flush=True,
            )
            if not named:
                raise SystemExit(1)
    print(f"killed {len(victims)} after {moment - began:.1f} s, step {reached(workdir)}", flush=True)
    return bool(victims)


def final(output: str) -> str:
    """Returns the last parameters digest in the output of a run."""
    return re.findall(r"parameters digest: (\w+)", output)[-1]


def curve(workdir: pathlib.Path) -> list[tuple]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["batch_digest"]) for line in lines]


def train(arguments: argparse.Namespace, folder: pathlib.Path, chance: random.Random) -> bool:
    """Returns whether the broken run equals the unbroken one."""
    lengths = np.random.default_rng(1).integers(5, 97, 150).tolist()
    sizes = {"train": lengths, "validation": [50] * 60}
    dataset = conftest.write_dataset(folder / "data", sizes)
    pairs = {split: [max(9, size) for size in of_split] for split, of_split in sizes.items()}
    conftest.write_dataset(dataset / "pairs", pairs, fields=3, hard_negatives=1, labels=[0.0, 1.0])
    whole = conftest.finish(*launch(arguments, dataset, folder / "whole"))[0]
    kills = 0
    while kills < arguments.kills:
        team = launch(arguments, dataset, folder / "broken")
        if not kill_at_random(team, folder / "broken", chance):
            print(f"the run ended after {kills} kills: give more --steps")
            return False
        kills += 1
    broken = conftest.finish(*launch(arguments, dataset, folder / "broken"))[0]
    print(f"unbroken: {final(whole)}\nbroken:   {final(broken)} after {kills} kills")
    # A kill can lose lines of steps before the newest checkpoint; the resumed run does not write them again.
    written = dict((step, rest) for step, *rest in curve(folder / "whole"))
    same = all(written[step] == rest for step, *rest in curve(folder / "broken"))
    print(f"losses and batch digests of {len(curve(folder / 'broken'))} lines: {'the same' if same else 'DIFFERENT'}")
    return same and final(whole) == final(broken)


def prepare(arguments: argparse.Namespace, folder: pathlib.Path, chance: random.Random) -> bool:
    """Returns whether a dataset prepared after kills equals one that was prepared without."""
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(1, 9))) for _ in range(2000)]
    texts = [" ".join(chance.choices(words, k=200)) for _ in range(300)]
    shard = folder / "text.jsonl"
    shard.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(texts)))

    def begin(output: pathlib.Path) -> subprocess.Popen:
        more = [f"--input={shard}", f"--output={output}", "--vocab_size=512", "--sample_mb=1"]
        return conftest.start([sys.executable, "-m", "contrastive_jax", "prepare", *more])

    began = time.monotonic()
    conftest.finish(begin(folder / "whole"))
    lasts = time.monotonic() - began
    for _ in range(arguments.kills):
        process = begin(folder / "broken")
        time.sleep(chance.uniform(0.2, 0.9) * lasts)
        process.kill()
        process.communicate()
        print(f"killed; there is {sorted(path.name for path in folder.glob('broken*'))}", flush=True)
    conftest.finish(begin(folder / "broken"))
    hashes = [json.loads((folder / name / "manifest.json").read_text())["content_hash"] for name in ("whole", "broken")]
    print(f"content: {hashes}")
    return hashes[0] == hashes[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--recipe", default="moco", help="a recipe of configs/, without variant")
    parser.add_argument("--option", action="append", default=[], help="an override, as config.micro_batch=6")
    parser.add_argument("--steps", type=int, default=2500, help="of the whole run; it must outlast the kills")
    parser.add_argument("--every", type=int, default=7, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepare", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        test = prepare if arguments.prepare else train
        sys.exit(0 if test(arguments, pathlib.Path(folder), random.Random(arguments.seed)) else 1)


if __name__ == "__main__":
    main()
