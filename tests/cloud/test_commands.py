"""Every command with names on a bucket: what it writes there, and that on the local disk it writes nothing but caches."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
import zstandard
from absl import flags
from cloud.emulators import listing
from conftest import ROOT, XLA_FLAGS
from etils import epath

from contrastive_jax.commands import cli
from contrastive_jax.data import store

WORDS = "the cat dog sat ran on a mat hat red blue big small one two river stone cloud paper window garden letter".split()
CACHES = (".cache", ".keras")  # in HOME; TensorFlow writes the second as it is imported
SMALL_RUN = [
    f"--config={ROOT}/configs/debug.py",
    *("--config.steps=4", "--config.checkpoint_every=2", "--config.eval_every=4", "--config.log_every=1"),
    *("--config.optim.warmup_steps=1", "--config.data.batch_size=16", "--config.data.length=20"),
    *("--config.data.min_span=8", "--config.data.max_span=16", "--config.eval.span=16", "--config.eval.pairs=20"),
    *("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.num_kv_heads=2"),
    *("--config.model.head_dim=8", "--config.model.d_ff=16", "--config.model.max_length=64"),
]
COLUMNS = [f"index/{split}-{name}.npy" for split in ("train", "validation") for name in store.COLUMNS]
LISTED = ["manifest.json", "tokenizer.model", "rejects.jsonl", *COLUMNS]


def write_documents(path: epath.Path, first: int, count: int) -> None:
    rng = np.random.default_rng(first)
    texts = [f"{number} {' '.join(rng.choice(WORDS, 150))}." for number in range(first, first + count)]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Test"}}) + "\n" for text in texts]
    path.write_bytes(zstandard.compress("".join(lines).encode()))


def write_inputs(bucket: epath.Path) -> None:
    """Raw documents, the data of two tasks, and texts to encode."""
    write_documents(bucket / "raw" / "train-0.jsonl.zst", 0, 40)
    write_documents(bucket / "raw" / "train-1.jsonl.zst", 40, 40)
    write_documents(bucket / "raw" / "validation.jsonl.zst", 1000, 40)
    (bucket / "stsb" / "dev.tsv").write_text("5\tthe cat\tthe cat\n1\ta red hat\tone big dog\n3\ta mat\ta blue mat\n")
    documents = [{"_id": str(number), "title": "", "text": word} for number, word in enumerate(WORDS)]
    (bucket / "beir" / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (bucket / "beir" / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "the cat"}) + "\n")
    (bucket / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    (bucket / "texts.txt").write_text("the cat\na red hat\n")


def forget_flags() -> None:
    """Removes the flags of the command that ran before, since others have some of the same names."""
    flags.FLAGS.unparse_flags()
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in [*defined] if module.startswith("contrastive_jax") else []:
            delattr(flags.FLAGS, flag.name)
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)


def call_here(arguments: list[str]) -> None:
    """Runs a command in this process: a start of its own costs seconds."""
    name, *rest = arguments
    command = importlib.import_module(f"contrastive_jax.commands.{name}")
    forget_flags()
    command.define_flags()
    sys.argv[:] = [f"contrastive-jax {name}", *cli.config_first(rest)]  # where ml_collections looks for overrides
    try:
        command.main(cli.parse(sys.argv))
    except SystemExit as ended:
        assert ended.code == 0, ended.code


def call_process(arguments: list[str]) -> None:
    """Runs a command as users do, in the current folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": XLA_FLAGS.format(1)}
    done = subprocess.run(
        [sys.executable, "-m", "contrastive_jax", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def story(sizes: dict[str, int]) -> str:
    """The objects with their bytes, those of a checkpoint as one."""
    total: dict[str, int] = {}
    for name, size in sizes.items():
        folder, checkpoints, rest = name.partition("/checkpoints/")
        key = f"{folder}{checkpoints}{rest.partition('/')[0]}{'/...' if checkpoints else ''}"
        total[key] = total.get(key, 0) + size
    return ", ".join(f"{name} ({size:,})" for name, size in total.items())


class Machine:
    """A machine whose working folder, HOME and TMPDIR are empty at first, and a bucket."""

    def __init__(self, folder: pathlib.Path, bucket: str, call: Callable[[list[str]], None]):
        self.bucket, self._folder, self._call = bucket, folder, call
        self.before = listing(bucket)

    def run(self, *arguments: str) -> list[str]:
        """Runs a command; returns the names of the objects that it has added or changed."""
        self._call(list(arguments))
        after = listing(self.bucket)
        assert not self.before.keys() - after.keys(), "objects are gone"
        changed = {name: size for name, size in after.items() if self.before.get(name) != size}
        print(f"\n{arguments[0]} wrote {story(changed) or 'nothing'}")
        self.before = after
        files = [path.relative_to(self._folder) for path in self._folder.rglob("*") if path.is_file()]
        assert not [path for path in files if not (path.parts[0] == "home" and path.parts[1] in CACHES)], files
        return sorted(changed)


@pytest.fixture
def make_machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    monkeypatch.delenv("XDG_CACHE_HOME")
    for name in ("home", "work", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path / "work")
    compile_cache = jax.config.jax_compilation_cache_dir

    def make(bucket: str, call: Callable[[list[str]], None]) -> Machine:
        write_inputs(epath.Path(bucket))
        return Machine(tmp_path, bucket, call)

    yield make
    forget_flags()
    jax.config.update("jax_compilation_cache_dir", compile_cache)


def prepare(machine: Machine) -> None:
    raw, data = f"{machine.bucket}/raw", f"{machine.bucket}/data"
    shape = ["--vocab_size=300", "--record_tokens=256", "--workers=1"]
    inputs = [f"--input={raw}/train-*.jsonl.zst", f"--validation={raw}/validation.jsonl.zst"]
    written = machine.run("prepare", *inputs, f"--output={data}", *shape)
    tfds = [
        "dataset_info.json",
        "features.json",
        *(f"pile-{split}.array_record-00000-of-00001" for split in ("train", "validation")),
    ]
    assert written == sorted([f"data/{name}" for name in LISTED] + [f"data/pile/1.0.0/{name}" for name in tfds])
    assert machine.run("prepare", *inputs, f"--output={data}", *shape) == []  # it is there already


def use(machine: Machine) -> None:
    """Runs all other commands, and looks at what each of them wrote."""
    bucket, run = machine.bucket, f"{machine.bucket}/run"
    written = machine.run("train", *SMALL_RUN, f"--workdir={run}", f"--config.data.dir={bucket}/data")
    assert all(name.startswith("run/") for name in written)
    assert {"run/config.json", "run/metrics.jsonl", "run/tokenizer.model"} <= set(written)
    assert [name for name in written if name.startswith("run/events.out")]
    assert {name.split("/")[2] for name in written if name.startswith("run/checkpoints/")} == {"2", "4"}
    lines = [json.loads(line) for line in (epath.Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 1, 2, 3, 4}
    assert machine.run("verify", f"--workdir={run}") == []

    tasks = ["--tasks=query_key,sts,retrieval", f"--data={bucket}/data,{bucket}/stsb,{bucket}/beir"]
    written = machine.run("evaluate", f"--model={run}", *tasks)
    assert written == ["run/query_key-data.json", "run/retrieval-beir.json", "run/sts-stsb.json"]
    written = machine.run("encode", f"--model={run}@2", f"--input={bucket}/texts.txt", f"--output={bucket}/vectors/2.npy")
    assert written == ["vectors/2.npy"]
    with (epath.Path(bucket) / "vectors" / "2.npy").open("rb") as file:
        assert np.load(file).shape == (2, 16)

    written = machine.run("export", f"--model={run}", f"--output={bucket}/exported")
    assert {"exported/modules.json", "exported/model.safetensors", "exported/1_Pooling/config.json"} <= set(written)
    assert all(name.startswith("exported/") for name in written) and "exported/.incomplete" not in written
    output = f"--output={bucket}/results/sts.json"
    written = machine.run("evaluate", f"--model={bucket}/exported", "--tasks=sts", f"--data={bucket}/stsb", output)
    assert written == ["results/sts.json"]
    ours, exported = (
        json.loads((epath.Path(bucket) / name).read_text())["results"] for name in ("run/sts-stsb.json", "results/sts.json")
    )
    assert ours["dev"]["spearman"] == pytest.approx(exported["dev"]["spearman"])
    written = machine.run("report", f"--output={bucket}/report.html", run, f"{bucket}/results/sts.json")
    assert written == [
        "report.html",
        *(f"run/projector/{name}.tsv" for name in ("metadata", "tensors")),
        "run/projector_config.pbtxt",
    ]


def test_every_command_works_on_gs(gs_bucket: str, make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(gs_bucket, call_here)
    prepare(machine)
    use(machine)


@pytest.mark.slow
def test_every_command_works_as_a_process_of_its_own(bucket: str, make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(bucket, call_process)
    prepare(machine)
    use(machine)
