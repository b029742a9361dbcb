"""Contrastive pre-training of text encoders (CPT-text) in JAX."""

import os

# TensorFlow reads these when it is imported; it would greet the user at every start, of oneDNN above all, unused here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# It would import Keras too, a third of its own time; the legacy Keras that it now looks for is not there.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
