"""Eight CPU devices for every test, and a small prepared dataset written without Beam."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The programs of the tests are small: compiling them well costs more than running them.
XLA_FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = XLA_FLAGS.format(8)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import importlib
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from array_record.python import array_record_module
from ml_collections import ConfigDict

from contrastive_jax import cli, train

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="contrastive_jax-")  # where evaluate keeps vectors
ROOT = pathlib.Path(__file__).parent.parent
RESERVED = {"pad": 0, "bos": 1, "eos": 2, "mask": 3, "x_open": 4, "x_close": 5, "y_open": 6, "y_close": 7}
VOCAB = 320


def write_dataset(root: pathlib.Path, sizes: dict[str, list[int]], seed: int = 0) -> pathlib.Path:
    """A prepared dataset with windows of these sizes per split; token t of window w is a function of w and t.

    Windows 2i and 2i + 1 are of one document; domains "a" and "b" take turns by document.
    """
    rng = np.random.default_rng(seed)
    folder = root / "pile" / "1.0.0"
    folder.mkdir(parents=True)
    for split, lengths in sizes.items():
        shards = [lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :]]
        for number, shard in enumerate(shards):
            path = folder / f"pile-{split}.array_record-{number:05d}-of-00002"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for length in shard:
                # A topic a window: neighbouring spans share rare tokens, so that there is something to learn.
                topic = rng.integers(8, VOCAB, size=12)
                tokens = np.where(rng.random(length) < 0.5, rng.choice(topic, length), rng.integers(8, VOCAB, length))
                feature = {
                    "tokens": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tokens.astype(np.uint16).tobytes()]))
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
            writer.close()
        document = np.arange(len(lengths), dtype=np.int32) // 2
        np.savez(
            root / f"index-{split}.npz",
            length=np.array(lengths, np.int32),
            document=document,
            domain=document % 2,
            domains=np.array(["a", "b"]),
        )
    manifest = {"format": 2, "window": 96, "vocab_size": VOCAB, "reserved": RESERVED, "content_hash": f"test{seed}"}
    (root / "manifest.json").write_text(json.dumps(manifest | {"splits": {split: {} for split in sizes}}))
    return root


def shrink(config: ConfigDict, dataset: pathlib.Path) -> ConfigDict:
    """A shipped recipe, small enough for a test: its choices stay, its sizes go."""
    layers = min(config.model.num_layers, 2)
    eight = dict(num_layers=layers, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=32)
    config.model.update(eight)
    config.data.update(dir=str(dataset), batch_size=16, length=24, min_span=6, max_span=20, max_gap=min(config.data.max_gap, 3))
    config.eval.update(pairs=40, span=10, batch_size=24)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.optim.warmup_steps = 1
    config.micro_batch = 8 if config.micro_batch else 0
    config.objective.queue = min(config.objective.queue, 3)
    config.update(steps=4, log_every=1, eval_every=0, checkpoint_every=0)
    return config


def recipe(name: str, *argument: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(*argument)


def overrides(name: str, dataset: pathlib.Path) -> list[str]:
    """The flags that shrink a recipe on the command line."""
    small, default = shrink(recipe(name), dataset), recipe(name)
    changed = []
    for key, value in small.items():
        nested = isinstance(value, ConfigDict)
        for leaf_key, leaf in value.items() if nested else [(key, value)]:
            if leaf != (default[key][leaf_key] if nested else default[leaf_key]):
                changed.append(f"--config.{key}.{leaf_key}={leaf}" if nested else f"--config.{leaf_key}={leaf}")
    return changed


def wait_for(condition: Callable[[], object], seconds: int = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def command(dataset: pathlib.Path, workdir: pathlib.Path, *more: str, name: str = "debug") -> list[str]:
    """The training of a shrunk recipe."""
    changed = [f"--config=configs/{name}.py", *overrides(name, dataset)]
    return [sys.executable, "-m", "contrastive_jax.train", f"--workdir={workdir}", *changed, *more]


def evaluation(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "contrastive_jax.evaluate", *arguments]


def start(arguments: list[str], devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": XLA_FLAGS.format(devices)}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen, status: int = 0) -> list[str]:
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=240)[0])
        finally:
            process.kill()
        assert process.returncode == status, outputs[-1][-3000:]
    return outputs


def free_address() -> str:
    """HOST:PORT on this machine, of a port that is free with the one below it."""
    while True:
        with socket.socket() as one, socket.socket() as below:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                below.bind(("127.0.0.1", port - 1))
            except OSError:
                continue
            return f"127.0.0.1:{port}"


def peers(
    dataset: pathlib.Path, workdir: pathlib.Path, *more: str, name: str = "debug", devices: int = 4, differ: str = ""
) -> list[subprocess.Popen]:
    """Two processes of one run; `differ` is a flag that gets the number of the process."""
    together = [f"--coordinator={free_address()}", "--num_processes=2"]
    return [
        start(
            [*command(dataset, workdir, *more, *together, f"--process_id={i}", name=name), *[differ.format(i)] * bool(differ)],
            devices,
        )
        for i in range(2)
    ]


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The line with which the train command refuses its arguments, in this process, since a start of its own costs seconds."""
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)  # overrides of the time before
    argv = cli.arrange(arguments[2:], "configs/debug.py")
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    with pytest.raises(SystemExit) as ended:
        train.main(cli.parse(argv))
    assert ended.value.code == cli.USER_ERROR
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """150 training windows of 5 to 96 tokens, 60 held-out windows of 40 to 96."""
    rng = np.random.default_rng(1)
    sizes = {"train": rng.integers(5, 97, 150).tolist(), "validation": rng.integers(40, 97, 60).tolist()}
    return write_dataset(tmp_path_factory.mktemp("prepared"), sizes)
