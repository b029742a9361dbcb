#!/usr/bin/env bash
# Rehearses a run on a pod, without a pod: four workers with nothing in common but a network and an emulated bucket, launch/tpu.sh
# at a fake gcloud, and what goes wrong with real ones. It prints the story, and ends with status 0 if the parameters are those of
# an unbroken run on a local disk. Needs root, for namespaces, and what `bash tests/run.sh` installs.
#
#   bash tests/cloud/rehearsal.sh           about ten minutes on two cores
#   bash tests/cloud/rehearsal.sh --short   two workers, fewer faults: two minutes
#
# Not rehearsed: the installation of packages on a worker (it has a ready virtual environment), TPUs, and Google's own services.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-.venv/bin/python}" -m tests.cloud.rehearsal "$@"
