"""The command line: help for everybody, one line for a user's mistake, a traceback for a bug."""

import errno
import importlib
import logging
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from absl import flags
from conftest import ROOT, command, finish, refusal, start

from contrastive_jax import __main__ as program
from contrastive_jax.commands import cli, train
from contrastive_jax.config import UserError
from contrastive_jax.training import guard


@pytest.fixture
def no_flags() -> Iterator[None]:
    """No command has defined its flags; what the test defines is gone afterwards."""

    def forget() -> None:
        by_module = flags.FLAGS.flags_by_module_dict()
        for name in [flag.name for module in by_module if module.startswith(cli.__package__) for flag in by_module[module]]:
            delattr(flags.FLAGS, name)

    forget()
    yield
    forget()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["trian"], "unknown command 'trian'"), ([], "no command given"), (["-x"], "unknown command '-x'")],
)
def test_without_a_command_the_commands_are_listed(
    arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["contrastive-jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[-1].startswith(f"error: {problem}; choose one of prepare, train")
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in program.COMMANDS)


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for word in ("--help", "-h", "help"):
        monkeypatch.setattr(sys, "argv", ["contrastive-jax", word])
        program.main()
        assert all(f"\n  {name} " in capsys.readouterr().out for name in ["train"])


@pytest.mark.parametrize("name", program.COMMANDS)
def test_help_describes_every_flag(
    name: str, no_flags: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["contrastive-jax", name, "--help"])
    program.main()
    out = capsys.readouterr().out
    module = importlib.import_module(f"contrastive_jax.commands.{name}")
    assert out.startswith(str(module.__doc__).splitlines()[0]) and f"contrastive-jax {name} --" in out
    shown = dict(re.findall(r"(?m)^  --(?:\[no\])?(\w+)\S*\n      (\S.*)$", out))
    by_module = flags.FLAGS.flags_by_module_dict()
    own = {flag.name for flag in by_module.get(module.__name__, [])}
    own |= {flag.name for flag in by_module.get(cli.__name__, [])}
    assert own and shown.keys() == own
    assert all(len(text) > 10 and "None" not in text for text in shown.values()), shown


def test_a_command_starts_without_what_only_some_of_its_work_needs() -> None:
    """scikit-learn and scipy.stats take four seconds of a core."""
    imports = "from contrastive_jax.commands import evaluate, report"
    loaded = f'import sys; {imports}; print(sorted(set(sys.modules) & {{"sklearn", "scipy.stats", "apache_beam", "torch"}}))'
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_a_reader_of_help_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "contrastive_jax", "verify", "--help"],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stpes=3"], "Unknown command line flag 'stpes'"),
        (["--config.optim.learning_rat=1"], "--config.optim.learning_rat: unknown key 'learning_rat'; there are: b1, b2, "),
        (["--config.steps.x=1"], "--config.steps.x: unknown key 'x'; there are: no keys below it"),
        (["--config.steps=many"], "config.steps"),
        (["--config=absent.py"], "--config=absent.py: no such file; give a recipe, for example configs/debug.py"),
        (["runs/debug"], "unexpected argument 'runs/debug'; flags are given as --name=value"),
        (["--stop_at_step=-1"], "stop_at_step"),
        (["--profile_steps=7"], "--profile_steps=7: give FROM:TO"),
        (["--coordinator=here:1"], "give --coordinator, --num_processes and --process_id together"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    more: list[str],
    message: str,
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    arguments = command(dataset, tmp_path, *more)
    if more[0].startswith("--config="):
        arguments = [argument for argument in arguments if argument == more[0] or not argument.startswith("--config=")]
    assert message in refusal(arguments, monkeypatch, capsys)


def test_a_missing_flag_is_named(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for missing in ("--workdir=", "--config="):
        arguments = [argument for argument in command(dataset, tmp_path) if not argument.startswith(missing)]
        assert f"{missing.split('=')[0]}" in refusal(arguments, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.steps_ = 3", r"recipe.py:5: AttributeError: .*steps_"),
        ("config.steps = 'many'", r"recipe.py:5: TypeError: "),
        ("import absent_module", r"recipe.py:5: ModuleNotFoundError: No module named 'absent_module'"),
        ("config.steps = = 3", r"recipe.py: SyntaxError: "),
        ("config.steps = 0", r"config.steps=0: must be at least 1"),
    ],
)
def test_a_mistake_in_a_recipe_names_its_line(
    body: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "recipe.py"
    header = "from contrastive_jax.config import default_config\n\ndef get_config():\n    config = default_config()\n"
    recipe.write_text(f"{header}    {body}\n    return config\n")
    arguments = [sys.executable, "-m", "contrastive_jax", "train", f"--config={recipe}", f"--workdir={tmp_path}/run"]
    assert re.search(message, refusal(arguments, monkeypatch, capsys))


def test_a_recipe_with_an_argument_it_does_not_take_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = [sys.executable, "-m", "contrastive_jax", "train", "--config=configs/debug.py:xl", f"--workdir={tmp_path}"]
    assert "configs/debug.py: TypeError: get_config() takes 0 positional arguments" in refusal(arguments, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("config.steps=0:\nmust be at least 1"), 2, "error: config.steps=0: must be at least 1"),
        (guard.StoppedError("the embeddings collapse"), 3, "error: the embeddings collapse"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/disk/run/log"),
            1,
            "error: [Errno 28] No space left on device: '/disk/run/log'; the checkpoints in /disk/run stay as they are",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/disk/run"),
            2,
            "error: --workdir=/disk/run: /disk/run: Not a directory; check that path",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/disk/run/checkpoints"),
            2,
            "error: --workdir=/disk/run: /disk/run/checkpoints: Permission denied; check that path",
        ),
    ],
)
def test_each_kind_of_error_ends_a_training_with_its_status(
    error: Exception,
    status: int,
    line: str,
    no_flags: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def fail(_: object) -> None:
        raise error

    argv = ["contrastive-jax train", "--config=configs/debug.py", "--workdir=/disk/run"]
    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(sys, "argv", argv)
    train.define_flags()
    with pytest.raises(SystemExit) as ended:
        cli.start(train, cli.parse_or_exit(argv))
    assert ended.value.code == status
    assert capsys.readouterr().err.splitlines() == [line]


def test_an_error_about_another_path_is_not_the_users() -> None:
    arguments = ["--output=/tmp/out/vectors.npy", "--model=runs/debug", "--dim=3"]
    for number, path, is_users in (
        (errno.ENOENT, "/tmp/out/.vectors.npy.new", True),
        (errno.ENOENT, "/tmp/out/input.npy", False),  # beside it, and not its temporary file
        (errno.ENOENT, "/tmp/out", True),
        (errno.ENOENT, "runs/debug/config.json", False),  # a file that should be there
        (errno.EACCES, "runs/debug/config.json", True),
        (errno.ENOENT, "/usr/share/elsewhere", False),
        (errno.ENOENT, "other.txt", False),
        (errno.EIO, "/tmp/out/vectors.npy", False),
    ):
        error = cli.path_error(OSError(number, os.strerror(number), path), arguments)
        assert (error is not None) == is_users, path
    assert cli.path_error(OSError("no number, no path"), arguments) is None


PLANT = """
from contrastive_jax.__main__ import main
from contrastive_jax.evals.in_training import Evaluator

def planted(self, params, step):
    raise ValueError("planted")

Evaluator.__call__ = planted
main()
"""


def test_a_bug_keeps_its_traceback(dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = command(dataset, tmp_path, "--config.eval_every=2")
    output = finish(start([sys.executable, "-c", PLANT, *arguments[3:]]), status=1)[0]
    assert "Traceback (most recent call last):" in output and "in planted" in output
    assert output.strip().endswith("ValueError: planted") and "error: " not in output


@pytest.mark.parametrize(
    "name, message, printed",
    [
        ("asyncio", "Future exception was never retrieved\nfuture: <Future finished exception=...>", False),
        ("asyncio", "Executing <Task> took 2 seconds", True),
        ("gcsfs", "Future exception was never retrieved", True),
    ],
)
def test_the_other_errors_of_a_failed_save_do_not_follow_the_last_line(name: str, message: str, printed: bool) -> None:
    record = logging.LogRecord(name, logging.ERROR, "/elsewhere/events.py", 1, message, None, None)
    assert cli.only_warnings_of_libraries(record) is printed


@pytest.mark.parametrize(
    "module, printed",
    [
        ("runners/dataflow/dataflow_runner", True),
        ("runners/portability/portable_runner", True),
        ("options/value_provider", False),
    ],
)
def test_b6_what_beam_logs_about_a_job_is_printed(module: str, printed: bool) -> None:
    record = logging.LogRecord("root", logging.INFO, f"/lib/apache_beam/{module}.py", 1, "Job is running", None, None)
    assert cli.only_warnings_of_libraries(record) is printed


LATE = """
import atexit, logging, types
from contrastive_jax.commands import cli
from contrastive_jax.config import UserError

def main(arguments):
    atexit.register(logging.getLogger("library").error, "a thread of a library failed too")
    raise UserError("--flag=x: the bucket is gone")

command = types.ModuleType("command", "Fails.")
command.define_flags, command.main = lambda: None, main
cli.run(command, [])
"""


def test_what_threads_of_libraries_log_at_the_end_does_not_hide_the_error() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: --flag=x: the bucket is gone", done.stderr
