"""Finds the input of `prepare`: which files, whose domain, and how much of each.

An input is written [NAME=]GLOB[@LIMIT]:

    train/*.jsonl.zst                           each document names its domain, or has that of its file
    web=crawl/*.parquet                         all its documents are of the domain "web"
    code=hf://datasets/ORG/SET/*.jsonl@2000000  at most two million lines: the heads of its files, by their sizes
    books/*.json.gz@5GB                         at most 5 GB of text, with the JSON around it

A line is a document of a file of JSON lines; of a Parquet file it is a row, of a TFDS dataset an example. Bad ones count too.

No limit can be confused with a path: a file that can be read ends in .jsonl, .json or .parquet (and .gz ...). A relative path
whose first folder has a "=" is written ./lang=en/*.parquet.
"""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from contrastive_jax.config import UserError
from contrastive_jax.data.raw import parts, schemas, sources, tables, text_stream
from contrastive_jax.data.raw.pairs import PairFields
from contrastive_jax.data.raw.sources import Document, Part, Shard
from contrastive_jax.data.raw.text_stream import DECOMPRESSORS
from contrastive_jax.files import listing

LINE_SUFFIXES = (".jsonl", ".json", ".ndjson")
SUFFIXES = (".parquet", *(suffix + end for suffix in LINE_SUFFIXES for end in ("", *DECOMPRESSORS)))
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_INPUT = re.compile(r"(?:(?P<name>[^/=*?:@\[]+)=)?(?P<glob>.+?)(?:@(?P<number>\d+(?:\.\d+)?)(?P<unit>[KMGT]B)?)?")
LOOKED_AT = 8  # of the .zst files of the input, for the memory that they need
_TFDS_SHARD = 20_000  # TFDS examples per shard


class Input(NamedTuple):
    """One --input: its domain or "", its glob, and its limits; 0: none."""

    domain: str
    glob: str
    max_lines: int = 0
    max_bytes: int = 0


def parse_input(value: str, flag: str) -> Input:
    """Returns the meaning of [NAME=]GLOB[@LIMIT].

    Raises:
      UserError: the name may be the beginning of a path, or the limit is not a number.
    """
    found = _INPUT.fullmatch(value)
    if not found:
        raise UserError(f"--{flag}={value}: write GLOB, NAME=GLOB or GLOB@LIMIT")
    name, number, unit = found["name"] or "", found["number"], found["unit"]
    if name and os.path.exists(value.partition("/")[0]):
        raise UserError(f"--{flag}={value}: {name}=... is the beginning of a path here; write ./{value} for the path")
    if number is None:
        return Input(name, found["glob"])
    limit = float(number) * UNITS.get(unit or "", 1)
    if limit != int(limit) or not limit:
        raise UserError(f"--{flag}={value}: give a whole number of lines, such as @2000000, or a size, such as @5GB")
    return Input(name, found["glob"], **{"max_bytes" if unit else "max_lines": int(limit)})


def file_shards(
    patterns: Iterable[str],
    split: str,
    flag: str,
    text_field: str = "",
    domain_field: str = "",
    limit: int = 0,
    pair: PairFields | None = None,
) -> list[Shard]:
    """Returns the files of some inputs, sorted by name within each; a file that two of them match belongs to the first.

    Args:
      patterns: the inputs, as [NAME=]GLOB[@LIMIT]; globs of files, local, on gs://, s3:// or hf://.
      split: the split of all these files, see `Shard`.
      flag: the flag that the inputs were given with, for the message.
      text_field: see `Shard`; so is `domain_field`.
      domain_field: the dotted path of the domain.
      limit: the most lines over all; 0: all.
      pair: see `Shard`.

    Raises:
      UserError: a glob matches nothing, or a file that cannot be read.
    """
    shards: dict[str, Shard] = {}
    for pattern in patterns:
        source = parse_input(pattern, flag)
        matches = listing.list_files(source.glob)
        if not matches:
            folder = f"; it is a folder: write {source.glob.rstrip('/')}/*" if os.path.isdir(source.glob) else ""
            hint = f"; if {source.domain}= belongs to the path, write ./{pattern}" if source.domain else ""
            raise UserError(f"--{flag}={pattern}: no file matches; check the path{folder or hint}")
        for file in matches:
            if not file.name.endswith(SUFFIXES + tables.SUFFIXES * bool(pair)):
                raise UserError(
                    f"--{flag}={pattern}: {file.name} cannot be read; narrow the glob to names that end in .jsonl or .json, "
                    f"or in these with {', '.join(DECOMPRESSORS)}, or in .parquet"
                )
        new = [
            Shard(file.name, 0, split, None, file.size, file.version, source.domain, text_field, domain_field, pair=pair)
            for file in matches
            if file.name not in shards
        ]
        new = with_limit(with_limit(new, "max_lines", source.max_lines), "max_bytes", source.max_bytes)
        shards.update({shard.name: shard for shard in new})
    limited = with_limit(list(shards.values()), "max_lines", limit)
    return [shard._replace(order=order) for order, shard in enumerate(limited)]


def with_limit(shards: list[Shard], name: str, limit: int) -> list[Shard]:
    """Returns the shards with a limit over all, shared out by their sizes; those that get nothing are left out.

    Args:
      shards: the shards; one that has a lower limit already keeps it.
      name: the field of the limit.
      limit: the sum of the limits; 0: there is none.
    """
    total = sum(shard.size for shard in shards)
    if not limit or not total:
        return shards
    before, limited = 0, []
    for shard in shards:
        share = limit * (before + shard.size) // total - limit * before // total
        before += shard.size
        if share:
            lower: dict[str, Any] = {name: min(share, getattr(shard, name) or share)}
            limited.append(shard._replace(**lower))
    return limited


def check_fields(shards: Sequence[Shard]) -> None:
    """Checks that --domain_field is there, in the first documents of the first file: a run may take days.

    Raises:
      UserError: none of them has it.
    """
    for shard in [shard for shard in shards[:1] if shard.domain_field]:
        items = itertools.islice(sources.read(Part(shard, 0, 100, 1, 0, True)), 100)
        domains = {item.domain for item in items if isinstance(item, Document)}
        if domains == {schemas.UNKNOWN_DOMAIN}:
            raise UserError(f"--domain_field={shard.domain_field}: the first documents of {shard.name} lack it; check its name")


def with_field_count(shards: list[Shard], pair: PairFields) -> list[Shard]:
    """Returns the files of a source with the number of texts that the first good line has; all lines of columns need as many.

    Raises:
      UserError: the first lines of the first file have no pair.
    """
    # A pair with too few hard negatives has its texts all the same.
    shard = shards[0]._replace(pair=pair._replace(options=pair.options._replace(min_negatives=0)))
    items = list(itertools.islice(sources.read(Part(shard, 0, 1 << 20, 1, 0, False)), 100))
    first = next((item for item in items if isinstance(item, Document)), None)
    if first is None:
        reason = f" ({items[0]})" if items else ""
        raise UserError(f"--pairs={shards[0].name}: no pair in its first lines{reason}; --text_field=A,B names the fields")
    assert first.pair
    return [shard._replace(pair=pair._replace(size=len(first.pair.texts))) for shard in shards]


class PairTexts(NamedTuple):
    """The texts of a pair."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


def read_pairs(patterns: Iterable[str], text_field: str = "") -> Iterator[PairTexts]:
    """Yields the pairs of some inputs; those with an empty text are passed over, and labels are not looked at.

    Args:
      patterns: the values of --pairs, see `file_shards`.
      text_field: the dotted paths of the texts of a pair, with commas between them; "": those of a known layout.

    Raises:
      UserError: a file cannot be read, or a line has no pair; the message names it.
    """
    pair = PairFields(tuple(text_field.split(",")) if text_field else (), label="-")  # no field has this name
    for shard in file_shards(patterns, "", "pairs", pair=pair):
        for item in itertools.chain.from_iterable(map(sources.read, parts.cut(shard, sys.maxsize))):
            if isinstance(item, Document) and item.pair and item.pair.positives:
                texts, first = item.pair.texts, 1 + item.pair.positives
                yield PairTexts(texts[0], texts[1:first], texts[first:])
            elif isinstance(item, Document) or item.reason not in schemas.HARMLESS:
                reason = f"{shard.name}:{item.line}: a pair of one text" if isinstance(item, Document) else f"{item}"
                raise UserError(f"--pairs: {reason}; --text_field=QUERY,POSITIVE names the fields")


def window_bytes(shards: Sequence[Shard]) -> int:
    """Returns the memory that a worker needs to decompress the .zst files among its input; looks at a few of them."""
    names = [shard.name for shard in shards if shard.name.endswith(".zst")]
    windows = [0]
    for name in names[:: max(1, len(names) // LOOKED_AT)]:
        with listing.open_binary(name) as file, listing.hub_errors(name):
            windows.append(text_stream.window_of(file.read(18)))  # the longest header
    return max(windows)


def tfds_shards(name: str, data_dir: str | None, feature: str | None, limit: int = 0) -> list[Shard]:
    """Returns the shards, of 20,000 examples each, of a TFDS dataset, which is downloaded if need be.

    If the dataset has a validation split, it is kept as such. A test split is not read.

    Args:
      name: NAME or NAME/CONFIG.
      data_dir: the folder in which TFDS keeps it; None: TFDS's own.
      feature: its text feature; None: "text", or the only one.
      limit: the most examples of a split; 0: all.

    Raises:
      UserError: there is no such dataset, it has no train split, or its text feature has to be chosen.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare()
    except (tfds.core.registered.DatasetNotFoundError, AssertionError, OSError) as error:
        raise UserError(f"--tfds={name}: {' '.join(str(error).split())[:300]}") from error
    texts = [key for key, value in builder.info.features.items() if isinstance(value, tfds.features.Text)]
    feature = feature or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if feature not in texts:
        raise UserError(f"--tfds={name}: choose --tfds_feature among its text features: {', '.join(texts) or 'none'}")
    if "train" not in builder.info.splits:
        raise UserError(f"--tfds={name}: no split 'train' among {', '.join(builder.info.splits)}")
    splits = ["train", "validation"] if "validation" in builder.info.splits else ["train"]
    shards: list[Shard] = []
    for split in splits:
        size, of_split = builder.info.splits[split].num_examples, list[Shard]()
        for start in range(0, size, _TFDS_SHARD):
            end = min(start + _TFDS_SHARD, size)
            cut = f"{split}[{start}:{end}]"
            tfds_slice = {"directory": str(builder.data_path), "cut": cut, "feature": feature, "domain": builder.name}
            of_split.append(Shard(f"{name}/{cut}", 0, split if len(splits) > 1 else "", tfds_slice, end - start))
        shards += with_limit(of_split, "max_lines", limit)
    return [shard._replace(order=order) for order, shard in enumerate(shards)]
