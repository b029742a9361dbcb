"""Every key of config/keys.py with wrong types and values out of range, and combinations that cannot be."""

import json
import pathlib

import pytest
from conftest import command, recipe, refusal, shrink, write_dataset
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax.config import default_config
from contrastive_jax.training import loop


def leaves(config: ConfigDict, prefix: str = "config") -> list[tuple[str, object]]:
    found = []
    for key, value in config.items():
        found += leaves(value, f"{prefix}.{key}") if isinstance(value, ConfigDict) else [(f"{prefix}.{key}", value)]
    return found


WRONG = {
    bool: ["maybe", "2"],
    int: ["x", "1.5", "-3", "0", "[1]"],
    float: ["x", "-1.0", "nan", "inf", "[1]"],
    str: ["nonsense", ""],
    tuple: ["x", "3", "[1]", "[(1,)]", "[('a', 'b')]", "[('a', float('nan'))]"],
    type(None): ["x", "nan"],
}
# What is right all the same.
MAY_BE_ZERO = (
    "seed eval_every checkpoint_every micro_batch micro_batch_tokens data.min_gap data.max_gap data.min_separation "
    "model.num_layers model.latent model.local_window model.embedding_dim objective.context objective.locals "
    "data.hard_negatives data.query_length "
    "tokens.positions optim.warmup_steps guard.skipped_in_a_row guard.warmup_steps eval.seed"
).split()
RIGHT = {(f"config.{key}", "0") for key in MAY_BE_ZERO} | {("config.objective.bias", "-1.0")}
MAY_BE_EMPTY = (
    "init_from keep_best eval.tasks tracker model.pool_tanh tokens.name memory.kind memory.source "
    "data.cache_dir data.one_source data.join"
).split()
RIGHT |= {(f"config.{key}", "") for key in MAY_BE_EMPTY}
RIGHT |= {("config.data.cache_dir", "nonsense")}  # the name of a folder
RIGHT |= {(f"config.{key}", size) for key in ("heads.projector", "heads.predictor", "labels.classes") for size in ("[1]", "3")}
RIGHT |= {("config.noise.views", "[1]")}


@pytest.mark.parametrize(("key", "value"), leaves(default_config()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_value_is_named(
    key: str,
    value: object,
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("accepted"))
    for wrong in WRONG[type(value)]:
        if (key, wrong) not in RIGHT:
            line = refusal(command(dataset, tmp_path, "--config.eval_every=5", f"--{key}={wrong}"), monkeypatch, capsys)
            assert key.rpartition(".")[2] in line, line


IMPOSSIBLE = [
    # The shrunk debug recipe, 16 pairs on 8 devices, with one or two values that do not go together; what the line says.
    ("data.batch_size=15", "config.data.batch_size=15 must be a multiple of mesh.data × mesh.fsdp × data.pack_pairs = 8"),
    ("mesh.data=3", "config.mesh.data=3, config.mesh.fsdp=1, config.mesh.tensor=1: must multiply to the 8 devices"),
    ("mesh.data=-1 mesh.fsdp=-1", "at most one"),
    ("mesh.tensor=8", "over config.mesh.tensor=8"),
    ("mesh.fsdp=8 model.d_model=20", "over config.mesh.fsdp=8"),
    ("data.max_span=100", "config.data.length=24: config.data.max_span=100 needs 102"),
    ("data.min_span=20 data.max_span=10", "config.data.min_span=20: must not be above config.data.max_span=10"),
    (
        "data.min_span=60 data.max_span=60 data.length=62",
        "no record has the 120 tokens that config.data.sampler='neighbours' needs (longest: 96)",
    ),
    ("data.max_gap=60", "config.data.max_gap=60 need records of 100 tokens, but those of config.data.dir have at most 96"),
    ("data.weights=[('C',1.0)]", "config.data.weights: no domain 'C'; there are a, b"),
    ("data.pack_pairs=3 data.pack_rows=2", "data.pack_pairs"),
    ("data.pack_pairs=2 data.pack_rows=3", "config.data.pack_rows=3: must not be above config.data.pack_pairs=2"),
    ("data.pack_pairs=16", "config.data.pack_rows=1: 16 spans of at least 8 tokens (with delimiters) need more rows"),
    ("eval.span=40", "config.data.length=24: config.eval.span=40 needs 42"),
    ("micro_batch=8 micro_batch_tokens=4096", "config.micro_batch=8, config.micro_batch_tokens=4096"),
    ("micro_batch=12", "config.micro_batch=12 must be a multiple"),
    ("micro_batch=32", "config.micro_batch=32 is more than config.data.batch_size=16"),
    ("micro_batch_tokens=10", "config.micro_batch_tokens=10"),
    ("objective.weight=0.0", "config.objective.weight=0: there is no token loss either"),
    ("tokens.name=mlm", "config.tokens.name='mlm' predicts what noise has picked; set config.noise.ops"),
    ("noise.ops=[('musk',0.1)]", "config.noise.ops: no operation 'musk'; there are mask, replace"),
    ("memory.kind=queue", "config.memory.kind='queue': needs config.objective.symmetric=False"),
    ("objective.name=siglip objective.label_smoothing=0.1", "config.objective.label_smoothing=0.1"),
    ("objective.matryoshka=[(64,1.0)]", "config.objective.matryoshka"),
    (
        "objective.name=cosent objective.matryoshka=[(8,1.0)]",
        "config.objective.matryoshka: config.objective.name='cosent' is no loss over pairs",
    ),
    (
        "objective.weight=0.0 objective.extra=(('spread_mean',1.0),) objective.matryoshka=[(8,1.0)]",
        "config.objective.matryoshka: config.objective.weight=0",
    ),
    ("data.views=3 data.hard_negatives=1", "config.data.hard_negatives=1: no span of a document is one"),
    ("noise.ops=[('mask',15.0)]", "config.noise.ops: 'mask' has a share of 15.0, and needs one in [0, 1]"),
    (
        "tokens.name=bilm model.mixer=lstm model.position=none model.mlp=none model.norm=affine model.ngrams=((2,128),)",
        "config.tokens.name='bilm': each half of a state must know one direction alone; set config.model.ngrams=()",
    ),
    (
        "objective.where=ring mesh.tensor=8 model.num_heads=8 model.num_kv_heads=8",
        "config.objective.where='ring': the batch is on one device",
    ),
    (
        "objective.joint=('query_query',)",
        "config.objective.joint=('query_query',): is one softmax over several directions; set",
    ),
    ("objective.joint=('queries',)", "config.objective.joint=('queries',): choose any of document_query, query_query"),
    ("objective.hardness_own=5.0", "config.objective.hardness_own=5.0: set config.data.hard_negatives"),
    ("objective.mask_guide=True objective.mask_margin=0.0", "'mask_guide' needs a target; set config.memory.kind='frozen'"),
    ("objective.extra=(('gor',1.0),)", "config.objective.extra: no loss 'gor'; there are similarity, embedding, margin_mse"),
    ("objective.name=kl", "config.objective: 'kl' compares the documents of a pair by a teacher's scores; set"),
    ("objective.temperature=0.005", "config.objective.temperature=0.005 must lie in"),
    ("model.num_kv_heads=3", "config.model.num_kv_heads=3 must divide config.model.num_heads=4"),
    ("model.head_dim=5", "config.model.head_dim=5"),
    ("model.position=learned model.max_length=16", "config.data.length needs a table of 24 learned positions"),
    (
        "model.position=learned model.max_length=16 data.pack_pairs=2 data.pack_rows=2",
        "config.data.max_span needs a table of 22 learned positions",
    ),
    ("optim.warmup_steps=4", "config.optim.warmup_steps=4 must be in [0, config.steps=4)"),
    ("optim.learning_rate_rules=[('embedding',1.0)]", "config.optim.learning_rate_rules: no pattern matches"),
    ("optim.weight_decay_rules=[('(',1.0)]", "config.optim.weight_decay_rules"),
    ("guard.effective_rank_stop=9.0", "config.guard.effective_rank_stop=9.0"),
]


@pytest.mark.parametrize(("values", "words"), IMPOSSIBLE, ids=[values for values, _ in IMPOSSIBLE])
def test_values_that_do_not_go_together(
    values: str,
    words: str,
    dataset: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("accepted"))
    given = [f"--config.{value}" for value in values.split()]
    assert words in refusal(command(dataset, tmp_path, "--config.eval_every=5", *given), monkeypatch, capsys)


@pytest.mark.slow
def test_a_checkpoint_of_another_vocabulary_is_refused(
    dataset: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = shrink(recipe("debug"), dataset)
    config.steps = 1
    config.optim.warmup_steps = 0
    loop.train(loop.set_up(config, epath.Path(tmp_path / "run")), 1)
    other = write_dataset(tmp_path / "other", {"train": [90] * 40, "validation": [90] * 40}, seed=1)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 640}))
    line = refusal(command(other, tmp_path / "run"), monkeypatch, capsys)
    assert "holds other data than this run had; restore it, or say --other_data" in line
    line = refusal(command(other, tmp_path / "run", "--other_data"), monkeypatch, capsys)
    assert "does not fit this config: params/encoder" in line and "float32[384,16] there, float32[640,16] here" in line
