"""Stops a run that no longer trains: numbers that are not finite, embeddings that collapse, a temperature that runs away.

Non-finite steps leave the state unchanged (see `step`); this module counts consecutive ones and stops the run. Collapse is
judged by the embedding statistics of each log line.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from contrastive_jax.config import UserError


class StoppedError(UserError):
    """The run no longer trains; the message says why, from which step, and what to do.

    Its exit status is its own: starting the run again would end the same way.
    """

    status = 3


def check_guard(config: ConfigDict) -> None:
    """Raises UserError if a limit of `config.guard` stops the run before it warns."""
    for name, (warn, stop) in thresholds(config).items():
        if stop > warn:
            raise UserError(f"config.guard.{name}_stop={stop}, {name}_warn={warn}: need stop <= warn")
    warn, stop = config.temperature_jump_warn, config.temperature_jump_stop
    if warn > stop:
        raise UserError(f"config.guard.temperature_jump_warn={warn}, temperature_jump_stop={stop}: need warn <= stop")


def thresholds(config: ConfigDict) -> dict[str, tuple[float, float]]:
    """Returns {statistic of the embeddings: (warn below, stop below)}."""
    return {
        "effective_rank": (config.effective_rank_warn, config.effective_rank_stop),
        "embedding_std": (config.embedding_std_warn, config.embedding_std_stop),
    }


class Guard:
    """Judges a run by what it has shown so far.

    Args:
      config: `config.guard`.
      warmup_steps: of the learning rate; embeddings are judged only after these and `config.warmup_steps`.
    """

    def __init__(self, config: ConfigDict, warmup_steps: int):
        self._config, self._first = config, max(config.warmup_steps, warmup_steps)
        self._allowed = config.skipped_in_a_row
        self._skipped: list[str] = []  # "STEP (batch DIGEST)" of the consecutive skipped steps up to now
        self._thresholds = thresholds(config)
        self._below = dict.fromkeys(self._thresholds, 0)
        self._temperature: float | None = None

    def steps(self, first: int, steps: Sequence[Mapping[str, Any]]) -> None:
        """Judges consecutive steps.

        Args:
          first: the number of the first one.
          steps: the metrics of each, with `batch_digest` as a string.

        Raises:
          StoppedError: too many steps in a row were skipped, or the temperature changed too much in one step.
        """
        for number, values in enumerate(steps, first):
            if values["skipped"]:
                logging.warning(
                    "step %d skipped: loss %g, gradient norm %g, norm of the new parameters %g; batch digest %s",
                    number,
                    values["loss"],
                    values["gradient_norm"],
                    values["parameter_norm"],
                    values["batch_digest"],
                )
                self._skipped.append(f"{number} (batch {values['batch_digest']})")
                if len(self._skipped) > self._allowed:
                    raise StoppedError(self._skipped_message())
            else:
                self._skipped.clear()
                if "temperature" in values:
                    self._judge_temperature(number, float(values["temperature"]))

    def _skipped_message(self) -> str:
        steps = ", ".join(self._skipped[:5]) + (", ..." if len(self._skipped) > 5 else "")
        return (
            f"{len(self._skipped)} steps in a row had a non-finite loss, gradient or parameter and were skipped, more than "
            f"config.guard.skipped_in_a_row={self._allowed}: {steps}; the last checkpoint is sound; "
            f"--replay_step={self._skipped[0].split()[0]} shows the operation that made the first one"
        )

    def _judge_temperature(self, step: int, temperature: float) -> None:
        before, self._temperature = self._temperature, temperature
        if before is None:
            return
        jump = max(before / temperature, temperature / before)
        line = f"step {step}: the temperature went from {before:.4g} to {temperature:.4g} in one step"
        if jump > self._config.temperature_jump_stop:
            raise StoppedError(
                f"{line}, more than config.guard.temperature_jump_stop={self._config.temperature_jump_stop} allows; lower its "
                "learning rate (config.optim.learning_rate_rules, objective/log_temperature)"
            )
        if jump > self._config.temperature_jump_warn:
            logging.warning("%s", line)

    def embeddings(self, step: int, statistics: Mapping[str, float]) -> None:
        """Judges the embeddings at a log line by their statistics (`metrics.embedding_metrics`).

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
