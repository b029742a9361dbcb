"""Held-out pairs as a run's encoder sees them, for the page and for TensorBoard's projector.

Dimensions: n pairs, v = 2 views, l tokens, e embedding.
"""

import io
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from google.protobuf import text_format
from tensorboard.plugins import projector

from contrastive_jax import files
from contrastive_jax.config import UserError, load_run_config
from contrastive_jax.data import prepared, tokenizer
from contrastive_jax.evals import query_key
from contrastive_jax.inference import batching, text_model
from contrastive_jax.reporting import page

MAX_PAIRS = 1000  # t-SNE takes 10 s for the spans of so many


class HeldOutSpans(NamedTuple):
    """The spans of n held-out pairs and their embeddings.

    Attributes:
      step: the step of the checkpoint that embedded them.
      z: float32[n 2 e], unit vectors of queries and keys.
      domain: int64[n], the domain of each pair, an index into `domains`.
      domains: the names of the domains.
      texts: 2 n texts: the query and the key of each pair.
    """

    step: int
    z: np.ndarray
    domain: np.ndarray
    domains: list[str]
    texts: list[str]


def embed_held_out(workdir: epath.Path, data: str | None) -> HeldOutSpans:
    """Embeds the first pairs of a run's query-key test with its newest checkpoint.

    Args:
      workdir: the run.
      data: the folder of a prepared dataset; None: that of the run's config.

    Raises:
      UserError: the data or a checkpoint is missing or cannot be read; the message says what to give.
    """
    config = load_run_config(workdir)
    directory = data or config.data.dir
    folder = prepared.folders(directory)[0]  # whose tokenizer is that of all
    if not (folder / "manifest.json").exists():
        raise UserError(f"{workdir}: its data is not in {directory}; say where a prepared dataset is: `--data=DIR`")
    model = text_model.load(str(workdir))
    data_tokenizer = tokenizer.load(folder)
    if model.tokenizer.sha256 != data_tokenizer.sha256:
        raise UserError(f"{folder}: its tokenizer is not that of {workdir}; give `--data=DIR` of a dataset prepared with that")
    records = prepared.open_split(directory, "validation", config.data.cache_dir, config.data.cache_gb)
    pairs = query_key.make_pairs(records, config.eval, config.data)
    tokens, mask = pairs.tokens[:MAX_PAIRS], pairs.mask[:MAX_PAIRS]
    n, v, length = tokens.shape
    logging.info("%s: embedding %d held-out pairs", workdir, n)
    z = batching.embed(model.forward, tokens.reshape(n * v, length), mask.reshape(n * v, length), config.eval.batch_size)
    texts = [page.shorten(data_tokenizer.decode(span)) for pair in pairs.spans[:MAX_PAIRS] for span in pair]
    domain = records.record_domains()[pairs.record[:MAX_PAIRS]].astype(np.int64)
    return HeldOutSpans(model.step or 0, z.reshape(n, v, -1), domain, records.domains, texts)


def write_projector(workdir: epath.Path, spans: HeldOutSpans) -> None:
    """Writes the spans to WORKDIR/projector/, with the file that makes TensorBoard's projector show them."""
    folder = workdir / "projector"
    files.make_folder(folder)
    tensors = io.StringIO()
    np.savetxt(tensors, spans.z.reshape(len(spans.texts), -1), fmt="%.5g", delimiter="\t")
    files.write_text(folder / "tensors.tsv", tensors.getvalue())
    names = [page.shorten(spans.domains[index]) for index in np.repeat(spans.domain, 2)]
    lines = [f"{name}\t{text}\n" for name, text in zip(names, spans.texts, strict=True)]
    files.write_text(folder / "metadata.tsv", "domain\ttext\n" + "".join(lines))
    config = projector.ProjectorConfig()
    config.embeddings.add(
        tensor_name=f"held-out spans, step {spans.step}",
        tensor_path="projector/tensors.tsv",
        metadata_path="projector/metadata.tsv",
    )
    files.write_text(workdir / "projector_config.pbtxt", text_format.MessageToString(config))
    logging.info("TensorBoard shows the same spans: tensorboard --logdir=%s, then PROJECTOR", workdir)
