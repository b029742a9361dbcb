"""Families of Hugging Face models, read and written.

Each family has a table, tensor of the Hugging Face file ↔ parameter of this encoder, and a translation between its config.json
and the values of `config.model`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from contrastive_jax.config import UserError
from contrastive_jax.huggingface.rotary import check_rope, read_global_every


class Entry(NamedTuple):
    """A parameter of this encoder and the tensor that holds it.

    Attributes:
      path: the parameter's path in the Transformer, "blocks/attention/query/kernel"; below `blocks` layers are stacked.
      tensor: the tensor's name; {} stands for the number of the layer.
      transposed: whether the tensor is [out in], as in torch.nn.Linear; parameters are [in out].
      part: (i, n): the parameter is part i of n equal parts of the tensor, along out.
    """

    path: str
    tensor: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)


class Family(NamedTuple):
    """How a family is read and written.

    Attributes:
      entries: the table of its parameters.
      to_values: config.json → values of `config.model`.
      prefix: the prefix of the tensors' names in files of a model with a head.
      to_config: values of `config.model` → config.json, without the sizes of tables; None: the family is only read.
      optional: regex of the tensors that a file may lack; the parameter is then a scale of ones.
    """

    entries: list[Entry]
    to_values: Callable[[dict[str, Any]], dict[str, Any]]
    prefix: str
    to_config: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    optional: str = "$^"


def linear(path: str, tensor: str, transposed: bool = False, part: tuple[int, int] = (0, 1), bias: bool = True) -> list[Entry]:
    """Returns the entries of a linear map: its kernel and, with `bias`, its bias."""
    kernel = Entry(f"{path}/kernel", f"{tensor}.weight", transposed, part)
    return [kernel, Entry(f"{path}/bias", f"{tensor}.bias", False, part)] if bias else [kernel]


def norm(path: str, tensor: str, bias: bool = True) -> list[Entry]:
    """Returns the entries of a norm: its scale and, with `bias`, its bias."""
    scale = Entry(f"{path}/scale", f"{tensor}.weight")
    return [scale, Entry(f"{path}/bias", f"{tensor}.bias")] if bias else [scale]


def bert_entries() -> list[Entry]:
    """Returns the table of BERT and RoBERTa."""
    layer = "encoder.layer.{}."
    table = [
        Entry("embedding", "embeddings.word_embeddings.weight"),
        Entry("position_embedding", "embeddings.position_embeddings.weight"),
        *norm("embedding_norm", "embeddings.LayerNorm"),
        *linear("blocks/attention/out", f"{layer}attention.output.dense", True),
        *norm("blocks/attention_norm", f"{layer}attention.output.LayerNorm"),
        *linear("blocks/mlp/up", f"{layer}intermediate.dense", True),
        *linear("blocks/mlp/down", f"{layer}output.dense", True),
        *norm("blocks/mlp_norm", f"{layer}output.LayerNorm"),
    ]
    for name in ("query", "key", "value"):
        table += linear(f"blocks/attention/{name}", f"{layer}attention.self.{name}", True)
    return table


def distilbert_entries() -> list[Entry]:
    """Returns the table of DistilBERT."""
    layer = "transformer.layer.{}."
    table = [
        Entry("embedding", "embeddings.word_embeddings.weight"),
        Entry("position_embedding", "embeddings.position_embeddings.weight"),
        *norm("embedding_norm", "embeddings.LayerNorm"),
        *norm("blocks/attention_norm", f"{layer}sa_layer_norm"),
        *linear("blocks/mlp/up", f"{layer}ffn.lin1", True),
        *linear("blocks/mlp/down", f"{layer}ffn.lin2", True),
        *norm("blocks/mlp_norm", f"{layer}output_layer_norm"),
    ]
    for name, tensor in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"), ("out", "out_lin")):
        table += linear(f"blocks/attention/{name}", f"{layer}attention.{tensor}", True)
    return table


def gpt2_entries() -> list[Entry]:
    """Returns the table of GPT-2, whose linear maps are [in out]; query, key and value are parts of one."""
    table = [
        Entry("embedding", "wte.weight"),
        Entry("position_embedding", "wpe.weight"),
        *norm("blocks/attention_norm", "h.{}.ln_1"),
        *linear("blocks/attention/out", "h.{}.attn.c_proj"),
        *norm("blocks/mlp_norm", "h.{}.ln_2"),
        *linear("blocks/mlp/up", "h.{}.mlp.c_fc"),
        *linear("blocks/mlp/down", "h.{}.mlp.c_proj"),
        *norm("final_norm", "ln_f"),
    ]
    for number, name in enumerate(("query", "key", "value")):
        table += linear(f"blocks/attention/{name}", "h.{}.attn.c_attn", part=(number, 3))
    return table


def modernbert_entries() -> list[Entry]:
    """Returns the table of ModernBERT, without biases; query, key and value are parts of one map, gate and up of another."""
    table = [
        Entry("embedding", "embeddings.tok_embeddings.weight"),
        *norm("embedding_norm", "embeddings.norm", bias=False),
        *norm("blocks/attention_norm", "layers.{}.attn_norm", bias=False),
        *linear("blocks/attention/out", "layers.{}.attn.Wo", True, bias=False),
        *norm("blocks/mlp_norm", "layers.{}.mlp_norm", bias=False),
        *linear("blocks/mlp/gate", "layers.{}.mlp.Wi", True, (0, 2), bias=False),
        *linear("blocks/mlp/up", "layers.{}.mlp.Wi", True, (1, 2), bias=False),
        *linear("blocks/mlp/down", "layers.{}.mlp.Wo", True, bias=False),
        *norm("final_norm", "final_norm", bias=False),
    ]
    for number, name in enumerate(("query", "key", "value")):
        table += linear(f"blocks/attention/{name}", "layers.{}.attn.Wqkv", True, (number, 3), bias=False)
    return table


def starcoder2_entries() -> list[Entry]:
    """Returns the table of Starcoder2, a pre-norm decoder with rotary positions."""
    layer = "layers.{}."
    table = [
        Entry("embedding", "embed_tokens.weight"),
        *norm("blocks/attention_norm", f"{layer}input_layernorm"),
        *norm("blocks/mlp_norm", f"{layer}post_attention_layernorm"),
        *linear("blocks/mlp/up", f"{layer}mlp.c_fc", True),
        *linear("blocks/mlp/down", f"{layer}mlp.c_proj", True),
        *norm("final_norm", "norm"),
    ]
    for name, tensor in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
        table += linear(f"blocks/attention/{name}", f"{layer}self_attn.{tensor}", True)
    return table


# The activation in config.json → `config.model.mlp`, of an MLP without a gate.
GELU = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
ACTIVATIONS = GELU | {"quick_gelu": "quick_gelu"}


def translate(config: dict[str, Any], key: str, choices: dict[Any, Any], default: Any) -> Any:
    """Returns what `choices` has for the value of a key of config.json, or for `default` where the key is absent.

    Raises:
      UserError: the value is none of the choices: this encoder cannot be that model.
    """
    value = config.get(key, default)
    if value not in choices:
        raise UserError(f"config.json: {key}={value!r}; this encoder knows {', '.join(map(repr, choices))}")
    return choices[value]


def base_values(layers: int, width: int, heads: int, d_ff: int) -> dict[str, Any]:
    """Returns the values of `config.model` that most families have in common; each family lays its own over them.

    Raises:
      UserError: the width does not divide over the heads.
    """
    if width % heads:
        raise UserError(f"config.json: a width of {width} does not divide over {heads} heads; is the file damaged?")
    choices = dict(mixer="attention", position="learned", norm="layernorm", bias=True, causal=False, local_window=0)
    counts = dict(num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads, head_dim=width // heads, d_ff=d_ff)
    return choices | counts | dict(pool_tanh="")


def bert_values(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of `config.model` of a BERT or RoBERTa, from its config.json."""
    translate(config, "position_embedding_type", {"absolute": None}, "absolute")
    return base_values(
        config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    ) | dict(
        norm_position="post",
        final_norm=False,
        embedding_norm=True,
        mlp=translate(config, "hidden_act", ACTIVATIONS, "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )


def distilbert_values(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of `config.model` of a DistilBERT, from its config.json."""
    return base_values(config["n_layers"], config["dim"], config["n_heads"], config["hidden_dim"]) | dict(
        norm_position="post",
        final_norm=False,
        embedding_norm=True,
        mlp=translate(config, "activation", ACTIVATIONS, "gelu"),
        norm_eps=1e-12,
    )


def gpt2_values(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of `config.model` of a GPT-2, from its config.json."""
    for key, usual in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        translate(config, key, {usual: None}, usual)
    width = config["n_embd"]
    return base_values(config["n_layer"], width, config["n_head"], config.get("n_inner") or 4 * width) | dict(
        norm_position="pre",
        final_norm=True,
        embedding_norm=False,
        causal=True,
        mlp=translate(config, "activation_function", ACTIVATIONS, "gelu_new"),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
    )


def modernbert_values(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of `config.model` of a ModernBERT, from its config.json."""
    for key in ("attention_bias", "mlp_bias", "norm_bias"):
        translate(config, key, {False: None}, False)
    gelu = translate(config, "hidden_activation", GELU, "gelu")
    # Newer files write the bases of the rotary positions by kind of layer.
    rope = config.get("rope_parameters") or {}
    check_rope(config, rope.get("full_attention", {}), rope.get("sliding_attention", {}))
    return base_values(
        config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    ) | dict(
        norm_position="pre",
        final_norm=True,
        embedding_norm=True,
        bias=False,
        position="rotary",
        mlp={"gelu_exact": "geglu_exact", "gelu": "geglu"}[gelu],
        norm_eps=config.get("norm_eps", 1e-5),
        local_window=config.get("local_attention", 128) // 2,
        global_every=read_global_every(config),
        rope_theta=float(rope.get("full_attention", {}).get("rope_theta") or config.get("global_rope_theta", 160_000.0)),
        local_rope_theta=float(rope.get("sliding_attention", {}).get("rope_theta") or config.get("local_rope_theta", 10_000.0)),
    )


def starcoder2_values(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of `config.model` of a Starcoder2; with is_causal false (transformers ≥ 5) tokens see both sides."""
    translate(config, "use_bias", {True: None}, True)
    translate(config, "sliding_window", {None: None}, None)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {}
    check_rope(config, rope)
    return base_values(config["num_hidden_layers"], width, heads, config["intermediate_size"]) | dict(
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        norm_position="pre",
        final_norm=True,
        embedding_norm=False,
        position="rotary",
        causal=config.get("is_causal", True),
        mlp=translate(config, "hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        norm_eps=config.get("norm_epsilon", 1e-5),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
    )


# `config.model.mlp` → the activation in config.json.
ACTIVATION = {
    "gelu": "gelu_pytorch_tanh",
    "gelu_exact": "gelu",
    "quick_gelu": "quick_gelu",
    "geglu": "gelu_pytorch_tanh",
    "geglu_exact": "gelu",
}


def common_config(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of config.json that BERT, ModernBERT and Starcoder2 have in common."""
    return dict(
        hidden_size=model["d_model"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        intermediate_size=model["d_ff"],
        attention_dropout=model["attention_dropout"],
    )


def bert_config(model: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json from the values of `config.model`: the inverse of `bert_values`."""
    dropout = dict(hidden_dropout_prob=model["dropout"], attention_probs_dropout_prob=model["attention_dropout"])
    other = dict(hidden_act=ACTIVATION.get(model["mlp"], "gelu"), layer_norm_eps=model["norm_eps"], type_vocab_size=1)
    return common_config(model) | dropout | other


def gpt2_config(model: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json from the values of `config.model`: the inverse of `gpt2_values`."""
    return dict(
        n_embd=model["d_model"],
        n_layer=model["num_layers"],
        n_head=model["num_heads"],
        n_inner=model["d_ff"],
        activation_function=ACTIVATION.get(model["mlp"], "gelu_new"),
        layer_norm_epsilon=model["norm_eps"],
        attn_pdrop=model["attention_dropout"],
        **dict.fromkeys(("embd_pdrop", "resid_pdrop"), model["dropout"]),
    )


def modernbert_config(model: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json from the values of `config.model`: the inverse of `modernbert_values`."""
    bases = {"full_attention": model["rope_theta"], "sliding_attention": model["local_rope_theta"]}
    return common_config(model) | dict(
        hidden_activation=ACTIVATION.get(model["mlp"], "gelu"),
        norm_eps=model["norm_eps"],
        local_attention=2 * model["local_window"],
        global_attn_every_n_layers=model["global_every"],
        rope_parameters={name: {"rope_type": "default", "rope_theta": theta} for name, theta in bases.items()},
        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), False),
        **dict.fromkeys(("embedding_dropout", "mlp_dropout"), model["dropout"]),
    )


def starcoder2_config(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json, as a dict, for values of `config.model`: the inverse of `starcoder2_values`.

    Starcoder2 is a decoder, but no other family here has rotary positions and an MLP without a gate. With is_causal false,
    transformers (≥ 5) runs it as an encoder. The activation of an MLP that it lacks (swiglu) falls back to gelu_pytorch_tanh;
    `family_of` then finds that `mlp` differs.
    """
    return common_config(model) | dict(
        num_key_value_heads=model["num_kv_heads"],
        head_dim=model["head_dim"],
        hidden_act=ACTIVATION.get(model["mlp"], "gelu_pytorch_tanh"),
        norm_epsilon=model["norm_eps"],
        is_causal=model["causal"],
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        use_cache=False,
        **dict.fromkeys(("embedding_dropout", "residual_dropout"), model["dropout"]),
    )


FAMILIES = {
    "bert": Family(bert_entries(), bert_values, "bert.", bert_config),
    "roberta": Family(bert_entries(), bert_values, "roberta."),
    "distilbert": Family(distilbert_entries(), distilbert_values, "distilbert."),
    "gpt2": Family(gpt2_entries(), gpt2_values, "transformer.", gpt2_config),
    "modernbert": Family(
        modernbert_entries(), modernbert_values, "model.", modernbert_config, optional=r"layers\.0\.attn_norm\.weight"
    ),
    "starcoder2": Family(starcoder2_entries(), starcoder2_values, "model.", starcoder2_config),
}


def family_of(model: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Finds the Hugging Face family that an encoder with layers can be exported as: the first in FAMILIES that matches.

    Args:
      model: values of `config.model`.

    Returns:
      The family's name, and its config.json without the sizes of its tables (vocabulary and positions), which
      `weights.save_transformer` adds.

    Raises:
      UserError: no family matches; the message names, per family, the keys that differ.
    """
    if model["mixer"] != "attention":
        raise UserError(f"config.model.mixer={model['mixer']!r}: transformers has no such encoder; use the run's own folder")
    for key in ("latent", "ngrams"):
        if model.get(key):
            raise UserError(f"config.model.{key}={model[key]}: transformers has no such encoder; use the run's own folder")
    if not model[
        "local_window"
    ]:  # all layers are global, whatever `global_every` is; transformers takes a window of 0 at its word
        model = model | {"global_every": 1}
    differences = []
    for name, family in FAMILIES.items():
        if family.to_config is None:  # a family that is only read
            continue
        hf_config = family.to_config(model)
        expected = family.to_values(hf_config)
        # An encoder without biases matches a family with biases: they are exported as zeros.
        differing = [key for key, value in expected.items() if model[key] != value and not (key == "bias" and value)]
        if not differing:
            return name, hf_config | {"model_type": name}
        changes = ", ".join(f"{key}={expected[key]!r} (now {model[key]!r})" for key in differing)
        differences.append(f"to match {name}, set {changes}")
    raise UserError(f"config.model matches no Hugging Face family; {'; '.join(differences)}")
