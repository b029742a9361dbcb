"""AdamW with a schedule, clipping, and rules by regex over the parameters' paths."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.runtime.sharding import path_of

Params = Any  # nested dict of arrays


def match_rules(rules: Sequence[tuple[str, float]], params: Params, name: str) -> Params:
    """Returns, for each parameter, the value of the first rule whose regex is found in its path.

    Args:
      rules: (regex, value) pairs.
      params: nested dict; only its structure counts.
      name: the config key of the rules, for messages.

    Raises:
      UserError: no rule matches a parameter, or a regex does not compile.
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"{name}={rules!r}: {error}") from error

    def match_leaf(path: Any, _: Any) -> float:
        for pattern, value in compiled:
            if pattern.search(path_of(path)):
                logging.info("%s: %s takes %s (%s)", name, path_of(path), value, pattern.pattern)
                return float(value)
        raise UserError(f"{name}: no pattern matches {path_of(path)}; add ('.*', value) as the last rule")

    return jax.tree_util.tree_map_with_path(match_leaf, params)


def make_schedule(config: ConfigDict, steps: int) -> Callable[[Any], Any]:
    """Returns step → learning rate: a linear warm-up from 0, then the decay of `config.schedule`.

    Args:
      config: `config.optim`.
      steps: of the whole run.

    Raises:
      UserError: the warm-up is as long as the run, or longer.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps:
        raise UserError(f"config.optim.warmup_steps={warmup} must be in [0, config.steps={steps})")
    rest = steps - warmup
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.end_factor),
        "linear": optax.linear_schedule(peak, peak * config.end_factor, rest),
        # Continuous at the end of the warm-up: peak · sqrt(w / step), counted from step w (Vaswani et al., §5.3).
        # join_schedules evaluates steps before the warm-up's end too, which are negative here.
        "rsqrt": lambda step: peak * jnp.sqrt(max(warmup, 1) / (jnp.maximum(step, 0) + max(warmup, 1))),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(config: ConfigDict, steps: int, params: Params) -> optax.GradientTransformation:
    """Builds the optimiser: clipping, Adam, weight decay, the schedule or its peak, and a factor per parameter.

    Args:
      config: `config.optim`.
      steps: optimiser steps of the whole run, the length of the schedule.
      params: the parameters or their shapes; only the structure and the paths count.

    Raises:
      UserError: from `match_rules` and `make_schedule`.
    """
    decay_factors = match_rules(config.weight_decay_rules, params, "config.optim.weight_decay_rules")
    rate_factors = match_rules(config.learning_rate_rules, params, "config.optim.learning_rate_rules")
    constant = match_rules(config.constant_rate_rules, params, "config.optim.constant_rate_rules")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        _add_weight_decay(config.weight_decay, decay_factors),
        _scale_by_rate(make_schedule(config, steps), config.learning_rate, constant),
        _scale_by(rate_factors),
    )


def _add_weight_decay(weight_decay: float, factors: Params) -> optax.GradientTransformation:
    """Adds weight_decay · factor · parameter to each update."""

    def update(updates: Params, params: Params | None) -> Params:
        return jax.tree.map(lambda u, p, f: u + weight_decay * f * p if f else u, updates, params, factors)

    return optax.stateless(update)


def _scale_by_rate(schedule: Callable[[Any], Any], peak: float, constant: Params) -> optax.GradientTransformation:
    """Multiplies each update by minus the rate of its step, or by minus the peak where `constant` is not 0."""

    def update(updates: Params, state: optax.ScaleByScheduleState, _: Params = None) -> tuple[Params, Any]:
        rate = schedule(state.count)
        updates = jax.tree.map(lambda u, still: u * -(peak if still else rate), updates, constant)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda _: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def _scale_by(factors: Params) -> optax.GradientTransformation:
    """Multiplies each update by its factor; 0 freezes the parameter."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))
