"""Plans recipes for one machine, all in one process: `every_recipe.py TARGET NAME:VARIANT...` prints a line for each."""

import importlib
import pathlib
import sys
import tempfile

from contrastive_jax.planning import hardware, plan


def main(target: hardware.Target, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan.configure_compilers(target, pathlib.Path(folder))
        for name in names:
            module, _, argument = name.partition(":")
            config = importlib.import_module(f"configs.{module}").get_config(*[argument] * bool(argument))
            config.memory.source = ""  # a teacher that was not trained here
            try:
                planned = plan.plan_step(config, target, plan.DEFAULT_VOCAB_SIZE, pathlib.Path(folder))
                missing = ", ".join(x for x in planned.get("unmodelled", ()) if x != "ZeroCrop") or "nothing"
                result = f"{'fits' if planned['fits'] else 'does not fit'}; not modelled: {missing}"
            except Exception as error:  # the others are planned all the same
                result = f"{type(error).__name__}: {error}".splitlines()[0]
            print(name, result, flush=True)


if __name__ == "__main__":
    main(hardware.parse_target(sys.argv[1]), sys.argv[2:])
