"""The TFDS builder: raw documents -> windows of token ids in ArrayRecord files, through Apache Beam.

```
shards ──read──> documents ──group by hash of the text──> first of equals ──tokenize──> windows ──> TFDS writer
```

Grouping serves twice: equal texts meet, and the work of a few large shards is spread over all workers. TFDS orders the
records by a hash of their key, so the files depend on the documents only, never on which worker was faster.

What is counted on the way (documents, windows, tokens, bytes, rejects) comes as (path into the manifest, number) pairs,
summed and left in `counts.json` in the work directory, the bad lines in `rejects.jsonl`.
"""

import contextlib
import hashlib
import json
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.transforms import environments
from etils import epath

from contrastive_jax.data import sources, token_type, tokenizer
from contrastive_jax.data.sources import DataError, Document, Reject, Shard

TRAIN, VALIDATION = "train", "validation"
MAX_REJECTS_NAMED = 1000  # per shard; all are counted


class Recipe(NamedTuple):
    """All that decides the content of the dataset, but for the tokenizer, which lies in `work`.

    Attributes:
      shards: the inputs.
      window: the most tokens a record holds.
      vocab_size: ids of the tokenizer.
      validation_fraction: share of the documents, by hash, for shards that name no split.
      on_bad: "skip" counts a bad line, "fail" stops at it.
      work: directory of this run; the dataset is built in it, and workers leave what they have to say there.
    """

    shards: list[Shard]
    window: int
    vocab_size: int
    validation_fraction: float
    on_bad: str
    work: str


class Pile(tfds.core.BeamBasedBuilder):
    """Windows of token ids, each from one document, with domain and position."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS 4.9.10 looks for this path with importlib_resources, which it does not require on today's Pythons.
    code_path = epath.Path(__file__)

    def __init__(self, *, recipe: Recipe, **kwargs: Any):
        self._recipe = recipe
        super().__init__(data_dir=recipe.work, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=token_type(self._recipe.vocab_size), encoding="bytes"),
            "document": tfds.features.Text(),  # hex of the SHA-256 of the text, its first half
            "domain": tfds.features.Text(),
            "position": tfds.features.Scalar(np.int32),  # tokens of the document before the window
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents as windows of token ids; made by contrastive_jax.prepare.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any, pipeline: beam.Pipeline) -> dict[str, beam.PCollection]:
        del dl_manager  # nothing is downloaded here
        recipe = self._recipe
        documents, read_counts, bad = (
            pipeline
            | "Shards" >> beam.Create(recipe.shards)
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.ParDo(_Read(recipe)).with_outputs("counts", "bad", main="documents")
        )
        splits = (
            documents
            | "Split" >> beam.MapTuple(lambda key, document: _split(key, document, recipe.validation_fraction))
            | "Splits" >> beam.Distinct()
            | "AllSplits" >> beam.combiners.ToList()
            | "BothSplits" >> beam.Map(_require_both_splits, recipe=recipe)
        )
        outputs = (
            documents
            | "EqualTexts" >> beam.GroupByKey()
            | "Tokenize"
            >> beam.ParDo(_Tokenize(recipe), beam.pvalue.AsSingleton(splits)).with_outputs(TRAIN, VALIDATION, "counts")
        )
        _ = (
            (read_counts, outputs["counts"])
            | "Counts" >> beam.Flatten()
            | "Sum" >> beam.CombinePerKey(sum)
            | "AllCounts" >> beam.combiners.ToList()
            | "WriteCounts" >> beam.Map(_write_lines, path=f"{recipe.work}/counts.json")
        )
        _ = (
            bad
            | "NameSome" >> beam.combiners.Top.SmallestPerKey(MAX_REJECTS_NAMED)
            | "Unkey" >> beam.FlatMap(lambda keyed: keyed[1])
            | "AllBad" >> beam.combiners.ToList()
            | "WriteBad" >> beam.Map(_write_lines, path=f"{recipe.work}/rejects.jsonl")
        )
        return {TRAIN: outputs[TRAIN], VALIDATION: outputs[VALIDATION]}

    def _generate_examples(self) -> None:
        """Unused: both splits come from one pipeline."""


class _Read(beam.DoFn):
    """Shard -> (document id, document), counts of rejects, and the bad lines as (shard, (order, line, reason))."""

    def __init__(self, recipe: Recipe):
        self._on_bad = recipe.on_bad
        self._work = recipe.work

    def setup(self) -> None:
        self._meter = Meter(self._work, "read")

    def process(self, shard: Shard) -> Iterator[Any]:
        for item in sources.read(shard):
            if isinstance(item, Document):
                self._meter.add(item.text)
                yield hashlib.sha256(item.text.encode()).hexdigest()[:32], item
            elif self._on_bad == "fail" and item.reason != sources.EMPTY_TEXT:
                stop(self._work, stop_message(item))
            else:
                yield from _reject_counts(item)
                yield beam.pvalue.TaggedOutput("bad", (shard.name, (shard.order, item.line, str(item))))

    def finish_bundle(self) -> None:
        self._meter.write()


class _Tokenize(beam.DoFn):
    """(document id, equal documents) -> keyed examples in the output of their split, and counts."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def setup(self) -> None:
        self._tokenizer = tokenizer.load(self._recipe.work)
        self._meter = Meter(self._recipe.work, "tokenized")

    def finish_bundle(self) -> None:
        self._meter.write()

    def process(self, keyed: tuple[str, Iterable[Document]], splits: list[str]) -> Iterator[Any]:
        del splits  # waited for, so that a dataset without a split is refused before the long work
        key, documents = keyed
        kept: tuple[Any, ...] | None = None
        for document in documents:
            split = _split(key, document, self._recipe.validation_fraction)
            # Validation first: a text of both splits leaves train, so that figures on validation stay honest.
            ranked = (split != VALIDATION, document.shard.order, document.line, document)
            dropped, kept = (ranked, kept) if kept and kept < ranked else (kept, ranked)
            if dropped:
                yield from _reject_counts(Reject(dropped[3].shard, dropped[3].line, "duplicate", dropped[3].domain))
        if kept:
            yield from self._windows(key, VALIDATION if kept[0] is False else TRAIN, kept[3])

    def _windows(self, key: str, split: str, document: Document) -> Iterator[Any]:
        tokens = np.array(self._tokenizer.encode(document.text), token_type(self._recipe.vocab_size))
        starts = range(0, len(tokens), self._recipe.window)
        for start in starts:
            window = tokens[start : start + self._recipe.window]
            example = {"tokens": window, "document": key, "domain": document.domain, "position": start}
            yield beam.pvalue.TaggedOutput(split, (f"{key}-{start}", example))
        size = self._meter.add(document.text)
        for name, number in {"documents": 1, "windows": len(starts), "tokens": len(tokens), "bytes": size}.items():
            yield _count("splits", split, "domains", document.domain, name, number=number)


class Meter:
    """What a worker has done so far, in a file of its own for the command to sum up."""

    def __init__(self, work: str, stage: str):
        self._path = epath.Path(work) / "progress" / f"{stage}-{uuid.uuid4().hex}"
        self._documents = self._bytes = 0
        self._written = time.monotonic()

    def add(self, text: str) -> int:
        """Counts one document; returns its size in bytes."""
        size = len(text.encode())
        self._documents += 1
        self._bytes += size
        if time.monotonic() > self._written + 2:
            self.write()
        return size

    def write(self) -> None:
        """Leaves the figures for the command."""
        self._written = time.monotonic()
        self._path.write_text(f"{self._documents} {self._bytes}")


def read_meters(work: str) -> dict[str, tuple[int, int]]:
    """Stage -> (documents, bytes) of all workers together."""
    totals = {"read": (0, 0), "tokenized": (0, 0)}
    for path in (epath.Path(work) / "progress").glob("*-*"):
        stage = path.name.partition("-")[0]
        documents, size = map(int, (path.read_text() or "0 0").split())
        totals[stage] = (totals[stage][0] + documents, totals[stage][1] + size)
    return totals


def build(recipe: Recipe, beam_flags: list[str], cores: int) -> dict[str, Any]:
    """Runs the pipeline; the dataset is then in WORK/pile/1.0.0.

    Args:
      recipe: what to build.
      beam_flags: options of Beam such as `--runner=DataflowRunner`; without a runner, this machine does the work.
      cores: worker processes on this machine.

    Returns:
      The counts, nested as in the manifest.

    Raises:
      DataError: bad input under on_bad="fail", or a split without documents.
    """
    (epath.Path(recipe.work) / "progress").mkdir(parents=True, exist_ok=True)
    runner = None
    if not any(flag.startswith("--runner=") for flag in beam_flags):
        runner = _local_runner(recipe.work, cores)
        beam_flags = [f"--direct_num_workers={cores}", *beam_flags]
    options = tfds.download.DownloadConfig(beam_runner=runner, beam_options=PipelineOptions(flags=beam_flags))
    try:
        with quiet():
            Pile(recipe=recipe).download_and_prepare(download_config=options, download_dir=f"{recipe.work}/downloads")
    except Exception as error:
        # A worker's exception arrives as a traceback in the text of another; what it had to say is in this file.
        message = epath.Path(recipe.work) / "stopped.txt"
        if message.exists():
            raise DataError(message.read_text()) from error
        raise
    return _nested(json.loads(line) for line in (epath.Path(recipe.work) / "counts.json").read_text().splitlines())


def _local_runner(work: str, cores: int) -> fn_runner.FnApiRunner:
    """Beam's in-memory runner, by name: DirectRunner may prefer Prism, which downloads a program."""
    if cores == 1:
        return fn_runner.FnApiRunner()
    # Workers are fresh Python processes: they must find this package where this one did, and their logs go to a file.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    worker = f"exec {shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main"
    return fn_runner.FnApiRunner(
        environments.SubprocessSDKEnvironment.from_command_string(f"{worker} 2>>{shlex.quote(work)}/workers.log")
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what TFDS prints and Beam logs: both talk of their own affairs, and repeat what is raised anyway."""
    level = logging.root.level
    logging.disable(logging.CRITICAL)
    tfds.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(level)


def stop_message(reject: Reject) -> str:
    """What the user is told under --on_bad=fail."""
    return f"{reject} (--on_bad=skip counts such lines and goes on)"


def stop(work: str, message: str) -> None:
    """Ends the run from within a worker, with a message for the user."""
    (epath.Path(work) / "stopped.txt").write_text(message)
    raise DataError(message)


def _split(key: str, document: Document, fraction: float) -> str:
    """The split the input names, else by the document's hash."""
    return document.shard.split or (VALIDATION if int(key[:15], 16) < fraction * 16**15 else TRAIN)


def _require_both_splits(splits: list[str], recipe: Recipe) -> list[str]:
    for split in (TRAIN, VALIDATION):
        if split not in splits:
            stop(recipe.work, f"no document for the {split} split; mend --input, --validation or --validation_fraction")
    return splits


def _count(*path: str, number: int = 1) -> beam.pvalue.TaggedOutput:
    return beam.pvalue.TaggedOutput("counts", (path, number))


def _reject_counts(reject: Reject) -> Iterator[beam.pvalue.TaggedOutput]:
    reason = reject.reason.partition(":")[0]
    yield _count("rejects", reason, reject.shard.name)
    yield _count("rejects_by_domain", reject.shard.split or "unsplit", reject.domain, reason)


def _write_lines(items: list[Any], path: str) -> None:
    epath.Path(path).write_text("".join(json.dumps(item) + "\n" for item in sorted(items)))


def _nested(counts: Iterable[tuple[list[str], int]]) -> dict[str, Any]:
    """[(path, number)] -> nested dicts."""
    tree: dict[str, Any] = {}
    for (*path, last), number in counts:
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = number
    return tree
