"""What a run reports: embedding statistics, TensorBoard and a JSON-lines file.

Dimensions: b pairs, v = 2 views, e embedding.
"""

import json
from collections.abc import Mapping

import numpy as np
from etils import epath
from tensorboard import summary


def embedding_metrics(z: np.ndarray) -> dict[str, float]:
    """How a sample of embeddings lies on the sphere.

    Alignment is the mean squared distance of positives, uniformity the log of the mean Gaussian potential of anchors (Wang and
    Isola, https://arxiv.org/abs/2005.10242); the effective rank is the exponential of the entropy of the normalised singular
    values of the anchors (Roy and Vetterli, 2007): 1 where all embeddings are collinear, min(b, e) at most. The standard
    deviation is that of the whole vector, √(1 - |mean|²): 0 where all anchors are one, 1 where they are evenly spread.

    Args:
      z: float32[b 2 e], unit vectors.
    """
    anchor, positive = z[:, 0].astype(np.float64), z[:, 1].astype(np.float64)
    gram = anchor @ anchor.T
    apart = ~np.eye(len(gram), dtype=bool)
    # |x - y|² = 2 - 2 x·y on the sphere.
    potential = np.exp(-2 * (2 - 2 * gram[apart])).mean() if len(gram) > 1 else np.nan
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    share = singular / singular.sum()
    return {
        "alignment": float(np.square(anchor - positive).sum(-1).mean()),
        "uniformity": float(np.log(potential)),
        "effective_rank": float(np.exp(-(share * np.log(np.maximum(share, 1e-30))).sum())),
        "embedding_std": float(np.sqrt(anchor.var(0).sum())),
    }


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a file at once, so that whoever reads it, or is killed here, finds the old text or the new one."""
    beside = path.parent / f".{path.name}.new"
    beside.write_text(text)
    beside.replace(path)


class Writer:
    """Scalars to TensorBoard and, one JSON object a line, to metrics.jsonl: {"step": 20, "loss": 3.2, ...}."""

    def __init__(self, workdir: epath.Path, first_step: int):
        path = workdir / "metrics.jsonl"
        # A restart repeats the steps since its checkpoint: what an earlier run wrote of them is dropped.
        # (Its last line, if it was killed, may be half a line.)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        write_text(path, "".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= first_step))
        self._file = path.open("a")
        self._events = summary.Writer(str(workdir))

    def write(self, step: int, scalars: Mapping[str, float], **texts: str) -> None:
        """Writes one line and one point of each curve; texts go to the line alone."""
        self._file.write(json.dumps({"step": step} | dict(scalars) | texts) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what waits and closes both."""
        self._file.close()
        self._events.close()
