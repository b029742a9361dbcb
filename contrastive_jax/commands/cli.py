"""What all commands share: the recipe, the flags, --help, and one-line messages for the user's mistakes."""

import contextlib
import errno
import functools
import inspect
import logging as std_logging
import os
import re
import runpy
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from contrastive_jax import config as config_lib
from contrastive_jax.config import UserError
from contrastive_jax.files import errors
from contrastive_jax.runtime import processes
from contrastive_jax.runtime.peers import Peers, print_error

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEAM_RUNNERS = "/apache_beam/runners/"
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
FORBIDDEN_PATH = {errno.EACCES, errno.EPERM, errno.EROFS}


def define_config() -> None:
    """Defines the flag --config=FILE.py[:ARGUMENT] and, with it, --config.key=value for every config key."""
    config_flags.DEFINE_config_file(
        "config", None, "The recipe: FILE.py or FILE.py:ARGUMENT. --config.key=value overrides a value.", lock_config=True
    )


def define_processes() -> None:
    """Defines the flags of a command that several processes run together."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Index of this process, 0 to num_processes - 1.")
    flags.DEFINE_bool("cluster", False, "Take coordinator and processes from the environment (TPU pod, SLURM, Open MPI).")
    flags.DEFINE_integer("join_seconds", 300, "How long the processes wait for one another at the start.")
    flags.DEFINE_integer("silent_seconds", 40, "Warn of a process without a sign of life or progress for this long.")
    flags.DEFINE_integer("hang_seconds", 600, "End if a process has no sign of life or no progress for this long.")


def parameters_of(*documented: Callable[..., Any]) -> dict[str, tuple[Any, Any, str]]:
    """Returns {name: (type, default, description)} of the parameters of functions and of the fields of NamedTuples.

    The descriptions come from the sections "Args:" and "Attributes:" of the docstrings. Of two of a name the first counts.
    """
    parameters: dict[str, tuple[Any, Any, str]] = {}
    for item in documented:
        section = re.search(r"^(?:Args|Attributes):\n((?:(?:  .*)?\n)*)", f"{inspect.getdoc(item)}\n", re.M)
        entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section[1], re.M) if section else []
        texts = {name: " ".join(text.split()) for name, text in entries}
        types = typing.get_type_hints(item)
        for name, parameter in inspect.signature(item).parameters.items():
            if parameter.kind != parameter.VAR_KEYWORD:
                parameters.setdefault(name, (types[name], parameter.default, texts[name][0].upper() + texts[name][1:]))
    return parameters


def define_flags_of(*documented: Callable[..., Any]) -> None:
    """Defines the flags that `parameters_of` describes; a type that is no bool, int, float, str or Literal may be repeated."""
    kinds: dict[type, Callable[..., Any]] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    parameters = parameters_of(*documented)
    for name, (annotated, default, description) in parameters.items():
        kind = typing.get_args(annotated)[0] if default is None else annotated  # it is X | None
        text = re.sub(r"`(\w+)`", lambda found: "--" * (found[1] in parameters) + found[1], description)
        if typing.get_origin(kind) is typing.Literal:
            flags.DEFINE_enum(name, default, typing.get_args(kind), text)
        elif default is inspect.Parameter.empty:
            flags.DEFINE_string(name, None, text, required=True)
        elif kind in kinds:
            kinds[kind](name, default, text)
        else:
            flags.DEFINE_multi_string(name, list(default), text)


@contextlib.contextmanager
def joined_processes() -> Iterator[Peers]:
    """Joins the other processes that `define_processes` names, watches them, and ends with them; with none, does nothing.

    Raises:
      UserError: from `processes.join`, or in the place of an error of a path or bucket that the command line names: the other
        processes end with the same line.
    """
    names = ("coordinator", "num_processes", "process_id", "cluster", "join_seconds", "silent_seconds", "hang_seconds")
    joining: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    with processes.join(**joining) as peers:
        try:
            yield peers
        except UserError:
            raise
        except Exception as error:
            user_error = storage_error(error, sys.argv[1:])
            if user_error is None:
                raise
            raise user_error from error


def config_first(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with --config=FILE before its overrides, which ml_collections requires."""
    recipes = [argument for argument in arguments if argument.startswith("--config=")]
    return [*recipes, *(argument for argument in arguments if argument not in recipes)]


def recipe_path(arguments: Sequence[str]) -> tuple[str, str]:
    """Returns the file and the argument of --config=FILE.py[:ARGUMENT]; the argument is "" where there is none.

    Raises:
      UserError: --config is missing, or there is no such file.
    """
    recipes = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    recipe = recipes[-1] if recipes else ""  # of a flag that is given twice the last one counts
    path, _, variant = recipe.partition(":")
    if not path:
        raise UserError("--config=FILE.py is missing; give a recipe, for example configs/debug.py")
    if not os.path.isfile(path):
        raise UserError(f"--config={recipe}: no such file; give a recipe, for example configs/debug.py")
    return path, variant


def load_recipe(path: str, variant: str) -> ConfigDict:
    """Runs a recipe; returns its config.

    Args:
      path: of the recipe, a Python file with a function `get_config`.
      variant: the argument of `get_config`; "": it is called without one.

    Raises:
      UserError: the recipe raises an exception; the message names the line of the recipe.
    """
    # A recipe may import the recipes beside it (`from configs import debug`), wherever the command was started.
    parent = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if parent not in sys.path:
        sys.path.append(parent)
    try:
        get_config = runpy.run_path(path)["get_config"]
        return get_config(variant) if variant else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a user's file raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error


def unknown_key(config: ConfigDict, arguments: Sequence[str]) -> str | None:
    """Returns the message for the first --config.key that the config does not have, or None if it has all of them."""
    for argument in arguments:
        if not argument.startswith("--config."):
            continue
        name, node = argument.partition("=")[0], config
        for key in name.split(".")[1:]:
            if not isinstance(node, ConfigDict) or key not in node:
                keys = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no keys below it"
                return f"{name}: unknown key {key!r}; there are: {keys}"
            node = node[key]
    return None


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and checks the recipe; returns the arguments that are not flags.

    Raises:
      UserError: a flag or a value of the recipe is wrong; the message names it.
    """
    config = load_recipe(*recipe_path(argv)) if "config" in flags.FLAGS else None
    try:
        positional = flags.FLAGS(argv)[1:]
    except (AttributeError, KeyError) as error:
        message = unknown_key(config, argv) if config is not None else None
        if message is None:
            raise
        raise UserError(message) from error
    except (flags.Error, ValueError, TypeError) as error:
        if missing := re.match(r"flag --(\w+)=None: Flag --\1 must have a value", str(error)):
            raise UserError(f"--{missing[1]} is missing; --help describes it") from error
        raise UserError(str(error)) from error
    if config is not None:
        config_lib.check(flags.FLAGS["config"].value)
    return positional


def show_help(command: ModuleType) -> None:
    """Prints the docstring of a command and its flags."""
    lines = [inspect.cleandoc(command.__doc__ or ""), "", "Flags:"]
    defined = flags.FLAGS.flags_by_module_dict()
    own = defined.get(command.__name__, []) + [flag for flag in defined.get(__name__, []) if "." not in flag.name]
    for flag in own:
        values = f"{{{','.join(flag.parser.enum_values)}}}" if hasattr(flag.parser, "enum_values") else ""
        usage = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={values or 'VALUE'}"
        default = (flag.default_as_str or "").strip("'")
        note = f" (default: {default})" if flag.default not in (None, "", [], False) else ""
        text = re.sub(r"^<.*?>: |;\s+repeat this option.*", "", flag.help)  # what absl adds says the same once more
        lines += [f"  {usage}", textwrap.fill(text + note, 128, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    print_page("\n".join(lines))


def print_page(text: str) -> None:
    """Prints a text. A reader that closes the pipe early, as in `--help | head`, is not an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more when it ends


def path_error(error: OSError, arguments: Sequence[str]) -> UserError | None:
    """Returns the UserError to raise if an operating-system error is the fault of a path that the user gave, else None.

    There are two cases. The path is wrong: it, or a folder above it, does not exist or is of the wrong kind. Or the path is
    forbidden: there is no permission to write it, a folder above it, or something inside it. The error may name the temporary
    file beside the path that is written first and then renamed.

    Args:
      error: its `filename` is the path that the operating system could not use.
      arguments: the command line: --name=VALUE, --name=VALUE,VALUE or VALUE. A value without "/" is not taken for a path: it
        may be a number or a name, and as a path it would lie in the current folder, where errors have other causes.
    """
    if not isinstance(error.filename, str):
        return None
    failed_path = os.path.abspath(error.filename)
    failed_folder, failed_name = os.path.split(failed_path)
    for argument in arguments:
        for value in (argument.partition("=")[2] if argument.startswith("--") else argument).split(","):
            given_path = os.path.abspath(value)
            folder, name = os.path.split(given_path)
            error_is_same_or_parent = given_path == failed_path or given_path.startswith(failed_path + os.sep)
            error_is_sibling = folder == failed_folder and name in failed_name  # the temporary file's name contains the path's
            error_is_inside = failed_path.startswith(given_path + os.sep)
            wrong = error.errno in WRONG_PATH and (error_is_same_or_parent or error_is_sibling)
            forbidden = error.errno in FORBIDDEN_PATH and (error_is_same_or_parent or error_is_sibling or error_is_inside)
            if os.sep in value and (wrong or forbidden):
                return UserError(f"{argument}: {error.filename}: {error.strerror}; check that path")
    return None


def storage_error(error: Exception, arguments: Sequence[str]) -> UserError | None:
    """Returns the UserError for an error of a path or a bucket that a command line names, else None."""
    user_error = path_error(error, arguments) if isinstance(error, OSError) else None
    return user_error or errors.explain(error, [name for argument in arguments for name in errors.NAMED.findall(argument)])


def parse_or_exit(argv: list[str]) -> list[str]:
    """Calls `parse` for absl, with the program's name before the arguments; a UserError ends the process with one line."""
    try:
        return [argv[0], *parse(argv)]
    except UserError as error:
        print_error(error)
        sys.exit(error.status)


def start(command: ModuleType, argv: list[str]) -> None:
    """Calls the command's main with its positional arguments.

    A UserError ends the process with one line and its exit status; so do errors of paths and buckets that the command line
    names. Every other exception is a bug, or a failure of the machine, and keeps its traceback.
    """
    try:
        errors.check_names(sys.argv[1:])
        if argv[1:] and not getattr(command, "POSITIONAL", False):
            raise UserError(f"unexpected argument {argv[1]!r}; flags are given as --name=value")
        command.main(argv[1:])
    except UserError as error:
        end(error)
    except Exception as error:
        user_error = storage_error(error, sys.argv[1:])
        if user_error is None:
            raise
        end(user_error)


def end(error: UserError) -> NoReturn:
    """Ends the process with an error as the last line: threads of libraries that fail for the same reason say no more."""
    logging.get_absl_handler().addFilter(nothing_of_libraries)
    print_error(error)
    sys.exit(error.status)


def nothing_of_libraries(record: std_logging.LogRecord) -> bool:
    """Returns whether a log line is of this package."""
    return record.pathname.startswith(PACKAGE)


def only_warnings_of_libraries(record: std_logging.LogRecord) -> bool:
    """Returns whether to print a log line: all of this package's, only warnings of others (Orbax logs dozens per save).

    Lines about a job that Beam runs on a cluster are printed too: what its workers and its service say is said nowhere else.

    When a save fails, Orbax raises one of its errors; asyncio would print the others, pages long, after the last line.
    """
    if record.pathname.startswith(PACKAGE) or BEAM_RUNNERS in record.pathname:
        return True
    if record.name == "asyncio" and "exception was never retrieved" in record.getMessage():
        return False
    record.exc_info = None  # what a library could not handle is raised, and printed then
    return record.levelno >= std_logging.WARNING


def run(command: ModuleType, arguments: Sequence[str]) -> None:
    """Runs a command.

    Args:
      command: a module with a docstring (its --help), `define_flags()`, `main(positional arguments)` and, where it takes
        positional arguments, `POSITIONAL = True`.
      arguments: the command line after the command's name.
    """
    command.define_flags()
    if {"--help", "-h", "--helpfull"} & set(arguments):
        show_help(command)
        return
    name = command.__name__.rpartition(".")[2]
    sys.argv[:] = [f"contrastive-jax {name}", *config_first(arguments)]  # ml_collections reads overrides from sys.argv
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(only_warnings_of_libraries)
    errors.log_repeated()
    app.run(functools.partial(start, command), argv=sys.argv, flags_parser=parse_or_exit)
