"""The configuration: its choices are those of the code, older runs are laid over the defaults."""

import json
import pathlib

import pytest

from contrastive_jax.config import KEYS, UserError, check, default_config, flat, load_run_config, to_json
from contrastive_jax.data import spans
from contrastive_jax.models import mixers, transformer
from contrastive_jax.objectives import exchange, losses, registry, tokens


def write_config(workdir: pathlib.Path, **changes: object) -> pathlib.Path:
    """A run's config.json of the defaults; a change to None removes the key."""
    stored = json.loads(to_json(default_config()))
    for path, value in changes.items():
        section, name = path.split("__")
        if value is None:
            del stored[section][name]
        else:
            stored[section][name] = value
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(stored))
    return workdir


def test_the_defaults_are_complete_and_within_their_bounds() -> None:
    config = default_config()
    check(config)
    assert flat(config).keys() == KEYS.keys()
    with pytest.raises(AttributeError):
        config.optim.momentum = 0.9


def test_configs_do_not_share_values() -> None:
    first, second = default_config(), default_config()
    first.objective.mask_margin = 0.1
    assert second.objective.mask_margin is None


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("objective.name", {**registry.OBJECTIVES, **losses.LOSSES}),
        ("objective.where", exchange.EXCHANGES),
        ("data.sampler", spans.SAMPLERS),
        ("tokens.name", tokens.TOKEN_LOSSES),
        ("model.mlp", {**transformer.PLAIN, **transformer.GATED, "none": None}),
        ("model.mixer", mixers.MIXERS),
    ],
)
def test_choices_are_those_of_the_code(key: str, table: dict) -> None:
    assert sorted(KEYS[key].rule.text.removeprefix("choose one of ").removesuffix(", or '' for none").split(", ")) == sorted(
        table
    )


def test_a_broken_rule_is_named() -> None:
    config = default_config()
    config.model.dropout = 1.0
    with pytest.raises(UserError, match=r"config.model.dropout=1.0: must be in \[0, 1\)"):
        check(config)


def test_a_key_that_a_run_did_not_have_takes_its_default(tmp_path: pathlib.Path) -> None:
    config = load_run_config(write_config(tmp_path, model__local_window=None, model__d_model=32))
    assert config.model.local_window == default_config().model.local_window and config.model.d_model == 32


def test_the_config_of_a_run_comes_back(tmp_path: pathlib.Path) -> None:
    config = default_config()
    config.objective.matryoshka, config.objective.mask_margin = ((64, 1.0), (256, 0.5)), 0.1
    (tmp_path / "config.json").write_text(to_json(config))
    assert to_json(load_run_config(tmp_path)) == to_json(config)


def test_unknown_keys_are_named_and_left_out(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    load_run_config(write_config(tmp_path, objective__hinge=0, data__colour="red"))
    assert "data.colour, objective.hinge" in caplog.text


def test_learned_positions_of_older_runs_are_as_long_as_their_rows(tmp_path: pathlib.Path) -> None:
    older = write_config(tmp_path, model__max_length=None, model__position="learned", data__length=128)
    assert load_run_config(older).model.max_length == 128
    older = write_config(tmp_path, model__max_length=None, model__position="rotary", data__length=128)
    assert load_run_config(older).model.max_length == default_config().model.max_length


@pytest.mark.parametrize("text", ["{", "[1]", '{"steps": "many"}'])
def test_what_is_no_config_is_refused(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        load_run_config(tmp_path)
