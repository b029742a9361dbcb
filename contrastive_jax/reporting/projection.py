"""Maps embeddings to the plane, and finds nearest neighbours.

Dimensions: n vectors, m of them chosen, e embedding, k neighbours.
"""

import numpy as np
import threadpoolctl

PERPLEXITY = 30
PCA_DIMS = 50


def project_to_plane(z: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns a map float32[n 2] of vectors z float32[n e]: PCA to at most 50 coordinates, then t-SNE.

    t-SNE is that of van der Maaten and Hinton, 2008, with a perplexity of 30, or of a third of n if n is small. The map is the
    same each time. Fewer than 4 vectors, or equal ones (of a collapsed model), are put on a line.
    """
    n = len(z)
    if n < 4 or np.ptp(z, axis=0).max() < 1e-6:
        return np.stack([np.arange(n), np.zeros(n)], axis=1).astype(np.float32)
    from sklearn import decomposition, manifold  # takes seconds

    # One thread: several would add in any order, and t-SNE turns a different last bit into a different map.
    with threadpoolctl.threadpool_limits(1):
        reduced = decomposition.PCA(min(PCA_DIMS, *z.shape), svd_solver="full").fit_transform(z.astype(np.float64))
        tsne = manifold.TSNE(perplexity=min(PERPLEXITY, (n - 1) / 3), init="pca", random_state=seed)
        return tsne.fit_transform(reduced.astype(np.float32))


def nearest_neighbours(z: np.ndarray, chosen: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k nearest other vectors of some of the vectors, by cosine similarity.

    Args:
      z: float32[n e], unit vectors.
      chosen: int64[m], the rows of z whose neighbours are wanted.
      k: the number of neighbours, less than n.

    Returns:
      Similarity float32[m k], descending, and rows of z int64[m k].
    """
    similarity = z[chosen] @ z.T
    similarity[np.arange(len(chosen)), chosen] = -np.inf
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, axis=1), rows


def choose_across_domains(domain: np.ndarray, count: int) -> np.ndarray:
    """Chooses up to `count` rows of domain int[n]: the first of each domain, then the first of the rest.

    Returns:
      Rows int64[≤ count], ascending.
    """
    _, first = np.unique(domain, return_index=True)
    rest = np.setdiff1d(np.arange(len(domain)), first)
    return np.sort(np.concatenate([np.sort(first), rest])[:count])
