"""Every mixer equals a plain NumPy reference, never sees padding, and lies on the mesh; initialisation and poolings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from contrastive_jax.config import UserError, default_config
from contrastive_jax.huggingface.families import family_of
from contrastive_jax.huggingface.folder import pooling_config
from contrastive_jax.models import encoder
from contrastive_jax.models.mixers import FIXED_LENGTH, MIXERS
from contrastive_jax.runtime import layout, sharding
from contrastive_jax.training import build

LENGTH, VOCAB, SIZES = 14, 40, (3, 7, 10, 14)
NAMES = sorted(MIXERS.keys() - {"attention"})


def model_config(mixer: str = "attention", **changes: object) -> ConfigDict:
    config = default_config().model
    config.update(num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, head_dim=6, d_ff=20, max_length=LENGTH)
    config.update(mixer=mixer, position="learned", local_window=2 if mixer == "conv" else 0, attention="plain")
    config.update(changes)
    return config


def make_rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (len(SIZES), LENGTH)).astype(np.int32)
    return tokens, np.arange(LENGTH) < np.array(SIZES)[:, None]


def make_model(config: ConfigDict, on: layout.Layout = encoder.ONE_DEVICE) -> tuple[encoder.Encoder, dict]:
    model = encoder.make_encoder(config, VOCAB, on)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)  # XLA would compile a random generator for each shape
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32), shapes)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x: np.ndarray, p: dict) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def apply_linear(x: np.ndarray, p: dict, out: int) -> np.ndarray:
    return x @ p["kernel"].reshape(-1, out) + p["bias"].reshape(-1)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def mix(config: ConfigDict, p: dict, x: np.ndarray) -> np.ndarray:  # noqa: PLR0911 a return per mixer is the plainest
    """A mixer of one row x[s d] without padding; the places up to `max_length` count as zeros where there are any."""
    size, d = x.shape
    full = np.concatenate([x, np.zeros((config.max_length - size, d))])
    if config.mixer == "fourier":
        return np.fft.fft2(full).real[:size]
    if config.mixer == "linear":
        return apply_linear(full.T, p["tokens"], LENGTH).T[:size]
    if config.mixer == "mlp":
        return apply_linear(gelu(apply_linear(full.T, p["up"], 12)), p["down"], LENGTH).T[:size]
    if config.mixer in ("gmlp", "amlp"):
        u, v = (gelu(apply_linear(x, p[name], 10)) for name in ("value", "gate"))
        gate = p["tokens"][:size, :size] @ norm(v, p["gate_norm"]) + p["tokens_bias"][:size, None]
        if config.mixer == "amlp":
            query, key, value = (apply_linear(x, p["attention"][name], 6) for name in ("query", "key", "value"))
            gate += apply_linear(softmax(query @ key.T / np.sqrt(6), 1) @ value, p["attention"]["out"], 10)
        return apply_linear(u * gate, p["out"], d)
    if config.mixer == "external":
        weights = softmax(apply_linear(x, p["keys"], 12), axis=0)
        return apply_linear(weights / weights.sum(1, keepdims=True), p["values"], d)
    if config.mixer == "conv":
        y = apply_linear(x, p["value"], 12) * sigmoid(apply_linear(x, p["gate"], 12))
        y, taps = np.pad(y, ((2, 2), (0, 0))), softmax(p["taps"], 0)
        mixed = [[(taps[:, c // 6] * y[t : t + 5, c]).sum() for c in range(12)] for t in range(size)]
        return apply_linear(np.array(mixed), p["out"], d)
    halves = []
    for side, half in enumerate((x[:, : d // 2], x[::-1, d // 2 :])):
        hidden, cell, states = np.zeros(12), np.zeros(12), []
        for now in half:
            gates = np.einsum("d,dgm->gm", now, p["inputs"][side]) + np.einsum("m,mgk->gk", hidden, p["recurrent"][side])
            enter, forget, leave, new = gates + p["gate_bias"][side]
            cell = sigmoid(forget) * cell + sigmoid(enter) * np.tanh(new)
            hidden = sigmoid(leave) * np.tanh(cell)
            states.append(hidden @ p["out"][side])
        halves.append(np.array(states)[:: -1 if side else 1])
    return np.concatenate(halves, axis=1)


def states_of(config: ConfigDict, params: dict, tokens: np.ndarray) -> list[np.ndarray]:
    """The token states [s d] after each pre-norm block of one row, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["transformer"])
    x, states = p["embedding"][tokens] + p["position_embedding"][: len(tokens)], []
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        x = x + mix(config, block.get("attention"), norm(x, block["attention_norm"]))
        if config.mlp != "none":
            y = gelu(apply_linear(norm(x, block["mlp_norm"]), block["mlp"]["up"], config.d_ff))
            x = x + apply_linear(y, block["mlp"]["down"], config.d_model)
        states.append(x)
    return [*states[:-1], norm(x, p["final_norm"])]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("mixer", NAMES)
def test_row59_m16_a_mixer_equals_numpy_and_never_sees_padding(mixer: str) -> None:
    config = model_config(mixer, mlp="none" if mixer in ("gmlp", "amlp", "lstm") else "gelu")
    model, params = make_model(config)
    apply = jax.jit(model.apply)
    tokens, mask = make_rows()
    z = apply(params, tokens, mask)
    for row, size, vector in zip(tokens, SIZES, z, strict=True):
        np.testing.assert_allclose(vector, unit(states_of(config, params, row[:size])[-1].mean(0)), atol=5e-6)
    np.testing.assert_array_equal(z, apply(params, np.where(mask, tokens, 7), mask))
    np.testing.assert_allclose(z[:2], apply(params, tokens[:2, :8], mask[:2, :8]), atol=2e-6)  # other rows, equal vectors
    order = tokens.copy()
    order[3, :2] = order[3, 1::-1]
    bag = model_config(mixer, num_layers=0, position="none")
    assert mixer == "external" or np.abs(apply(params, order, mask)[3] - z[3]).max() > 1e-5, bag  # order matters


@pytest.mark.parametrize(
    "mixer", [name if name in ("gmlp", "lstm") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_row59_a_mixer_trains_on_a_mesh_as_on_one_device(mixer: str) -> None:
    """With dropout by row, remat, either loop, and rows in parts: the same vectors and gradients."""
    tokens, mask = (np.concatenate([x, x]) for x in make_rows())
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    changes = dict(dropout=0.2)
    one, params = make_model(model_config(mixer, **changes))
    many, _ = make_model(model_config(mixer, remat="full", scan=False, **changes), layout.on_mesh(mesh))
    shapes = jax.eval_shape(lambda: params)
    placed = sharding.place(params, sharding.tree_shardings(many.axes, shapes, mesh))

    def value(model: encoder.Encoder, params: dict, rows: slice = slice(None)) -> jax.Array:
        row = jnp.arange(len(tokens), dtype=jnp.int32)[rows]
        return model.apply(params, tokens[rows], mask[rows], jax.random.key(3), row)

    def gradient_and_value(model: encoder.Encoder, params: dict) -> tuple[dict, jax.Array]:
        def first_sum(params: dict) -> tuple[jax.Array, jax.Array]:
            z = value(model, params)
            return jnp.sum(z[:, :5]), z

        return jax.jit(jax.grad(first_sum, has_aux=True))(params)

    (expected, whole), (gradient, z) = gradient_and_value(one, params), gradient_and_value(many, placed)
    np.testing.assert_allclose(z, whole, atol=3e-6)
    np.testing.assert_allclose(value(one, params, slice(3, 5)), whole[3:5], atol=3e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), gradient, expected)
    half, _ = make_model(model_config(mixer, dtype="bfloat16", **changes))
    assert jnp.sum(value(half, params) * whole, axis=-1).min() > 0.998


def test_row59_gates_begin_open_and_structures_over_tokens_are_not_sharded() -> None:
    for mixer in sorted(FIXED_LENGTH - {"fourier"}):
        model = encoder.make_encoder(model_config(mixer), VOCAB)
        shapes = jax.tree.leaves_with_path(jax.eval_shape(model.init, jax.random.key(0))["transformer"]["blocks"]["attention"])
        over_tokens = {jax.tree_util.keystr(path): leaf for path, leaf in shapes if LENGTH in leaf.shape}
        assert over_tokens, mixer
        axes = model.axes["transformer"]["blocks"]["attention"]
        for path, names in jax.tree.leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple)):
            if (leaf := over_tokens.get(jax.tree_util.keystr(path))) is not None:
                assert [name for name, size in zip(names, leaf.shape, strict=True) if size == LENGTH and name] == []
    config = model_config("gmlp", num_layers=1, final_norm=False, init_std=0.5)
    model = encoder.make_encoder(config, VOCAB)
    params = model.init(jax.random.key(0))
    tokens, mask = make_rows()
    p = jax.tree.map(np.asarray, params["transformer"])
    block = jax.tree.map(lambda leaf: leaf[0], p["blocks"])
    assert not block["attention"]["tokens"].any() and (block["attention"]["tokens_bias"] == 1).all()
    x = p["embedding"][tokens[3]] + p["position_embedding"]
    y = gelu(apply_linear(norm(x, block["attention_norm"]), block["attention"]["value"], 10))
    x = x + apply_linear(y, block["attention"]["out"], 16)
    y = gelu(apply_linear(norm(x, block["mlp_norm"]), block["mlp"]["up"], 20))
    x = x + apply_linear(y, block["mlp"]["down"], 16)
    np.testing.assert_allclose(model.apply(params, tokens, mask)[3], unit(x.mean(0)), atol=2e-6)


@pytest.mark.parametrize(
    ("mixer", "changes", "message"),
    [
        ("gmlp", {"causal": True}, "config.model.causal=True does not go with config.model.mixer='gmlp': set False"),
        ("fourier", {"position": "rotary"}, "config.model.position='rotary' does not go .*'fourier': choose learned or none"),
        ("mlp", {"local_window": 3}, "config.model.local_window=3 .*'mlp': set 0"),
        ("conv", {"local_window": 0}, "config.model.local_window=0 .*'conv': set the tokens on either side"),
        ("linear", {"attention_dropout": 0.1}, "config.model.attention_dropout=0.1 .*'linear': set 0"),
        ("lstm", {"d_model": 15}, "config.model.d_model=15 .*'lstm': set an even number"),
        ("amlp", {"d_ff": 15}, "config.model.d_ff=15 .*'amlp': set an even number"),
    ],
)
def test_row59_what_a_mixer_cannot_do_is_one_line(mixer: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        encoder.make_encoder(model_config(mixer, **changes), VOCAB)


def test_row59_export_packing_and_longer_rows_are_refused() -> None:
    config = default_config()
    config.model = model_config("gmlp")
    with pytest.raises(
        UserError, match="^config.model.mixer='gmlp': transformers has no such encoder; use the run's own folder$"
    ):
        family_of(config.model.to_dict())
    config.data.length = LENGTH
    build.check_positions(config, 10)
    config.data.length = LENGTH + 1
    config.model.position = "none"
    with pytest.raises(
        UserError, match="max_length=14: config.data.length needs rows of 15 tokens; raise config.model.max_len"
    ):
        build.check_positions(config, 10)
    config.data.update(pack_pairs=2, pack_rows=1)
    with pytest.raises(
        UserError, match="^config.data.pack_pairs=2: config.model.mixer='gmlp' would mix the spans of a row; set"
    ):
        build.check_positions(config, 10)


def test_m3_half_of_a_bilstm_state_knows_the_tokens_before_and_half_those_after() -> None:
    """ELMo's two directions, which share embeddings but never meet; max-pooled, InferSent's encoder."""
    config = model_config("lstm", mlp="none", norm="affine", pooling="max", position="none")
    model, params = make_model(config)
    tokens, mask = make_rows()

    def states(changed: np.ndarray) -> np.ndarray:
        attend = encoder.make_attend(config, encoder.ONE_DEVICE)
        transformer = encoder.Transformer(config, VOCAB, attend, encoder.ONE_DEVICE, nnx.Rngs(0))
        return np.asarray(transformer(jnp.asarray(changed), jnp.asarray(mask, jnp.int32))[0])[3]

    changed = tokens.copy()
    changed[3, 5] = (changed[3, 5] + 1) % VOCAB
    moved = np.abs(states(changed) - states(tokens)) > 0
    forward, backward = moved[:, :8].any(1), moved[:, 8:].any(1)
    assert not forward[:5].any() and forward[5:].all() and backward[:6].all() and not backward[6:].any()
    z = model.apply(params, tokens, mask)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 1, atol=1e-6)


def test_m4_poolings_equal_numpy() -> None:
    tokens, mask = make_rows()
    expected = {
        "max": lambda first, last: last.max(0),
        "first_last": lambda first, last: ((first + last) / 2).mean(0),
    }
    for pooling, make in expected.items():
        for scan in (True, False):
            config = model_config("external", pooling=pooling, scan=scan)
            model, params = make_model(config)
            z = model.apply(params, tokens, mask)
            for row, size, vector in zip(tokens, SIZES, z, strict=True):
                np.testing.assert_allclose(vector, unit(make(*states_of(config, params, row[:size]))), atol=3e-6)
    config = model_config("external")
    _, params = make_model(config)
    last = states_of(config, params, tokens[1, :7])[-1]
    for when, mean in (("before", np.tanh(last).mean(0)), ("after", np.tanh(last.mean(0)))):
        model = encoder.make_encoder(model_config("external", pool_tanh=when), VOCAB)
        np.testing.assert_allclose(model.apply(params, tokens, mask)[1], unit(mean), atol=3e-6)
    segment = jnp.asarray([[1, 1, 2, 2, 2, 0]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), jnp.float32)
    packed = encoder.pool(x, segment[:, :, None] == jnp.arange(1, 4), "max")
    np.testing.assert_array_equal(packed[0], jnp.stack([x[0, :2].max(0), x[0, 2:5].max(0), jnp.zeros(4)]))
    assert pooling_config("max", 4)["pooling_mode_max_tokens"] is True
    with pytest.raises(
        UserError, match="config.model.pooling='first_last' has no form in sentence-transformers, which has mean"
    ):
        pooling_config("first_last", 4)


@pytest.mark.parametrize("std", [0.125, 0.354])
def test_row48_kernels_have_the_variance_of_their_inputs_and_outputs_that_of_the_depth(std: float) -> None:
    config = default_config().model
    config.update(num_layers=3, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=512, init="fan_in", init_std=std)
    params = encoder.make_encoder(config, VOCAB).init(jax.random.key(0))
    blocks = params["transformer"]["blocks"]
    fan_in = {"query": 256, "key": 256, "value": 256, "out": 256, "up": 256, "down": 512}
    kernels = {name: leaf["kernel"] for part in ("attention", "mlp") for name, leaf in blocks[part].items()}
    assert kernels.keys() == fan_in.keys()
    for name, kernel in kernels.items():
        depth = 2 * config.num_layers if name in ("out", "down") else 1
        assert float(kernel.var()) * fan_in[name] * depth == pytest.approx(std**2, rel=0.02), name


def test_row48_the_block_is_the_sparse_transformers() -> None:
    """H + a + b, a = attention(norm H), b = ff(norm(H + a)), with f(x) = x σ(1.702 x) (arXiv 1904.10509, equations 12-15)."""
    config = model_config(mlp="quick_gelu", position="none", num_layers=1, final_norm=False)
    model, params = make_model(config)
    tokens, mask = make_rows()
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["transformer"])
    block = jax.tree.map(lambda leaf: leaf[0], p["blocks"])
    hidden = p["embedding"][tokens[3]]
    x = norm(hidden, block["attention_norm"])
    query, key, value = (apply_linear(x, block["attention"][n], 12).reshape(-1, 2, 6) for n in ("query", "key", "value"))
    weights = softmax(np.einsum("lhk,shk->hls", query, key) / np.sqrt(6), 2)
    a = apply_linear(np.einsum("hls,shk->lhk", weights, value).reshape(-1, 12), block["attention"]["out"], 16)
    y = apply_linear(norm(hidden + a, block["mlp_norm"]), block["mlp"]["up"], 20)
    b = apply_linear(y * sigmoid(1.702 * y), block["mlp"]["down"], 16)
    np.testing.assert_allclose(model.apply(params, tokens, mask)[3], unit((hidden + a + b).mean(0)), atol=2e-6)
