"""Every configuration key, with its default, its bounds and its meaning.

A recipe calls `default_config` and changes values; it cannot add keys. Every value can be overridden on the command line:
`--config.optim.learning_rate=3e-4`. Sizes are counted in tokens, steps or pairs.

Here is also `UserError`, for mistakes that the user can mend, and `load_run_config`, which reads the configs of older runs.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging
from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


class UserError(Exception):
    """A mistake that the user can mend. Commands print it as one line and end with its `status`.

    The message names the file, key or value, and says what to do. Everything else that is raised is a bug or a failure of the
    machine, and keeps its traceback.
    """

    status = 2


class Rule(NamedTuple):
    """A bound on the value of one key.

    Attributes:
      text: what the value must be, the end of an error message: "must be at least 1".
      holds: value → whether it is so.
    """

    text: str
    holds: Callable[[Any], bool]


def is_number(value: object) -> bool:
    """Whether the value is a finite int or float (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at_least(minimum: float) -> Rule:
    """The rule value >= minimum."""
    return Rule(f"must be at least {minimum}", lambda value: is_number(value) and value >= minimum)


def above(bound: float) -> Rule:
    """The rule value > bound."""
    return Rule(f"must be above {bound}", lambda value: is_number(value) and value > bound)


def between(low: float, high: float) -> Rule:
    """The rule low <= value < high."""
    return Rule(f"must be in [{low}, {high})", lambda value: is_number(value) and low <= value < high)


def choice(*names: str) -> Rule:
    """The rule that the value is one of the names."""
    return Rule(f"choose one of {', '.join(names)}", lambda value: value in names)


def mesh_size() -> Rule:
    """The rule of a mesh axis: a positive size, or -1 for all devices that remain."""
    return Rule("must be a positive number of devices, or -1 for all that remain", lambda v: v == -1 or v >= 1)


def pairs(kind: type) -> Rule:
    """The rule that the value is a sequence of (name, finite number) pairs, or of (size, finite number) pairs; it may be empty.

    Args:
      kind: str for names, int for sizes.
    """
    name = "size" if kind is int else "name"

    def holds(value: Any) -> bool:
        return all(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], kind) and is_number(pair[1]) for pair in value
        )

    return Rule(f"give ({name}, number) pairs, as in [({name}, 1.0), ({name}, 0.5)]", holds)


NUMBER = Rule("must be a finite number", is_number)
NUMBER_OR_NONE = Rule("must be a finite number, or None", lambda value: value is None or is_number(value))
# Text and switches: ml_collections checks the type, and the code that uses the text checks its content.
ANY = Rule("", lambda value: True)


class Key(NamedTuple):
    """The default of one key and the rule that its value must follow. Rules over several keys stay with the code they serve.

    The default of a key that may be None is its type: it begins as None.
    """

    default: Any
    rule: Rule = ANY


KEYS = {
    # Seed of all randomness: parameters, dropout, order of the data.
    "seed": Key(0, at_least(0)),
    # Optimiser steps of the whole run; the learning-rate schedule ends here.
    "steps": Key(1000, at_least(1)),
    # A model whose weights training starts from: hf:FOLDER (a Hugging Face folder), a folder written by `export`, or
    # WORKDIR[@STEP|@best] of another run. Empty: random weights. The sizes and choices of config.model are then taken from
    # that model, and the data must have its tokenizer (prepare --tokenizer=hf:FOLDER).
    "init_from": Key(""),
    # Write a log line (console, TensorBoard, metrics.jsonl) every N steps.
    "log_every": Key(20, at_least(1)),
    # An experiment tracker that also gets the metrics, "wandb" or "trackio", each an extra of this package; empty: none.
    "tracker": Key("", Rule('choose "wandb" or "trackio", or "" for none', lambda name: name in ("", "wandb", "trackio"))),
    # Run the query-key test on the validation split, and the tasks of eval.tasks, every N steps; 0: never.
    "eval_every": Key(0, at_least(0)),
    # Save a checkpoint every N steps (0: only at the end); the newest `keep` are kept.
    "checkpoint_every": Key(500, at_least(0)),
    "keep": Key(3, at_least(1)),
    # Also keep the checkpoint with the best value of this score (WORKDIR@best), for example "query_key/mean/top5" or
    # "sts-stsb/test/spearman"; checkpoint_every must then be a multiple of eval_every. Empty: keep none.
    "keep_best": Key(""),
    # Gradient caching: encode this many pairs at once, or rows with this many tokens, instead of the whole batch. Loss and
    # gradient are the same; it costs one more forward pass. At most one of the two may be set; both 0: the whole batch.
    "micro_batch": Key(0, at_least(0)),
    "micro_batch_tokens": Key(0, at_least(0)),
    # The folder of a prepared dataset (`contrastive-jax prepare`). Several, separated by commas, must have one tokenizer.
    "data.dir": Key("data/python"),
    # The local folder to which each machine copies a dataset from a bucket, to read it there. Empty: gs:// is read in place, a
    # request per chunk of up to 128 records, and s3:// is copied to ~/.cache/contrastive_jax/buckets.
    "data.cache_dir": Key(""),
    # The most GB of copies in that folder, whose other files are neither counted nor deleted; 0: no limit. Copies used less
    # recently make room. File shards of gs:// that do not fit are read in place. On gs:// it needs data.cache_dir.
    "data.cache_gb": Key(0.0, at_least(0)),
    # Pairs per step, over all devices and processes.
    "data.batch_size": Key(256, at_least(1)),
    # Tokens per row: at least the longest span with its delimiters; the rest is padding.
    "data.length": Key(64, at_least(1)),
    # Packing: the spans of `pack_pairs` pairs share `pack_rows` rows per view; 1 and 1: one span per row. Spans that do not fit
    # are truncated. Rows twice as long as the longest span fill well: 48 pairs of 64 to 510 tokens in 15 rows of 1024 tokens
    # fill 90 % and lose 0.4 % of the tokens, where one span per row of 512 fills 56 %. `fill` in the metrics shows the share.
    "data.pack_pairs": Key(1, at_least(1)),
    "data.pack_rows": Key(1, at_least(1)),
    # How two spans of a record become a positive pair.
    "data.sampler": Key("neighbours", choice("neighbours")),
    # Span lengths are uniform in [min_span, max_span]; the gap between spans is uniform in [min_gap, max_gap] (0: adjacent).
    "data.min_span": Key(62, at_least(1)),
    "data.max_span": Key(62, at_least(1)),
    "data.min_gap": Key(0, at_least(0)),
    "data.max_gap": Key(0, at_least(0)),
    # Whether the query is always the earlier span ("kept") or either of the two ("random").
    "data.order": Key("random", choice("random", "kept")),
    # Put each view between its delimiter tokens as CPT-text does, [x] and {y}; the tokenizer reserves their ids. False: bare
    # spans.
    "data.delimiters": Key(True),
    # The share of each domain in the pairs, as (name, weight) pairs: weights need not sum to 1, and domains that are not named
    # are left out. A name is a domain, or, where data.dir lists several datasets, a dataset (the last part of its path) or
    # DATASET/DOMAIN. The records of each name have epochs of their own. Empty: data.alpha decides.
    "data.weights": Key((), pairs(str)),
    # Without weights: a domain's share of the pairs is proportional to its number of records to this power. 1: all records come
    # equally often; 0: all domains do, and so the records of small ones more often. With one_source="dataset" this is said of
    # datasets instead of domains.
    "data.alpha": Key(1.0, at_least(0)),
    # Take all pairs of a step from one "domain" or one "dataset", in turns by their shares. Empty: from all of them.
    "data.one_source": Key(
        "", Rule('choose "domain" or "dataset", or "" for neither', lambda v: v in ("", "domain", "dataset"))
    ),
    # How many records are shuffled among one another; which ones is drawn anew in each epoch, in chunks of up to 128 records.
    # They are held in memory with a quarter as many that come next: 2.8 KB for each of them if records have 1,024 tokens, over
    # all processes together. Many domains with shares of their own take up to five times as much.
    "data.shuffle_records": Key(131_072, at_least(1)),
    # Transformer blocks; 0: a bag of token embeddings.
    "model.num_layers": Key(2, at_least(0)),
    # Width of the residual stream.
    "model.d_model": Key(256, at_least(1)),
    "model.num_heads": Key(4, at_least(1)),
    # Key and value heads; fewer than num_heads: grouped-query attention.
    "model.num_kv_heads": Key(4, at_least(1)),
    "model.head_dim": Key(64, at_least(1)),
    "model.d_ff": Key(1024, at_least(1)),
    # The longest text in tokens, delimiters included: the size of a learned position table, and where inference, evaluations
    # and exports truncate. Training rows (data.length) may be shorter. Bags and rotary positions have no other limit.
    "model.max_length": Key(512, at_least(1)),
    # The MLP: plain, or gated (the "glu" ones). "gelu" and "geglu" use the tanh approximation of GELU, the "exact" ones do not.
    "model.mlp": Key("gelu", choice("gelu", "gelu_exact", "geglu", "geglu_exact", "swiglu")),
    "model.norm": Key("layernorm", choice("layernorm", "rmsnorm")),
    # Added to the variance in norms.
    "model.norm_eps": Key(1e-5, above(0)),
    # Whether blocks normalise their input ("pre": GPT, ModernBERT) or their output ("post": BERT).
    "model.norm_position": Key("pre", choice("pre", "post")),
    # A norm after the last block; customary with "pre".
    "model.final_norm": Key(True),
    # A norm right after the token and position embeddings (BERT, ModernBERT). With "pre" the first block's attention then has
    # no norm of its own.
    "model.embedding_norm": Key(False),
    "model.position": Key("rotary", choice("learned", "rotary", "none")),
    "model.rope_theta": Key(10_000.0, above(0)),
    # Attend to earlier tokens only.
    "model.causal": Key(False),
    # Attend to this many tokens on either side (0: all), except in the first of every `global_every` layers, which attends to
    # all. Local layers have rotary positions with their own base.
    "model.local_window": Key(0, at_least(0)),
    "model.global_every": Key(3, at_least(1)),
    "model.local_rope_theta": Key(10_000.0, above(0)),
    # "plain" (XLA), "fused" (a Pallas kernel on TPU, cuDNN on GPU), or "auto": fused where the device has it. All give equal
    # results.
    "model.attention": Key("auto", choice("auto", "plain", "fused")),
    # Biases in projections and LayerNorm.
    "model.bias": Key(True),
    # Dropout of embeddings and of each residual branch, and of attention probabilities.
    "model.dropout": Key(0.0, between(0, 1)),
    "model.attention_dropout": Key(0.0, between(0, 1)),
    # Standard deviation of the weights' initial normal distribution.
    "model.init_std": Key(0.02, at_least(0)),
    # Initialise the last projection of each residual branch to zero, so that the encoder starts as a bag of its embeddings.
    "model.zero_init_branches": Key(False),
    # How token states become one vector: "mean", "cls" (the first token) or "eos" (the last token).
    "model.pooling": Key("mean", choice("mean", "cls", "eos")),
    # Width of the embedding after a linear projection; 0: d_model, no projection.
    "model.embedding_dim": Key(0, at_least(0)),
    # What the backward pass recomputes: "none", "dots" (all but matrix products and attention), "attention" (all but
    # attention) or "full". Saving more is not always faster: the loop over layers writes what it saves and reads it back.
    "model.remat": Key("none", choice("none", "dots", "attention", "full")),
    # Run the blocks as one loop (lax.scan). Without it a step is faster, but compile time grows with the number of layers.
    "model.scan": Key(True),
    # Type of activations and matrix products; parameters, norms and softmax stay float32.
    "model.dtype": Key("float32", choice("float32", "bfloat16")),
    "objective.name": Key("infonce", choice("infonce", "flatnce", "dcl", "siglip")),
    # Where negatives come from: each device's own share of the batch ("local"), or the whole batch, either all-gathered
    # ("gathered") or passed around a ring of devices ("ring"). The last two are equal; a ring holds one device's share of the
    # embeddings at a time, and transfers while it computes.
    "objective.where": Key("gathered", choice("local", "gathered", "ring")),
    # Rows and columns of a tile of the score matrix, which is never stored whole.
    "objective.block": Key(4096, at_least(1)),
    # Type of the embeddings in the score products and in transfers; "bfloat16" halves the traffic. Sums are always float32.
    "objective.dtype": Key("float32", choice("float32", "bfloat16")),
    # Score in both directions: each positive also has to find its anchor (siglip's loss contains both already).
    "objective.symmetric": Key(True),
    # The temperature of the logits: its start, the range it is clipped to, and whether it is trained.
    "objective.temperature": Key(0.05, above(0)),
    "objective.temperature_min": Key(0.01, above(0)),
    "objective.temperature_max": Key(1.0, above(0)),
    "objective.temperature_trainable": Key(True),
    # Initial value of siglip's trainable bias.
    "objective.bias": Key(-10.0, NUMBER),
    # Share of the target distribution spread over all keys; infonce only.
    "objective.label_smoothing": Key(0.0, between(0, 1)),
    # Matryoshka: also train prefixes of the embedding, as (size, weight) pairs; the loss is their weighted mean. Empty: off.
    "objective.matryoshka": Key((), pairs(int)),
    # Spans of one document are not each other's negatives.
    "objective.mask_same_document": Key(True),
    # Pairs that share a span's text are not each other's negatives, and of identical pairs only the first counts.
    "objective.mask_duplicates": Key(True),
    # A key whose similarity exceeds the positive's by more than this margin is not a negative; None: no such mask.
    "objective.mask_margin": Key(float, NUMBER_OR_NONE),
    # MoCo: batches of keys in the queue that the momentum encoder fills; 0: no queue, negatives come from the batch.
    "objective.queue": Key(0, at_least(0)),
    # Decay of the momentum encoder's moving average of parameters.
    "objective.momentum": Key(0.999, between(0, 1)),
    # AdamW.
    "optim.learning_rate": Key(1e-3, above(0)),
    "optim.b1": Key(0.9, between(0, 1)),
    "optim.b2": Key(0.98, between(0, 1)),
    "optim.eps": Key(1e-8, above(0)),
    "optim.weight_decay": Key(0.01, at_least(0)),
    # (regex, factor) pairs: the first pattern that matches a parameter's path decides; every parameter must be matched.
    "optim.weight_decay_rules": Key(((r"norm|bias|embedding|objective", 0.0), (r".*", 1.0)), pairs(str)),
    "optim.learning_rate_rules": Key(((r".*", 1.0),), pairs(str)),
    # Linear warm-up, then this decay; "cosine" and "linear" end at end_factor × learning_rate.
    "optim.schedule": Key("cosine", choice("cosine", "linear", "rsqrt", "constant")),
    "optim.warmup_steps": Key(100, at_least(0)),
    "optim.end_factor": Key(0.0, at_least(0)),
    # Scale gradients down to this global norm; 0: never.
    "optim.clip_norm": Key(1.0, at_least(0)),
    # Steps with a non-finite loss, gradient or parameter are skipped; more than this many in a row stop the run.
    "guard.skipped_in_a_row": Key(10, at_least(0)),
    # Collapse detection, active after max(warmup_steps, optim.warmup_steps). Below *_warn: log a warning. Below *_stop for
    # `patience` consecutive log lines: stop. 0 disables. The effective rank is 1 where all embeddings lie on one line. The
    # standard deviation of the whole vector is 0 where all embeddings are equal, 0.1 at a mean cosine of 0.99, and 1 where they
    # are evenly spread. (Untrained, the shipped recipes have 0.3 or more, and ranks near 100.)
    "guard.warmup_steps": Key(100, at_least(0)),
    "guard.patience": Key(3, at_least(1)),
    "guard.effective_rank_warn": Key(4.0, at_least(0)),
    "guard.effective_rank_stop": Key(2.0, at_least(0)),
    "guard.embedding_std_warn": Key(0.2, at_least(0)),
    "guard.embedding_std_stop": Key(0.1, at_least(0)),
    # If the temperature changes by more than these factors in one step: warn, stop.
    "guard.temperature_jump_warn": Key(1.1, above(1)),
    "guard.temperature_jump_stop": Key(1.5, above(1)),
    # Devices along each mesh axis; one of them may be -1: all that remain.
    "mesh.data": Key(-1, mesh_size()),
    "mesh.fsdp": Key(1, mesh_size()),
    "mesh.tensor": Key(1, mesh_size()),
    # Tasks to run every eval_every steps beside the query-key test: "sts=DIR,retrieval=DIR" (see evaluate --help).
    "eval.tasks": Key(""),
    # The query-key test: number of pairs, tokens per span, spans embedded at once, and the seed that chooses the spans.
    "eval.pairs": Key(1000, at_least(1)),
    "eval.span": Key(62, at_least(1)),
    "eval.batch_size": Key(200, at_least(1)),
    "eval.seed": Key(0, at_least(0)),
}


def default_config() -> ConfigDict:
    """Returns the complete configuration with its defaults, locked against new keys."""
    config = ConfigDict()
    for path, key in KEYS.items():
        section, _, name = path.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        # A placeholder is a reference: each config needs its own, or a value set in one would appear in all.
        default = placeholder(key.default) if isinstance(key.default, type) else key.default
        (config[section] if section else config)[name] = default
    return config.lock()


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The values of a nested config by their dotted path, {"optim.b1": 0.9, ...}."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def check(config: ConfigDict) -> None:
    """Checks each value of a complete config by the rule of its key.

    Raises:
      UserError: at the first value that breaks its rule; the message names the key, the value and the rule.
    """
    for path, value in flat(config).items():
        rule = KEYS[path].rule
        if not rule.holds(value):
            raise UserError(f"config.{path}={value!r}: {rule.text}")


def to_json(config: ConfigDict) -> str:
    """The config as JSON with sorted keys: equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def load_run_config(workdir: epath.PathLike) -> ConfigDict:
    """The config of a run, config.json in its workdir, laid over today's defaults.

    A key that the run did not have yet takes its default. A key that no longer exists is named in a warning and left out. A run
    from before `model.max_length` had a learned position table as long as its rows.

    Args:
      workdir: the folder of a training run.

    Raises:
      UserError: there is no config.json, or it is not a config.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir}: no config.json there; give the workdir of a training run, or hf:FOLDER")
    try:
        stored = flat(ConfigDict(json.loads(path.read_text())))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config of a run ({error})") from error
    config = default_config()
    if "model.max_length" not in stored and stored.get("model.position") == "learned":
        stored["model.max_length"] = stored["data.length"]
    unknown = sorted(stored.keys() - KEYS.keys())
    if unknown:
        logging.warning("%s: keys that this version does not know are ignored: %s", path, ", ".join(unknown))
    for name in stored.keys() & KEYS.keys():
        try:
            config.update_from_flattened_dict({name: tuples(stored[name])})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: config.{name}={stored[name]!r}: {error}") from error
    return config


def tuples(value: Any) -> Any:
    """Lists, which is what JSON makes of tuples, as tuples again, at every depth."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
