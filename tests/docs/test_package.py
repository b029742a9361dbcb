"""The wheel is complete, and the lock files name what it needs."""

import pathlib
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from setuptools.config.setupcfg import read_configuration

LOCKS = sorted((ROOT / "launch/locks").glob("*.txt"))


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_wheel_is_complete(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("contrastive_jax", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, f"--wheel-dir={tmp_path}"], check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "contrastive_jax").rglob("*.py")}
    assert found == expected | {"contrastive_jax/py.typed"}
    names = {name.partition(".dist-info/")[2] for name in zipfile.ZipFile(wheel).namelist()}
    assert {"entry_points.txt", "licenses/LICENSE"} <= names


@pytest.mark.parametrize("extra", ["base", "cuda", "test", "tpu"])
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_a_lock_names_every_requirement(extra: str, python: str) -> None:
    lines = [line for line in (ROOT / f"launch/locks/{extra}-{python}.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), "a lock has versions, no addresses"
    versions = dict(line.split("==") for line in lines)
    assert "torch" not in versions
    options = read_configuration(ROOT / "setup.cfg")["options"]
    wanted = list(options["install_requires"]) + (options["extras_require"][extra] if extra != "base" else [])
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate({"platform_machine": "x86_64"}):
            assert requirement.specifier.contains(versions[normalize(requirement.name)]), requirement


def test_there_are_no_other_locks() -> None:
    assert len(LOCKS) == 10
