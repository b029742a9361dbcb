"""Options of Apache Beam: how a user gives them, what they must say, and what Beam says about the job that they start."""

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.runners import runner as runners
from apache_beam.runners.runner import PipelineResult

from contrastive_jax.config import UserError
from contrastive_jax.files import MachineError

FLAG = "--beam_pipeline_options"
ALIASES = {
    "dask": "apache_beam.runners.dask.dask_runner.DaskRunner",  # Beam has no short name for it
    "direct": "FnApiRunner",  # what Beam calls the direct runner may choose Prism, which downloads a program
}
IN_PROCESS = ("fnapi", "bundlebaseddirect", "testdirect", "switchingdirect")
# The job servers of these have options of their own, such as `parallelism`, that Beam's Python part does not know.
HAVE_A_JOB_SERVER = ("flink", "spark", "portable")
DATAFLOW = "dataflow"
# What the engine needs in order to work well, where the user does not decide otherwise.
DEFAULTS = {
    # Without this, 128 tasks would form one piece of work that cannot be divided.
    "dask": ["--dask_partition_size=1"],
    # A worker process runs one task at a time: more would share Python's lock, and need the memory several times. No task is in
    # the program's main module, which Beam would send along.
    DATAFLOW: ["--number_of_worker_harness_threads=1", "--no_save_main_session"],
}
EXTRAS = {"dask": "dask", DATAFLOW: "gcp"}
OPPOSED = {"dask_partition_size": "dask_npartitions", "no_save_main_session": "save_main_session"}  # of two, one can be given
Given = str | Sequence[str] | Mapping[str, Any]


class BeamOptions(NamedTuple):
    """Options that were checked.

    Attributes:
      flags: ("--runner=DataflowRunner", ...).
      kind: of the runner, "dataflow" for DataflowRunner.
    """

    flags: tuple[str, ...]
    kind: str

    @property
    def in_process(self) -> bool:
        """Whether the tasks run in this process, as tests let them."""
        return self.kind in IN_PROCESS


def beam_flags(given: Given) -> list[str]:
    """Returns options of Beam as its flags, ["--runner=DataflowRunner", ...].

    Args:
      given: {"runner": "DataflowRunner", ...}; or that as JSON; or a list, also as JSON, of "runner=DataflowRunner", with or
        without "--" before it; or what several such values joined in a list. A value may hold commas.

    Raises:
      UserError: it is none of these.
    """
    if isinstance(given, Mapping):
        return [flag for name, value in given.items() for flag in _flags_of(name.lstrip("-"), value)]
    if not isinstance(given, str):
        return [flag for one in given for flag in beam_flags(one)]
    text = given.strip()
    if not text.startswith(("{", "[")):
        return ["--" + text.lstrip("-")] if text else []
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{FLAG}={text}: not JSON ({error}); quote it for the shell, or write NAME=VALUE") from error
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise UserError(f"{FLAG}={text}: a list must hold texts, NAME=VALUE; or give an object")
    return beam_flags(value)


def _flags_of(name: str, value: Any) -> list[str]:
    """Returns one option of an object as flags: none for false or null, several for a list."""
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [flag for item in value for flag in _flags_of(name, item)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def names(flags: Sequence[str]) -> set[str]:
    """Returns the names of the options in some flags."""
    return {flag.removeprefix("--").partition("=")[0] for flag in flags}


def kind_of(runner: str) -> str:
    """Returns "dask", "dataflow", "fnapi", ... for the name of a runner, short or fully qualified."""
    return runner.rpartition(".")[2].lower().removesuffix("runner")


def complete(given: Given, folder: str) -> BeamOptions:
    """Checks options, and adds what the engine needs.

    Args:
      given: see `beam_flags`.
      folder: where the workers write.

    Raises:
      UserError: there is no runner, Beam does not have it, an option is unknown, bad or missing, or workers cannot write there.
    """
    flags = beam_flags(given)
    runner = next((flag.partition("=")[2] for flag in flags if flag.startswith("--runner=")), "")
    if not runner:
        raise UserError(
            f"{FLAG}: no runner is named; add runner=DataflowRunner (or Flink, Spark, Dask), or leave the option out"
        )
    if "," in runner:
        raise UserError(f"{FLAG}=runner={runner}: a comma does not separate options; repeat the flag, or give a JSON object")
    kind = kind_of(runner)
    runner = ALIASES.get(kind, runner)
    flags = [f"--runner={runner}", *(flag for flag in flags if not flag.startswith("--runner="))]
    try:
        runners.create_runner(runner)
        if kind == DATAFLOW:
            import apache_beam.runners.dataflow.internal.apiclient  # noqa: F401  # needs the extra; the runner alone does not
    except ImportError as error:
        install = f"pip install 'contrastive_jax[{EXTRAS.get(kind, 'beam')}]'"
        raise UserError(f"{FLAG}: {runner} cannot be imported ({error}); {install}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{FLAG}: no runner {runner!r}; choose one of DataflowRunner, FlinkRunner, SparkRunner, DaskRunner"
        ) from error
    present = names(flags)
    if kind == DATAFLOW and not folder.startswith("gs://"):
        raise UserError(f"{FLAG}: workers of Dataflow cannot write to {folder}; give an --output on gs://")
    if kind == DATAFLOW and "template_location" in present:
        raise UserError(f"{FLAG}: template_location makes a template and runs nothing; leave it out")
    if kind == DATAFLOW and "temp_location" not in present:
        flags.append(f"--temp_location={folder}/temp")
    for flag in DEFAULTS.get(kind, []):
        (name,) = names([flag])
        if name not in present and OPPOSED.get(name) not in present:
            flags.append(flag)
    check_flags(flags, kind)
    return BeamOptions(tuple(flags), kind_of(runner))


def check_inputs(options: BeamOptions, files: Iterable[str]) -> None:
    """Checks that workers can read the input, as far as its names tell.

    Raises:
      UserError: they cannot.
    """
    here = [file for file in files if options.kind == DATAFLOW and not file.startswith(("gs://", "s3://", "hf://"))]
    if here:
        raise UserError(f"--input={here[0]}: workers of Dataflow cannot read it; copy the input to gs:// first")


def check_flags(flags: Sequence[str], kind: str) -> None:
    """Checks that Beam knows the options and that none is missing.

    Raises:
      UserError: otherwise.
      MachineError: the checks need the network, and it fails.
    """
    options, complaint = PipelineOptions(list(flags)), io.StringIO()
    # It warns of unknown options, several times, and goes on without them.
    logging.getLogger("apache_beam.options.pipeline_options").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(complaint):
            known = options.get_all_options(retain_unknown_options=False)
            unknown = sorted(set(options.get_all_options(retain_unknown_options=True)) - set(known))
        beam.Pipeline(options=options)
    except SystemExit as error:  # argparse has printed its usage and the reason
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"{FLAG}: {reason}") from error
    except ValueError as error:
        raise UserError(f"{FLAG}: {one_line(error)}") from error
    except Exception as error:  # from the clients of Google's storage
        raise MachineError(f"{FLAG}: {one_line(error)}") from error
    if unknown and kind not in HAVE_A_JOB_SERVER:
        raise UserError(f"{FLAG}: Beam has no option {unknown[0]!r}; check its spelling")


def describe(result: PipelineResult, options: PipelineOptions) -> str:
    """Returns the job's id and its page, as far as the runner gives them; "" if it gives none."""
    if hasattr(result, "job_id"):
        google, number = options.view_as(GoogleCloudOptions), result.job_id()
        page = f"https://console.cloud.google.com/dataflow/jobs/{google.region}/{number}?project={google.project}"
        return f"job {number}, {page}"
    number = getattr(result, "_job_id", "")
    return f"job {number}" if number else ""


def how_to_cancel(result: PipelineResult, options: PipelineOptions) -> str:
    """Returns what goes on running after Ctrl-C, and how to cancel it."""
    if hasattr(result, "job_id"):
        google = options.view_as(GoogleCloudOptions)
        command = f"gcloud dataflow jobs cancel {result.job_id()} --project={google.project} --region={google.region}"
        return f"the job goes on without this command, and costs money; cancel it with: {command}"
    if hasattr(result, "client"):  # Dask
        return "the cluster finishes the tasks that run now, and drops the others"
    if hasattr(result, "_job_id"):
        return f"{describe(result, options)} may go on; cancel it on the page of its cluster"
    return "nothing goes on running"


def reason_of(error: BaseException) -> str:
    """Returns Beam's reason for a failed job in one line: of a traceback its last line."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        lines = [line for line in text.splitlines() if line and not line.startswith((" ", "\t"))]
        return lines[-1][:500]
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Returns the kind and the message of an exception in one line."""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
