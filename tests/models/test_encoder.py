"""The encoder does what its config says, and equals a plain NumPy reference."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.models import encoder
from contrastive_jax.models.dropout import Noise, dropout

LENGTH, VOCAB = 11, 50


def model_config(**changes: object) -> ConfigDict:
    config = default_config().model
    config.update(num_layers=2, d_model=24, num_heads=4, num_kv_heads=4, head_dim=6, d_ff=40, init_std=0.3, max_length=LENGTH)
    config.update(changes)
    return config


def make_rows(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (5, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array([1, 3, 7, 10, 11])[:, None]
    return jnp.asarray(tokens), jnp.asarray(mask)


def make_jitted_encoder(config: ConfigDict) -> encoder.Encoder:
    model = encoder.make_encoder(config, VOCAB)
    return model._replace(apply=jax.jit(model.apply))


def make_model(config: ConfigDict, seed: int = 0) -> tuple[encoder.Encoder, dict]:
    model = make_jitted_encoder(config)
    # Drawn by NumPy, because XLA compiles a random generator for each shape. Norm scales and biases differ from 1 and 0.
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32), shapes)


# Of the first four keys, every pair of values of two keys occurs at least once.
SHAPES = [
    ("pre", "layernorm", "learned", False, "mean", "gelu"),
    ("pre", "rmsnorm", "rotary", True, "eos", "swiglu"),
    ("pre", "rmsnorm", "none", False, "cls", "geglu"),
    ("post", "rmsnorm", "learned", True, "mean", "swiglu"),
    ("post", "layernorm", "rotary", False, "mean", "geglu"),
    ("post", "layernorm", "none", True, "eos", "gelu"),
]


@pytest.mark.parametrize(("norm_position", "norm", "position", "causal", "pooling", "mlp"), SHAPES)
def test_padding_never_changes_an_embedding(
    norm_position: str, norm: str, position: str, causal: bool, pooling: str, mlp: str
) -> None:
    model, params = make_model(
        model_config(
            norm_position=norm_position, norm=norm, position=position, causal=causal, pooling=pooling, mlp=mlp, num_kv_heads=2
        )
    )
    tokens, mask = make_rows()
    z = model.apply(params, tokens, mask, None)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(z, model.apply(params, jnp.where(mask, tokens, 7), mask, None))
    short = model.apply(params, tokens[:3, :7], mask[:3, :7], None)
    np.testing.assert_allclose(z[:3], short, atol=2e-6)


def reference(params: dict, tokens: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Encodes one row without padding by a post- or pre-norm Transformer in float64 NumPy, with mean pooling."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["transformer"])

    def norm(x: np.ndarray, w: dict) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]

    x = p["embedding"][tokens] + p["position_embedding"][: len(tokens)]
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])

        def attention(x: np.ndarray, w: dict = block["attention"]) -> np.ndarray:
            q, k, v = (np.einsum("ld,dhk->hlk", x, w[n]["kernel"]) + w[n]["bias"][:, None] for n in ("query", "key", "value"))
            s = q @ k.transpose(0, 2, 1) / np.sqrt(config.head_dim)
            if config.causal:
                s = np.where(np.tril(np.ones(s.shape[1:], bool)), s, -np.inf)
            a = np.exp(s - s.max(-1, keepdims=True))
            return np.einsum("hlk,hkd->ld", a / a.sum(-1, keepdims=True) @ v, w["out"]["kernel"]) + w["out"]["bias"]

        def mlp(x: np.ndarray, w: dict = block["mlp"]) -> np.ndarray:
            y = x @ w["up"]["kernel"] + w["up"]["bias"]
            y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
            return y @ w["down"]["kernel"] + w["down"]["bias"]

        if config.norm_position == "pre":
            x = x + attention(norm(x, block["attention_norm"]))
            x = x + mlp(norm(x, block["mlp_norm"]))
        else:
            x = norm(x + attention(x), block["attention_norm"])
            x = norm(x + mlp(x), block["mlp_norm"])
    z = (norm(x, p["final_norm"]) if config.final_norm else x).mean(0)
    return z / np.linalg.norm(z)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_equals_a_plain_reference(norm_position: str, causal: bool) -> None:
    config = model_config(norm_position=norm_position, final_norm=norm_position == "pre", position="learned", causal=causal)
    model, params = make_model(config)
    tokens, mask = make_rows()
    z = model.apply(params, tokens, mask, None)
    for row, row_mask, vector in zip(np.asarray(tokens), np.asarray(mask), z, strict=True):
        np.testing.assert_allclose(vector, reference(params, row[row_mask], config), atol=3e-6)


def test_rotary_scores_depend_on_distance_only() -> None:
    model, params = make_model(model_config(position="rotary", num_layers=1, pooling="mean"))
    tokens = jnp.asarray([[3, 9, 9, 4]] * 2)
    early, late = jnp.asarray([[3, 9, 4, 0, 0, 0]]), jnp.asarray([[0, 0, 0, 3, 9, 4]])
    z = [model.apply(params, t, t > 0, None) for t in (early, late)]
    np.testing.assert_allclose(z[0], z[1], atol=2e-6)
    swapped = model.apply(params, tokens[:, ::-1], tokens > 0, None) - model.apply(params, tokens, tokens > 0, None)
    assert jnp.abs(swapped).max() > 1e-3  # the order of tokens matters


def test_grouped_heads_equal_full_heads_with_repeated_keys() -> None:
    grouped, params = make_model(model_config(num_kv_heads=2))
    full = make_jitted_encoder(model_config(num_kv_heads=4))
    attention = dict(params["transformer"]["blocks"]["attention"])
    for name in ("key", "value"):
        kernel, bias = attention[name]["kernel"], attention[name]["bias"]
        attention[name] = {"kernel": jnp.repeat(kernel, 2, axis=2), "bias": jnp.repeat(bias, 2, axis=1)}
    blocks = params["transformer"]["blocks"] | {"attention": attention}
    repeated = params | {"transformer": params["transformer"] | {"blocks": blocks}}
    tokens, mask = make_rows()
    np.testing.assert_allclose(grouped.apply(params, tokens, mask, None), full.apply(repeated, tokens, mask, None), atol=1e-6)


def test_zero_initialised_branches_start_as_a_bag_of_embeddings() -> None:
    config = model_config(zero_init_branches=True, final_norm=False, dropout=0.0)
    model = make_jitted_encoder(config)
    params = model.init(jax.random.key(0))
    bag = make_jitted_encoder(model_config(num_layers=0, final_norm=False, position="none"))
    table = {"transformer": {"embedding": params["transformer"]["embedding"]}}
    tokens, mask = make_rows()
    np.testing.assert_allclose(model.apply(params, tokens, mask, None), bag.apply(table, tokens, mask, None), atol=1e-6)


SAVED = (("query", 1), ("middle", 1), ("up", 2))


@pytest.mark.parametrize(
    ("remat", "scan", "saved"),
    [
        ("dots", True, ()),
        ("attention", False, SAVED),
        ("full", True, ()),
        ("full", True, (("value", 2),)),
        ("full", False, SAVED),
    ],
)
def test_rematerialisation_and_the_loop_over_layers_change_no_gradient(remat: str, scan: bool, saved: tuple) -> None:
    tokens, mask = make_rows()

    def gradient(config: ConfigDict) -> dict:
        model, params = make_model(config)
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, tokens, mask, jax.random.key(5))[:, :3])))(params)

    plain = gradient(model_config(dropout=0.2))
    again = gradient(model_config(dropout=0.2, remat=remat, scan=scan, saved=saved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_what_is_saved_is_not_computed_again() -> None:
    tokens, mask = make_rows()

    def products(saved: tuple) -> int:
        model = encoder.make_encoder(model_config(remat="full", scan=False, saved=saved), VOCAB)
        params = jax.eval_shape(model.init, jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, tokens, mask)[:, :3])))
        return gradient.lower(params).as_text().count("stablehlo.dot_general")

    nothing = products(())
    assert products((("up", 1),)) == nothing - 1 and products((("up", 2), ("query", 1), ("value", 2))) == nothing - 5
    assert products((("middle", 2),)) == nothing - 2  # the products of attention's last projection


def test_what_is_saved_costs_a_tpu_no_pass_of_its_own() -> None:
    """Attention's result has no reduce_precision, which JAX puts behind what a policy saves by name: behind a kernel it is a
    pass over memory, behind queries a part of their product. Queries have three dimensions: with four the TPU copies them."""
    tokens, mask = make_rows()
    config = model_config(dtype="bfloat16", remat="attention", saved=(("query", 2),), scan=False)
    model = encoder.make_encoder(config, VOCAB)
    params = jax.eval_shape(model.init, jax.random.key(0))
    program = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.apply(p, tokens, mask)[:, :3])))(params))
    queries = re.findall(r"(\w+):bf16\[5,11,24\] = name\[name=query\]", program)
    rounded = re.findall(r":(\S+) = reduce_precision\[.*?\] (\w+)", program)
    assert len(queries) == program.count("name[name=query]") == 2
    assert sorted(name for kind, name in rounded if kind != "f32[5,11,1]") == sorted(queries)  # those are statistics of norms


@pytest.mark.parametrize(
    "changes",
    [
        {"saved": (("out", 2),)},
        {"saved": SAVED, "remat": "none"},
        {"saved": SAVED, "scan": True},
        {"saved": SAVED, "mixer": "conv", "local_window": 2, "position": "none"},
        {"saved": SAVED, "mlp": "none"},
    ],
)
def test_saves_that_cannot_be_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=r"config.model.saved=\(\(.*needs"):
        encoder.make_encoder(model_config(**{"remat": "full", "scan": False} | changes), VOCAB)


def test_local_layers_attend_within_their_window_and_rotate_by_their_own_theta() -> None:
    tokens, mask = make_rows()
    # With a window as long as the row and the same theta, local layers equal global ones.
    wide = dict(position="rotary", local_window=LENGTH, global_every=2, rope_theta=100.0, local_rope_theta=100.0)
    model, params = make_model(model_config(**wide))
    plain, _ = make_model(model_config(position="rotary", rope_theta=100.0))
    np.testing.assert_allclose(model.apply(params, tokens, mask), plain.apply(params, tokens, mask), atol=1e-6)
    theta, _ = make_model(model_config(**wide | {"local_rope_theta": 2.0}))
    assert jnp.abs(theta.apply(params, tokens, mask) - plain.apply(params, tokens, mask)).max() > 1e-3
    # The first layer, a global one, is switched off; the second lets the first token attend to the two after it.
    local, params = make_model(model_config(position="none", local_window=2, global_every=2, pooling="cls"))
    out = params["transformer"]["blocks"]["attention"]["out"]
    params["transformer"]["blocks"]["attention"]["out"] = {"kernel": out["kernel"].at[0].set(0), "bias": out["bias"]}
    before = local.apply(params, tokens, mask)
    for index, attended in ((2, True), (3, False)):
        after = local.apply(params, tokens.at[4, index].set((tokens[4, index] + 1) % VOCAB), mask)
        assert bool(jnp.abs(after[4] - before[4]).max() > 1e-4) == attended


def test_packed_rows_may_be_longer_than_the_table_of_learned_positions() -> None:
    """Two spans of 20 and 22 tokens share a row of 48, with positions for 24: their vectors are those of a row per span."""
    config = default_config().model
    config.update(num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32, position="learned", max_length=24)
    model = encoder.make_encoder(config, 50)
    params = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 50, (1, 48)).astype(np.int32)
    segment = np.repeat([1, 2, 0], [20, 22, 6])[None].astype(np.int32)
    packed = model.apply(params, tokens, segment, packing=(2, 1))
    alone = np.zeros((2, 24), np.int32)
    alone[0, :20], alone[1, :22] = tokens[0, :20], tokens[0, 20:42]
    expected = model.apply(params, alone, (np.arange(24) < np.array([[20], [22]])).astype(np.int32))
    np.testing.assert_allclose(packed, expected, atol=1e-6)


def test_token_weights_make_a_weighted_mean() -> None:
    model, params = make_model(model_config(token_weights=True))
    tokens, mask = make_rows()
    states = np.asarray(model.encode(params, tokens, mask).states, np.float64)
    weight = np.exp(np.asarray(params["token_weight"], np.float64))[tokens] * mask
    expected = np.einsum("nl,nld->nd", weight, states)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.apply(params, tokens, mask), expected, atol=1e-6)
    # The spans of rows 1 and 2 in one row have the same vectors.
    packed, segment = np.zeros((1, LENGTH), np.int32), np.zeros((1, LENGTH), np.int32)
    for number, (row, begin, size) in enumerate(((1, 0, 3), (2, 3, 7)), 1):
        packed[0, begin : begin + size], segment[0, begin : begin + size] = tokens[row, :size], number
    of_spans = model.encode(params, packed, segment, packing=(2, 1)).z
    np.testing.assert_allclose(of_spans, expected[1:3], atol=1e-6)


ONE_TOKEN = {
    "learned, causal, grouped": dict(position="learned", causal=True, pooling="eos", num_kv_heads=2),
    "rotary, grouped, post": dict(position="rotary", pooling="cls", num_kv_heads=2, norm_position="post", embedding_norm=True),
    "windows, saved": dict(local_window=2, global_every=2, pooling="eos", position="none", num_layers=3, remat="attention"),
    "no loop": dict(scan=False, pooling="cls", num_layers=3, remat="full", bias=False),
    "one block": dict(num_layers=1, pooling="cls", pool_tanh="before", embedding_dim=5),
    "other mixer": dict(mixer="amlp", mlp="none", pooling="cls", position="none"),
}


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_the_last_block_may_compute_the_pooled_token_alone(name: str) -> None:
    model, params = make_model(model_config(**ONE_TOKEN[name]))
    tokens, mask = make_rows()
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(len(tokens), 24)), jnp.float32)

    def value(params: dict, states: bool) -> tuple[jax.Array, encoder.Encoding]:
        encoding = model.encode(params, tokens, mask, states=states)
        return (encoding.z * weights[:, : encoding.z.shape[1]]).sum(), encoding

    results = [jax.jit(jax.value_and_grad(lambda p, s=s: value(p, s), has_aux=True))(params) for s in (True, False)]
    ((_, whole), reference), ((_, alone), gradient) = results
    assert alone.states.shape == (len(tokens), 1, 24)
    np.testing.assert_allclose(alone.z, whole.z, atol=1e-6)
    place = 0 if model_config(**ONE_TOKEN[name]).pooling == "cls" else np.asarray(mask).sum(1) - 1
    np.testing.assert_allclose(alone.states[:, 0], whole.states[jnp.arange(len(tokens)), place], atol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), gradient, reference)


def test_the_weights_of_one_token_have_dropout() -> None:
    """The mean state over many masks is that without dropout, although the dropped weights of a row do not sum to 1."""
    model, params = make_model(model_config(num_layers=1, mlp="none", pooling="eos", final_norm=False, attention_dropout=0.2))
    tokens, mask = (jnp.repeat(x, 4000, axis=0) for x in make_rows())
    encode = jax.jit(model.encode, static_argnames="states")
    dropped, whole = (encode(params, tokens, mask, rng, states=False).states[:, 0] for rng in (jax.random.key(0), None))
    mean, spread = (f(dropped.reshape(5, 4000, -1), axis=1) for f in (jnp.mean, jnp.std))
    assert spread.max() > 0.1
    assert (jnp.abs(mean - whole[::4000]) < 5 * spread / 4000**0.5 + 1e-5).all()


@pytest.mark.parametrize("changes", [{"pooling": "cls"}, {"latent": 8}])
def test_token_weights_need_a_mean(changes: dict) -> None:
    with pytest.raises(UserError, match="config.model.token_weights: needs config.model.pooling='mean'"):
        encoder.make_encoder(model_config(token_weights=True, **changes), VOCAB)


def test_dropout_depends_on_its_random_key() -> None:
    model, params = make_model(model_config(dropout=0.2, attention_dropout=0.1))
    tokens, mask = make_rows()
    z = [model.apply(params, tokens, mask, key) for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2), None)]
    np.testing.assert_array_equal(z[0], z[1])
    assert jnp.abs(z[0] - z[2]).max() > 1e-2
    assert jnp.abs(z[0] - z[3]).max() > 1e-2


def test_dropout_depends_on_the_number_of_a_row() -> None:
    model, params = make_model(model_config(dropout=0.2, attention_dropout=0.1))
    tokens, mask = make_rows()
    number = jnp.asarray(np.random.default_rng(5).permutation(100)[: len(tokens)], jnp.int32)
    whole = model.apply(params, tokens, mask, jax.random.key(1), number)
    part = model.apply(params, tokens[1:3], mask[1:3], jax.random.key(1), number[1:3])
    np.testing.assert_allclose(part, whole[1:3], atol=1e-6)
    default = model.apply(params, tokens, mask, jax.random.key(1))
    assert jnp.abs(default - whole).max() > 1e-2
    np.testing.assert_array_equal(default, model.apply(params, tokens, mask, jax.random.key(1), jnp.arange(len(tokens))))


def test_dropout_is_unbiased_and_independent() -> None:
    x = jnp.ones((400, 30, 50))

    def noise(seed: int) -> Noise:
        return Noise(jax.random.key(seed), jnp.arange(400))

    kept = np.asarray(dropout(x, 0.3, noise(3))) > 0
    other = np.asarray(dropout(x, 0.3, noise(4))) > 0
    sd = np.sqrt(0.3 * 0.7 / kept.size)
    assert abs(kept.mean() - 0.7) < 4 * sd
    for axis in range(3):  # neighbours along each axis agree as often as chance
        agree = (kept == np.roll(kept, 1, axis)).mean()
        assert abs(agree - (0.7**2 + 0.3**2)) < 4 * sd
        others = tuple(i for i in range(3) if i != axis)
        spread = kept.mean(others).std() / np.sqrt(0.3 * 0.7 * kept.shape[axis] / kept.size)
        assert 0.6 < spread < 1.4
    assert abs((kept == other).mean() - (0.7**2 + 0.3**2)) < 4 * sd


def test_bfloat16_stays_near_float32() -> None:
    tokens, mask = make_rows()
    model, params = make_model(model_config())
    half, _ = make_model(model_config(dtype="bfloat16"))
    cosine = jnp.sum(model.apply(params, tokens, mask, None) * half.apply(params, tokens, mask, None), axis=-1)
    assert cosine.min() > 0.999


def test_program_does_not_grow_with_depth() -> None:
    tokens, mask = make_rows()

    def size(layers: int) -> int:
        model, params = make_model(model_config(num_layers=layers))
        return len(model.apply.lower(params, tokens, mask, None).as_text().splitlines())

    assert size(2) == size(12)


def test_a_profile_names_the_parts_of_the_model() -> None:
    model, params = make_model(model_config())
    program = model.apply.lower(params, *make_rows()).as_text(debug_info=True)
    for scope in ("embedding", "attention/qkv", "attention/rope", "attention/scores", "attention/out", "mlp", "pooling"):
        assert f"{scope}/" in program, scope


def test_every_parameter_has_an_axis_name_per_dimension() -> None:
    model, params = make_model(model_config(position="learned", embedding_norm=True, embedding_dim=9))
    names = jax.tree.map(lambda x, axes: len(axes) == x.ndim, params, model.axes)
    assert all(jax.tree.leaves(names))
    assert model.axes["transformer"]["blocks"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads", None)


@pytest.mark.parametrize(
    ("changes", "key"), [({"num_kv_heads": 3}, "num_kv_heads"), ({"head_dim": 7, "position": "rotary"}, "head_dim")]
)
def test_bad_model_values_name_the_key(changes: dict, key: str) -> None:
    with pytest.raises(UserError, match=f"config.model.{key}"):
        encoder.make_encoder(model_config(**changes), VOCAB)
