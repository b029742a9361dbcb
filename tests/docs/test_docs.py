"""Every command and every Python block of README.md, docs/ and launch/gke.md runs: shrunk, in order, on data written here."""

import gzip
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from cloud.emulators import listing, make_bucket
from conftest import ROOT, XLA_FLAGS, free_address
from etils import epath
from hf_folders import WORDS, write_folder

from contrastive_jax.config import KEYS, UserError
from contrastive_jax.data.raw import pair_sources
from contrastive_jax.runtime.processes import NOT_JOINED, PREEMPTED
from contrastive_jax.training import guard

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch/gke.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
# Fenced blocks that are not run: printed results and diagrams, and the YAML of a job and files of sources, which have tests.
NOT_RUN = ("", "yaml", "toml")
# Commands that cannot run here, and the test that runs them.
ELSEWHERE = {
    "bash launch/local.sh": "tests/docs/test_docs.py::test_local",
    "bash tests/run.sh": "tests/docs/test_docs.py::test_pages",  # by whoever runs this test
    "bash launch/gpu.sh": "tests/launch/test_slurm.py::test_gpu_on_one_node_ends_with_the_status_of_the_training",
    "sbatch": "tests/launch/test_slurm.py::test_three_jobs_one_after_another_each_with_all_its_cores",
    "pip install uv && bash launch/locks/update.sh": "tests/docs/test_package.py::test_a_lock_names_every_requirement",
    "pip install xpk": "tests/docs/test_docs.py::test_jobs_of_gke",
    "xpk": "tests/docs/test_docs.py::test_jobs_of_gke",
    "contrastive-jax prepare --input='hf://datasets/allenai/c4/en/c4-train.*.json.gz'": (
        "tests/data/test_inputs.py::test_files_of_the_hub_are_listed_and_read"
    ),
    "contrastive-jax prepare --beam_pipeline_options": (
        "tests/data/test_beam_engine.py::test_a_job_of_dataflow_is_built_and_stays_small"
    ),
    "dask": "tests/data/test_prepare_on_beam.py::test_a_killed_worker_of_three_changes_nothing",
    "python -m benchmarks.prepare_on_dask": (
        "tests/data/test_prepare_on_beam.py::test_a_killed_worker_of_three_changes_nothing"
    ),
    "contrastive-jax prepare --pairs": "tests/data/test_pairs.py::test_row55_all_fields_and_labels_of_a_file_come_back",
    "contrastive-jax train --config=configs/labelled.py:softmax": (
        "tests/training/test_labelled.py::test_row55_prepared_pairs_train_and_resume_bit_for_bit"
    ),
    "contrastive-jax prepare --python": "tests/data/test_prepare.py::test_python_text_is_prepared",
    "contrastive-jax prepare --tfds": "tests/data/test_prepare.py::test_tfds_dataset_with_its_own_validation_split",
}
SMALL_DATA = ["--vocab_size=300", "--record_tokens=256", "--on_bad=skip"]
SMALL_PYTHON = """
import functools
from contrastive_jax.data.preparation import prepare
prepare.prepare = functools.partial(prepare.prepare, vocab_size=300, record_tokens=256)
"""
SMALL_RUN = [
    *("--config.steps=3", "--config.optim.warmup_steps=1", "--config.data.batch_size=16", "--config.eval_every=3"),
    *("--config.checkpoint_every=0", "--config.log_every=1", "--config.eval.pairs=5", "--config.data.min_span=8"),
    *("--config.data.max_span=16", "--config.eval.span=16", "--config.data.length=64", "--config.model.d_model=32"),
    *("--config.model.num_heads=4", "--config.model.num_kv_heads=4", "--config.model.head_dim=8", "--config.model.d_ff=64"),
    "--config.mesh.fsdp=1",
]


class Block(NamedTuple):
    """A fenced block of a page: its language and its text."""

    language: str
    text: str


def blocks(page: pathlib.Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text())]


def commands(block: Block) -> list[str]:
    """The commands of a bash block, without comments and line breaks."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#\s.*", "", line).strip() for line in lines if line.strip()]


def write_file_shard(path: pathlib.Path, first: int, count: int) -> None:
    """Documents of the words that the tokenizer of `hf_folders` knows, and of numbers, so that none is like another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    words = [f"{' '.join(pair)} {rng.integers(10**6)}" for pair in rng.choice(WORDS[4:], (count * 100, 2))]
    texts = [f"{first + i} {' '.join(words[100 * i : 100 * (i + 1)])}." for i in range(count)]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Test"}}) + "\n" for text in texts]
    path.write_bytes(zstandard.compress("".join(lines).encode()))


def write_other_formats(folder: pathlib.Path) -> None:
    """A Parquet file and a .jsonl.gz, as docs/data.md prepares them."""
    for name in ("crawl", "code"):
        (folder / name).mkdir()
    documents = [" ".join(WORDS[4 + (i * j) % 15] for j in range(50)) + f" {i}" for i in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": documents[:200]}), folder / "crawl/0.parquet")
    lines = "".join(json.dumps({"content": text, "lang": "Python"}) + "\n" for text in documents[200:])
    (folder / "code/0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def write_questions(folder: pathlib.Path) -> None:
    """Pairs of a question and an answer, and a BEIR folder of the first of them, as docs/training-recipes.md takes them."""
    rng = np.random.default_rng(1)
    pairs = [(" ".join(words[:3]), f"{' '.join(words)} {i}") for i, words in enumerate(rng.choice(WORDS[4:], (300, 6)))]
    for name in ("questions", "search/qrels"):
        (folder / name).mkdir(parents=True)
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
    (folder / "questions/0.jsonl").write_text("\n".join(lines))
    entries = [[json.dumps({"_id": f"{i}", "text": pair[side]}) for i, pair in enumerate(pairs[:20])] for side in (0, 1)]
    (folder / "search/queries.jsonl").write_text("\n".join(entries[0]))
    (folder / "search/corpus.jsonl").write_text("\n".join(entries[1]))
    judgements = ["query-id\tcorpus-id\tscore", *(f"{i}\t{i}\t1" for i in range(20))]
    (folder / "search/qrels/test.tsv").write_text("\n".join(judgements))


class Site:
    """A folder in which the commands of the pages run.

    It begins with raw documents, two labelled sets, a Hugging Face folder, and `runs/local`, as `launch/local.sh` leaves it.
    gs://BUCKET of the pages is a bucket of an emulator, with raw documents and the dataset that docs/data.md prepares of them.
    """

    def __init__(self, folder: pathlib.Path, bucket: str):
        self.folder, self.bucket = folder, bucket
        self.done: set[str] = set()
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": XLA_FLAGS.format(1)}
        write_file_shard(folder / "pile/train/0.jsonl.zst", 0, 40)
        write_file_shard(folder / "pile/val.jsonl.zst", 1000, 20)
        write_other_formats(folder)
        write_questions(folder)
        for name in ("models", "stsb", "movie", "eval/sts", "eval/retrieval"):
            (folder / name).mkdir(parents=True)
        (folder / "eval/sts/dev.tsv").write_text("5\tthe cat\tthe cat\n")
        (folder / "eval/retrieval/corpus.jsonl").write_text('{"text": "' + "a red hat on one big dog " * 3 + '"}\n')
        write_folder(folder / "models/minilm", "bert")
        (folder / "stsb/dev.tsv").write_text("5\tthe cat\tthe cat\n1\ta red hat\tone big dog\n3\ta mat\ta blue mat\n")
        movie = [{"text": f"{WORDS[4 + i % 15]} {label}", "label": label} for i in range(30) for label in ("cat", "dog")]
        (folder / "movie/all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in movie))
        (folder / "texts.txt").write_text("one\ntwo\n")
        (folder / "faq").mkdir()
        (folder / "faq/0.jsonl").write_text(
            '{"question": "one cat", "answer": "the cat"}\n{"question": "dog", "answer": "two"}\n'
        )
        for name in ("configs", "docs", "mkdocs.yml"):
            (folder / name).symlink_to(ROOT / name)
        self.run("contrastive-jax prepare --input='pile/train/*' --validation='pile/val*' --output=data/python")
        for name in ("pile/train/0.jsonl.zst", "pile/val.jsonl.zst", "texts.txt"):
            epath.Path(folder / name).copy(epath.Path(bucket) / name.replace("pile/", "raw/"))
        self.run(
            next(
                line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.endswith("--output=gs://BUCKET/pile")
            )
        )
        self.run("contrastive-jax train --config=configs/local.py --workdir=runs/local")

    def call(self, arguments: list[str], shown: str) -> str:
        done = subprocess.run(
            arguments, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{shown}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def run(self, command: str) -> None:
        """Runs a command of a page, as near as it can be run here; one that several pages have is run once."""
        if command in self.done:
            return
        self.done.add(command)
        if any(command == known or command.startswith((f"{known} ", f"{known}=")) for known in ELSEWHERE):
            return
        for start, run in RULES.items():
            if command.startswith(start):
                run(self, command.removeprefix(start).strip(), command)
                return
        raise AssertionError(f"no test runs: {command}; write a rule for it, or name the test in ELSEWHERE")

    def run_python(self, page: pathlib.Path) -> str:
        """Runs all Python blocks of a page in one process."""
        code = "\n".join(block.text for block in blocks(page) if block.language == "python")
        return self.call([sys.executable, "-c", SMALL_PYTHON + code], page.name) if code else ""


def shrink(arguments: list[str]) -> list[str]:
    """The flags that make a training of the pages small; rows fit the positions of `hf_folders`."""
    flags = list(SMALL_RUN)
    if any("cpt_text" in argument for argument in arguments):
        flags.append("--config.model.num_layers=2")
    if any("init_from" in argument for argument in arguments):
        flags.append("--config.data.length=32")
    if any("finetune" in argument for argument in arguments):
        flags += ["--config.data.query_length=16", "--config.eval_every=0"]  # few pairs are held out
    return flags


def run_contrastive_jax(site: Site, rest: str, command: str) -> None:
    name, *arguments = shlex.split(rest.replace("gs://BUCKET", site.bucket))
    if name == "prepare":
        arguments += SMALL_DATA
    elif name == "train":
        arguments += shrink(arguments)
    elif name == "plan":  # tests/planning runs the compilers of TPU and GPU
        arguments = [a if not a.startswith("--target=") else "--target=cpu:1" for a in arguments] + shrink(arguments)
    elif name == "export":
        shutil.rmtree(site.folder / "exported", ignore_errors=True)  # an earlier block of the page wrote it
    if "--cluster" in arguments:  # there is no pod here: the same command as the only process
        arguments[arguments.index("--cluster")] = f"--coordinator={free_address()}"
        arguments += ["--num_processes=1", "--process_id=0"]
    site.call([sys.executable, "-m", "contrastive_jax", name, *arguments], command)


def run_tpu(site: Site, rest: str, command: str) -> None:
    name, *arguments = shlex.split(rest)
    output = site.call(["bash", str(ROOT / "launch/tpu.sh"), name, "--dry-run", *arguments], command)
    assert {"run": "worker.sh start --config=", "logs": "worker.sh poll 0", "profile": "worker.sh profile 5"}[name] in output


def run_mkdocs(site: Site, rest: str, command: str) -> None:
    site.call([sys.executable, "-m", "mkdocs", *rest.split(), f"--site-dir={site.folder / 'site'}"], command)


def run_tensorboard(site: Site, rest: str, command: str) -> None:
    assert "Event statistics" in site.call([sys.executable, "-m", "tensorboard.main", "--inspect", *rest.split()], command)


def run_pytest(site: Site, rest: str, command: str) -> None:
    """Collects the tests only: they take hours. Those against sentence-transformers are none where it is not installed."""
    if "sentence_transformers" in rest and importlib.util.find_spec("sentence_transformers") is None:
        return
    collect = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", f"--rootdir={ROOT}", *rest.split()]
    arguments = [str(ROOT / argument) if argument.startswith("tests/") else argument for argument in collect]
    assert ("2400" if "test_objective" in rest else "224") in site.call(arguments, command)


RULES: dict[str, Callable[[Site, str, str], None]] = {
    "contrastive-jax ": run_contrastive_jax,
    "python -m contrastive_jax ": run_contrastive_jax,
    "bash launch/tpu.sh ": run_tpu,
    "mkdocs ": run_mkdocs,
    "tensorboard ": run_tensorboard,
    "python -m pytest ": run_pytest,
}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, gcs: str) -> Site:
    return Site(tmp_path_factory.mktemp("site"), make_bucket("gs", gcs))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: pathlib.Path, site: Site) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "python", *NOT_RUN), f"{page.name}: no test runs a block of {block.language}"
        if block.language == "bash":
            for command in commands(block):
                site.run(command)
    printed = site.run_python(page)
    if page.name == "README.md":
        assert printed.count("[") == 3  # two by two similarities
        assert (site.folder / "runs/pile_small/query_key.json").exists()
        assert (site.folder / "exported/modules.json").exists()
    if page.name == "training-recipes.md":
        assert (site.folder / "runs/tuned/retrieval-search.json").exists() and (site.folder / "tuned/modules.json").exists()
    if page.name == "data.md":
        written = {name.partition("/")[0] for name in listing(site.bucket)}
        assert written >= {"pile", "pile_small", "results", "vectors.npy", "exported", "report.html"}
    if page.name == "evaluation.md":
        parts = [np.load(site.folder / f"{name}.npy") for name in ("part-0", "part-1")]
        np.testing.assert_array_equal(np.concatenate(parts), np.load(site.folder / "vectors.npy"))
        assert parts[0].shape == (0, 32) and parts[1].shape == (2, 32)
        assert '"neg": ["' in (site.folder / "mined.jsonl").read_text() and (site.folder / "mined.jsonl.zst").exists()
        assert "<svg" in (site.folder / "report.html").read_text()


def test_commands_that_run_elsewhere_do_so() -> None:
    for name in ELSEWHERE.values():
        path, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(), name


def test_files_of_sources_are_read(tmp_path: pathlib.Path) -> None:
    (block,) = [block for page in PAGES for block in blocks(page) if block.language == "toml"]
    (tmp_path / "pairs.toml").write_text(block.text)
    assert len(pair_sources.read(str(tmp_path / "pairs.toml"))) == 3


def test_names_in_the_pages_exist() -> None:
    """Paths and config keys between backticks."""
    groups = "|".join({key.partition(".")[0] for key in KEYS if "." in key})
    for page in PAGES:
        for name in re.findall(r"`([^`\s]+)`", page.read_text()):
            path = re.match(r"(benchmarks|configs|contrastive_jax|docs|launch|tests)/[\w./-]*", name)
            if path and "EXTRA" not in name:
                assert (ROOT / path[0]).exists(), f"{page.name}: {name}"
            key = re.match(rf"(?:--config\.)?((?:{groups})\.\w+)(=|$)", name)
            if key:
                assert key[1] in KEYS, f"{page.name}: {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_jobs_of_gke() -> None:
    """Both jobs of launch/gke.md start the command that tests/docs runs as one process, on every worker."""
    yaml = pytest.importorskip("yaml")  # mkdocs needs it
    text = (ROOT / "launch/gke.md").read_text()
    job = yaml.safe_load(next(block.text for block in blocks(ROOT / "launch/gke.md") if block.language == "yaml"))
    template = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = template["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "contrastive_jax", "train", "--cluster"]
    assert "python -m contrastive_jax train --cluster --config=" in text
    (rule,) = template["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [UserError.status, guard.StoppedError.status]  # all other statuses are tried again
    assert f"--restart-on-exit-codes=1,{NOT_JOINED},{PREEMPTED} " in text


@pytest.mark.slow
def test_local(tmp_path: pathlib.Path) -> None:
    """`bash launch/local.sh` in a fresh copy, then the README's Python: 15 minutes, most of it installation."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "VIRTUAL_ENV"))}
    done = subprocess.run(
        ["bash", "launch/local.sh"], cwd=clone, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((clone / "runs/local/query_key.json").read_text())["results"]
    assert rows["mean"]["top5"] >= 0.75
    readme = next(block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    done = subprocess.run(
        [".venv/bin/python", "-c", readme], cwd=clone, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    (first, second), (third, fourth) = (map(float, re.findall(r"-?\d+\.\d*", row)) for row in done.stdout.strip().splitlines())
    assert first > second and fourth > third
