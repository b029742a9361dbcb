"""Eight CPU devices for every test, and a small prepared dataset written without Beam."""

import os
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
# The programs of the tests are small: compiling them well costs more than running them.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
# Options of XLA with which a program is compiled as for users.
AS_USERS: tuple[tuple[str, str], ...] = ()
# Without the emitters of fusions compiling takes 0.6 of the time. Later versions no longer have the choice.
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS = (("xla_cpu_use_fusion_emitters", "True"),)
os.environ["XLA_FLAGS"] = XLA_FLAGS.format(8)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import importlib
import json
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from contrastive_jax.commands import cli, train
from contrastive_jax.config import UserError
from contrastive_jax.data import FORMAT, store, tokenizer
from contrastive_jax.data.preparation import engine
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

pytest_plugins = ["cloud.emulators", "launch.machines"]
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="contrastive_jax-")  # where evaluate keeps vectors
ROOT = pathlib.Path(__file__).parent.parent
RESERVED = {"pad": 0, "bos": 1, "eos": 2, "mask": 3, "x_open": 4, "x_close": 5, "y_open": 6, "y_close": 7}
VOCAB = 320
# All recipes, as (name, argument of get_config); of those that differ in size alone, the smallest.
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
MODULES = {name: importlib.import_module(f"configs.{name}") for name in NAMES}
VARIANTS = {name: [*module.VARIANTS] for name, module in MODULES.items() if hasattr(module, "VARIANTS")} | {"cpt_text": ["s"]}
RECIPES = [(name, argument) for name in NAMES for argument in VARIANTS.get(name, [""])]
SMALL_RECIPES = [each for each in RECIPES if "_text" not in each[0] and "_base" not in each[0]]  # one device can hold a step


def write_dataset(
    root: pathlib.Path, sizes: dict[str, list[int]], seed: int = 0, domains: Sequence[str] = ("a", "b"), **more: object
) -> pathlib.Path:
    """A prepared dataset with records of these sizes per split, in two file shards; records 2i and 2i + 1 are of document i.

    The domains take turns by document. A file shard holds the records of the first domain before those of the next.
    """
    rng = np.random.default_rng(seed)
    folder = root / "pile" / "1.0.0"
    folder.mkdir(parents=True)
    for split, lengths in sizes.items():
        records = []
        for number, length in enumerate(lengths):
            # A topic per record: neighbouring spans share rare tokens, so that there is something to learn.
            topic = rng.integers(8, VOCAB, size=12)
            tokens = np.where(rng.random(length) < 0.5, rng.choice(topic, length), rng.integers(8, VOCAB, length))
            document, numbers = number // 2, None
            if "fields" in more:  # three texts, each of which ends with the id eos
                tokens[length // 3], tokens[2 * length // 3], tokens[-1] = 2, 2, 2
                numbers = (float(number % 2), 1.0, 1.0)
            key = f"{document:08x}{'0' * 24}"
            records.append(store.Record(tokens, key, document % len(domains), number % 2 * 96, numbers))
        indexes = []
        for number, shard in enumerate((records[: len(records) // 2], records[len(records) // 2 :])):
            path = root / store.NAME.format(split=split, number=number, count=2)
            indexes.append(store.write_file_shard(path, sorted(shard, key=lambda record: record.domain), domains, VOCAB))
        store.write_index(root, split, indexes)
    manifest = {"format": FORMAT, "window": 96, "vocab_size": VOCAB, "reserved": RESERVED, "content_hash": f"test{seed}"}
    manifest |= {"domains": list(domains), "splits": {split: {} for split in sizes}, **more}
    manifest |= {"numbers": ["label", "positives", "hard_negatives"]} if "fields" in more else {}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def shrink(config: ConfigDict, dataset: pathlib.Path) -> ConfigDict:
    """A shipped recipe, small enough for a test: its choices stay, its sizes go. `dataset`/pairs is for those of pairs."""
    dataset = dataset / "pairs" if config.data.sampler == "fields" else dataset
    layers = min(config.model.num_layers, 2)
    eight = dict(num_layers=layers, d_model=16, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=32)
    config.model.update(eight)
    config.data.update(dir=str(dataset), batch_size=16, length=24, min_span=6, max_span=20, max_gap=min(config.data.max_gap, 3))
    if config.data.sampler == "fields":  # the pairs of the fixture have a positive and a hard negative
        config.data.update(views=min(config.data.views, 3), hard_negatives=min(config.data.hard_negatives, 1))
        config.data.query_length = min(config.data.query_length, 20)
    config.model.latent_layers = max(min(config.model.latent_layers, layers), 1)
    if config.model.mixer != "attention":
        config.model.max_length = 24  # every row is padded to it
    config.eval.update(pairs=40, span=10, batch_size=24)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.optim.warmup_steps = 1
    config.micro_batch = 8 if config.micro_batch else 0
    config.memory.queue = min(config.memory.queue, 3)
    config.heads.update(projector=(16, 16), predictor=(8, 16))
    config.update(steps=4, log_every=1, eval_every=0, checkpoint_every=0)
    return config


def recipe(name: str, *argument: str) -> ConfigDict:
    config = importlib.import_module(f"configs.{name}").get_config(*argument)
    config.memory.source = ""  # a teacher that was not trained here; the run's own start takes its place
    return config


def trace(config: ConfigDict, vocab_size: int = 8192) -> tuple[build.Run, tuple]:
    """A run, and the shapes of what its step returns; nothing is compiled."""
    mesh = sharding.make_mesh(config.mesh)
    run = build.build(config, mesh, vocab_size)
    return run, jax.eval_shape(run.train_step, run.shapes, build.batch_shapes(config, mesh))


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
    return [sys.executable, "-m", "contrastive_jax", "train", f"--workdir={workdir}", *changed, *more]


def evaluation(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "contrastive_jax", "evaluate", *arguments]


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
    """HOST:PORT on this machine, of a port that is free with the one below it.

    Each worker of pytest-xdist has a range of its own, below the ports that the system gives to clients, so that nobody else
    takes the port between this check and its use.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    low, high = (10_000 + 1000 * (int(worker) % 20), 1000) if worker else (10_000, 20_000)
    while True:
        port = low + random.randrange(1, high)
        with socket.socket() as upper, socket.socket() as lower:
            try:
                upper.bind(("127.0.0.1", port))
                lower.bind(("127.0.0.1", port - 1))
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
    if "workdir" not in flags.FLAGS:
        train.define_flags()
    argv = ["contrastive-jax train", *cli.config_first(arguments[4:])]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    with pytest.raises(SystemExit) as ended:
        cli.start(train, cli.parse_or_exit(argv))
    assert ended.value.code == UserError.status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """150 training records of 5 to 96 tokens, 60 held-out records of 40 to 96, and a tokenizer."""
    rng = np.random.default_rng(1)
    sizes = {"train": rng.integers(5, 97, 150).tolist(), "validation": rng.integers(40, 97, 60).tolist()}
    folder = write_dataset(tmp_path_factory.mktemp("prepared"), sizes)
    write_dataset(
        folder / "pairs",
        {split: [max(9, n) for n in lengths] for split, lengths in sizes.items()},
        fields=3,
        hard_negatives=1,
        labels=[0.0, 1.0],
    )
    trained = tokenizer.train([f"The cat {i} sat on a mat. A dog {i * i} ran!" for i in range(80)], VOCAB)
    for root in (folder, folder / "pairs"):
        (root / trained.file).write_bytes(trained.model)
    return folder


def fail_after(tasks: int) -> Callable:
    """A `LocalEngine.map` that fails after so many tasks of all stages."""
    left = iter(range(tasks))

    def run(self: engine.LocalEngine, function: Callable, tasks: list, done: Callable) -> None:
        for task in tasks:
            if next(left, None) is None:
                raise KeyboardInterrupt
            done(function(task))

    return run
