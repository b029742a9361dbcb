"""Retrieval over a BEIR folder (Thakur et al., arXiv 2104.08663): corpus.jsonl, queries.jsonl, qrels/test.tsv; exact search.

A folder may also be one of NanoBEIR (hub: zeta-alpha-ai/Nano…): corpus, queries and qrels are then folders of Parquet files,
documents have no title, and all grades are 1. The task `nanobeir` scores several such folders and their mean.

Dimensions: q queries, n documents.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals import baselines
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.vectors import Encode, make_vector_task
from contrastive_jax.inference import nearest
from contrastive_jax.runtime.progress import Progress

BLOCK = 8192  # documents embedded and searched at once: a corpus need not fit into memory
DEPTH = 100  # documents kept per query
QUERIES = 64  # queries scored at once by a baseline
FILES = ("*.jsonl", "qrels/test.tsv", "corpus/*.parquet", "queries/*.parquet", "qrels/*.parquet")
PROTOCOL = {"similarity": "cosine", "document": "title and text", "gain": "linear"}


class JudgedQueries(NamedTuple):
    """Queries with the documents that are relevant to each.

    Attributes:
      texts: of the queries.
      relevant: per query, document id → grade, above 0.
      left_out: per query, the id of the document that is left out of its ranking, the query itself; "": none.
    """

    texts: list[str]
    relevant: list[dict[str, float]]
    left_out: list[str]


def check_file(path: epath.Path) -> epath.Path:
    """Returns the path of a file of a BEIR folder.

    Raises:
      UserError: there is no such file.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; --data is a BEIR folder with corpus.jsonl, queries.jsonl and qrels/test.tsv")
    return path


def read_entries(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (id, object) of each line of a .jsonl of queries or documents.

    Raises:
      UserError: the file is missing, or a line has no _id or no text; the message names it.
    """
    for location, value in files.read_json_lines(check_file(path)):
        files.text_of(location, value, "text")
        yield files.text_of(location, value, "_id"), value


def is_nano(folder: epath.Path) -> bool:
    """Returns whether a folder has its corpus as Parquet files."""
    return (folder / "corpus").is_dir()


def read_columns(folder: epath.Path, first: str, second: str) -> list[tuple[str, str]]:
    """Returns two columns of all Parquet files of a folder, without rows whose second value is empty.

    Raises:
      UserError: a file is missing or damaged, or lacks a column; the message names it.
    """
    rows: list[tuple[str, str]] = []
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise UserError(f"{folder}: no .parquet there; give a folder of NanoBEIR, with corpus, queries and qrels")
    if len({path.name.partition("-")[0] for path in paths}) > 1:
        raise UserError(f"{folder}: files of several data sets; give each data set a folder of its own")
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(str(path))
            rows += zip(table[first].to_pylist(), table[second].to_pylist(), strict=True)
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a Parquet file with {first!r} and {second!r} ({error}); fetch it again") from error
    return [row for row in rows if row[1]]


def read_queries(folder: epath.Path) -> JudgedQueries:
    """Reads the queries that have a relevant document, in the order of their file.

    Raises:
      UserError: a file is missing or a line is not as it should be.
    """
    if is_nano(folder):
        of_query: dict[str, dict[str, float]] = {}
        for query, document in read_columns(folder / "qrels", "query-id", "corpus-id"):
            of_query.setdefault(query, {})[document] = 1.0
        judged = judge(folder / "qrels", read_columns(folder / "queries", "_id", "text"), of_query)
        return judged._replace(left_out=[""] * len(judged.texts))  # sentence-transformers' evaluator leaves none out
    path = check_file(folder / "qrels" / "test.tsv")
    relevant: dict[str, dict[str, float]] = {}
    for number, line in files.read_lines(path):
        if number == 1:
            continue  # the header
        try:
            query, document, grade = line.split("\t")
            if float(grade) > 0:
                relevant.setdefault(query, {})[document] = float(grade)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not query-id, corpus-id, score between tabs") from error
    return judge(path, ((key, value["text"]) for key, value in read_entries(folder / "queries.jsonl")), relevant)


def judge(path: epath.Path, queries: Iterable[tuple[str, str]], relevant: dict[str, dict[str, float]]) -> JudgedQueries:
    """Returns the queries (id, text) that have grades in `relevant`.

    A document with the id of the query is left out, unless it is relevant: the ids of queries are then others than those of
    documents, although they look alike.

    Raises:
      UserError: there are none; the message names the path of the grades.
    """
    judged = [(text, relevant[key], "" if key in relevant[key] else key) for key, text in queries if key in relevant]
    if not judged:
        raise UserError(f"{path}: no query has a document with a score above 0")
    texts, grades, keys = (list(column) for column in zip(*judged, strict=True))
    return JudgedQueries(texts, grades, keys)


def read_documents(folder: epath.Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yields ids and texts (title and text) of the corpus, in blocks."""
    if is_nano(folder):
        # Of documents with equal scores sentence-transformers' evaluator has that with the lower id first.
        rows = sorted(read_columns(folder / "corpus", "_id", "text"))
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            yield [key for key, _ in block], [text for _, text in block]
        return
    ids, texts = [], []
    for key, value in read_entries(folder / "corpus.jsonl"):
        ids.append(key)
        texts.append(f"{value.get('title') or ''} {value['text']}".strip())
        if len(ids) == BLOCK:
            yield ids, texts
            ids, texts = [], []
    if ids:
        yield ids, texts


def all_documents(folder: epath.Path) -> list[str]:
    """Returns the texts of the whole corpus."""
    return [text for _, texts in read_documents(folder) for text in texts]


def measure_ranking(ranked: list[str], grades: dict[str, float]) -> dict[str, float]:
    """Measures one query's ranking: nDCG@10 with linear gain as in trec_eval, MRR@10, recall at 10, 20 and 100."""
    gain = sum(grades.get(name, 0.0) / math.log2(rank + 1) for rank, name in enumerate(ranked[:10], 1))
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades.values(), reverse=True)[:10], 1))
    first = next((1 / rank for rank, name in enumerate(ranked[:10], 1) if name in grades), 0.0)
    recall = {f"recall@{k}": sum(name in grades for name in ranked[:k]) / len(grades) for k in (10, 20, 100)}
    return {"ndcg@10": gain / ideal, "mrr@10": first} | recall


def mean_measures(ranked: list[list[str]], judged: JudgedQueries) -> Rows:
    """Returns the means of `measure_ranking` over the queries, as the row "test"; `ranked` has DEPTH + 1 documents of each.

    In some sets, such as ArguAna, the queries are documents too. BEIR leaves those out (`ignore_identical_ids`).
    """
    measured = [
        measure_ranking([name for name in names if name != own][:DEPTH], grades)
        for names, grades, own in zip(ranked, judged.relevant, judged.left_out, strict=True)
    ]
    return {"test": {name: float(np.mean([measures[name] for measures in measured])) for name in measured[0]}}


def score_encoder(encode: Encode, folder: epath.Path) -> Rows:
    """Scores exact search with the vectors of an encoder."""
    judged = read_queries(folder)
    names: list[str] = []

    def embed_blocks(progress: Progress) -> Iterator[np.ndarray]:
        for ids, texts in read_documents(folder):
            names.extend(ids)
            yield np.asarray(encode(texts, "document"))
            progress.advance(len(ids))

    queries = np.asarray(encode(judged.texts, "query"))
    with Progress("retrieval", unit="documents") as progress:
        _, positions = nearest.search(queries, embed_blocks(progress), DEPTH + 1)
    return mean_measures([[names[index] for index in row if index >= 0] for row in positions], judged)


def score_ranker(score: Callable[[list[str]], np.ndarray], folder: epath.Path) -> Rows:
    """Scores a baseline that holds the whole corpus: (q queries) → float[q n], the scores of all n documents."""
    judged = read_queries(folder)
    names = [name for ids, _ in read_documents(folder) for name in ids]
    ranked = []
    for start in range(0, len(judged.texts), QUERIES):
        order = np.argsort(-score(judged.texts[start : start + QUERIES]), axis=1, kind="stable")[:, : DEPTH + 1]
        ranked += [[names[index] for index in row] for row in order]
    return mean_measures(ranked, judged)


def score_tfidf(folder: epath.Path) -> Rows:
    """Scores TF-IDF: its sparse vectors are multiplied with the whole corpus at once, not by `nearest.search`."""
    documents = all_documents(folder)
    encode = baselines.fit_tfidf(documents)
    corpus = encode(documents)
    return score_ranker(lambda queries: baselines.dot_products(encode(queries), corpus), folder)


def score_bm25(folder: epath.Path) -> Rows:
    """Scores BM25 over the whole corpus."""
    return score_ranker(baselines.Bm25(all_documents(folder)).scores, folder)


TASK = make_vector_task(
    name="retrieval",
    score=score_encoder,
    all_texts=all_documents,
    files=FILES,
    protocol=PROTOCOL | {"document with the query's id": "left out, but for folders of NanoBEIR"},
    own_baselines={"TF-IDF": score_tfidf, "BM25": score_bm25},
)
