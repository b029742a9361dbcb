"""Losses: every kind, wherever it is computed and however embeddings are made, equals the plain dense one."""

import types

import dense
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from objectives.composition import (
    COVER,
    TABLE,
    TEMPERATURE,
    B,
    E,
    check_composition,
    composition_config,
    distance,
    embeddings,
    encode,
    ids,
    make,
    mesh_of,
    objective_config,
    rows_of,
    small_encoder,
)

from contrastive_jax.config import UserError, default_config
from contrastive_jax.objectives import exchange, pairs, registry
from contrastive_jax.objectives.dense import info_nce
from contrastive_jax.objectives.losses import LOSSES
from contrastive_jax.objectives.objective import Given, PairIds
from contrastive_jax.runtime import sharding

# --- by hand ---------------------------------------------------------------------------------------------------------------


def test_two_pairs_worked_by_hand() -> None:
    """Similarities [[0.8, -0.6], [0.6, 0.8]] at temperature 0.5: logits 1.6, -1.2 and 1.2, 1.6."""
    z = jnp.array([[[1.0, 0.0], [0.8, 0.6]], [[0.0, 1.0], [-0.6, 0.8]]])
    by_hand = np.mean(
        [
            np.log(1 + np.exp(-1.2 - 1.6)),  # anchor 0 among positives 0 and 1
            np.log(1 + np.exp(1.2 - 1.6)),  # anchor 1
            np.log(1 + np.exp(1.2 - 1.6)),  # positive 0 among anchors 0 and 1
            np.log(1 + np.exp(-1.2 - 1.6)),  # positive 1
        ]
    )
    np.testing.assert_allclose(info_nce(z[:, 0], z[:, 1], temperature=0.5), by_hand, rtol=1e-6)
    objective = pairs.make_objective(objective_config(temperature=0.5), 2, 2)
    host = PairIds(jnp.arange(2), jnp.arange(4).reshape(2, 2))
    np.testing.assert_allclose(objective.loss(z, host, objective.init(jax.random.key(0)))[0], by_hand, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_objective_equals_the_public_info_nce(symmetric: bool) -> None:
    config = objective_config(symmetric=symmetric, mask_same_document=False, mask_duplicates=False, temperature=0.07)
    objective, z = make(config), embeddings(2)
    params = objective.init(jax.random.key(0))
    got = jax.value_and_grad(lambda z: objective.loss(z, ids(2), params)[0])(z)
    plain = jax.value_and_grad(lambda z: info_nce(z[:, 0], z[:, 1], 0.07, symmetric))(z)
    np.testing.assert_allclose(got[0], plain[0], rtol=1e-6)
    # info_nce normalises its input, whose gradient then has no part along z.
    along = got[1] - (got[1] * z).sum(-1, keepdims=True) * z
    assert distance(along, plain[1]) < 1e-5


def test_info_nce_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"anchors \(3, 4\) and positives \(2, 4\)"):
        info_nce(jnp.zeros((3, 4)), jnp.zeros((2, 4)))


# --- the composition table -----------------------------------------------------------------------------------------------


def name_of(case: tuple) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", COVER, ids=name_of)
def test_composition(case: tuple) -> None:
    check_composition(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=name_of)
def test_composition_whole(case: tuple) -> None:
    check_composition(*case)


def test_the_logits_of_the_table_are_large() -> None:
    z = encode(small_encoder()[1], rows_of(2))
    logits = z[:, 0] @ z[:, 1].T / TEMPERATURE
    assert logits.max() > 150 and logits.min() < -100


# --- options ---------------------------------------------------------------------------------------------------------------


def compare(
    config: ConfigDict,
    views: int,
    value: float = 1e-6,
    gradient: float = 1e-5,
    devices: int = 4,
    host: PairIds | None = None,
) -> None:
    z, mesh, host = embeddings(views), mesh_of(devices), host or ids(views)
    spread = make(config, views, mesh)
    params = spread.init(jax.random.key(0))
    z_spread, ids_spread = sharding.to_global((np.asarray(z), host), np.arange(B), B, mesh)
    got = jax.jit(jax.value_and_grad(lambda z, p: spread.loss(z, ids_spread, p)[0], argnums=(0, 1)))(z_spread, params)
    plain = jax.jit(jax.value_and_grad(lambda z, p: dense.loss(config, z, host, p), argnums=(0, 1)))(z, params)
    assert distance(got[0], plain[0]) < value
    far = jax.tree.map(distance, got[1], plain[1])
    assert max(jax.tree.leaves(far)) < gradient, far


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({"symmetric": False, "where": "ring"}, 2),
        ({"label_smoothing": 0.1, "where": "ring"}, 2),
        ({"label_smoothing": 0.1, "symmetric": False}, 2),
        ({"where": "ring"}, 4),  # three positives
        ({"mask_margin": 0.05, "where": "ring"}, 2),
        ({"name": "siglip", "mask_margin": 0.1}, 3),
        ({"block": 1000, "temperature": 0.07}, 2),
    ],
)
def test_option_equals_the_dense_loss(changes: dict, views: int) -> None:
    compare(objective_config(**changes), views)


@pytest.mark.parametrize("masked", [True, False])
def test_pairs_of_a_source_without_in_batch_negatives_have_their_own_hard_ones_alone(masked: bool) -> None:
    source = np.arange(B) % 3  # two sources without, and one with
    host = ids(4)
    host = host._replace(
        document=np.where(source < 2, -3 - source, host.document).astype(np.int32), label=np.zeros(B, np.float32)
    )
    config = objective_config(
        where="ring", hard_negatives=2, mask_same_document=masked, mask_duplicates=masked, symmetric=False
    )
    compare(config, 4, host=host)
    z, params = embeddings(4), make(config, 4).init(jax.random.key(0))
    alone = host._replace(document=np.full(B, -3, np.int32))
    logits = jnp.einsum("be,bke->bk", z[:, 0], z[:, 1:]) / TEMPERATURE
    config.mask_duplicates = False
    value = make(config, 4).loss(z, alone, params)[0]
    np.testing.assert_allclose(value, -jax.nn.log_softmax(logits)[:, 0].mean(), rtol=1e-5)


def test_two_positives_and_a_hard_negative() -> None:
    compare(objective_config(where="gathered", name="dcl", hard_negatives=1), 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_embeddings(loss: str) -> None:
    """Unit vectors rounded to 8 bits: at temperature 0.07 the loss moves by less than 1 %, its gradients by less than 3 %."""
    compare(objective_config(name=loss, dtype="bfloat16", where="ring", temperature=0.07, bias=-3.0), 2, 0.01, 0.03)


def test_mesh_with_a_tensor_axis() -> None:
    config = default_config().mesh
    config.update(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(config)
    z, ids_spread = sharding.to_global((np.asarray(embeddings(2)), ids(2)), np.arange(B), B, mesh)
    objective = make(objective_config(where="ring"), 2, mesh)
    params = objective.init(jax.random.key(0))
    got = jax.jit(lambda z, p: objective.loss(z, ids_spread, p)[0])(z, params)
    np.testing.assert_allclose(got, dense.loss(objective_config(), embeddings(2), ids(2), params), rtol=1e-6)


def test_gradient_equals_differences_of_the_dense_loss() -> None:
    """The reference itself, against float64 differences."""
    config, host = objective_config(temperature=0.05), ids(2)
    params = make(config).init(jax.random.key(0))
    gradient = jax.grad(lambda z: dense.loss(config, z, host, params))(embeddings(2))
    with jax.enable_x64(True):
        z, wide = np.asarray(embeddings(2), np.float64), {"log_temperature": jnp.asarray(np.log(0.05), jnp.float64)}
        for place in [(0, 0, 0), (3, 1, 4), (23, 0, 9), (11, 1, 2)]:
            step = np.zeros(z.shape)
            step[place] = 1e-6
            high, low = (dense.loss(config, jnp.asarray(z + sign * step), host, wide) for sign in (1, -1))
            np.testing.assert_allclose(gradient[place], (high - low) / 2e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 4), (16, 16), (3, 4), (2, 2, 4), (4, 4, 8), (8,), (2,), (1,)])
@pytest.mark.parametrize("tensor", [1, 2])
def test_ring_goes_from_neighbour_to_neighbour(sizes: tuple[int, ...], tensor: int) -> None:
    """On a grid of chips, also where a tensor axis takes a dimension of its own."""
    chips = np.empty((*sizes, tensor), object)
    for place in np.ndindex(chips.shape):
        chips[place] = types.SimpleNamespace(coords=place, core_on_chip=0)
    shape = {"data": chips.size // tensor, "fsdp": 1, "tensor": tensor}
    mesh = types.SimpleNamespace(axis_names=sharding.AXES, shape=shape, devices=chips.reshape(tuple(shape.values())))
    (order,) = exchange.make_ring(mesh, ("data", "fsdp")).slices
    assert sorted(order) == list(range(chips.size // tensor))
    places = np.array([mesh.devices[i, 0, 0].coords for i in order])
    steps = np.abs(places - np.roll(places, -1, axis=0)).sum(1)
    # A line alone closes over its wrap-around link.
    assert (steps <= 1).all() if len(sizes) > 1 else (steps[:-1] <= 1).all()


def test_ring_without_a_grid_keeps_the_order() -> None:
    assert exchange.make_ring(mesh_of(8), sharding.BATCH_AXES).slices == [list(range(8))]


# --- several slices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_slices(monkeypatch: pytest.MonkeyPatch) -> jax.sharding.Mesh:
    """Two slices of four devices each; the devices of the one have the even numbers."""
    monkeypatch.setattr(type(jax.devices()[0]), "slice_index", property(lambda device: device.id % 2), raising=False)
    config = default_config().mesh
    config.fsdp = 2
    return sharding.make_mesh(config)


def test_shards_of_a_slice_lie_together(two_slices: jax.sharding.Mesh) -> None:
    assert [device.id % 2 for device in two_slices.devices.flat] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert dict(two_slices.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert exchange.make_ring(two_slices, sharding.BATCH_AXES).slices == [[0, 1, 2, 3], [4, 5, 6, 7]]
    config = default_config().mesh
    config.update(data=1, fsdp=8)
    with pytest.raises(UserError, match="the data axis, of size 1, must be a multiple of the 2 slices"):
        sharding.make_mesh(config)


@pytest.mark.parametrize("where", ["gathered", "ring"])
@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_slices_give_the_dense_loss(loss: str, where: str, two_slices: jax.sharding.Mesh) -> None:
    config = composition_config(loss, where, 0, "whole", "masked")
    z, host = embeddings(2), ids(2)
    objective = make(config, mesh=two_slices)
    params = objective.init(jax.random.key(0))
    got = jax.jit(jax.value_and_grad(lambda z, params: objective.loss(z, host, params)[0], (0, 1)))(z, params)
    plain = jax.value_and_grad(lambda z, params: dense.loss(config, z, host, params), (0, 1))(z, params)
    np.testing.assert_allclose(got[0], plain[0], rtol=1e-6)
    assert max(map(distance, jax.tree.leaves(got[1]), jax.tree.leaves(plain[1]))) < 1e-5


@pytest.mark.parametrize("slices", [2, 4])
def test_a_block_crosses_to_each_other_slice_once(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one ring over all devices each block would cross at every hop: counted in the traced program."""
    monkeypatch.setattr(type(jax.devices()[0]), "slice_index", property(lambda device: device.id % slices), raising=False)
    mesh = sharding.make_mesh(default_config().mesh)
    ring = exchange.make_ring(mesh, sharding.BATCH_AXES)
    slice_of = {shard: number for number, shards in enumerate(ring.slices) for shard in shards}

    def count(jaxpr: jax.extend.core.Jaxpr, times: int = 1) -> int:
        """How often an array of the keys' size is sent to another slice."""
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "ppermute" and equation.invars[0].aval.shape == (3, E):
                crosses = [slice_of[a] != slice_of[b] for a, b in equation.params["perm"]]
                assert all(crosses) or not any(crosses)
                total += times * crosses[0]
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += count(inner, times * equation.params.get("length", 1))
        return total

    config = objective_config(where="ring", symmetric=False)
    objective = make(config, mesh=mesh)
    params, host = objective.init(jax.random.key(0)), ids(2)
    assert count(jax.make_jaxpr(lambda z: objective.loss(z, host, params)[0])(embeddings(2)).jaxpr) == slices - 1


# --- masking ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gathered", "ring"])
@pytest.mark.parametrize("loss", LOSSES)
def test_planted_duplicates_change_nothing(loss: str, where: str) -> None:
    """Documents that come again, with the same spans: loss and gradient are those of the batch without them."""
    config = objective_config(name=loss, where=where, temperature=0.05)
    z, rng = embeddings(2), np.random.default_rng(0)
    text = rng.permutation(1000)[: 2 * B].reshape(B, 2).astype(np.int32)
    doc, again = np.arange(B, dtype=np.int32), rng.integers(0, B, 16)
    order = rng.permutation(B + 16)
    planted = [np.concatenate([x, x[again]])[order] for x in (np.asarray(z), doc, text)]
    mesh = mesh_of(8)
    z_spread, *spread = sharding.to_global(planted, np.arange(B + 16), B + 16, mesh)
    single, many = make(config), make(config, 2, mesh)
    params = single.init(jax.random.key(0))
    expected = jax.value_and_grad(lambda z: single.loss(z, PairIds(doc, text), params)[0])(z)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(lambda z: many.loss(z, PairIds(*spread), params), has_aux=True))(
        z_spread
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    home = np.concatenate([np.arange(B), again])[order]
    collected = np.zeros_like(z)
    np.add.at(collected, home, np.asarray(gradient))
    assert distance(collected, expected[1]) < 1e-5
    np.testing.assert_allclose(metrics["dropped_share"], 16 / (B + 16), rtol=1e-6)


def test_masked_share_counts_what_is_masked() -> None:
    doc = np.repeat(np.arange(B // 2), 2).astype(np.int32)
    for mask, views in ((True, 2), (False, 2), (True, 3)):  # two positives: each row's twin has as many
        objective = make(objective_config(mask_same_document=mask), views)
        given = PairIds(doc, np.arange(views * B, dtype=np.int32).reshape(B, views))
        _, metrics = objective.loss(embeddings(views), given, objective.init(jax.random.key(0)))
        np.testing.assert_allclose(metrics["masked_share"], mask / (B - 1), atol=1e-6)
        assert metrics["dropped_share"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_without_negatives_are_harmless(loss: str) -> None:
    objective = make(objective_config(name=loss))
    params, host = objective.init(jax.random.key(0)), PairIds(np.zeros(B, np.int32), ids(2).span_hash)
    value, gradient = jax.value_and_grad(lambda z: objective.loss(z, host, params)[0])(embeddings(2))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if loss in ("infonce", "dcl"):
        assert value == 0 and not gradient.any()


# --- memory ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["joint, changed", "sums"])
def test_temporaries_grow_linearly_with_the_batch(name: str) -> None:
    """Also with all that a tile does; and those of losses that are sums over the rows alone."""
    config, mesh = default_config(), mesh_of(8)
    config.objective = composition_config("joint, changed", "ring", 1, "whole", "masked")
    config.memory.kind, config.data.sampler, config.data.hard_negatives = "frozen", "fields", 1
    if name == "sums":
        config.objective.update(weight=0.0, extra=tuple((extra, 1.0) for extra in registry.EXTRA))
    objective = registry.make_objective(config, 3, E, mesh, sharding.BATCH_AXES)
    params = objective.init(jax.random.key(0))

    def megabytes(b: int) -> float:
        rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        shapes = {"z": (b, 3, E), "guide": (b, 3, E), "scores": (b, 2), "document": (b,), "span_hash": (b, 3)}
        types = {name: jnp.int32 if name in ("document", "span_hash") else jnp.float32 for name in shapes}
        structs = {name: jax.ShapeDtypeStruct(shape, types[name], sharding=rows) for name, shape in shapes.items()}

        def loss(z: jax.Array, guide: jax.Array, scores: jax.Array, document: jax.Array, span_hash: jax.Array) -> jax.Array:
            return objective.loss(z, PairIds(document, span_hash, scores=scores), params, Given(guide))[0]

        program = jax.jit(jax.value_and_grad(loss)).lower(*structs.values()).compile()
        return program.memory_analysis().temp_size_in_bytes / 1e6

    small, large = megabytes(2048), megabytes(8192)
    assert large < 4.2 * small, (small, large)


# --- the rest --------------------------------------------------------------------------------------------------------------


def test_flatnce_has_the_gradient_of_dcl() -> None:
    z, host = embeddings(2), ids(2)

    def gradient(name: str) -> tuple:
        objective = make(objective_config(name=name))
        return jax.value_and_grad(lambda z: objective.loss(z, host, objective.init(jax.random.key(0)))[0])(z)

    (one, flat), (_, decoupled) = gradient("flatnce"), gradient("dcl")
    np.testing.assert_allclose(one, 1, rtol=1e-6)
    assert distance(flat, decoupled) < 1e-6


def test_temperature_is_held_in_its_range_and_can_be_frozen() -> None:
    objective = make(objective_config(temperature=0.02, temperature_min=0.01, temperature_max=0.05))
    for value, held in ((0.001, 0.01), (0.03, 0.03), (0.9, 0.05)):
        params = objective.project({"log_temperature": jnp.log(value)}, {})
        np.testing.assert_allclose(jnp.exp(params["log_temperature"]), held, rtol=1e-5)
    frozen = make(objective_config(temperature_trainable=False))
    gradient = jax.grad(lambda p: frozen.loss(embeddings(2), ids(2), p)[0])(frozen.init(jax.random.key(0)))
    assert gradient["log_temperature"] == 0


def test_in_batch_metrics() -> None:
    z = jnp.stack([jnp.eye(4), jnp.eye(4)[jnp.array([0, 1, 3, 2])]], axis=1)
    objective = pairs.make_objective(objective_config(), 2, 4)
    host = PairIds(jnp.arange(4), jnp.arange(8).reshape(4, 2))
    _, metrics = objective.loss(z, host, objective.init(jax.random.key(0)))
    assert metrics["in_batch_top1"] == 0.5
    assert metrics["positive_similarity"] == 0.5
    np.testing.assert_allclose(metrics["negative_similarity"], 2 / 12, rtol=1e-6)


def test_matryoshka_reports_each_prefix() -> None:
    objective = make(objective_config(matryoshka=((4, 1.0), (8, 1.0), (E, 2.0)), temperature=0.05))
    value, metrics = objective.loss(embeddings(2), ids(2), objective.init(jax.random.key(0)))
    by_size = [metrics[f"loss_{size}"] for size in (4, 8, E)]
    np.testing.assert_allclose(value, (by_size[0] + by_size[1] + 2 * by_size[2]) / 4, rtol=1e-6)
    assert metrics["in_batch_top1"] == metrics[f"in_batch_top1_{E}"] != metrics["in_batch_top1_4"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"temperature": 2.0}, "temperature"),
        ({"label_smoothing": 0.1, "name": "dcl"}, "label_smoothing"),
        ({"matryoshka": ((E + 1, 1.0),)}, "matryoshka"),
        ({"matryoshka": ((E, 0.0),)}, "matryoshka"),
        ({"joint": ("query_query",)}, "joint"),
        ({"joint": ("query_query",), "symmetric": False, "name": "dcl"}, "joint"),
        ({"hardness_own": 1.0}, "hardness_own"),
        ({"mask_guide": True}, "mask_guide: set config.objective.mask_margin"),
        ({"mask_relative": True}, "mask_relative: set config.objective.mask_margin"),
        ({"mask_guide": True, "mask_margin": 0.0, "pairing": "all", "context": 3}, "mask_guide: needs"),
    ],
)
def test_values_that_do_not_go_together_name_the_key(changes: dict, key: str) -> None:
    with pytest.raises(UserError, match=f"config.objective.{key}"):
        make(objective_config(**changes))


def test_more_hard_negatives_than_views_are_refused() -> None:
    with pytest.raises(UserError, match="hard_negatives=1: of the 2 views"):
        make(objective_config(hard_negatives=1))
