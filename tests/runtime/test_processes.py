"""How a process joins the others of its run."""

from typing import Any

import jax
import pytest

from contrastive_jax.runtime import peers, processes

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a,b",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        (SLURM | {"SLURM_NTASKS": "2"}, "deactivate"),
        (SLURM | {"SLURM_NTASKS": "16"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "deactivate"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({}, None),
    ],
)
def test_the_only_process_of_a_node_has_all_of_its_gpus(
    environment: dict[str, str], method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where JAX looks for SLURM or Open MPI itself, it gives a process one GPU."""
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    called: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **values: called.append(values))
    monkeypatch.setattr(peers.Peers, "join", lambda self, seconds: None)
    processes.join("host:1234", 2, 1)
    (values,) = called
    assert values["cluster_detection_method"] == method
