"""The compiler's options for the step: an XLA that does not know one compiles without it."""

import logging

import jax
import pytest
from conftest import recipe
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.planning import hardware
from contrastive_jax.runtime import sharding
from contrastive_jax.training import compiler_options

MESH = ConfigDict({"data": -1, "fsdp": 2, "tensor": 1})


def test_an_option_is_taken_under_the_name_that_this_xla_knows(caplog: pytest.LogCaptureFixture) -> None:
    mesh = sharding.make_mesh(MESH)
    entries: tuple[compiler_options.Options, ...] = (
        {"xla_gpu_of_tomorrow": 1, "xla_gpu_enable_latency_hiding_scheduler": True},
        {"xla_gpu_of_yesterday": True},
    )
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert compiler_options.known_options(entries, mesh) == {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert [record.message for record in caplog.records] == [
        "this XLA knows no option xla_gpu_of_yesterday; compiling without it"
    ]


def test_a_wrong_value_is_an_error() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_latency_hiding_scheduler"):
        entries: tuple[compiler_options.Options, ...] = ({"xla_gpu_enable_latency_hiding_scheduler": "perhaps"},)
        compiler_options.known_options(entries, sharding.make_mesh(MESH))


def test_only_several_gpus_and_what_the_user_did_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_options.options_for(sharding.make_mesh(MESH)) is None  # on CPU

    class Device:
        platform, process_index = "gpu", 0

    class Gpus:
        size = 8
        devices = type("Devices", (), {"flat": [Device()]})

    monkeypatch.setattr(compiler_options, "known_options", lambda entries, _: {name: 1 for names in entries for name in names})
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    options = compiler_options.options_for(Gpus())  # type: ignore[arg-type]
    assert options and "xla_gpu_enable_pipelined_all_gather" in options
    assert "xla_gpu_enable_latency_hiding_scheduler" not in options
    Gpus.size = 1
    assert compiler_options.options_for(Gpus()) is None  # type: ignore[arg-type]


def test_the_options_of_a_run_win_on_their_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (("xla_gpu_autotune_level", "0"), ("xla_cpu_enable_fast_math", "false"))
    assert compiler_options.options_for(sharding.make_mesh(MESH), chosen) == {"xla_cpu_enable_fast_math": False}
    with pytest.raises(UserError, match=r"config.xla_options=.*'perhaps' is not a valid bool"):
        compiler_options.options_for(sharding.make_mesh(MESH), (("xla_cpu_enable_fast_math", "perhaps"),))
    with pytest.raises(UserError, match="config.xla_options: the installed XLA knows no option xla_cpu_of_tomorrow for cpu"):
        compiler_options.options_for(sharding.make_mesh(MESH), (*chosen, ("xla_cpu_of_tomorrow", "1")))

    class Device:
        platform, process_index = "tpu", 0

    class Tpus:
        size = 8
        devices = type("Devices", (), {"flat": [Device()]})

    monkeypatch.setattr(
        compiler_options, "known_options", lambda entries, _: {k: v for each in entries for k, v in each.items()}
    )
    name = next(iter(compiler_options.TPU_OPTIONS[0]))
    assert compiler_options.options_for(Tpus(), ((name, "7"), ("xla_tpu_a", "1"))) == {name: "7", "xla_tpu_a": "1"}  # type: ignore[arg-type]


@pytest.mark.slow
def test_xla_for_gpus_knows_every_option() -> None:
    """`pip install .[plan]` first."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    config = recipe("cpt_text", "s-gpu")
    mesh = sharding.make_mesh(config.mesh, hardware.describe_devices(hardware.parse_target("gpu:h100:1x8")))
    assert len(compiler_options.options_for(mesh) or ()) == len(compiler_options.GPU_OPTIONS)
