"""The command line: `python -m contrastive_jax COMMAND --flag=value ...`, installed also as `contrastive-jax`."""

import importlib
import sys

COMMANDS = {
    "prepare": "make a dataset of tokens from raw documents",
    "train": "train an encoder, or continue a run",
    "evaluate": "score a model on tasks; compare two results",
    "encode": "turn a file of texts into a file of vectors",
    "mine": "find hard negatives for a file of pairs",
    "generate": "write texts like those in a file, as pairs for training",
    "export": "write a run as a sentence-transformers folder",
    "report": "make one HTML page of runs and results",
    "plan": "compile a recipe for hardware that is not here: does it fit, how fast is it",
    "verify": "read all checkpoints of a run and print which are whole",
}


def usage() -> str:
    """Returns the list of commands."""
    rows = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    return f"usage: contrastive-jax COMMAND --flag=value ...\n\n{rows}\n\ncontrastive-jax COMMAND --help lists its flags."


def main() -> None:
    """Runs the command that the first argument names; exits with status 2 if there is no such command."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("--help", "-h", "help"):
        print(usage())
        return
    if name not in COMMANDS:
        problem = f"unknown command {name!r}" if name else "no command given"
        print(f"{usage()}\n\nerror: {problem}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    from contrastive_jax.commands import cli

    cli.run(importlib.import_module(f"contrastive_jax.commands.{name}"), sys.argv[2:])


if __name__ == "__main__":
    main()
