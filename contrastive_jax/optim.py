"""AdamW with a schedule, clipping, and rules by regex over the parameters' paths."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from ml_collections import ConfigDict

Params = Any  # nested dict of arrays
SCHEDULES = ("cosine", "linear", "rsqrt", "constant")


def path_of(path: Any) -> str:
    """A parameter's name: its keys joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def match(rules: Sequence[tuple[str, float]], params: Params, name: str) -> Params:
    """The value of the first rule that matches each parameter's path (re.search).

    Args:
      rules: (regex, value) pairs.
      params: nested dict; only its structure counts.
      name: the config key of the rules, for messages.

    Raises:
      ValueError: a parameter that no rule matches, or a regex that does not compile.
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise ValueError(f"{name}={rules!r}: {error}") from error

    def one(path: Any, _: Any) -> float:
        for pattern, value in compiled:
            if pattern.search(path_of(path)):
                logging.info("%s: %s takes %s (%s)", name, path_of(path), value, pattern.pattern)
                return float(value)
        raise ValueError(f"{name}: no pattern matches {path_of(path)}; add ('.*', value) as the last rule")

    return jax.tree_util.tree_map_with_path(one, params)


def schedule(config: ConfigDict, steps: int) -> Callable[[Any], Any]:
    """Step → learning rate: linear warm-up from 0, then the decay of `config.schedule`.

    Raises:
      ValueError: unknown schedule, or a warm-up longer than the run.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule not in SCHEDULES:
        raise ValueError(f"config.optim.schedule={config.schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < steps:
        raise ValueError(f"config.optim.warmup_steps={warmup} must be in [0, config.steps={steps})")
    rest = steps - warmup
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.end_factor),
        "linear": optax.linear_schedule(peak, peak * config.end_factor, rest),
        # Continuous at the end of the warm-up: peak · sqrt(w / step), counted from step w (Vaswani et al., §5.3).
        # join_schedules asks for steps before the warm-up's end too, which count from below zero here.
        "rsqrt": lambda step: peak * jnp.sqrt(max(warmup, 1) / (jnp.maximum(step, 0) + max(warmup, 1))),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make(config: ConfigDict, steps: int, params: Params) -> optax.GradientTransformation:
    """The optimiser of `config.optim` for parameters of this structure.

    Raises:
      ValueError: from `match` and `schedule`, or a value out of range.
    """
    for key in ("learning_rate", "eps"):
        if not config[key] > 0:
            raise ValueError(f"config.optim.{key}={config[key]}: must be above 0")
    for key in ("b1", "b2"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"config.optim.{key}={config[key]}: must be in [0, 1)")
    for key in ("weight_decay", "clip_norm", "end_factor"):
        if not config[key] >= 0:
            raise ValueError(f"config.optim.{key}={config[key]}: must not be negative")
    decay = match(config.weight_decay_rules, params, "config.optim.weight_decay_rules")
    rate = match(config.learning_rate_rules, params, "config.optim.learning_rate_rules")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        _scaled_decay(config.weight_decay, decay),
        optax.scale_by_learning_rate(schedule(config, steps)),
        _scale_by(rate),
    )


def _scaled_decay(weight_decay: float, factors: Params) -> optax.GradientTransformation:
    """Adds weight_decay · factor · parameter to each update."""

    def update(updates: Params, params: Params | None) -> Params:
        return jax.tree.map(lambda u, p, f: u + weight_decay * f * p if f else u, updates, params, factors)

    return optax.stateless(update)


def _scale_by(factors: Params) -> optax.GradientTransformation:
    """Multiplies each update by its factor; 0 freezes the parameter."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))
