"""Imports run one way (see the map in README.md)."""

import ast
import pathlib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "contrastive_jax"
# What modules of each part may import, beside the standard library and what is not named in WATCHED.
ALLOWED = {
    "data": {"contrastive_jax.data", "tensorflow"},
    "objectives": {"jax", "contrastive_jax.objectives"},
    "models": {"jax", "flax", "contrastive_jax.models"},
    "evals": {"contrastive_jax.evals", "contrastive_jax.data", "tensorflow"},
    "sharding.py": {"jax"},
    "optim.py": {"jax", "optax"},
    "checkpoint.py": {"jax", "orbax", "contrastive_jax.digest"},
    "digest.py": {"jax"},
    "metrics.py": set(),
    "step.py": {"jax", "optax", "contrastive_jax.digest"},
    "grad_cache.py": {"jax"},
    "processes.py": {"jax", "contrastive_jax.peers"},
    "peers.py": {"contrastive_jax.cli"},
    "guard.py": set(),
    "nearest.py": {"jax", "contrastive_jax.sharding"},
    "reporting": {"contrastive_jax.reporting", "contrastive_jax.results"},
    "results.py": set(),
}
WATCHED = {"jax", "flax", "optax", "orbax", "clu", "tensorflow", "contrastive_jax"}


def imports(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module.startswith("contrastive_jax") else {module}
    return {name for name in names if name.split(".")[0] in WATCHED}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part: str) -> None:
    files = [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).glob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            allowed = any(name == entry or name.startswith(entry + ".") for entry in ALLOWED[part])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_imports_a_command() -> None:
    commands = {f"contrastive_jax.{name}" for name in ("train", "evaluate", "prepare", "plan", "encode", "export", "report")}
    for path in PACKAGE.rglob("*.py"):
        assert not imports(path) & commands, path
