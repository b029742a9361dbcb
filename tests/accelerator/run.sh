#!/usr/bin/env bash
# Runs on the GPU or TPU at hand what a CPU cannot test, and writes accelerator.json. See tests/accelerator/__main__.py for the
# arguments. It installs nothing: it needs jax with the plugin of the device, flax, optax, ml_collections and numpy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python3}" -m tests.accelerator "$@"
