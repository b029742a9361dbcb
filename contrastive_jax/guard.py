"""Stops a run that no longer trains: numbers that are not finite, embeddings that collapse, a temperature that runs away.

A step whose loss, gradient or new parameters are not finite changes nothing but the step's number (see `step`); here is counted
how many did so in a row. Collapse is judged by the statistics of each log line.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

# Exit status of a run that a guard stopped: starting it again would end the same way.
STOPPED = 3


class StoppedError(RuntimeError):
    """The run cannot go on to any use; the message says why, from which step, and what to do."""


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the key, if `config.guard` has a value that cannot be."""
    for key in ("skipped_in_a_row", "warmup_steps"):
        if config[key] < 0:
            raise ValueError(f"config.guard.{key}={config[key]}: must not be negative")
    if config.patience < 1:
        raise ValueError(f"config.guard.patience={config.patience}: log lines, at least 1")
    for name, (warn, stop) in thresholds(config).items():
        if not 0 <= stop <= warn < math.inf:
            raise ValueError(f"config.guard.{name}_stop={stop}, {name}_warn={warn}: need 0 <= stop <= warn")
    warn, stop = config.temperature_jump_warn, config.temperature_jump_stop
    if not 1 < warn <= stop:
        raise ValueError(f"config.guard.temperature_jump_warn={warn}, temperature_jump_stop={stop}: need 1 < warn <= stop")


def thresholds(config: ConfigDict) -> dict[str, tuple[float, float]]:
    """Of each statistic of the embeddings, below what it warns and below what it stops."""
    return {
        "effective_rank": (config.effective_rank_warn, config.effective_rank_stop),
        "embedding_std": (config.embedding_std_warn, config.embedding_std_stop),
    }


class Guard:
    """What a run has shown so far, judged by `config.guard`; embeddings after its first steps and the warm-up only."""

    def __init__(self, config: ConfigDict, warmup_steps: int):
        self._config, self._first = config, max(config.warmup_steps, warmup_steps)
        self._allowed = config.skipped_in_a_row
        self._skipped: list[str] = []  # the last steps, if they were skipped, with their batches
        self._thresholds = thresholds(config)
        self._below = dict.fromkeys(self._thresholds, 0)
        self._temperature: float | None = None

    def steps(self, first: int, steps: Sequence[Mapping[str, Any]]) -> None:
        """Judges steps `first`, `first` + 1, ... by their metrics, `batch_digest` as a string.

        Raises:
          StoppedError: too many in a row were skipped, or the temperature leapt.
        """
        for number, values in enumerate(steps, first):
            if values["skipped"]:
                logging.warning(
                    "step %d skipped: loss %g, gradient norm %g, norm of the new parameters %g; batch digest %s",
                    *(number, values["loss"], values["gradient_norm"], values["parameter_norm"], values["batch_digest"]),
                )
                self._skipped.append(f"{number} (batch {values['batch_digest']})")
                if len(self._skipped) > self._allowed:
                    raise StoppedError(
                        f"{len(self._skipped)} steps in a row had no finite loss, gradient or parameters and were skipped, "
                        f"config.guard.skipped_in_a_row={self._allowed}: {', '.join(self._skipped[:5])}"
                        f"{', ...' * (len(self._skipped) > 5)}; the last checkpoint is sound; "
                        f"--replay_step={self._skipped[0].split()[0]} shows where it begins"
                    )
            else:
                self._skipped.clear()
                self._judge_temperature(number, float(values["temperature"]))

    def _judge_temperature(self, step: int, temperature: float) -> None:
        before, self._temperature = self._temperature, temperature
        if before is None:
            return
        jump = max(before / temperature, temperature / before)
        line = f"step {step}: the temperature went from {before:.4g} to {temperature:.4g} in one step"
        if jump > self._config.temperature_jump_stop:
            raise StoppedError(
                f"{line}, more than config.guard.temperature_jump_stop={self._config.temperature_jump_stop} times; lower its "
                "learning rate (config.optim.learning_rate_rules, objective/log_temperature)"
            )
        if jump > self._config.temperature_jump_warn:
            logging.warning("%s", line)

    def embeddings(self, step: int, statistics: Mapping[str, float]) -> None:
        """Judges the embeddings at a log line.

        Raises:
          StoppedError: they have collapsed.
        """
        if step <= self._first:
            return
        for name, (warn, stop) in self._thresholds.items():
            value = statistics[name]
            self._below[name] = self._below[name] + 1 if value < stop else 0
            line = f"step {step}: {name.replace('_', ' ')} {value:.3g}, the embeddings collapse"
            if self._below[name] >= self._config.patience:
                raise StoppedError(
                    f"{line}: below config.guard.{name}_stop={stop} at {self._below[name]} log lines in a row; "
                    "lower the learning rate, or see what keeps texts apart in this objective"
                )
            if value < warn:
                logging.warning("%s", line)
