"""From a prepared dataset to batches.

The batch of step k is a pure function of (data, seed, k): nothing of an iterator is ever saved, and the tokens of step k are
the same whatever the number of processes.

Dimensions: b pairs of the global batch, n pairs of this process, v views, g groups of pack_pairs pairs, r rows of a group per
view, l tokens of a row.
"""

import collections
import concurrent.futures
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from contrastive_jax.config import UserError
from contrastive_jax.data import order, packing, pieces, prepared, reading, spans, tokenizer, views
from contrastive_jax.data.batch import Batch
from contrastive_jax.data.prepared import RecordBatch, Records

# Batches that are made while the one before them is used.
AHEAD = 3


class Stream(NamedTuple):
    """The endless pairs of a split.

    Attributes:
      records: the split.
      config: `config.data`.
      seed: of the order and of the spans.
      sampler: cuts the spans of a pair from a record.
      order: says which record comes next.
    """

    records: Records
    config: ConfigDict
    seed: int
    sampler: spans.Sampler
    order: order.Order

    def batches(self, pairs: np.ndarray | None = None, start: int = 0) -> Iterator[Batch]:
        """Returns the endless batches from step `start` on.

        Args:
          pairs: int64[n], which pairs of the global batch to make, ascending, in whole groups of pack_pairs; None: all.
          start: the first step.

        Returns:
          An iterator over Batch, as NumPy arrays of these pairs and their groups.
        """
        records, config, seed, sampler, data_order = self
        own = np.arange(config.batch_size) if pairs is None else pairs
        delimiters = views.delimiter_ids(records.manifest, sampler.views) if config.delimiters else None
        find_units = unit_finder(sampler, config, records.manifest)
        has_texts = sampler.ends == "field"
        reader = reading.Reader(records, data_order, sampler.min_record, own, config.batch_size)

        def make_batch(step: int, waiting: concurrent.futures.Future[RecordBatch]) -> Batch:
            batch = waiting.result()
            uniform = spans.uniform_numbers(seed, step, config.batch_size, sampler.uniforms)[own]
            units = find_units(batch)
            if step == start and sampler.ends == "sentence":
                log_units(sampler, units[0])
            first, size = sampler.sample(batch.length, uniform, *units)
            tokens, segment, span_hash = views.make_views(
                batch.tokens, batch.begin[:, None] + first, size, config.length, delimiters, config.pack_pairs, config.pack_rows
            )
            of_texts = (batch.label, units[0].score[spans.choose_texts(config, units[0], uniform)[:, 1:]]) if has_texts else ()
            return Batch(tokens, segment, batch.document, span_hash, *of_texts)

        return ahead(reader, make_batch, start)


def open_stream(records: Records, config: ConfigDict, seed: int) -> Stream:
    """Makes the sampler and the order of the data, and says in the log what they pass over.

    Args:
      records: the split to sample from.
      config: `config.data`.
      seed: of the order and of the spans.

    Raises:
      UserError: config values contradict each other, or the records cannot serve them.
    """
    sampler = spans.make_sampler(config)
    check_fields(records.manifest, config)
    check_alone(records, config)
    spans.check_length(config, sampler.max_span, "config.data.max_span")
    packing.check_rows(config, sampler.min_span)
    data_order = order.Order(records, config, seed, count_usable(records, config, sampler))
    return Stream(records, config, seed, sampler, data_order)


def check_alone(records: Records, config: ConfigDict) -> None:
    """Raises UserError if pairs without in-batch negatives would be in one batch with others."""
    if records.alone and config.one_source != "domain" and len(records.domains) > 1:
        name = records.domains[min(records.alone)]
        raise UserError(f"config.data.one_source={config.one_source!r}: {name!r} has no in-batch negatives; set it to 'domain'")


def check_fields(manifest: dict[str, Any], config: ConfigDict) -> None:
    """Checks that the sampler fits the data, and the views the texts of its pairs.

    Raises:
      UserError: they do not.
    """
    count, hard = manifest.get("fields", 0), manifest.get("hard_negatives", 0)
    if config.sampler != "fields":
        if count:
            raise UserError(f"config.data.sampler={config.sampler!r}: config.data.dir holds pairs; set it to 'fields'")
    elif not count:
        raise UserError("config.data.sampler='fields': config.data.dir holds no pairs; make them with `prepare --pairs=GLOB`")
    elif config.views > count:
        enough = f", or prepare them with --min_negatives={config.hard_negatives}" if config.hard_negatives > hard else ""
        raise UserError(f"config.data.views={config.views}: some pairs of config.data.dir have {count} texts; lower it{enough}")
    elif config.hard_negatives > hard:
        raise UserError(
            f"config.data.hard_negatives={config.hard_negatives}: some pairs of config.data.dir have {hard}; lower it, or "
            f"prepare them with --min_negatives={config.hard_negatives}"
        )
    elif config.views - config.hard_negatives > count - hard:
        raise UserError(
            f"config.data.views={config.views}: the pairs of config.data.dir have {count - hard - 1} positives; set "
            f"config.data.hard_negatives={config.views - count + hard} or more"
        )


def count_usable(records: Records, config: ConfigDict, sampler: spans.Sampler) -> np.ndarray:
    """Returns uint8[c], the records of each chunk that have room for a pair; says how many have not.

    Raises:
      UserError: no record has room for the shortest pair, or none could ever have room for the longest.
    """
    usable, roomy = records.count(sampler.min_record, sampler.max_record)
    count, total, longest = int(usable.sum(dtype=np.int64)), len(records), records.manifest["window"]
    if not count:
        raise UserError(
            f"no record has the {sampler.min_record} tokens that config.data.sampler={config.sampler!r} needs (longest: "
            f"{records.lengths().max(initial=0)}); lower {' or '.join(f'config.data.min_{key}' for key in sampler.keys)}"
        )
    asked = " and ".join(f"config.data.max_{key}={config[f'max_{key}']}" for key in sampler.keys)
    if sampler.max_record > longest:
        raise UserError(
            f"{asked} need records of {sampler.max_record} tokens, but those of config.data.dir have at most {longest}; "
            f"lower them, or prepare the data with --record_tokens={sampler.max_record}"
        )
    if count < total:
        logging.info("%d of %d records have fewer than %d tokens and are left out", total - count, total, sampler.min_record)
    share = roomy.sum(dtype=np.int64) / count
    if share < 1:
        logging.info("%s: %.1f %% of the records have room for the longest; the others have shorter ones", asked, 100 * share)
    return usable


def batches(
    records: Records, config: ConfigDict, seed: int, pairs: np.ndarray | None = None, start: int = 0
) -> Iterator[Batch]:
    """Returns the batches of a stream that nothing else needs; see `open_stream` and `Stream.batches`."""
    return open_stream(records, config, seed).batches(pairs, start)


def unit_finder(sampler: spans.Sampler, config: ConfigDict, manifest: dict[str, Any]) -> Callable[[RecordBatch], list[Any]]:
    """Returns the function from records to the units between which the sampler cuts: [pieces.Units], [pieces.Texts] or []."""
    if sampler.ends == "sentence":
        tables = tokenizer.load(prepared.folders(config.dir)[0]).tables()
        return lambda batch: [pieces.sentences(batch.tokens, batch.begin, tables)]
    if sampler.ends == "field":
        return lambda batch: [pieces.texts_of_pairs(batch, manifest["reserved"]["eos"])]
    return lambda batch: []


def log_units(sampler: spans.Sampler, units: pieces.Units) -> None:
    """Says how many of the first batch's records have the units that the sampler asks for: the tables alone can tell."""
    count = np.diff(units.first)
    full, cut = 100 * (count >= sampler.max_units).mean(), 100 * (count < sampler.min_units).mean()
    logging.info(
        "of the first records, %.1f %% have the %d sentences of a whole pair, %.1f %% have fewer than %d and are cut at their "
        "middle, and the spans of the others have fewer sentences",
        *(full, sampler.max_units, cut, sampler.min_units),
    )


def ahead(
    reader: reading.Reader, make_batch: Callable[[int, concurrent.futures.Future[RecordBatch]], Batch], start: int
) -> Iterator[Batch]:
    """Yields the batches of step `start`, `start` + 1, ..., some of which are made before they are asked for.

    One thread gets the records, step after step. Others make batches of them, in NumPy, which lets threads run at once.

    Args:
      reader: of the records.
      make_batch: (step, its records, which may be awaited) → its batch.
      start: the first step.
    """
    reads, makers = concurrent.futures.ThreadPoolExecutor(1), concurrent.futures.ThreadPoolExecutor(AHEAD)
    pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
    ending = sys.is_finalizing
    try:
        for step in itertools.count(start):
            pending.append(makers.submit(make_batch, step, reads.submit(reader.read, step)))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
    finally:
        if not ending():  # at the end of the process, the threads have ended, and the modules that stop them are gone
            for threads in (makers, reads):
                threads.shutdown(wait=False, cancel_futures=True)
            reader.close()
