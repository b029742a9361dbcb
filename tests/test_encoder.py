"""The encoder: what its config promises, against a plain NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from contrastive_jax.models import encoder
from contrastive_jax.models.rows import Noise, dropout

LENGTH, VOCAB = 11, 50


def model_config(**changes: object) -> ConfigDict:
    config = base.get_config().model
    config.update(num_layers=2, d_model=24, num_heads=4, num_kv_heads=4, head_dim=6, d_ff=40, init_std=0.3)
    config.update(changes)
    return config


def rows(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (5, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array([1, 3, 7, 10, 11])[:, None]
    return jnp.asarray(tokens), jnp.asarray(mask)


def jitted(config: ConfigDict) -> encoder.Encoder:
    model = encoder.make(config, VOCAB, LENGTH)
    return model._replace(apply=jax.jit(model.apply))


def make(config: ConfigDict, seed: int = 0) -> tuple[encoder.Encoder, dict]:
    model = jitted(config)
    # Drawn by NumPy: XLA compiles a random generator for each shape, slowly. Norm scales and biases are away from 1 and 0.
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32), shapes)


# Every pair of values of any two keys occurs at least once in the first four keys.
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
    model, params = make(
        model_config(
            norm_position=norm_position, norm=norm, position=position, causal=causal, pooling=pooling, mlp=mlp, num_kv_heads=2
        )
    )
    tokens, mask = rows()
    z = model.apply(params, tokens, mask, None)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(z, model.apply(params, jnp.where(mask, tokens, 7), mask, None))
    short = model.apply(params, tokens[:3, :7], mask[:3, :7], None)
    np.testing.assert_allclose(z[:3], short, atol=2e-6)


def reference(params: dict, tokens: np.ndarray, config: ConfigDict) -> np.ndarray:
    """A post- or pre-norm Transformer over one unpadded row, in float64 NumPy, mean-pooled."""
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
    model, params = make(config)
    tokens, mask = rows()
    z = model.apply(params, tokens, mask, None)
    for row, inside, got in zip(np.asarray(tokens), np.asarray(mask), z, strict=True):
        np.testing.assert_allclose(got, reference(params, row[inside], config), atol=3e-6)


def test_rotary_scores_depend_on_distance_only() -> None:
    model, params = make(model_config(position="rotary", num_layers=1, pooling="mean"))
    tokens = jnp.asarray([[3, 9, 9, 4]] * 2)
    early, late = jnp.asarray([[3, 9, 4, 0, 0, 0]]), jnp.asarray([[0, 0, 0, 3, 9, 4]])
    z = [model.apply(params, t, t > 0, None) for t in (early, late)]
    np.testing.assert_allclose(z[0], z[1], atol=2e-6)
    swapped = model.apply(params, tokens[:, ::-1], tokens > 0, None) - model.apply(params, tokens, tokens > 0, None)
    assert jnp.abs(swapped).max() > 1e-3  # order does matter


def test_grouped_heads_equal_full_heads_with_repeated_keys() -> None:
    grouped, params = make(model_config(num_kv_heads=2))
    full = jitted(model_config(num_kv_heads=4))
    attention = dict(params["transformer"]["blocks"]["attention"])
    for name in ("key", "value"):
        kernel, bias = attention[name]["kernel"], attention[name]["bias"]
        attention[name] = {"kernel": jnp.repeat(kernel, 2, axis=2), "bias": jnp.repeat(bias, 2, axis=1)}
    blocks = params["transformer"]["blocks"] | {"attention": attention}
    repeated = params | {"transformer": params["transformer"] | {"blocks": blocks}}
    tokens, mask = rows()
    np.testing.assert_allclose(grouped.apply(params, tokens, mask, None), full.apply(repeated, tokens, mask, None), atol=1e-6)


def test_zero_branches_start_as_the_bag() -> None:
    config = model_config(zero_init_branches=True, final_norm=False, dropout=0.0)
    model = jitted(config)
    params = model.init(jax.random.key(0))
    bag = jitted(model_config(num_layers=0, final_norm=False, position="none"))
    table = {"transformer": {"embedding": params["transformer"]["embedding"]}}
    tokens, mask = rows()
    np.testing.assert_allclose(model.apply(params, tokens, mask, None), bag.apply(table, tokens, mask, None), atol=1e-6)


@pytest.mark.parametrize(("remat", "scan"), [("dots", True), ("attention", False), ("full", True)])
def test_remat_and_the_loop_change_no_gradient(remat: str, scan: bool) -> None:
    tokens, mask = rows()

    def gradient(config: ConfigDict) -> dict:
        model, params = make(config)
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, tokens, mask, jax.random.key(5))[:, :3])))(params)

    plain, again = gradient(model_config(dropout=0.2)), gradient(model_config(dropout=0.2, remat=remat, scan=scan))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_local_layers_see_so_far_and_turn_by_their_own_theta() -> None:
    tokens, mask = rows()
    # Wide windows and one theta: what all layers do.
    wide = dict(position="rotary", local_window=LENGTH, global_every=2, rope_theta=100.0, local_rope_theta=100.0)
    model, params = make(model_config(**wide))
    plain, _ = make(model_config(position="rotary", rope_theta=100.0))
    np.testing.assert_allclose(model.apply(params, tokens, mask), plain.apply(params, tokens, mask), atol=1e-6)
    theta, _ = make(model_config(**wide | {"local_rope_theta": 2.0}))
    assert jnp.abs(theta.apply(params, tokens, mask) - plain.apply(params, tokens, mask)).max() > 1e-3
    # The first layer mixes nothing here; the second lets the first token see the two after it.
    local, params = make(model_config(position="none", local_window=2, global_every=2, pooling="cls"))
    out = params["transformer"]["blocks"]["attention"]["out"]
    params["transformer"]["blocks"]["attention"]["out"] = {"kernel": out["kernel"].at[0].set(0), "bias": out["bias"]}
    before = local.apply(params, tokens, mask)
    for place, seen in ((2, True), (3, False)):
        after = local.apply(params, tokens.at[4, place].set((tokens[4, place] + 1) % VOCAB), mask)
        assert bool(jnp.abs(after[4] - before[4]).max() > 1e-4) == seen


def test_dropout_follows_its_key() -> None:
    model, params = make(model_config(dropout=0.2, attention_dropout=0.1))
    tokens, mask = rows()
    z = [model.apply(params, tokens, mask, key) for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2), None)]
    np.testing.assert_array_equal(z[0], z[1])
    assert jnp.abs(z[0] - z[2]).max() > 1e-2
    assert jnp.abs(z[0] - z[3]).max() > 1e-2


def test_dropout_follows_the_number_of_a_row() -> None:
    model, params = make(model_config(dropout=0.2, attention_dropout=0.1))
    tokens, mask = rows()
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
    for axis in range(3):  # neighbours along each axis, and another key's mask, agree no more than chance
        agree = (kept == np.roll(kept, 1, axis)).mean()
        assert abs(agree - (0.7**2 + 0.3**2)) < 4 * sd
        others = tuple(i for i in range(3) if i != axis)
        spread = kept.mean(others).std() / np.sqrt(0.3 * 0.7 * kept.shape[axis] / kept.size)
        assert 0.6 < spread < 1.4
    assert abs((kept == other).mean() - (0.7**2 + 0.3**2)) < 4 * sd


def test_bfloat16_stays_near_float32() -> None:
    tokens, mask = rows()
    model, params = make(model_config())
    half, _ = make(model_config(dtype="bfloat16"))
    cosine = jnp.sum(model.apply(params, tokens, mask, None) * half.apply(params, tokens, mask, None), axis=-1)
    assert cosine.min() > 0.999


def test_program_does_not_grow_with_depth() -> None:
    tokens, mask = rows()

    def size(layers: int) -> int:
        model, params = make(model_config(num_layers=layers))
        return len(model.apply.lower(params, tokens, mask, None).as_text().splitlines())

    assert size(2) == size(12)


def test_every_parameter_has_an_axis_name_a_dimension() -> None:
    model, params = make(model_config(position="learned", embedding_norm=True, embedding_dim=9))
    names = jax.tree.map(lambda x, axes: len(axes) == x.ndim, params, model.axes)
    assert all(jax.tree.leaves(names))
    assert model.axes["transformer"]["blocks"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads", None)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"norm": "batchnorm"}, "norm"),
        ({"pooling": "max"}, "pooling"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7, "position": "rotary"}, "head_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"d_model": 0}, "d_model"),
    ],
)
def test_bad_model_values_name_the_key(changes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"config.model.{key}"):
        encoder.make(model_config(**changes), VOCAB, LENGTH)
