"""What the export of a shrunk run must give, or the line with which it must be refused."""

import importlib.util
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.inference import export, text_model

TEXTS = ["the cat", "  a dog ran  ", "the cat 7 sat on a mat, a dog 49 ran " * 2, "", "x " * 1000]


def refusal_of(config: ConfigDict) -> str:
    """How the line begins with which the export of a run is refused; empty where it is not."""
    for key, value in (("mixer", "attention"), ("latent", 0)):
        if config.model[key] != value:
            return f"^config.model.{key}={config.model[key]!r}: transformers has no such encoder; use the run's own folder$"
    if config.model.ngrams and not config.model.num_layers:
        return r"^config.model: no layers, but no plain bag of embeddings either; that has ngrams=\(\) \(is "
    bag_with_delimiters = config.data.delimiters and not config.model.num_layers
    return "^config.data.delimiters: a bag of embeddings with delimiters has no form" if bag_with_delimiters else ""


def check_export(run: pathlib.Path, folder: pathlib.Path, views: Sequence[str] = ("query", "document")) -> None:
    """The run gives the same vectors from the folder that it is exported to, or is refused and leaves none."""
    stored = json.loads((run / "config.json").read_text())
    stored["model"] |= {"dtype": "float32", "products": "float32", "attention": "plain"}  # bfloat16 has no digits to compare
    (run / "config.json").write_text(json.dumps(stored))
    model = text_model.load(str(run))
    assert model.config is not None and model.max_tokens == model.config.model.max_length
    if refused := refusal_of(model.config):
        with pytest.raises(UserError, match=refused):
            export.export(model, folder)
        assert not folder.exists()
        return
    for view in views:
        of_view = folder.with_name(view)
        of_view.mkdir()
        export.write(model, model.config, of_view, view)
        exported = text_model.load(str(of_view))
        assert exported.max_tokens == model.max_tokens
        assert exported.tokenize(TEXTS) == model.tokenize(TEXTS, view)
        np.testing.assert_allclose(exported.encode(TEXTS), model.encode(TEXTS, view), atol=1e-6)
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers and torch are not installed, which load the same folder")
    export.export(model, folder)  # it compares the vectors with sentence-transformers' to 1e-5
