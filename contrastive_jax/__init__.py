"""Contrastive pre-training of text encoders (CPT-text) in JAX."""

import os

# TensorFlow reads these when it is imported; it would greet the user at every start, of oneDNN above all, unused here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
