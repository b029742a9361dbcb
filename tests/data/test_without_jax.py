"""The data room works without jax: machines that only prepare data need not have it."""

import pkgutil
import subprocess
import sys

from conftest import ROOT

from contrastive_jax import data

# Refuses jax to everybody. TensorFlow, which tries to import it for TensorFlow Lite, goes on without.
PROGRAM = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
print("jax" in sys.modules)
"""


def test_every_module_of_the_data_room_is_imported_where_there_is_no_jax() -> None:
    names = [module.name for module in pkgutil.walk_packages(data.__path__, "contrastive_jax.data.")]
    assert {"contrastive_jax.data.pipeline", "contrastive_jax.data.preparation.prepare"} <= set(names)
    arguments = [sys.executable, "-c", PROGRAM, *names]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.splitlines()[-1:] == ["False"], result.stderr[-2000:]
