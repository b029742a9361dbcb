"""Mines hard negatives: for each query of a file of pairs the nearest documents that are none of its positives.

Dimensions: q queries, p positives of all queries together, n documents, k neighbours kept per query, e embedding.
"""

import array
import contextlib
import itertools
import json
import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
import zstandard
from absl import logging
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.data.raw import inputs
from contrastive_jax.files import transfer
from contrastive_jax.inference import encode_file, nearest, on_disk
from contrastive_jax.inference.hard_negatives import Options, choose
from contrastive_jax.inference.on_disk import TextFile, VectorFile
from contrastive_jax.inference.text_model import TextModel
from contrastive_jax.runtime.progress import Progress

QUERIES = 2048  # the most queries that are searched at once
CANDIDATES = 1 << 21  # the most candidates in memory, of all queries of a block together
SUFFIXES = (".jsonl", ".jsonl.zst")


class Texts(NamedTuple):
    """The texts of pairs and of a corpus: each query and each document once, by number.

    Attributes:
      queries: the texts of all pairs' queries.
      query_row: int64[q], the row in `queries` of each.
      documents: the texts of the corpus, in its order, and then of all pairs.
      document_row: int64[n], the row in `documents` of each.
      corpus: how many rows of `documents` are of the corpus.
      positive: int64[p 2], query and document; ascending.
      group: int64[n]; documents of one group differ in white space and case alone.
      groups: how many there are.
      excluded: int64, query x groups + group of what may be no negative of a query; ascending.
    """

    queries: TextFile
    query_row: np.ndarray
    documents: TextFile
    document_row: np.ndarray
    corpus: int
    positive: np.ndarray
    group: np.ndarray
    groups: int
    excluded: np.ndarray

    def most_excluded(self) -> int:
        """Returns the most documents that are excluded for one query."""
        sizes = np.bincount(self.group, minlength=self.groups)
        return int(np.bincount(self.excluded // self.groups, weights=sizes[self.excluded % self.groups]).max())


def read_texts(
    queries: TextFile, documents: TextFile, pairs: Sequence[str], text_field: str, corpus: epath.Path | None
) -> Texts:
    """Reads pairs and a corpus.

    Excluded for a query are, as negatives: its positives, what equals them or the query itself but for white space and case,
    and blank texts.

    Args:
      queries: an empty file, for the queries.
      documents: an empty file, for the documents.
      pairs: globs of files of pairs.
      text_field: the fields of their texts; "": those of a known layout.
      corpus: a file of further documents, as `encode` takes them.

    Raises:
      UserError: a file cannot be read, or has a bad line.
    """
    links = array.array("q")  # of each positive, the rows of query and document
    with Progress("reading", unit="texts", quiet_if_short=True) as progress:
        for text in encode_file.read_texts(corpus) if corpus else ():
            documents.append(text)
            progress.advance()
        size = len(documents)
        for query, positives, negatives in inputs.read_pairs(pairs, text_field):
            for i in range(len(positives)):
                links.extend((len(queries), len(documents) + i))
            queries.append(query)
            for text in (*positives, *negatives):
                documents.append(text)
            progress.advance()
    if not len(queries):
        raise UserError(f"--pairs={' '.join(pairs)}: no pairs; give files that prepare --pairs takes")
    query_row, query_number = on_disk.number(queries.exact)
    document_row, document_number = on_disk.number(documents.exact)
    query_of, document_of = np.asarray(links).reshape(-1, 2).T
    keys = np.unique(query_number[query_of] * len(document_row) + document_number[document_of])
    positive = np.stack(np.divmod(keys, len(document_row)), axis=1)
    loose = [np.asarray(file.loose, np.uint64)[rows] for file, rows in ((documents, document_row), (queries, query_row))]
    rows, group = on_disk.number(np.concatenate([*loose, [np.uint64(on_disk.hash_text(""))]]))
    n, q, groups = len(document_row), len(query_row), len(rows)
    every = np.arange(q) * groups
    excluded = [positive[:, 0] * groups + group[positive[:, 1]], every + group[n : n + q], every + group[-1]]
    return Texts(
        queries,
        query_row,
        documents,
        document_row,
        corpus=size,
        positive=positive,
        group=group[:n],
        groups=groups,
        excluded=np.unique(np.concatenate(excluded)),
    )


class Vectors(NamedTuple):
    """The vectors of the queries and documents of `Texts`.

    Attributes:
      dim: e.
      queries: vectors [q e].
      documents: files of vectors.
      kept: bool, for each vector in `documents` whether it belongs to one of the n documents, in their order.
    """

    dim: int
    queries: VectorFile
    documents: list[VectorFile]
    kept: np.ndarray


def encode(folder: pathlib.Path, model: TextModel, texts: Texts, pattern: str) -> Vectors:
    """Encodes queries and documents into files of a folder.

    Args:
      folder: the folder.
      model: the encoder.
      texts: what to encode.
      pattern: a glob of vectors of the corpus, which `encode` has written; "": there are none.

    Raises:
      UserError: these are not the vectors of the corpus.
    """
    stored = on_disk.open_npy(pattern, model.dim) if pattern else []
    count = sum(file.rows for file in stored)
    if pattern and count != texts.corpus:
        raise UserError(f"--vectors={pattern}: {count:,} vectors for the {texts.corpus:,} texts of --corpus")
    check_vectors(model, texts.documents, stored)
    kept = np.zeros(count, bool)
    kept[texts.document_row[texts.document_row < count]] = True
    new = texts.document_row[texts.document_row >= count]
    documents = [*stored, on_disk.encode_to(folder / "documents.f32", model, texts.documents, new, "document")]
    queries = on_disk.encode_to(folder / "queries.f32", model, texts.queries, texts.query_row, "query")
    truncated = model.truncation.truncated
    logging.info("%d of %d texts were truncated to %d tokens", truncated, queries.rows + len(new), model.max_tokens)
    return Vectors(model.dim, queries, documents, np.concatenate([kept, np.ones(len(new), bool)]))


def check_vectors(model: TextModel, texts: TextFile, stored: Sequence[VectorFile]) -> None:
    """Checks the first vector of each file: whether model, view and order of the files are right.

    Raises:
      UserError: a vector is not that of its text; the message names the file.
    """
    starts = [0, *itertools.accumulate(file.rows for file in stored)]
    for file, start in zip(stored, starts, strict=False):
        if file.rows:
            expected = model.encode(texts.read([start]), "document")[0]
            found = on_disk.read_vectors(file, len(expected), 0, 1)[0]
            if found @ expected < 0.999:  # float16 takes 1e-6
                raise UserError(
                    f"--vectors: {file.path}: its first vector is not that of text {start + 1:,} of --corpus; use the same "
                    "model, --view=document, and names of the files that sort in the order of their parts"
                )


class Found(NamedTuple):
    """The nearest documents of the queries of a block.

    Attributes:
      first: the number of the first query.
      scores: float32[q k], descending; -inf where there is no document.
      documents: int64[q k].
      positive: int64[p 2], the positives of these queries.
      positive_score: float32[p].
    """

    first: int
    scores: np.ndarray
    documents: np.ndarray
    positive: np.ndarray
    positive_score: np.ndarray


def search(texts: Texts, vectors: Vectors, options: Options) -> Iterator[Found]:
    """Yields the nearest documents of all queries, block by block, and the scores of their positives."""
    depth = max(options.candidates() + texts.most_excluded(), options.consistency)
    size, total = max(min(QUERIES, CANDIDATES // depth), 1), len(texts.query_row)
    with Progress("searching", total * len(texts.document_row), "scores") as progress:
        for first in range(0, total, size):
            z = on_disk.read_vectors(vectors.queries, vectors.dim, first, min(first + size, total))
            positive = texts.positive[slice(*np.searchsorted(texts.positive[:, 0], [first, first + size]))]
            score = np.zeros(len(positive), np.float32)
            blocks = scored_blocks(vectors, z, positive - [first, 0], score, progress)
            yield Found(first, *nearest.search(z, blocks, depth), positive, score)


def scored_blocks(
    vectors: Vectors, z: np.ndarray, positive: np.ndarray, score: np.ndarray, progress: Progress
) -> Iterator[np.ndarray]:
    """Yields the vectors of the documents, and writes on the way what the positives among them score.

    Args:
      vectors: of the documents.
      z: float32[q e], the vectors of some queries.
      positive: int64[p 2], the row in `z` and the document of each positive.
      score: float32[p], which is written.
      progress: counts the scores of `z` with all documents.
    """
    start, (query, document) = 0, positive.T
    for block in on_disk.blocks(vectors.documents, vectors.dim, vectors.kept):
        here = np.flatnonzero((document >= start) & (document < start + len(block)))
        score[here] = np.einsum("pe,pe->p", z[query[here]], block[document[here] - start])
        yield block
        start += len(block)
        progress.advance(len(z) * len(block))


def results(texts: Texts, found: Found, options: Options, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Yields the line of each query of a block that keeps a positive."""
    n, size = len(texts.document_row), len(found.scores)
    query, number = found.first + np.arange(size)[:, None], found.positive[:, 0] - found.first
    kept = np.ones(len(found.positive), bool)
    if options.consistency:
        near = (query * n + found.documents)[:, : options.consistency]
        kept = np.isin(found.positive @ [n, 1], near)
    lowest = np.full(size, np.inf, np.float32)
    np.minimum.at(lowest, number[kept], found.positive_score[kept])
    own = texts.excluded[slice(*np.searchsorted(texts.excluded, (found.first + np.array([0, size])) * texts.groups))]
    excluded = np.isin(query * texts.groups + texts.group[found.documents], own)
    chosen = choose(found.scores, excluded, lowest, options, random)
    bounds = np.searchsorted(number, np.arange(size + 1))
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        positives = start + np.flatnonzero(kept[start:end])
        negatives = np.flatnonzero(chosen[i])
        if not len(positives):
            continue
        yield {
            "query": texts.queries.read([texts.query_row[found.first + i]])[0],
            "pos": texts.documents.read(texts.document_row[found.positive[positives, 1]]),
            "neg": texts.documents.read(texts.document_row[found.documents[i, negatives]]),
            "pos_scores": [round(float(score), 6) for score in found.positive_score[positives]],
            "neg_scores": [round(float(score), 6) for score in found.scores[i, negatives]],
        }


@contextlib.contextmanager
def open_lines(path: epath.Path) -> Iterator[TextIO]:
    """Opens a new .jsonl, or .jsonl.zst, that appears when it is whole."""
    with transfer.new_file(path) as local:
        if path.name.endswith(".zst"):
            with zstandard.open(local, "wt", encoding="utf-8") as file:
                yield file
        else:
            with local.open("w", encoding="utf-8") as file:
                yield file


def mine(
    model: TextModel,
    pairs: Sequence[str],
    target: epath.Path,
    options: Options,
    text_field: str = "",
    corpus: epath.Path | None = None,
    vectors: str = "",
) -> None:
    """Writes a file of {"query", "pos", "neg", "pos_scores", "neg_scores"}, a line per query, in the order of the pairs.

    A query that several pairs have is one line with several positives. Its negatives come from the documents of all pairs, hard
    negatives among them, and from the corpus; none is a positive of it, or equals one but for white space and case. Every
    process must call this, with the same arguments, and process 0 writes. Texts and vectors are kept in TMPDIR.

    Args:
      model: the encoder; scores are cosines of its vectors.
      pairs: globs of files of pairs, as `prepare --pairs` takes them.
      target: the .jsonl or .jsonl.zst to write.
      options: which documents become negatives.
      text_field: the fields of the texts of a pair, with commas; "": those of a known layout.
      corpus: a file of further documents: lines of text, or a .jsonl.
      vectors: a glob of .npy files of the corpus's vectors, which `encode` has written; "": they are made here.

    Raises:
      UserError: a file cannot be read or written, an option is out of bounds, or the vectors are not those of the corpus.
    """
    options.candidates()
    if not target.name.endswith(SUFFIXES):
        raise UserError(f"--output={target}: give a name that ends in {' or '.join(SUFFIXES)}")
    if vectors and not corpus:
        raise UserError(f"--vectors={vectors}: they are vectors of a corpus; give --corpus too")
    writes = jax.process_index() == 0
    if writes:
        transfer.check_output(target)
    counts, random = Counter[str](), np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory(prefix="contrastive_jax-") as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        queries, documents = (
            stack.enter_context(contextlib.closing(TextFile(folder / kind))) for kind in ("queries", "documents")
        )
        texts = read_texts(queries, documents, pairs, text_field, corpus)
        file = stack.enter_context(open_lines(target)) if writes else None
        logging.info("%d queries, %d positives, %d documents", *map(len, (texts.query_row, texts.positive, texts.document_row)))
        for found in search(texts, encode(folder, model, texts, vectors), options):
            if not file:
                continue
            for line in results(texts, found, options, random):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                positives, negatives = len(line["pos"]), len(line["neg"])
                counts.update(queries=1, positives=positives, negatives=negatives, few=negatives < options.num_negatives)
    logging.info("%d queries with %d positives are kept", counts["queries"], counts["positives"])
    logging.info("%d negatives; %d queries have fewer than %d", counts["negatives"], counts["few"], options.num_negatives)
    logging.info("written to %s", target)
