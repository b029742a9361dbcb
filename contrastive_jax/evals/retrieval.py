"""Retrieval over a BEIR folder (Thakur et al., arXiv 2104.08663): corpus.jsonl, queries.jsonl, qrels/test.tsv; exact search."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

BLOCK = 8192  # documents embedded and searched at once: a corpus need not fit into memory
DEPTH = 100  # documents kept of each query

# (best scores float32[q k], their places int64[q k], queries[q e], block[m e], place of its first) → the new best two
Merge = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Judged(NamedTuple):
    """Queries with what is relevant to each: document id → grade, above 0."""

    texts: list[str]
    relevant: list[dict[str, float]]


def lines(path: epath.Path) -> Iterator[dict]:
    """The objects of a .jsonl.

    Raises:
      ValueError: there is no such file, or a line is no object with an _id; the message names it.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file; --data is a BEIR folder with corpus.jsonl, queries.jsonl and qrels/test.tsv")
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                found["_id"], found["text"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not an object with _id and text") from error
            yield found


def read_queries(data: epath.Path) -> Judged:
    """The queries that something is relevant to, in the order of their file.

    Raises:
      ValueError: a file is missing or a line is not as it should be.
    """
    path = data / "qrels" / "test.tsv"
    if not path.exists():
        raise ValueError(f"{path}: no such file; --data is a BEIR folder with corpus.jsonl, queries.jsonl and qrels/test.tsv")
    relevant: dict[str, dict[str, float]] = {}
    for number, line in enumerate(path.read_text().splitlines()[1:], 2):
        try:
            query, document, grade = line.split("\t")
            if float(grade) > 0:
                relevant.setdefault(query, {})[document] = float(grade)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not query-id, corpus-id, score between tabs") from error
    judged = [(query["text"], relevant[query["_id"]]) for query in lines(data / "queries.jsonl") if query["_id"] in relevant]
    return Judged([text for text, _ in judged], [grades for _, grades in judged])


def documents(data: epath.Path) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and texts (title and text) of the corpus, in blocks."""
    ids, texts = [], []
    for document in lines(data / "corpus.jsonl"):
        ids.append(document["_id"])
        texts.append(f"{document.get('title') or ''} {document['text']}".strip())
        if len(ids) == BLOCK:
            yield ids, texts
            ids, texts = [], []
    if ids:
        yield ids, texts


def search(queries: np.ndarray, blocks: Iterable[np.ndarray], depth: int, merge: Merge) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` nearest keys of each query, exactly.

    Args:
      queries: float32[q e].
      blocks: of keys, float32[m e].
      depth: k.
      merge: takes a block in.

    Returns:
      scores float32[q k], descending, and places int64[q k], -1 where there are fewer keys; of equal scores the first leads.
    """
    scores = np.full((len(queries), depth), -np.inf, np.float32)
    places = np.full((len(queries), depth), -1, np.int64)
    first = 0
    for block in blocks:
        scores, places = merge(scores, places, queries, block, first)
        first += len(block)
    return scores, places


def measures(ranked: list[str], grades: dict[str, float]) -> dict[str, float]:
    """Of one query: nDCG@10 with linear gain, as trec_eval's; MRR@10; recall at 20 and 100."""
    gain = sum(grades.get(name, 0.0) / math.log2(rank + 1) for rank, name in enumerate(ranked[:10], 1))
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades.values(), reverse=True)[:10], 1))
    first = next((1 / rank for rank, name in enumerate(ranked[:10], 1) if name in grades), 0.0)
    recall = {f"recall@{k}": sum(name in grades for name in ranked[:k]) / len(grades) for k in (20, 100)}
    return {"ndcg@10": gain / ideal, "mrr@10": first} | recall


def texts(data: epath.Path) -> list[str]:
    """All documents of the corpus."""
    return [text for _, block in documents(data) for text in block]


def evaluate_scores(score: Callable[[list[str]], np.ndarray], data: epath.Path) -> dict[str, dict[str, float]]:
    """Scores what gives float[q n] of all documents for some queries: a baseline, whose corpus is in memory."""
    judged = read_queries(data)
    names = [name for ids, _ in documents(data) for name in ids]
    ranked = []
    for start in range(0, len(judged.texts), 64):
        order = np.argsort(-score(judged.texts[start : start + 64]), axis=1, kind="stable")[:, :DEPTH]
        ranked += [[names[place] for place in row] for row in order]
    return {"test": means(ranked, judged)}


def means(ranked: list[list[str]], judged: Judged) -> dict[str, float]:
    """The means of `measures` over the queries."""
    found = [measures(row, grades) for row, grades in zip(ranked, judged.relevant, strict=True)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def evaluate(encode: Callable[[list[str], int], np.ndarray], data: epath.Path, merge: Merge) -> dict[str, dict[str, float]]:
    """Scores a model on a BEIR folder: means over its queries."""
    judged = read_queries(data)
    names: list[str] = []

    def blocks() -> Iterator[np.ndarray]:
        for ids, texts in documents(data):
            names.extend(ids)
            yield encode(texts, 1)

    _, places = search(encode(judged.texts, 0), blocks(), DEPTH, merge)
    ranked = [[names[place] for place in row if place >= 0] for row in places]
    return {"test": means(ranked, judged)}
