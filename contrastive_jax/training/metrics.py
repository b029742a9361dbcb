"""What a run reports: embedding statistics, a JSON-lines file, TensorBoard and a tracker.

Dimensions: b pairs, v views, e embedding.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tensorboard import summary

from contrastive_jax import files
from contrastive_jax.training import trackers

FLUSH_SECONDS = 10.0  # at least, between two flushes
FLUSH_SHARE = 0.05  # of the time, at most, may be spent in flushes: a file on a bucket is written whole each time


def embedding_metrics(z: np.ndarray) -> dict[str, float]:
    """Measures how a sample of embeddings lies on the unit sphere.

    Alignment is the mean squared distance of positives, uniformity the log of the mean Gaussian potential of anchors (Wang and
    Isola, https://arxiv.org/abs/2005.10242); the effective rank is the exponential of the entropy of the normalised singular
    values of the anchors (Roy and Vetterli, 2007): 1 where all embeddings are collinear, min(b, e) at most. The standard
    deviation is that of the whole vector, √(1 - |mean|²): 0 where all anchors are one, 1 where they are evenly spread.

    Args:
      z: float32[b v e], unit vectors: the anchors, their positives, others.

    Returns:
      "alignment" (with two views or more), "uniformity", "effective_rank" and "embedding_std".
    """
    anchor = z[:, 0].astype(np.float64)
    count = len(anchor)
    gram = anchor @ anchor.T
    potentials = np.exp(-2 * (2 - 2 * gram))  # |x - y|² = 2 - 2 x·y on the sphere
    np.fill_diagonal(potentials, 0)
    potential = potentials.sum() / (count * (count - 1)) if count > 1 else np.nan
    # The singular values of the anchors are the roots of the eigenvalues of either product; the smaller one is faster.
    squares = np.linalg.eigvalsh(gram if count <= anchor.shape[1] else anchor.T @ anchor)
    singular_values = np.sqrt(np.maximum(squares, 0))
    normalised = singular_values / singular_values.sum()
    alignment = {"alignment": float(np.square(anchor - z[:, 1]).sum(-1).mean())} if z.shape[1] > 1 else {}
    return alignment | {
        "uniformity": float(np.log(potential)),
        "effective_rank": float(np.exp(-(normalised * np.log(np.maximum(normalised, 1e-30))).sum())),
        "embedding_std": float(np.sqrt(anchor.var(0).sum())),
    }


class Writer:
    """Writes scalars to metrics.jsonl, one JSON object per line ({"step": 20, "loss": 3.2, ...}), to TensorBoard and a tracker.

    On a local disk each line is in the file at once. A bucket has no append: there both files grow in a temporary folder on
    this host, and `flush` copies them whole. If this process is killed, the lines since the last flush are lost.

    Args:
      workdir: the folder of both.
      first_step: the step at which the run resumes; later lines of an earlier process are dropped, since they come again.
      tracker: gets all scalars too; None: there is none.
    """

    def __init__(self, workdir: epath.Path, first_step: int, tracker: trackers.Tracker | None = None):
        self._workdir, self._tracker = workdir, tracker
        self._temporary = tempfile.TemporaryDirectory(prefix="contrastive_jax-") if files.on_bucket(workdir) else None
        self._folder = epath.Path(self._temporary.name if self._temporary else workdir)
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last line of a killed process may be cut off
        kept = [line for line in whole if json.loads(line)["step"] <= first_step]
        files.write_text(self._folder / "metrics.jsonl", "".join(kept))
        self.last_line: dict[str, Any] = next((value for line in reversed(kept) if "loss" in (value := json.loads(line))), {})
        self._file = (self._folder / "metrics.jsonl").open("a")
        self._events = summary.Writer(str(self._folder))
        self._copied: dict[pathlib.Path, int] = {}  # the size that each file had when it was copied to the bucket
        self._due = time.monotonic() + FLUSH_SECONDS

    def write(self, step: int, scalars: Mapping[str, float], **texts: str) -> None:
        """Writes one line, and one point of each scalar's curve; `texts` go into the line only."""
        self._file.write(json.dumps({"step": step} | dict(scalars) | texts) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        try:
            if self._tracker:
                self._tracker.log(step, scalars)
        except Exception as error:  # trackers raise many kinds, and no run ends because of its tracker
            logging.warning("config.tracker: step %d could not be sent (%s: %s)", step, type(error).__name__, error)
        self.flush_if_due()

    def flush(self) -> None:
        """Brings all lines and curves to the workdir."""
        began = time.monotonic()
        self._events.flush()
        if self._temporary:
            for file in filter(pathlib.Path.is_file, pathlib.Path(self._folder).iterdir()):
                content = file.read_bytes()
                if self._copied.get(file) != len(content):  # files only grow
                    (self._workdir / file.name).write_bytes(content)
                    self._copied[file] = len(content)
        now = time.monotonic()
        self._due = now + max(FLUSH_SECONDS, (now - began) / FLUSH_SHARE)

    def flush_if_due(self) -> None:
        """Flushes every few seconds. An error is only a warning, since the next flush brings the same lines."""
        if time.monotonic() < self._due:
            return
        try:
            self.flush()
        except Exception as error:  # the clients of buckets raise many kinds
            self._due = time.monotonic() + FLUSH_SECONDS
            logging.warning(
                "%s: the metrics could not be written (%s: %s); trying again", self._workdir, type(error).__name__, error
            )

    def close(self) -> None:
        """Flushes and closes all."""
        try:
            self.flush()
        finally:
            self._file.close()
            self._events.close()
            if self._tracker:
                self._tracker.close()
            if self._temporary:
                self._temporary.cleanup()
