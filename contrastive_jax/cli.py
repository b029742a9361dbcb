"""What the commands share: errors of the user as one line and exit status 2, flags, the config."""

import contextlib
import functools
import json
import logging as std_logging
import math
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

USER_ERROR = 2


class Failure(SystemExit):
    """The end of a command by an error that is told in one line; `status` is its exit status."""

    def __init__(self, message: str, status: int = USER_ERROR):
        super().__init__(status)
        self.message, self.status = " ".join(message.split()), status

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the exceptions of bad input into one line on stderr and exit status 2. Wrap set-up with it, never the loop."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


def fail(message: str, status: int = USER_ERROR) -> NoReturn:
    """Ends the command with a one-line message."""
    failure = Failure(message, status)
    print(f"error: {failure}", file=sys.stderr, flush=True)
    raise failure


def define_config() -> flags.FlagHolder:
    """The flag --config=FILE.py[:ARG]; any value in it is overridden by --config.key=value."""
    return config_flags.DEFINE_config_file("config", None, "The recipe, FILE.py or FILE.py:ARG.", lock_config=True)


def arrange(argv: list[str], config: str) -> list[str]:
    """Puts --config=FILE, by default `config`, before its overrides: absl wants it so."""
    given = [argument for argument in argv if argument.startswith("--config=")] or [f"--config={config}"]
    return [argv[0], *given, *(argument for argument in argv[1:] if argument not in given)]


def unknown_key(argv: list[str]) -> str | None:
    """The message for the first --config.key that the config does not have, with the list of what there is."""
    recipe = next(argument for argument in argv if argument.startswith("--config=")).partition("=")[2]
    path, _, variant = recipe.partition(":")
    config = runpy.run_path(path)["get_config"](*[variant] * bool(variant))
    for argument in argv:
        if not argument.startswith("--config."):
            continue
        node = config
        for key in argument.partition("=")[0].split(".")[1:]:
            if not isinstance(node, ConfigDict) or key not in node:
                there = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no keys below it"
                return f"{argument.partition('=')[0]}: unknown key {key!r}; there are: {there}"
            node = node[key]
    return None


def check_values(config: ConfigDict, prefix: str = "config") -> None:
    """Checks what each module would have to check for itself.

    Raises:
      ValueError: a number that is not finite, or a tuple that does not hold (name or size, number) pairs.
    """
    for key, value in config.items():
        shown = f"{prefix}.{key}={value!r}"
        if isinstance(value, ConfigDict):
            check_values(value, f"{prefix}.{key}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{shown}: must be a finite number")
        elif isinstance(value, tuple):
            first = int if key == "matryoshka" else str
            for pair in value:
                if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], first) and is_number(pair[1])):
                    kind = "size" if first is int else "name"
                    raise ValueError(f"{shown}: give ({kind}, number) pairs, as in [({kind}, 1.0), ({kind}, 0.5)]")


def is_number(value: object) -> bool:
    """Whether it is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parse(argv: list[str], positional: bool = False) -> list[str]:
    """Parses the flags; a wrong one is named in one line, exit status 2. Returns what is left, if the command takes it."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            check_values(flags.FLAGS["config"].value or ConfigDict())  # a file that could not be loaded says so at first use
    except (AttributeError, KeyError):
        message = unknown_key(argv)
        if message is None:
            raise
        fail(message)
    except (flags.Error, ValueError, TypeError, OSError) as error:
        fail(str(error))
    if rest[1:] and not positional:
        fail(f"unexpected argument {rest[1]!r}; flags are given as --name=value")
    return rest


def run(main: Callable[[list[str]], None], config: str | None = None, positional: bool = False) -> None:
    """Runs a command: parses its flags, refuses what it does not know, logs at level INFO.

    Args:
      main: takes what is left of the command line.
      config: for a command with `define_config`: the recipe where none is given.
      positional: whether the command takes arguments beside flags.
    """
    if config:
        sys.argv[:] = arrange(sys.argv, config)
    logging.set_verbosity(logging.INFO)
    # Libraries speak up from WARNING on only: Orbax alone would drown the progress lines.
    ours = os.path.dirname(__file__)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= std_logging.WARNING or record.pathname.startswith(ours)
    )
    app.run(main, flags_parser=functools.partial(parse, positional=positional))


def to_json(config: ConfigDict) -> str:
    """The config as JSON with sorted keys, the same for equal configs."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)
