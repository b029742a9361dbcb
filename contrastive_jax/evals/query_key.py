"""The query-key test: find, among n keys, the span that follows the query in its document.

A run with the tokenizer of the dataset reads the tokens of the spans. Any other model, of Hugging Face for example, reads their
text.

Dimensions: n pairs, v = 2 views, l tokens, e embedding.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pieces, prepared, tokenizer, views
from contrastive_jax.data import spans as spans_lib
from contrastive_jax.evals.results import Rows
from contrastive_jax.evals.task import Options, Task, untrained
from contrastive_jax.inference import batching
from contrastive_jax.inference.text_model import TextModel

TOP = (1, 5, 10, 100)
DIRECTIONS = ("query_to_key", "key_to_query")


class Pairs(NamedTuple):
    """Queries and their keys.

    Attributes:
      tokens: int32[n 2 l], with delimiters where the model was trained with them.
      mask: bool[n 2 l].
      spans: int32[n 2 span], the tokens without delimiters.
      record: int64[n], the record that each pair was cut from.
    """

    tokens: np.ndarray
    mask: np.ndarray
    spans: np.ndarray
    record: np.ndarray


class HeldOut(NamedTuple):
    """The opened data of the test.

    Attributes:
      pairs: the pairs.
      decode: () → the texts of the queries and of the keys, decoded with the dataset's tokenizer.
      as_tokens: whether the model reads tokens; False: it reads the decoded text.
      batch_size: spans embedded at once.
      protocol: the data and the choice of pairs.
    """

    pairs: Pairs
    decode: Callable[[], tuple[list[str], list[str]]]
    as_tokens: bool
    batch_size: int
    protocol: dict[str, Any]


def make_pairs(records: prepared.Records, config: ConfigDict, data: ConfigDict) -> Pairs:
    """Cuts adjacent spans of `config.span` tokens, one pair per record; `config.seed` draws records and positions.

    Of prepared pairs, the first text is the query and the second its key, both without what follows `config.span` tokens.

    Args:
      records: a held-out split.
      config: `config.eval`.
      data: `config.data`, whose delimiters are put around the spans.

    Raises:
      UserError: the rows of training are too short for the span, or there are too few records.
    """
    spans_lib.check_length(data, config.span, "config.eval.span")
    rng = np.random.default_rng(config.seed)
    lengths, fields = records.lengths(), records.manifest.get("fields", 0)
    needed = 4 if fields else 2 * config.span  # a text has a token or more, and one that ends it
    eligible = np.flatnonzero(lengths >= needed)
    if len(eligible) < config.pairs or fields == 1:
        found, what = 0 if fields == 1 else len(eligible), "two texts" if fields else f"{needed} tokens"
        raise UserError(f"config.eval.pairs={config.pairs}: only {found} held-out records have {what}; lower it")
    record = rng.permutation(eligible)[: config.pairs]
    first = rng.integers(0, lengths[record] - needed + 1)
    whole = records.read_records(record)
    begin = whole.begin[:, None] + np.stack([first, first + config.span], axis=1)
    size = np.full(begin.shape, config.span)
    if fields:
        texts = pieces.texts_of_pairs(whole, records.manifest["reserved"]["eos"])
        begin, end = (texts.start[texts.first[:-1, None] + np.arange(first, first + 2)] for first in (0, 1))
        size = np.minimum(end - begin - 1, config.span)
    spans = views.make_views(whole.tokens, begin, size, config.span).tokens[:, :, 0]
    delimiters = views.delimiter_ids(records.manifest, 2) if data.delimiters else None
    length = config.span + spans_lib.delimiter_count(data)
    tokens, segment, _ = views.make_views(whole.tokens, begin, size, length, delimiters)
    return Pairs(tokens[:, :, 0], segment[:, :, 0] > 0, spans, record)


def open_held_out(model: TextModel, data: str, options: Options) -> HeldOut:
    """Opens the held-out split of a prepared dataset, by default the one of the model's run.

    Raises:
      UserError: there is no dataset, or it cannot serve so many pairs.
    """
    config = default_config() if model.config is None else model.config.copy_and_resolve_references()
    if model.config is None and not data:
        raise UserError(f"--data: {model.name} is no run; give a prepared dataset, --data=DIR")
    directory = data or config.data.dir
    folder = prepared.folders(directory)[0]  # whose tokenizer is that of all
    config.eval.pairs, config.eval.span = options.pairs or config.eval.pairs, options.span or config.eval.span
    records = prepared.open_split(directory, "validation", config.data.cache_dir, config.data.cache_gb)
    as_tokens = reads_dataset_tokens(model, folder)
    if not as_tokens:
        config.data.update(length=config.eval.span, delimiters=False)  # a text has neither rows nor delimiters
    pairs = make_pairs(records, config.eval, config.data)

    def decode() -> tuple[list[str], list[str]]:
        decode_ids = tokenizer.load(folder).decode
        queries, keys = ([decode_ids(ids) for ids in pairs.spans[:, view].tolist()] for view in (0, 1))
        return queries, keys

    chosen = {key: config.eval[key] for key in ("pairs", "span", "seed")}
    protocol = {"data": records.manifest["content_hash"], "split": "validation"} | chosen
    return HeldOut(pairs, decode, as_tokens, config.eval.batch_size, protocol)


def reads_dataset_tokens(model: TextModel, folder: epath.Path) -> bool:
    """Returns whether the model reads the token ids of the dataset in `folder`; else it reads their text.

    A run does if the dataset has the run's tokenizer, or none at all. A model from a Hugging Face folder never does.
    """
    if model.config is None:
        return False  # its ids are those of another tokenizer
    path = tokenizer.find(folder)
    if path is None:
        return True  # there is no tokenizer to decode the ids with, so they must be the run's own
    return model.tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def ranks(similarity: np.ndarray) -> np.ndarray:
    """Returns the rank of the diagonal in each row of similarity[n n], from 1; ties count against it."""
    return (similarity >= np.diagonal(similarity)[:, None]).sum(axis=1)


def measure(rank: np.ndarray) -> dict[str, float]:
    """Returns top-k accuracies and the mean reciprocal rank, as fractions, from ranks int[n]."""
    return {f"top{k}": float((rank <= k).mean()) for k in TOP} | {"mrr": float((1 / rank).mean())}


def with_mean(forward: dict[str, float], backward: dict[str, float]) -> Rows:
    """Returns rows for both directions and for their mean."""
    mean = {name: float(np.mean([forward[name], backward[name]])) for name in forward}
    return dict(zip(DIRECTIONS, (forward, backward), strict=True)) | {"mean": mean}


def score_similarity(similarity: np.ndarray) -> Rows:
    """Scores similarity[n n], whose rows are queries, whose columns are keys, and whose diagonal is right."""
    return with_mean(measure(ranks(similarity)), measure(ranks(similarity.T)))


def chance_rows(n: int) -> Rows:
    """Returns the expected score of a random order of n keys."""
    expected = {f"top{k}": min(k / n, 1.0) for k in TOP} | {"mrr": float((1 / np.arange(1, n + 1)).mean())}
    return with_mean(expected, expected)


def embed_tokens(forward: batching.Forward, pairs: Pairs, batch_size: int) -> np.ndarray:
    """Returns the embeddings float32[n 2 e] by a model that reads tokens."""
    n, v, length = pairs.tokens.shape
    rows = pairs.tokens.reshape(n * v, length), pairs.mask.reshape(n * v, length)
    return batching.embed(forward, *rows, batch_size=batch_size).reshape(n, v, -1)


def embed(model: TextModel, data: HeldOut, options: Options) -> np.ndarray:
    """Returns the embeddings float32[n 2 e] of queries and keys, from tokens or from text."""
    if data.as_tokens:
        return embed_tokens(model.forward, data.pairs, data.batch_size)
    from contrastive_jax.evals import vectors  # not in training: scikit-learn takes a second to import

    encode = vectors.encode_of(model, options)
    queries, keys = data.decode()
    return np.stack([encode(queries, "query"), encode(keys, "document")], axis=1)


def score_embeddings(z: np.ndarray) -> Rows:
    """Scores z[n 2 e]: queries and their keys."""
    return score_similarity(z[:, 0] @ z[:, 1].T)


def score_held_out(model: TextModel, data: HeldOut, options: Options) -> Rows:
    """Scores a model on tokens or on text."""
    return score_embeddings(embed(model, data, options))


def protocol_of(model: TextModel, data: HeldOut, options: Options) -> dict[str, Any]:
    """Returns what decides the figures; a model that reads tokens reads rows of one length, whatever its own limit."""
    if data.as_tokens:
        return data.protocol | {"input": "tokens", "max_tokens": data.pairs.tokens.shape[2]}
    return data.protocol | {"input": "decoded text"}


def score_chance(model: TextModel, data: HeldOut, options: Options) -> Rows:
    """Returns the expected score of a random order."""
    return chance_rows(len(data.pairs.spans))


def score_tfidf(model: TextModel, data: HeldOut, options: Options) -> Rows:
    """Scores TF-IDF, fitted on the texts of the spans."""
    from contrastive_jax.evals import baselines

    queries, keys = data.decode()
    encode = baselines.fit_tfidf(queries + keys)
    return score_similarity(baselines.dot_products(encode(queries), encode(keys)))


def score_bm25(model: TextModel, data: HeldOut, options: Options) -> Rows:
    """Scores BM25 over the texts of the keys and, for the other direction, of the queries."""
    from contrastive_jax.evals import baselines

    queries, keys = data.decode()
    forward, backward = baselines.Bm25(keys).scores(queries), baselines.Bm25(queries).scores(keys)
    return with_mean(measure(ranks(forward)), measure(ranks(backward)))


TASK = Task(
    name="query_key",
    open_data=open_held_out,
    score=score_held_out,
    protocol=protocol_of,
    baselines={
        "chance": score_chance,
        "TF-IDF": score_tfidf,
        "BM25": score_bm25,
        "untrained": untrained(score_held_out),
    },
)
