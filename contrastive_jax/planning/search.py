"""Searches for settings of a recipe that are faster on a machine, or that fit at all. Every trial is compiled."""

import math
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.planning import hardware, plan
from contrastive_jax.planning.hardware import Target
from contrastive_jax.planning.plan import Plan

# The values of config.model.remat, from the least recomputation to the most.
REMAT_POLICIES = ("none", "dots", "attention", "full")
# What is searched, in this order; each keeps the best of those before.
AXES = ("remat", "scan", "saved", "micro_batch", "tensor")

# {config key: value}, for each key that an axis changes.
Settings = dict[str, Any]


class Search:
    """The trials of one search.

    Args:
      config: the recipe, with `init_from` resolved.
      target: the machine.
      vocab_size: the number of token ids.
      schedules: the folder for the TPU compiler's schedules of Pallas kernels, as in `plan.configure_compilers`.
      known: the plan of the recipe as it is, which is not compiled again.
    """

    def __init__(self, config: ConfigDict, target: Target, vocab_size: int, schedules: pathlib.Path, known: Plan):
        self._config = config
        self._compile_for = (target, vocab_size, schedules)
        # A plan has the resolved micro-batch, in pairs, and the resolved mesh, whatever the recipe says of them.
        size = known["micro_batch"]
        self._own: Settings = {
            "model.remat": known["remat"],
            "micro_batch": size if size < config.data.batch_size else 0,
            "model.scan": config.model.scan,
            "model.saved": config.model.saved,
            "mesh.fsdp": known["mesh"]["fsdp"],
            "mesh.tensor": known["mesh"]["tensor"],
        }
        self.best, self.best_plan = dict(self._own), known | {"settings": self._flags(self._own)}
        self._tried: dict[str, Plan | None] = {str(self._own): self.best_plan}

    def run(self, axes: Sequence[str]) -> list[Plan]:
        """Searches along some of AXES, one after another; prints a line per trial, and in the end all that fit.

        Args:
          axes: what to search. Where the recipe does not fit, "remat" is searched in any case.

        Returns:
          The plans that fit, the fastest first.
        """
        does_fit = self.best_plan["fits"]
        chosen = [axis for axis in AXES if axis in axes or (axis == "remat" and not does_fit)]
        print(f"searching for settings that {'are faster' if does_fit else 'fit'}, along {', '.join(chosen)}")
        print(HEADER, flush=True)
        for axis in chosen:
            getattr(self, axis)()
        fitting = self.fitting()
        if fitting:
            print("what fits, the fastest first", *map(format_trial, fitting), sep="\n")
        else:
            name = self._compile_for[0].name
            print(f"nothing fits on {name}: raise config.mesh.fsdp or config.mesh.tensor, or take a larger machine")
        return fitting

    def fitting(self) -> list[Plan]:
        """Returns the plans that fit, the fastest first; each has the flags that change the recipe, "settings"."""
        plans = [found for found in self._tried.values() if found and found["fits"]]
        return sorted(plans, key=lambda found: found["step_seconds"])

    def attempt(self, changes: Settings) -> Plan | None:
        """Compiles the best settings so far with these changes, prints the result, and keeps them if they are faster.

        Returns:
          The plan; None if the config refuses the settings, or the compiler fails.
        """
        settings = self.best | changes
        if str(settings) in self._tried:
            return self._tried[str(settings)]
        trial = self._config.copy_and_resolve_references()
        trial.update_from_flattened_dict(settings | {"micro_batch_tokens": 0})
        flags = self._flags(settings)
        try:
            found: Plan | None = plan.plan_step(trial, *self._compile_for)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # the other trials are worth having
            verdict = "refused" if isinstance(error, UserError) else "failed"
            print(f"{verdict:>28}{'':>28}  {flags}: {str(error).splitlines()[0]}", flush=True)
            found = None
        self._tried[str(settings)] = found
        if found:
            found["settings"] = flags
            print(format_trial(found), flush=True)
            is_first = not self.best_plan["fits"]
            if found["fits"] and (is_first or found["step_seconds"] < self.best_plan["step_seconds"]):
                self.best, self.best_plan = settings, found
        return found

    def _flags(self, settings: Settings) -> str:
        """Returns the flags that turn the recipe into these settings."""
        changed = {key: value for key, value in settings.items() if value != self._own[key]}
        if "micro_batch" in changed and self._config.micro_batch_tokens:
            changed["micro_batch_tokens"] = 0
        return " ".join(flag_of(key, value) for key, value in changed.items()) or "the recipe as it is"

    def remat(self) -> None:
        """Tries each policy with smaller and smaller micro-batches, until one fits."""
        for policy in REMAT_POLICIES:
            size: int | None = 0  # pairs over all devices; 0: the whole batch at once; None: no smaller size is left
            while size is not None:
                saved = () if policy == "none" else self._config.model.saved
                found = self.attempt({"model.remat": policy, "model.saved": saved, "micro_batch": size})
                if not found or found["fits"]:
                    break
                excess = found["memory"]["peak"] / found["memory"]["capacity"]
                multiple = found["batch_shards"] * self._config.data.pack_pairs
                size = smaller_micro_batch(size or self._config.data.batch_size, excess, multiple)

    def scan(self) -> None:
        """Tries the blocks without the loop, or with it."""
        self.attempt({"model.scan": not self.best["model.scan"]})

    def saved(self) -> None:
        """Tries to save queries, keys and values, then "middle" too, and "up" as far as memory is left."""
        model, blocks = self._config.model, self._config.model.num_layers
        if self.best["model.remat"] in ("none", "dots"):  # these save all products
            return
        nothing = self.attempt({"model.saved": ()})
        projections = tuple((name, blocks) for name in ("query", "key", "value"))
        some = self.attempt({"model.saved": projections})
        if not some or not nothing or not some["fits"]:
            return
        self.attempt({"model.saved": (*projections, ("middle", blocks))})
        width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        up = (some["memory"]["peak"] - nothing["memory"]["peak"]) / width * model.d_ff  # bytes of all blocks
        free = self.best_plan["memory"]["capacity"] - self.best_plan["memory"]["peak"]
        chosen = dict(self.best["model.saved"])
        chosen["up"] = min(chosen.get("up", 0) + int(0.9 * blocks * free / up), blocks) if up > 0 else 0
        if chosen["up"] == blocks or (chosen["up"] and not self.best["model.scan"]):
            self.attempt({"model.saved": tuple(chosen.items())})

    def micro_batch(self) -> None:
        """Tries micro-batches of a half and a quarter of the batch, and the whole batch at once."""
        multiple = self.best_plan["batch_shards"] * self._config.data.pack_pairs
        for part in (1, 2, 4):
            size = self._config.data.batch_size // part // multiple * multiple
            self.attempt({"micro_batch": 0 if part == 1 else size})

    def tensor(self) -> None:
        """Tries to share each layer among 1, 2, 4 and 8 devices, with so many fewer on the axis `fsdp`, or else on `data`."""
        devices = self._own["mesh.fsdp"] * self._own["mesh.tensor"]
        for size in (1, 2, 4, 8):
            if self._config.model.num_kv_heads % size == 0:
                self.attempt({"mesh.tensor": size, "mesh.fsdp": max(devices // size, 1)})


HEADER = f"{'step at least':>15}{'MFU at most':>13}{'peak, GiB':>15}{'compiled in':>13}  settings"


def format_trial(found: Plan) -> str:
    """Returns a line of the table with HEADER: the time of a step, memory, the time of the compilation, and the flags."""
    peak, capacity = found["memory"]["peak"] / hardware.GIB, found["memory"]["capacity"] / hardware.GIB
    if found["fits"]:
        start = f"{found['step_seconds']:>13.4f} s{found['mfu']:>13.1%}"
    else:
        start = f"{'does not fit':>28}"
    return f"{start}{f'{peak:.2f} of {capacity:.2f}':>15}{found['compile_seconds']:>11.0f} s  {found['settings']}"


def flag_of(key: str, value: Any) -> str:
    """Returns the flag that sets a value, as one word of a shell's command line."""
    flag = f"--config.{key}={value}"
    return f'"{flag}"' if "'" in flag else shlex.quote(flag)


def smaller_micro_batch(size: int, excess: float, multiple: int) -> int | None:
    """Returns the next micro-batch to try after one that did not fit, or None if there is no smaller one.

    Args:
      size: the micro-batch that did not fit, pairs.
      excess: the memory that it needs divided by the memory of the device, above 1.
      multiple: the micro-batch must be a multiple of this.

    Returns:
      The size divided by the excess, but at most half the size, rounded down to a multiple; at least one multiple.
    """
    count = size // multiple // max(2, math.ceil(excess))
    if count:
        return count * multiple
    return multiple if size > multiple else None
