"""`prepare` through Beam: in this process, and on a cluster of Dask of which one worker is killed."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from cloud.emulators import listing
from conftest import ROOT

from benchmarks import prepare_on_dask
from contrastive_jax.data.preparation import driver, prepare

WORDS = pathlib.Path(prepare.__file__).read_text().split()
DOCUMENTS = 200
ARGUMENTS = {"vocab_size": 500, "record_tokens": 64, "validation_fraction": 0.2}


@pytest.fixture
def raw(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Documents, some of them equal, which form some twenty tasks."""
    monkeypatch.setattr(driver, "PART_BYTES", (20_000, 20_000))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(50, 500))) for _ in range(DOCUMENTS)]
    for number in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::2] + texts[:20]]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    return f"{tmp_path}/*.jsonl"


@pytest.fixture
def content_hash(raw: str, tmp_path: pathlib.Path) -> str:
    """The hash of the dataset that this machine makes."""
    return prepare.prepare(tmp_path / "local", raw, workers=1, **ARGUMENTS)["content_hash"]


def test_beam_makes_the_dataset_of_the_local_engine_on_a_bucket(raw: str, content_hash: str, gs_bucket: str) -> None:
    made = prepare.prepare(f"{gs_bucket}/data", raw, beam_pipeline_options={"runner": "DirectRunner"}, **ARGUMENTS)
    assert made["content_hash"] == content_hash
    assert "beam_pipeline_options" not in made["arguments"]
    names = set(listing(f"{gs_bucket}/data"))
    assert "data/manifest.json" in names and not any("job-" in name or ".work" in name for name in names)


def test_a_killed_worker_of_three_changes_nothing(raw: str, content_hash: str, tmp_path: pathlib.Path) -> None:
    options = {"runner": "DaskRunner", "dask_scheduler_file": str(prepare_on_dask.scheduler_file(tmp_path))}
    with prepare_on_dask.cluster(tmp_path, workers=3) as client:
        killer = prepare_on_dask.Killer(client, tmp_path / "dask.incomplete" / ".work" / "tasks", "token")
        killer.start()
        made = prepare.prepare(tmp_path / "dask", raw, beam_pipeline_options=options, **ARGUMENTS)
        assert killer.killed and len(client.scheduler_info()["workers"]) == 2
    assert made["content_hash"] == content_hash


WITHOUT_BEAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "apache_beam":
            raise ImportError("No module named apache_beam")

sys.meta_path.insert(0, Refuse())
import contrastive_jax
import tensorflow_datasets as tfds
output, raw = sys.argv[1:]
contrastive_jax.prepare(output, raw, workers=1, vocab_size=500, record_tokens=64)
assert len(tfds.builder_from_directory(f"{output}/pile/1.0.0").as_data_source("train"))
try:
    contrastive_jax.prepare(f"{output}-2", raw, beam_pipeline_options="runner=FlinkRunner")
except contrastive_jax.UserError as error:
    print(error)
"""


def test_beam_is_needed_only_where_it_is_asked_for(raw: str, tmp_path: pathlib.Path) -> None:
    program = [sys.executable, "-c", WITHOUT_BEAM, str(tmp_path / "out"), raw]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("--beam_pipeline_options: Apache Beam cannot be imported")
    assert "pip install 'contrastive_jax[beam]'" in done.stdout
