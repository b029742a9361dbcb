"""Imports run one way: what each room may import (the map is in README.md)."""

import ast
import pathlib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "contrastive_jax"
# One line per room: the other rooms and the heavy libraries that it may import. Its own modules and everything that is not in
# WATCHED are free.
ROOMS = {
    "__init__.py": "config data evals inference objectives runtime training",
    "__main__.py": "commands",
    "config": "",
    "files": "config runtime.progress",
    "data": "config files runtime.progress",
    "runtime": "config files jax orbax",
    "objectives": "config jax",
    "models": "config runtime jax flax",
    "huggingface": "config files data",
    "training": "config files data runtime objectives models huggingface jax optax clu",
    "inference": "config files data runtime objectives models huggingface jax",
    "evals": "config files data runtime inference training objectives models huggingface jax optax",
    "planning": "config files data runtime objectives training inference jax",
    "reporting": "config files data inference evals",
    "commands": "contrastive_jax config files data evals inference planning reporting runtime training",
}
WATCHED = {"jax", "flax", "optax", "orbax", "clu", "tensorflow", "contrastive_jax"}


def imports(path: pathlib.Path) -> set[str]:
    """The watched libraries that a file imports, and modules of this package: "jax", "data.order"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = module == "contrastive_jax" or module.startswith("contrastive_jax.")
            names |= {f"{module}.{alias.name}" for alias in node.names} if inside else {module}
    watched = [name.split(".") for name in names if name.split(".")[0] in WATCHED]
    return {".".join(parts[1:3]) if parts[0] == "contrastive_jax" and parts[1:] else parts[0] for parts in watched}


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_every_module_is_in_a_room() -> None:
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == set(ROOMS)
    visible = [path.name for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]
    assert len(visible) <= 13, sorted(visible)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]
    assert files
    for path in files:
        for name in imports(path):
            allowed = {*ROOMS[room].split(), room.removesuffix(".py")}
            assert name in allowed or name.split(".")[0] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_package_never_imports_recipes() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "configs"], path


def lines_of(path: pathlib.Path) -> int:
    return len(path.read_text().splitlines())


def test_nothing_is_too_long_to_read() -> None:
    """Functions ≤ 60 lines, files ≤ 400, commands ≤ 80, recipes ≤ 30 beside their header, README ≤ 100."""
    for path in PACKAGE.rglob("*.py"):
        assert lines_of(path) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
    commands = [path for path in (PACKAGE / "commands").glob("*.py") if path.name != "cli.py"]
    for limit, paths in ((80, commands), (100, [ROOT / "README.md"])):
        for path in paths:
            assert lines_of(path) <= limit, path
    for path in (ROOT / "configs").glob("*.py"):
        assert lines_of(path) - ast.parse(path.read_text()).body[0].end_lineno <= 30, path
