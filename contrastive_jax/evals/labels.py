"""What a run has learned of labels: the metrics of its objective on the held-out pairs, without dropout and noise.

Unlike a `Task`, this scores the head that a run trains, which an encoder alone does not have.

Dimensions: n pairs, b pairs of a batch, v fields of a pair, its views, e embedding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.config.dense import vector_size
from contrastive_jax.data import pieces, pipeline, prepared, views
from contrastive_jax.data import spans as spans_lib
from contrastive_jax.data.batch import Batch
from contrastive_jax.inference import forward as forward_lib
from contrastive_jax.objectives import registry
from contrastive_jax.objectives.objective import PairIds
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build
from contrastive_jax.training import views as views_lib
from contrastive_jax.training.noise import Vocabulary


class LabelledPairs:
    """The pairs of a split, each once, cut and encoded as training does it.

    Args:
      config: of a run whose objective learns labels (`objectives.labels.learns_labels`).
      run: the run.
      split: of the run's data.

    Raises:
      UserError: there is no such split.
    """

    def __init__(self, config: ConfigDict, run: build.Run, split: str = "validation"):
        plain = config.copy_and_resolve_references()  # copies of a pair differ by dropout and noise alone, which are off
        plain.data.copies, plain.labels.rdrop, plain.noise.ops, plain.tokens.name = 1, 0.0, (), ""
        plain.objective.update(extra=(), weight=1.0)  # what is added to the loss of labels has no metric of them
        self._config, self._mesh = plain.data, run.mesh
        self._records = prepared.open_split(plain.data.dir, split, plain.data.cache_dir, plain.data.cache_gb)
        pipeline.check_fields(self._records.manifest, plain.data)
        make_views, encode = views_lib.make_views(plain, Vocabulary(0, {})), build.make_encode(run.encoder, plain, run.mesh)
        objective = registry.make_objective(plain, plain.data.views, vector_size(plain.model))

        def embed(encoder: Any, batch: Batch) -> jax.Array:
            return encode({"encoder": encoder}, make_views(batch, jax.random.key(0))[0], None).z

        self._embed, self._loss = jax.jit(embed), jax.jit(objective.loss)

    def _batch(self, record: np.ndarray) -> Batch:
        """Returns the pairs of these records."""
        config, manifest = self._config, self._records.manifest
        whole = self._records.read_records(record)
        texts = pieces.texts_of_pairs(whole, manifest["reserved"]["eos"])
        first = np.zeros((len(record), config.views - 1), np.float32)  # as draws, these choose the first texts of each kind
        begin, size = spans_lib.cut_texts(texts, spans_lib.choose_texts(config, texts, first), config)
        delimiters = views.delimiter_ids(manifest, config.views) if config.delimiters else None
        cut = views.make_views(whole.tokens, begin, size, config.length, delimiters, config.pack_pairs, config.pack_rows)
        return Batch(cut.tokens, cut.segment, whole.document, cut.span_hash, whole.label)

    def embed(self, encoder: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vectors float32[n v e] by an encoder's parameters, and the labels float32[n]; every process calls it."""
        total, blocks = self._config.batch_size, []
        for start in range(0, len(self._records), total):
            record = np.resize(np.arange(start, min(start + total, len(self._records))), total)  # repeats fill the last batch
            batch = self._batch(record)
            z = forward_lib.to_host(
                self._embed(encoder, sharding.to_global(batch, np.arange(total), total, self._mesh)), self._mesh
            )
            blocks.append((z, batch.label))
        z, label = (np.concatenate(parts)[: len(self._records)] for parts in zip(*blocks, strict=True))
        return z, label

    def score(self, params: Any) -> dict[str, float]:
        """Returns the metrics of the objective, over all pairs at once: "accuracy" or "label_correlation"."""
        z, label = self.embed(params["encoder"])
        head = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), params["objective"])  # every device has all of it
        no_ids = jnp.zeros(z.shape[:2], jnp.int32)  # these objectives look at the label alone
        _, metrics = self._loss(z, PairIds(no_ids[:, 0], no_ids, jnp.asarray(label)), head)
        return {name: float(value) for name, value in metrics.items()}
