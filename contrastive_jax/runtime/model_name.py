"""Names of models as users give them, to --model and to config.init_from.

runs/debug           a run: the newest checkpoint of its workdir
runs/debug@2000      the checkpoint of step 2,000
runs/debug@best      the checkpoint with the best score (config.keep_best)
exported             a folder that `export` wrote, known by its modules.json
hf:FOLDER            a Hugging Face or sentence-transformers folder
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.runtime import checkpoint, sharding

BEST = "best"


class ModelName(NamedTuple):
    """A parsed name.

    Attributes:
      folder: the workdir of a run, or the folder of Hugging Face files.
      is_run: whether it is a workdir.
      step: of a run: a step, "best", or None for the newest checkpoint.
    """

    folder: epath.Path
    is_run: bool
    step: int | str | None = None


def parse_model_name(name: str) -> ModelName:
    """Parses a name in one of the forms that this file's header lists.

    Looks for modules.json, which only an exported folder has; does not check that a workdir exists. A suffix other than @STEP
    or @best belongs to the path.
    """
    if name.startswith("hf:"):
        return ModelName(epath.Path(name.removeprefix("hf:")).expanduser(), is_run=False)
    whole = epath.Path(name).expanduser()
    if (whole / "modules.json").exists():
        return ModelName(whole, is_run=False)
    folder, _, step = name.rpartition("@")
    if folder and (step == BEST or step.isdigit()):
        return ModelName(epath.Path(folder).expanduser(), is_run=True, step=BEST if step == BEST else int(step))
    return ModelName(whole, is_run=True)


def read_params(name: ModelName, shardings_of: Callable[[Any], Any]) -> tuple[int, dict[str, Any]]:
    """Reads the parameters of encoder, objective and token loss from a checkpoint of a run.

    Args:
      name: of a run.
      shardings_of: the encoder's parameters as a tree of jax.ShapeDtypeStruct → the tree of their shardings on one mesh.

    Returns:
      The checkpoint's step, and the parameters; each device reads its own part of them.

    Raises:
      UserError: the run has no such checkpoint, or the checkpoint is damaged.
    """
    checkpoints = checkpoint.Checkpoints(name.folder, read_only=True)
    steps = checkpoints.steps()
    step = checkpoints.best() if name.step == BEST else name.step
    if name.step == BEST and step is None:
        raise UserError(f"{name.folder}@best: no checkpoint has a score; set config.keep_best when training")
    if name.step is None and not steps:
        raise UserError(f"{name.folder}: no checkpoint yet; train the run first")
    number = int(step) if step is not None else max(steps)
    if number not in steps:
        raise UserError(f"{name.folder}: no checkpoint {number}; there are {steps}")

    def place(shapes: Any) -> Any:
        """Every device holds all parameters but the encoder's: those of heads, and a few numbers."""
        encoder = shardings_of(shapes["encoder"])
        replicated = sharding.replicated(jax.tree.leaves(encoder)[0].mesh)
        return {name: encoder if name == "encoder" else jax.tree.map(lambda _: replicated, shapes[name]) for name in shapes}

    return number, checkpoints.read_item(number, "params", place)
