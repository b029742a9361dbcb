"""The short form of the rehearsal: a run on a pod, without a pod."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_pod_that_is_preempted_and_loses_a_worker_ends_with_the_parameters_of_an_unbroken_run() -> None:
    """Skipped where a process may not have namespaces and a bridge of its own: it needs root."""
    link = f"cjt{os.getpid()}"
    trial = f"unshare -n -m -p -u -f mount -t proc proc /proc && ip link add {link} type bridge && ip link del {link}"
    if os.geteuid() or subprocess.run(["bash", "-c", trial], capture_output=True).returncode:
        pytest.skip("namespaces and bridges need root")
    command = ["bash", "tests/cloud/rehearsal.sh", "--short"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("training: exit 75$.*pod: PREEMPTED$.*creating pod.*training: exit 0$", done.stdout, re.S | re.M)
    digests = re.findall(r"parameters digest of .*: +(\w{64})$", done.stdout, re.M)
    assert len(digests) == 2 and len(set(digests)) == 1
