"""What a prepared dataset says about itself: manifest.json, and the files by which TFDS opens it."""

import collections
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from contrastive_jax.data import FORMAT, token_type
from contrastive_jax.data.preparation.arguments import Arguments, as_json
from contrastive_jax.data.prepared import label_range
from contrastive_jax.data.raw.sources import Shard

MANIFEST = "manifest.json"
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
COUNTS = ("documents", "records", "tokens", "bytes")
DESCRIPTION = "Documents as records of token ids; made by contrastive_jax.prepare."


def identity_of_files(shards: Iterable[Shard]) -> list[dict[str, Any]]:
    """Returns what tells the input from other input of the same name: name, size and version of each file."""
    return [
        {"name": shard.name, "size": shard.size, "version": shard.version or (shard.tfds or {}).get("directory", "")}
        for shard in shards
    ]


def identity_of_python() -> list[dict[str, Any]]:
    """Returns the same of this Python installation: its version, and a hash of the names and versions of its packages."""
    packages = sorted({f"{item.name}=={item.version}" for item in importlib.metadata.distributions()})
    version = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:16]
    return [{"name": f"Python {platform.python_version()}", "size": len(packages), "version": version}]


def difference(before: Mapping[str, Any], plan: Mapping[str, Any], verb: str) -> str:
    """Returns how a dataset differs from the one that would be made now: "was made with other arguments (...)"; "": not at all.

    Args:
      before: its manifest, or the plan by which it was begun.
      plan: what would be made: "format", "arguments", "inputs" and "tokenizer_sha256".
      verb: what happened to it: "made", "begun".
    """
    if before.get("format") != FORMAT:
        return f"was {verb} by another version (format {before.get('format')}, not {FORMAT})"
    # A flag that an earlier version did not have is as its default.
    old, new = as_json(Arguments()) | before["arguments"], plan["arguments"]
    if changed := [name for name in {**new, **old} if name not in old or name not in new or old[name] != new[name]]:
        flags = ["record_tokens" if name == "window" else name for name in changed]
        values = (f"--{flag}: {json.dumps(old.get(name))[:80]}" for flag, name in zip(flags, changed, strict=True))
        return f"was {verb} with other arguments ({', '.join(values)})"
    if new["tokenizer"] and before["tokenizer_sha256"] != plan["tokenizer_sha256"]:
        return f"is of another tokenizer: {new['tokenizer']} has changed since it was {verb}"
    if before["inputs"] != plan["inputs"]:
        files, files_now = ({item["name"]: item for item in items} for items in (before["inputs"], plan["inputs"]))
        names = sorted(name for name in files.keys() | files_now.keys() if files.get(name) != files_now.get(name))
        if not names:
            return f"is of other input: the order of its files has changed since it was {verb}"
        change = "is new" if names[0] not in files else "is gone" if names[0] not in files_now else "has changed"
        return f"is of other input: the input {names[0]} {change} since it was {verb}"
    return ""


def is_manifest(value: Mapping[str, Any]) -> bool:
    """Returns whether the content of a file called manifest.json is that of a prepared dataset, of this version or another."""
    return isinstance(value.get("format"), int) and isinstance(value.get("arguments"), dict) and "content_hash" in value


def nested(rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Returns rows (name, ..., name, number) as nested dicts, sorted by name; numbers of the same names are added."""
    totals: collections.Counter[tuple[str, ...]] = collections.Counter()
    for *path, number in rows:
        totals[tuple(path)] += number
    tree: dict[str, Any] = {}
    for (*path, last), number in sorted(totals.items()):
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = number
    return tree


def count_splits(rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Returns the counts of each split, in total and by domain, from rows (split, domain, name of the count, number)."""
    counts = nested(rows)
    return {
        split: {name: sum(domain[name] for domain in counts[split].values()) for name in COUNTS} | {"domains": counts[split]}
        for split in SPLITS
        if split in counts
    }


def count_rejects(rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Returns the manifest's entries about rejects from rows (reason, file, split, domain, number)."""
    rows = list(rows)
    rejects = nested((reason, file, number) for reason, file, _, _, number in rows)
    return {
        "rejects": rejects,
        "rejects_by_domain": nested((split, domain, reason, number) for reason, _, split, domain, number in rows),
        "duplicates": sum(rejects.get("duplicate", {}).values()),
    }


def hash_content(file_shards: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Returns the hash of the records of a dataset, from the outcomes of the tasks that wrote its file shards."""
    hashes = {split: [shard["hash"] for shard in shards] for split, shards in file_shards.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def make_manifest(
    plan: dict[str, Any],
    tokenizer: Any,
    domains: Sequence[str],
    file_shards: Mapping[str, Sequence[dict[str, Any]]],
    counts: Iterable[Sequence[Any]],
    rejects: Iterable[Sequence[Any]],
    losses: list[dict[str, Any]],
) -> dict[str, Any]:
    """Returns the manifest.

    Args:
      plan: the arguments and the input, see `plan_of`.
      tokenizer: of the dataset.
      domains: their names, in the order of the numbers in the index.
      file_shards: the outcome of each file shard, by split.
      counts: see `count_splits`.
      rejects: see `count_rejects`.
      losses: see `losses.losses_of`.
    """
    return {
        "format": FORMAT,
        "arguments": plan["arguments"],
        "inputs": plan["inputs"],
        "window": plan["arguments"]["window"],
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "reserved": tokenizer.reserved,
        "content_hash": hash_content(file_shards),
        "domains": list(domains),
        "splits": count_splits(counts),
        **count_rejects(rejects),
        "losses": losses,
    }


def describe_pairs(shards: Sequence[Shard], written: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the manifest's entries on pairs: how many texts each has at least, and the lowest and the highest label.

    Of "fields" texts some are hard negatives. "numbers" says what is stored of each pair, with "scores" if any pair has them.
    "sources" has what training and exports need to know of each domain.

    Args:
      shards: the files of the input.
      written: the outcomes of the stage "token".
    """
    of_shards = [of_split for outcome in written for of_split in outcome["file_shards"].values() if of_split["records"]]
    if not shards[0].pair or not of_shards:
        return {}
    positives, negatives = (min(of_split[name] for of_split in of_shards) for name in ("positives", "hard_negatives"))
    names = ("query_prompt", "document_prompt", "in_batch")
    sources = {
        shard.domain: {name: getattr(shard.pair.options, name) for name in names}
        for shard in shards
        if shard.domain and shard.pair
    }
    labels = label_range(of_split["labels"] for of_split in of_shards)
    numbers = ["label", "positives", "hard_negatives"] + ["scores"] * any(of_split["scored"] for of_split in of_shards)
    entries = {"fields": 1 + positives + negatives, "hard_negatives": negatives, "labels": labels}
    return entries | {"numbers": numbers, "sources": sources}


def tfds_features(vocab_size: int, has_numbers: bool) -> str:
    """Returns the features.json by which TFDS parses the records."""
    package = "tensorflow_datasets.core.features."
    text = {"pythonClassName": f"{package}text_feature.Text", "text": {}}

    def tensor(dtype: str, encoding: str) -> dict[str, Any]:
        kind = {"dtype": dtype, "encoding": encoding, "shape": {"dimensions": ["-1"]}}
        return {"pythonClassName": f"{package}tensor_feature.Tensor", "tensor": kind}

    def scalar(dtype: str) -> dict[str, Any]:
        return {"pythonClassName": f"{package}scalar.Scalar", "tensor": {"dtype": dtype, "encoding": "none", "shape": {}}}

    features = {
        "document": text,
        "domain": text,
        "position": scalar("int32"),
        **({"numbers": tensor("float32", "none")} if has_numbers else {}),
        "tokens": tensor(token_type(vocab_size).name, "bytes"),
    }
    kind = {"pythonClassName": f"{package}features_dict.FeaturesDict", "featuresDict": {"features": features}}
    return json.dumps(kind, indent=4)


def tfds_info(file_shards: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Returns the dataset_info.json by which `tfds.builder_from_directory` opens the folder."""
    splits = [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split,
            "numBytes": str(sum(shard["bytes"] for shard in shards)),
            "shardLengths": [str(shard["records"]) for shard in shards],
        }
        for split, shards in file_shards.items()
    ]
    info = {"description": DESCRIPTION, "fileFormat": "array_record", "moduleName": "contrastive_jax.data.preparation.prepare"}
    return json.dumps(info | {"name": "pile", "splits": splits, "version": "1.0.0"}, indent=2)
