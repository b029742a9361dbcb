"""Compiles a recipe for hardware that you do not have.

    contrastive-jax plan --config=configs/cpt_text.py:s --target=tpu:v5e:16x16

Prints whether the train step fits into the memory of the devices, and how fast it may be; with --evaluation, whether the
forward pass of evaluations fits too. Needs the compilers of TPU and GPU (`pip install 'contrastive_jax[plan]'`), which run on
any machine.

With --search it also compiles other settings and prints which are faster: what the backward pass recomputes (remat), the blocks
as a loop or one by one (scan), what else is saved (saved), micro-batches (micro_batch), layers shared among devices (tensor).
A step that does not fit is searched for what fits in any case. A trial of a large model takes minutes.

Exit status: 0 if all that was planned fits; 1 if not; 2 for bad input.
"""

import json
import pathlib
import sys
import tempfile

from absl import flags, logging

from contrastive_jax import files
from contrastive_jax.commands import cli
from contrastive_jax.config import UserError
from contrastive_jax.files import transfer
from contrastive_jax.planning import hardware, plan, search
from contrastive_jax.training import warm_start


def define_flags() -> None:
    """Defines the flags of the command."""
    cli.define_config()
    flags.DEFINE_string("target", None, f"The machine: {hardware.EXAMPLES}.", required=True)
    flags.DEFINE_string("output", None, "Also write the plan, and the plans that the search found, to this JSON file.")
    flags.DEFINE_list("search", [], f"Search for faster settings along some of these, in this order: {', '.join(search.AXES)}.")
    flags.DEFINE_bool("evaluation", False, "Plan the memory of evaluations too.")
    flags.DEFINE_integer(
        "vocab_size",
        None,
        f"Number of token ids; by default that of config.data.dir, or {plan.DEFAULT_VOCAB_SIZE:,} if it is not present.",
        lower_bound=1,
    )


def main(arguments: list[str]) -> None:
    """Plans the recipe, writes the plan if --output is given, and exits with 0 if it fits, else 1."""
    del arguments
    values = flags.FLAGS
    output = files.absolute(values.output) if values.output else None
    if output:
        transfer.check_output(output)  # a compilation takes minutes: refuse before it
    if unknown := [axis for axis in values.search if axis not in search.AXES]:
        raise UserError(f"--search={unknown[0]}: choose from {', '.join(search.AXES)}")
    target = hardware.parse_target(values.target)
    logging.set_verbosity(logging.WARNING)  # each compilation logs the rules of every parameter
    with tempfile.TemporaryDirectory() as folder:
        schedules = pathlib.Path(folder)
        plan.configure_compilers(target, schedules)
        vocab_size = values.vocab_size or plan.vocab_size_of_data(values.config.data.dir)
        config = warm_start.resolve(values.config)
        result = plan.plan_recipe(config, target, vocab_size, schedules, values.evaluation)
        fitting = []
        if values.search or not result["fits"]:
            fitting = search.Search(config, target, vocab_size, schedules, result).run(values.search)
    if output:
        files.write_text(output, json.dumps(result | {"search": fitting}, indent=2))
    sys.exit(0 if result["fits"] and result.get("evaluation", result)["fits"] else 1)
