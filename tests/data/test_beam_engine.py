"""The engine that runs tasks through Apache Beam."""

import ast
import importlib.metadata
import json
import logging
import pathlib
import subprocess
import sys
import time

import pytest
from etils import epath
from packaging.utils import canonicalize_name

from contrastive_jax.config import UserError
from contrastive_jax.data.beam import engine as beam_engine
from contrastive_jax.data.beam import options as beam_options
from contrastive_jax.data.beam import workers as beam_workers
from contrastive_jax.data.beam.engine import BeamEngine
from contrastive_jax.data.preparation import engine
from contrastive_jax.data.preparation.work import Work
from contrastive_jax.files import MachineError

PACKAGE = pathlib.Path(beam_engine.__file__).parents[2]


def square(number: int) -> engine.Outcome:
    engine.advance(number)
    return {"number": number, "square": number**2}


def refuse(number: int) -> engine.Outcome:
    if number == 7:
        raise UserError("a.jsonl:7: not JSON; mend it")
    return {}


def fail(number: int) -> engine.Outcome:
    raise KeyError(f"no {number}")


def run(
    tmp_path: pathlib.Path, function: engine.Callable, count: int, given: beam_options.Given = "runner=DirectRunner"
) -> list:
    """The outcomes of a job, what it said, and the bytes that it reported."""
    outcomes, lines, sizes = [], [], []
    options = beam_options.complete(given, str(tmp_path))
    BeamEngine(options, epath.Path(tmp_path), lines.append, sizes.append).map(function, range(count), outcomes.append)
    return [sorted(outcomes, key=str), lines, sum(sizes)]


def test_outcomes_come_back_through_files_and_nothing_is_left(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_engine, "BLOCK", 3)
    monkeypatch.setattr(beam_engine, "MAX_RUNS", 4)  # of 3, 3, 3 and 1 tasks
    outcomes, lines, size = run(tmp_path, square, 10)
    assert sorted(outcome["number"] for outcome in outcomes) == list(range(10))
    assert outcomes[2]["square"] == outcomes[2]["number"] ** 2
    assert size == 45 and not list(tmp_path.iterdir())
    assert lines == ["Beam (fnapi): submitting a job of 10 tasks"]


def test_a_job_server_runs_a_job_as_those_of_flink_and_spark_do(tmp_path: pathlib.Path) -> None:
    embedded = {"runner": "PortableRunner", "job_endpoint": "embed", "environment_type": "beam:env:embedded_python:v1"}
    outcomes, lines, _ = run(tmp_path, square, 3, embedded)
    assert len(outcomes) == 3 and lines[1].startswith("Beam (portable): job job-")


def test_a_mistake_that_a_task_finds_is_said_as_it_is(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"^a\.jsonl:7: not JSON; mend it$"):
        run(tmp_path, refuse, 10)


def test_b6_a_failed_job_is_one_line_with_beams_reason(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MachineError, match=r"the job failed \(KeyError: .*no 0.*\); the same command goes on"):
        run(tmp_path, fail, 1)
    assert "Traceback" in caplog.text  # Beam's own log, which says where
    assert logging.root.manager.disable == 0


def test_b7_a_task_that_is_repeated_counts_once(tmp_path: pathlib.Path) -> None:
    job = Work(tmp_path / "job")
    beam_engine.write_tasks(job, square, range(3))
    for number in (0, 1, 1, 2, 0):
        beam_engine.run_task(number, str(job.root))
    outcomes, sizes = [], []
    results = beam_engine.Outcomes(job, 3, outcomes.append, sizes.append)
    results.report()
    results.report()
    assert [outcome["number"] for outcome in outcomes] == [0, 1, 2] and sum(sizes) == 3 and not results.missing


class Short:
    """A job that ends after a moment."""

    state = "DONE"

    def wait_until_finish(self) -> None:
        time.sleep(0.2)


def test_b7_a_request_that_fails_while_the_job_runs_stops_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    job = BeamEngine(beam_options.complete("runner=DirectRunner", ""), epath.Path(tmp_path), print)
    results = beam_engine.Outcomes(Work(tmp_path), 0, outcomes.append)
    listings = iter([ConnectionError("503"), ValueError("half an answer"), *[None] * 1000])

    def report() -> None:
        if error := next(listings):
            raise error

    monkeypatch.setattr(beam_engine, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(results, "report", report)
    job._follow(Short(), beam_options.PipelineOptions([]), results)
    assert next(listings) is None


class Interrupted:
    """A job of Dataflow that runs on while somebody presses Ctrl-C."""

    def job_id(self) -> str:
        return "2026-1"

    def wait_until_finish(self) -> None:
        time.sleep(3600)


def test_b6_ctrl_c_says_what_goes_on_and_how_to_cancel_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    job = BeamEngine(beam_options.complete("runner=DirectRunner", ""), epath.Path(tmp_path), lines.append)
    options = beam_options.PipelineOptions(["--project=mine", "--region=us-central1"])
    results = beam_engine.Outcomes(Work(tmp_path), 3, lines.append)
    monkeypatch.setattr(beam_engine, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(results, "raise_if_stopped", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job._follow(Interrupted(), options, results)
    assert "https://console.cloud.google.com/dataflow/jobs/us-central1/2026-1?project=mine" in lines[0]
    assert "gcloud dataflow jobs cancel 2026-1 --project=mine --region=us-central1" in lines[1]


@pytest.mark.parametrize(
    "given",
    [
        '{"runner": "SparkRunner", "environment_config": {"a": "1,2"}, "experiments": ["x", "y"], "streaming": false}',
        '["--runner=SparkRunner", "environment_config={\\"a\\": \\"1,2\\"}", "experiments=x", "experiments=y"]',
        ["runner=SparkRunner", 'environment_config={"a": "1,2"}', "--experiments=x", "experiments=y"],
        {"runner": "SparkRunner", "environment_config": {"a": "1,2"}, "experiments": ["x", "y"]},
    ],
)
def test_options_are_json_or_repeated_and_keep_their_commas(given: beam_options.Given) -> None:
    expected = ["--runner=SparkRunner", '--environment_config={"a": "1,2"}', "--experiments=x", "--experiments=y"]
    assert beam_options.beam_flags(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("project=mine", "no runner is named"),
        ("runner=Foo", "no runner 'Foo'; choose one of"),
        ("runner=FlinkRunner,flink_master=a:1", "a comma does not separate options; repeat the flag"),
        ('{"runner": "Direct', "not JSON .*quote it for the shell"),
        ("[1]", "a list must hold texts"),
        (["runner=Direct", "num_worker=3"], "Beam has no option 'num_worker'"),
        (["runner=Direct", "direct_num_workers=many"], "argument --direct_num_workers: invalid int value: 'many'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(given: beam_options.Given, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        beam_options.complete(given, "/absent")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--beam_pipeline_options")


def test_job_servers_may_have_options_that_beam_does_not_know() -> None:
    flags, kind = beam_options.complete(["--runner=FlinkRunner", "--flink_master=local", "--object_reuse=true"], "/work")
    assert kind == "flink" and "--object_reuse=true" in flags


def test_workers_install_a_wheel_with_few_requirements(tmp_path: pathlib.Path) -> None:
    with beam_workers.wheel() as wheel:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={tmp_path}", str(wheel)]
        subprocess.run(install, check=True, timeout=120)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert "numpy==" in metadata.read_text()
    assert not {"jax", "flax", "tensorflow", "apache-beam"} & set(beam_workers.REQUIREMENTS)
    program = "import contrastive_jax.data.beam.engine as e; print(e.__file__, 'jax' in e.engine.sys.modules)"
    python = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert python.stdout.split() == [str(tmp_path / "contrastive_jax/data/beam/engine.py"), "False"]
    assert not beam_workers.need_package("dask", set()) and not beam_workers.need_package("dataflow", {"sdk_container_image"})


def test_a_job_of_dataflow_is_built_and_stays_small(gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apache_beam.runners.dataflow.internal.apiclient", reason="needs the extra gcp")
    import google.auth
    from google.auth import credentials

    monkeypatch.setattr(google.auth, "default", lambda **_: (credentials.AnonymousCredentials(), "mine"))
    folder = epath.Path(gs_bucket) / "out" / ".work"
    given = {"runner": "DataflowRunner", "project": "mine", "region": "us-central1", "max_num_workers": 50}
    with pytest.raises(UserError, match="cannot write to /tmp; give an --output on gs://"):
        beam_options.complete(given, "/tmp")
    options = beam_options.complete(given, str(folder))
    with pytest.raises(UserError, match=r"--input=/home/a.jsonl: workers of Dataflow cannot read it"):
        beam_options.check_inputs(options, ["gs://bucket/a.jsonl", "/home/a.jsonl"])
    with beam_workers.wheel() as wheel:
        template = f"--template_location={gs_bucket}/job.json"  # the runner stops before it calls Dataflow's service
        beam_engine.make_pipeline([*options.flags, f"--extra_package={wheel}", template], folder, 100_000).run()
    job = json.loads((epath.Path(gs_bucket) / "job.json").read_text())
    (pool,) = job["environment"]["workerPools"]
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 50 and pool["numThreadsPerWorker"] == 1
    assert wheel.name in {package["name"] for package in pool["packages"]}
    graph = epath.Path(job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"])
    assert str(graph).startswith(f"{folder}/temp/")
    assert len(graph.read_bytes()) < 2e6  # Dataflow takes 10 MB


def modules_of_tasks() -> set[str]:
    """What the functions of tasks import, directly or through other modules of the package: top-level names."""
    queue, seen, names = ["data.beam.engine", "data.preparation.driver"], set(), set()
    while queue:
        module = queue.pop()
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        path = path if path.exists() else PACKAGE / module.replace(".", "/") / "__init__.py"
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            queue += [name.removeprefix("contrastive_jax.") for name in found if name.startswith("contrastive_jax.")]
            names |= {name.partition(".")[0] for name in found}
    return names - set(sys.stdlib_module_names) - {"contrastive_jax"}


def test_the_wheel_asks_for_all_that_tasks_import() -> None:
    assert {"numpy", "pyarrow", "zstandard"} <= modules_of_tasks()
    distributions = importlib.metadata.packages_distributions()
    wanted = {canonicalize_name(name) for name in beam_workers.REQUIREMENTS} | {"apache-beam"}
    # TensorFlow reads slices of TFDS datasets alone, which workers of Dataflow are not given.
    for module in modules_of_tasks() - {"tensorflow"}:
        assert {canonicalize_name(name) for name in distributions[module]} & wanted, module
