"""Counts the storage requests of a run of the debug recipe, at an emulator.

    bash launch/local.sh && python -m tests.cloud.count_requests --data=data/python     # prints the table of docs/operations.md

Workdir and data lie on one bucket; the data are copied there first. A step's requests are the difference between a run of few
steps and one of many, both without checkpoints; a checkpoint's and a resume's are counted in their own runs.
"""

import argparse
import collections
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from cloud.emulators import ROOT, gcs_environment, make_bucket, start_gcs, upload
from cloud.proxy import Proxy

STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=pathlib.Path, help="a prepared dataset")
    parser.add_argument(
        "--flag", action="append", default=[], help="a further flag of train, such as --config.data.batch_size=32"
    )
    values = parser.parse_args()
    rows: dict[str, collections.Counter[str]] = {}
    with start_gcs() as address, Proxy(address) as proxy:
        bucket = make_bucket("gs", address)
        upload(values.data, f"{bucket}/data", address)

        def count(command: str, *flags: str) -> collections.Counter[str]:
            """The requests of one command by kind and kind of file."""
            proxy.control("/_proxy/counts?counts=0")
            arguments = [sys.executable, "-m", "contrastive_jax", command, *flags]
            subprocess.run(arguments, cwd=ROOT, env=os.environ | gcs_environment(proxy.address), check=True)
            return collections.Counter(kind for kind, _, _ in proxy.requests)

        def train(name: str, steps: int, every: int) -> collections.Counter[str]:
            flags = [
                "--config.eval_every=0",
                "--config.optim.warmup_steps=2",
                f"--config.steps={steps}",
                f"--config.checkpoint_every={every}",
                *values.flag,
            ]
            return count(
                "train", "--config=configs/debug.py", f"--workdir={bucket}/{name}", f"--config.data.dir={bucket}/data", *flags
            )

        few, many = train("few", STEPS, 0), train("many", 3 * STEPS, 0)
        rows["start, first steps, last checkpoint, end"] = few
        rows[f"{2 * STEPS} further steps"] = many - few
        saved = train("saved", STEPS, STEPS // 2)
        rows["one further checkpoint"] = saved - few
        rows["resume at the last step, and end"] = train("saved", STEPS, 0)
        rows["evaluate --tasks=query_key"] = count("evaluate", f"--model={bucket}/saved", "--tasks=query_key")
    kinds = sorted({kind for row in rows.values() for kind in row})
    print(f"| | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(str(row[kind]) for kind in kinds)} |")


if __name__ == "__main__":
    main()
