"""Packing: spans that share rows keep their tokens, embeddings, loss and gradients."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import recipe, shrink

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import packing, pipeline, prepared
from contrastive_jax.data.batch import Batch
from contrastive_jax.models import encoder
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

PAIRS, ROWS, LENGTH = 8, 5, 24


def plain_first_fit(sizes: list[int], rows: int, length: int) -> list[tuple[int, int]] | None:
    free, positions = [length] * rows, {}
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r in range(rows) if free[r] >= sizes[i]), None)
        if row is None:
            return None
        positions[i] = (row, length - free[row])
        free[row] -= sizes[i]
    return [positions[i] for i in range(len(sizes))]


def test_first_fit_and_what_does_not_fit() -> None:
    size = np.random.default_rng(0).integers(3, LENGTH + 1, (400, PAIRS)).astype(np.int32)
    (row, start), fits = packing.first_fit(size, ROWS, LENGTH)
    expected = [plain_first_fit(sizes.tolist(), ROWS, LENGTH) for sizes in size]
    assert fits.tolist() == [positions is not None for positions in expected]
    assert 0.1 < fits.mean() < 0.9
    for i in np.flatnonzero(fits):
        assert list(zip(row[i].tolist(), start[i].tolist(), strict=True)) == expected[i]
    for sizes, cut in zip(size[~fits], packing.shorten(size[~fits], ROWS, LENGTH), strict=True):
        longest = cut.max()
        np.testing.assert_array_equal(cut, np.minimum(sizes, longest))  # only the longest are cut, all to one length
        assert plain_first_fit(cut.tolist(), ROWS, LENGTH) is not None
        assert longest >= LENGTH // 2 and plain_first_fit(np.minimum(sizes, longest + 1).tolist(), ROWS, LENGTH) is None


def test_groups_do_not_depend_on_each_other() -> None:
    size = np.random.default_rng(1).integers(3, LENGTH + 1, (6 * PAIRS, 2)).astype(np.int32)
    whole, positions = packing.fit(size, PAIRS, ROWS, LENGTH)
    assert (whole < size).any() and (whole[:PAIRS] == size[:PAIRS]).any()
    parts = [packing.fit(part, PAIRS, ROWS, LENGTH) for part in np.split(size, 6)]
    np.testing.assert_array_equal(np.concatenate([sizes for sizes, _ in parts]), whole)
    for name in ("row", "start"):
        joined = np.concatenate([getattr(part, name) for _, part in parts])
        np.testing.assert_array_equal(joined, getattr(positions, name))


def unpack(batch: Batch, pairs: int) -> Batch:
    """The same spans, one per row."""
    b, (_, views, _, length) = len(batch.document), batch.tokens.shape
    tokens, segment = np.zeros((2, b, views, 1, length), np.int32)
    for pair in range(b):
        for view in range(views):
            on_span = batch.segment[pair // pairs, view] == pair % pairs + 1
            size = on_span.sum()
            assert size and on_span.any(1).sum() == 1  # somewhere, and in one row
            assert np.ptp(np.flatnonzero(on_span)) == size - 1  # in one piece
            tokens[pair, view, 0, :size] = batch.tokens[pair // pairs, view][on_span]
            segment[pair, view, 0, :size] = 1
    return batch._replace(tokens=tokens, segment=segment)


@pytest.mark.parametrize("rows", [8, 5])
def test_packed_batches_hold_the_same_spans(rows: int, dataset: pathlib.Path) -> None:
    config = default_config().data
    config.update(batch_size=48, length=LENGTH, min_span=6, max_span=20, max_gap=5)
    records = prepared.open_split(dataset, "train")
    plain = next(pipeline.batches(records, config, 3))
    config.update(pack_pairs=PAIRS, pack_rows=rows)
    packed = next(pipeline.batches(records, config, 3))
    assert packed.tokens.shape == (48 // PAIRS, 2, rows, LENGTH)
    assert (packed.tokens[packed.segment == 0] == 0).all()
    got = unpack(packed, PAIRS)
    np.testing.assert_array_equal(got.document, plain.document)
    same = (got.tokens == plain.tokens).all(-1)
    assert same.all() if rows == PAIRS else 0.3 < same.mean() < 1
    for short, whole in zip(got.tokens[~same], plain.tokens[~same], strict=True):
        size = (short > 0).sum()
        assert short[size - 1] == whole[(whole > 0).sum() - 1]  # the closing delimiter, after fewer tokens
        np.testing.assert_array_equal(short[: size - 1], whole[: size - 1])


MODELS = {
    "mean": {"pooling": "mean", "position": "rotary", "attention": "plain"},
    "eos": {"pooling": "eos", "position": "learned", "attention": "fused", "causal": True},
    "cls": {"pooling": "cls", "position": "rotary", "attention": "plain", "local_window": 3, "global_every": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_embeddings_and_gradients_equal_unpacked(name: str, dataset: pathlib.Path) -> None:
    config = shrink(recipe("debug"), dataset)
    config.model.update(MODELS[name], max_length=LENGTH)
    config.data.update(pack_pairs=PAIRS, pack_rows=ROWS)
    packed = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    model = encoder.make_encoder(config.model, 256)
    params = jax.jit(model.init)(jax.random.key(0))

    def value_and_gradient(batch: Batch, shape: tuple[int, int]) -> tuple:
        def value(params: dict) -> tuple[jax.Array, jax.Array]:
            tokens, segment = (jnp.asarray(x[:, 0].reshape(-1, x.shape[-1])) for x in (batch.tokens, batch.segment))
            z = model.apply(params, tokens, segment, packing=shape)
            return jnp.sin(3 * z).sum(), z

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    (_, z), gradient = value_and_gradient(packed, (PAIRS, ROWS))
    (_, expected), reference = value_and_gradient(unpack(packed, PAIRS), (1, 1))
    np.testing.assert_allclose(z, expected, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(float(jnp.abs(b).max()), 1)), gradient, reference
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_packed_step_equals_unpacked(devices: int, dataset: pathlib.Path) -> None:
    config = shrink(recipe("debug"), dataset)
    config.data.update(batch_size=64, pack_pairs=PAIRS, pack_rows=ROWS)
    config.micro_batch, config.optim.warmup_steps, config.model.dropout = 32, 0, 0.0
    config.mesh.update(data=-1, fsdp=min(devices, 2), tensor=min(devices, 2))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    rows = np.arange(64)
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    results = []
    for pairs, rows_, batch in ((PAIRS, ROWS, host), (1, 1, unpack(host, PAIRS))):
        config.data.update(pack_pairs=pairs, pack_rows=rows_)
        run = build.build(config, mesh, 256)
        state, metrics, z = run.train_step(run.init(), sharding.to_global(batch, rows, 64, mesh))
        results.append((jax.device_get(z), jax.device_get(metrics), jax.device_get(state.params)))
    (z, metrics, params), (expected, reference, after) = results
    np.testing.assert_allclose(z, expected, atol=1e-6)
    for name in ("loss", "gradient_norm", "tokens"):
        np.testing.assert_allclose(metrics[name], reference[name], rtol=1e-5)
    moved = config.optim.learning_rate  # what Adam's first step moves every parameter by, whatever its gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02 * moved), params, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_pairs": 2, "pack_rows": 3}, "pack_rows=3: must not be above config.data.pack_pairs=2"),
        ({"pack_pairs": 5, "pack_rows": 2}, "pack_pairs=5: must divide config.data.batch_size=48"),
        ({"pack_pairs": 16, "pack_rows": 2}, "pack_rows=2: 16 spans of at least 9 tokens .* raise it"),
    ],
)
def test_impossible_packings_name_the_key(dataset: pathlib.Path, changes: dict, message: str) -> None:
    config = default_config().data
    config.update(batch_size=48, length=32, min_span=7, max_span=13, **changes)
    with pytest.raises(UserError, match=message):
        pipeline.batches(prepared.open_split(dataset, "train"), config, 0)
