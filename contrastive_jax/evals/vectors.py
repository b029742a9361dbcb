"""Tasks that see nothing of a model but the vectors of texts, and the baselines that all of them have."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from etils import epath
from scipy import sparse

from contrastive_jax.evals import baselines
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Score, Task, data_folder, hash_files, untrained
from contrastive_jax.inference import vector_cache
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.inference.tokenize import TruncationCount

Vectors: TypeAlias = np.ndarray | sparse.csr_array  # unit rows [n e], dense or sparse
Encode = Callable[[Sequence[str], str], Vectors]  # (n texts, "query", "document" or NO_SIDE) → their vectors
Data: TypeAlias = epath.Path | str  # a folder, or "tfds:NAME"
FINGERPRINT = "A tokenizer's fingerprint: Zwölf Boxkämpfer, 0123456789\n\t(x) [SEP] [PAD] <s> </s>"


def make_vector_task(
    name: str,
    score: Callable[[Encode, Any], Rows],
    all_texts: Callable[[Any], list[str]],
    files: Sequence[str],
    protocol: Mapping[str, Any],
    own_baselines: Mapping[str, Callable[[Any], Rows]] | None = None,
    tfds: bool = False,
) -> Task:
    """Makes a `Task` from a function that scores any encoder, be it a model or a baseline.

    Every such task has the baselines chance, TF-IDF and the untrained encoder, besides those of `own_baselines`.

    Args:
      name: the task's name.
      score: (encode, data) → rows.
      all_texts: data → all its texts, to which TF-IDF is fitted.
      files: patterns of the names of the data's files; the protocol has a hash of these files.
      protocol: what decides the figures, besides the model and the data.
      own_baselines: name → (data → rows): baselines that work without vectors. They replace chance or TF-IDF if they have the
        same name.
      tfds: whether the data may also be "tfds:NAME".
    """

    def open_data(model: TextModel, data: str, options: Options) -> Data:
        return data_folder(name, data, files, tfds)

    def score_model(model: TextModel, data: Data, options: Options) -> Rows:
        return score(encode_of(model, options), data)

    def score_chance(model: TextModel, data: Data, options: Options) -> Rows:
        return score(lambda texts, view: baselines.chance_vectors(texts), data)

    def score_tfidf(model: TextModel, data: Data, options: Options) -> Rows:
        encode = baselines.fit_tfidf(all_texts(data))
        return score(lambda texts, view: encode(texts), data)

    def full_protocol(model: TextModel, data: Data, options: Options) -> dict[str, Any]:
        return {"data": hash_files(data, files)} | dict(protocol)

    all_baselines: dict[str, Score] = {"chance": score_chance, "TF-IDF": score_tfidf}
    all_baselines |= {baseline: from_data(rows_of) for baseline, rows_of in (own_baselines or {}).items()}
    return Task(name, open_data, score_model, full_protocol, all_baselines | {"untrained": untrained(score_model)})


def from_data(rows_of: Callable[[Any], Rows]) -> Score:
    """Returns a baseline that needs neither model nor options."""
    return lambda model, data, options: rows_of(data)


def encode_of(model: TextModel, options: Options) -> Callable[[Sequence[str], str], np.ndarray]:
    """Returns (texts, view) → unit vectors float32[n e] of a model, kept in `options.cache` by all that decides them.

    `model.truncation` counts all texts, whether their vectors are kept or new.
    """
    cache = options.cache
    if cache is None:
        return model.encode
    # The folder's name decides nothing. The protocol does not identify the tokenizer: a sample of its ids does. GPUs and TPUs
    # round the factors of products.
    identity = {key: value for key, value in model.protocol().items() if key not in ("model", "step")}
    identity |= {"tokens": model.tokenize([FINGERPRINT]), "backend": jax.default_backend()}
    identity["architecture"] = model.model_config.to_dict()
    uncounted = dataclasses.replace(model, truncation=TruncationCount())

    def encode_cached(texts: Sequence[str], view: str) -> np.ndarray:
        model.truncation.add(model.tokenize_views(texts, view).truncated)
        key = json.dumps(identity | {"view": view})
        return vector_cache.cached(cache, key, lambda new: uncounted.encode(new, view))(texts)

    return encode_cached
