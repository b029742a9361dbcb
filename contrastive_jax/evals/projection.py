"""What embeddings look like: a map in the plane, and what lies beside what.

Dimensions: n spans, m of them, e embedding, k neighbours.
"""

import numpy as np
import threadpoolctl
from sklearn import decomposition, manifold

PERPLEXITY = 30
PCA_DIMS = 50


def plane(z: np.ndarray, seed: int = 0) -> np.ndarray:
    """A map float32[n 2] of vectors z float32[n e]: PCA to at most 50 coordinates, then t-SNE.

    van der Maaten and Hinton, 2008; a perplexity of 30, of few points a third of their number.
    """
    count = len(z)
    if count < 4 or np.ptp(z, axis=0).max() < 1e-6:  # t-SNE has nothing to spread out: few spans, or a model that collapsed
        return np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.float32)
    # One thread: the sums of several come in any order, and t-SNE makes another map of another last bit.
    with threadpoolctl.threadpool_limits(1):
        few = decomposition.PCA(min(PCA_DIMS, *z.shape), svd_solver="full").fit_transform(z.astype(np.float64))
        tsne = manifold.TSNE(perplexity=min(PERPLEXITY, (count - 1) / 3), init="pca", random_state=seed)
        return tsne.fit_transform(few.astype(np.float32))


def neighbours(z: np.ndarray, chosen: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other vectors of some.

    Args:
      z: float32[n e], unit vectors.
      chosen: int64[m], rows of z.
      k: less than n.

    Returns:
      Similarity float32[m k], descending, and rows int64[m k].
    """
    similarity = z[chosen] @ z.T
    similarity[np.arange(len(chosen)), chosen] = -np.inf
    places = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, places, axis=1), places


def one_of_each(domain: np.ndarray, count: int) -> np.ndarray:
    """Rows int64[≤ count] of domain int[n]: the first of each domain, then the first of what is left."""
    _, first = np.unique(domain, return_index=True)
    rest = np.setdiff1d(np.arange(len(domain)), first)
    return np.sort(np.concatenate([np.sort(first), rest])[:count])
