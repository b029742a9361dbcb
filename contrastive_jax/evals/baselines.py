"""What an encoder is compared with, on the same texts: chance, TF-IDF (scikit-learn), BM25 (bm25s), each with its defaults."""

import hashlib
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

# Vectors of texts: unit rows [n e], dense or sparse.
Encode = Callable[[Sequence[str]], np.ndarray | sparse.csr_array]

CHANCE_DIM = 256


def chance(texts: Sequence[str]) -> np.ndarray:
    """Random unit vectors float32[n e], the same for the same text: what any measure gives that knows nothing."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts]
    z = np.stack([np.random.default_rng(seed).normal(size=CHANCE_DIM) for seed in seeds])
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def tfidf(texts: Sequence[str]) -> Encode:
    """TF-IDF vectors, fitted on these texts."""
    vectorizer = TfidfVectorizer().fit(texts)
    return lambda wanted: sparse.csr_array(vectorizer.transform(wanted))


class Bm25:
    """BM25 over some documents."""

    def __init__(self, documents: Sequence[str]):
        self.count = len(documents)
        self.index = bm25s.BM25()
        self.index.index(bm25s.tokenize(list(documents), show_progress=False), show_progress=False)

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """float32[q n]: of each document for each query."""
        words = bm25s.tokenize(list(queries), return_ids=False, show_progress=False)
        return np.stack([self.index.get_scores(row) if row else np.zeros(self.count, np.float32) for row in words])


def products(a: np.ndarray | sparse.csr_array, b: np.ndarray | sparse.csr_array) -> np.ndarray:
    """All products [n m] of rows a[n e] and b[m e], dense."""
    found = a @ b.T
    return found if isinstance(found, np.ndarray) else found.toarray()
