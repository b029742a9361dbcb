"""What a model is compared with on the same texts: chance, TF-IDF (scikit-learn), BM25 (bm25s); the last two with defaults.

Dimensions: n, m texts, q queries, e features.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse

CHANCE_DIM = 256


def chance_vectors(texts: Sequence[str]) -> np.ndarray:
    """Returns random unit vectors float32[n e], equal for equal texts: the level of an encoder that knows nothing."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "little") for text in texts]
    z = np.stack([np.random.default_rng(seed).normal(size=CHANCE_DIM) for seed in seeds])
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def fit_tfidf(texts: Sequence[str]) -> Callable[[Sequence[str]], sparse.csr_array]:
    """Fits TF-IDF on texts; returns a function from n texts to their sparse unit vectors [n e]."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, and few evaluations need it

    vectorizer = TfidfVectorizer().fit(texts)
    return lambda new_texts: sparse.csr_array(vectorizer.transform(new_texts))


class Bm25:
    """BM25 over a list of documents."""

    def __init__(self, documents: Sequence[str]):
        import bm25s  # it computes with JAX when it is imported, and several processes must join before that

        self._tokenize = functools.partial(bm25s.tokenize, show_progress=False)
        self.count = len(documents)
        self.index = bm25s.BM25()
        self.index.index(self._tokenize(list(documents)), show_progress=False)

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """Returns float32[q n], the score of each document for each query; 0 for a query without a word."""
        terms = self._tokenize(list(queries), return_ids=False)
        return np.stack([self.index.get_scores(row) if row else np.zeros(self.count, np.float32) for row in terms])


def dot_products(a: np.ndarray | sparse.csr_array, b: np.ndarray | sparse.csr_array) -> np.ndarray:
    """Returns the dense dot products [n m] of the rows of a[n e] and b[m e]."""
    result = a @ b.T
    return result if isinstance(result, np.ndarray) else result.toarray()
