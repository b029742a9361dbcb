"""Every command of the README runs: shrunk, in order, on data written here."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_text_model import write_folder

COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.splitlines()
]
# Run by other tests, or by whoever runs this one.
ELSEWHERE = {
    "bash launch/local.sh": "test_local",
    "bash tests/run.sh": "this very run",
    "tensorboard --logdir=runs": "TensorBoard's own",
    "bash launch/gpu.sh": "test_launch.py, on CPU",
    "sbatch": "test_launch.py, on a SLURM of its own",
}

SMALL_DATA = ["--vocab_size=320", "--window=256", "--on_bad=skip"]
SMALL_RUN = [
    *("--config.steps=3", "--config.optim.warmup_steps=1", "--config.data.batch_size=16", "--config.eval_every=3"),
    *("--config.checkpoint_every=0", "--config.log_every=1", "--config.eval.pairs=5", "--config.data.min_span=8"),
    *("--config.data.max_span=16", "--config.eval.span=16", "--config.data.length=64", "--config.model.d_model=32"),
    *("--config.model.num_heads=4", "--config.model.num_kv_heads=4", "--config.model.head_dim=8", "--config.model.d_ff=64"),
]


def write_shard(path: pathlib.Path, first: int, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [f"word{i}" for i in range(50)]
    lines = []
    for i in range(first, first + count):
        text = " ".join(words[(i * 7 + j * j) % 50] for j in range(120))
        lines.append(json.dumps({"text": f"Document {i}. {text}", "meta": {"pile_set_name": "Test"}}))
    import zstandard

    path.write_bytes(zstandard.compress(("\n".join(lines) + "\n").encode()))


def test_every_command_of_the_readme_is_run(tmp_path: pathlib.Path) -> None:
    write_shard(tmp_path / "pile/train/0.jsonl.zst", 0, 40)
    write_shard(tmp_path / "pile/val.jsonl.zst", 1000, 20)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "models").mkdir()
    write_folder(tmp_path / "models/minilm", "bert")
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb/dev.tsv").write_text("5\tthe cat\tthe cat\n1\ta red hat\tone big dog\n3\ta mat\ta blue mat\n")
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    ran = 0
    for command in COMMANDS:
        if any(command == known or command.startswith(f"{known} -") for known in ELSEWHERE):
            continue
        words = shlex.split(command.replace("gs://BUCKET/pile", "data/pile").replace("gs://BUCKET/run", "runs/cpt"))
        if words[:3] == ["bash", "launch/tpu.sh", "run"]:
            dry = ["bash", str(ROOT / words[1]), "run", "--dry-run", *shlex.split(command)[3:]]
            done = subprocess.run(dry, capture_output=True, text=True)
            assert done.returncode == 0 and "worker.sh start --config=configs/cpt_text.py:s" in done.stderr
            ran += 1
            continue
        assert words[:2] == ["python", "-m"], f"no test runs: {command}"
        if "contrastive_jax.plan" in words:  # the compilers of TPU and GPU are tested by test_plan.py
            words[words.index("--target=tpu:v5e:16x16")] = "--target=cpu:1"
            words += [*SMALL_RUN, "--config.mesh.fsdp=1", "--config.model.num_layers=2"]
        if "--cluster" in words:  # there is no pod here: the same command as the only process
            words[words.index("--cluster")] = "--coordinator=127.0.0.1:17893"
            words += ["--num_processes=1", "--process_id=0", "--config.model.num_layers=2", "--config.mesh.fsdp=1"]
        words += {"contrastive_jax.prepare": SMALL_DATA, "contrastive_jax.train": SMALL_RUN}.get(words[2], [])
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran == 11
    assert np.load(tmp_path / "vectors.npy").shape[0] == 2
    assert (tmp_path / "exported/modules.json").exists() and "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "runs/pile_small/query_key.json").exists()


@pytest.mark.slow
def test_local(tmp_path: pathlib.Path) -> None:
    """`bash launch/local.sh` in a fresh copy: 15 minutes, most of it installation."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "VIRTUAL_ENV"))}
    done = subprocess.run(
        ["bash", "launch/local.sh"], cwd=tmp_path / "clone", env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    scores = json.loads((tmp_path / "clone/runs/debug/query_key.json").read_text())["results"]
    trained = next(value for name, value in scores.items() if name.startswith("step"))
    assert trained["mean"]["top5"] >= 0.6
