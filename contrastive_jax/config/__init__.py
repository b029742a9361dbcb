"""The configuration of a run: `keys.KEYS` has every key with its default, its bounds and its meaning.

A recipe calls `default_config` and changes values; it cannot add keys. Every value can be overridden on the command line:
`--config.optim.learning_rate=3e-4`.

Here is also `UserError`, for mistakes that the user can mend, and `load_run_config`, which reads the configs of older runs.
"""

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from contrastive_jax.config.keys import KEYS


class UserError(Exception):
    """A mistake that the user can mend. Commands print it as one line and end with its `status`.

    The message names the file, key or value, and says what to do. Everything else that is raised is a bug or a failure of the
    machine, and keeps its traceback.
    """

    status = 2


def default_config() -> ConfigDict:
    """Returns the complete configuration with its defaults, locked against new keys."""
    config = ConfigDict()
    for path, key in KEYS.items():
        section, _, name = path.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        # A placeholder is a reference: each config needs its own, or a value set in one would appear in all.
        default = placeholder(key.default) if isinstance(key.default, type) else key.default
        (config[section] if section else config)[name] = default
    return config.lock()


def with_variant(config: ConfigDict, variants: Mapping[str, Any], name: str) -> ConfigDict:
    """Lays the values {key: value} of one of a recipe's variants over its config, which it returns.

    Raises:
      UserError: there is no such variant.
    """
    if name not in variants:
        raise UserError(f"--config=FILE.py:{name}: the recipe has no such variant; choose one of {', '.join(variants)}")
    config.update_from_flattened_dict(variants[name])
    return config


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The values of a nested config by their dotted path, {"optim.b1": 0.9, ...}."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def check(config: ConfigDict) -> None:
    """Checks each value of a complete config by the rule of its key.

    Raises:
      UserError: at the first value that breaks its rule; the message names the key, the value and the rule.
    """
    for path, value in flat(config).items():
        rule = KEYS[path].rule
        if not rule.holds(value):
            raise UserError(f"config.{path}={value!r}: {rule.text}")


def to_json(config: ConfigDict) -> str:
    """The config as JSON with sorted keys: equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def load_run_config(workdir: epath.PathLike) -> ConfigDict:
    """The config of a run, config.json in its workdir, laid over today's defaults.

    A key that the run did not have yet takes its default. A key that no longer exists is named in a warning and left out. A run
    from before `model.max_length` had a learned position table as long as its rows.

    Args:
      workdir: the folder of a training run.

    Raises:
      UserError: there is no config.json, or it is not a config.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir}: no config.json there; give the workdir of a training run, or hf:FOLDER")
    try:
        stored = flat(ConfigDict(json.loads(path.read_text())))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config of a run ({error})") from error
    config = default_config()
    if "model.max_length" not in stored and stored.get("model.position") == "learned":
        stored["model.max_length"] = stored["data.length"]
    unknown = sorted(stored.keys() - KEYS.keys())
    if unknown:
        logging.warning("%s: keys that this version does not know are ignored: %s", path, ", ".join(unknown))
    for name in stored.keys() & KEYS.keys():
        try:
            config.update_from_flattened_dict({name: tuples(stored[name])})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: config.{name}={stored[name]!r}: {error}") from error
    return config


def tuples(value: Any) -> Any:
    """Lists, which is what JSON makes of tuples, as tuples again, at every depth."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
