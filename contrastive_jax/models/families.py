"""Families of Hugging Face models, both ways: a table each, name there ↔ path here, and what their config.json means."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A parameter here and there.

    Attributes:
      ours: path below the encoder's parameters, "blocks/attention/query/kernel"; below `blocks` one slice a layer.
      theirs: the tensor's name; {} is the number of the layer.
      transposed: whether theirs is [out in], as torch.nn.Linear has it; ours are [in out].
      part: (i, n): ours is part i of n of theirs, along out.
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)


class Family(NamedTuple):
    """How a family is read and written.

    Attributes:
      entries: the table.
      config: their config.json → values of `config.model`.
      prefix: what stands before the names where the file is of a model with a head.
      write: the inverse of `config`, as far as there is one; None: a family that is read only, and written as another.
      missing: names that a file may lack, because the model does without (regex).
    """

    entries: list[Entry]
    config: Callable[[dict[str, Any]], dict[str, Any]]
    prefix: str
    write: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    missing: str = "$^"


def pairs(ours: str, theirs: str, transposed: bool = False, part: tuple[int, int] = (0, 1), bias: bool = True) -> list[Entry]:
    """A linear map: kernel and bias."""
    kernel = Entry(f"{ours}/kernel", f"{theirs}.weight", transposed, part)
    return [kernel, Entry(f"{ours}/bias", f"{theirs}.bias", False, part)] if bias else [kernel]


def norm(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """A layer norm: scale and bias."""
    scale = Entry(f"{ours}/scale", f"{theirs}.weight")
    return [scale, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else [scale]


def bert_entries() -> list[Entry]:
    """BERT's and RoBERTa's."""
    layer = "encoder.layer.{}."
    table = [
        Entry("embedding", "embeddings.word_embeddings.weight"),
        Entry("position_embedding", "embeddings.position_embeddings.weight"),
        *norm("embedding_norm", "embeddings.LayerNorm"),
        *pairs("blocks/attention/out", f"{layer}attention.output.dense", True),
        *norm("blocks/attention_norm", f"{layer}attention.output.LayerNorm"),
        *pairs("blocks/mlp/up", f"{layer}intermediate.dense", True),
        *pairs("blocks/mlp/down", f"{layer}output.dense", True),
        *norm("blocks/mlp_norm", f"{layer}output.LayerNorm"),
    ]
    for name in ("query", "key", "value"):
        table += pairs(f"blocks/attention/{name}", f"{layer}attention.self.{name}", True)
    return table


def distilbert_entries() -> list[Entry]:
    """DistilBERT's."""
    layer = "transformer.layer.{}."
    table = [
        Entry("embedding", "embeddings.word_embeddings.weight"),
        Entry("position_embedding", "embeddings.position_embeddings.weight"),
        *norm("embedding_norm", "embeddings.LayerNorm"),
        *norm("blocks/attention_norm", f"{layer}sa_layer_norm"),
        *pairs("blocks/mlp/up", f"{layer}ffn.lin1", True),
        *pairs("blocks/mlp/down", f"{layer}ffn.lin2", True),
        *norm("blocks/mlp_norm", f"{layer}output_layer_norm"),
    ]
    for name, theirs in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"), ("out", "out_lin")):
        table += pairs(f"blocks/attention/{name}", f"{layer}attention.{theirs}", True)
    return table


def gpt2_entries() -> list[Entry]:
    """GPT-2's: its linear maps are [in out], query, key and value one of them."""
    table = [
        Entry("embedding", "wte.weight"),
        Entry("position_embedding", "wpe.weight"),
        *norm("blocks/attention_norm", "h.{}.ln_1"),
        *pairs("blocks/attention/out", "h.{}.attn.c_proj"),
        *norm("blocks/mlp_norm", "h.{}.ln_2"),
        *pairs("blocks/mlp/up", "h.{}.mlp.c_fc"),
        *pairs("blocks/mlp/down", "h.{}.mlp.c_proj"),
        *norm("final_norm", "ln_f"),
    ]
    for number, name in enumerate(("query", "key", "value")):
        table += pairs(f"blocks/attention/{name}", "h.{}.attn.c_attn", part=(number, 3))
    return table


def modernbert_entries() -> list[Entry]:
    """ModernBERT's, without biases: query, key and value are one map, gate and up another."""
    table = [
        Entry("embedding", "embeddings.tok_embeddings.weight"),
        *norm("embedding_norm", "embeddings.norm", bias=False),
        *norm("blocks/attention_norm", "layers.{}.attn_norm", bias=False),
        *pairs("blocks/attention/out", "layers.{}.attn.Wo", True, bias=False),
        *norm("blocks/mlp_norm", "layers.{}.mlp_norm", bias=False),
        *pairs("blocks/mlp/gate", "layers.{}.mlp.Wi", True, (0, 2), bias=False),
        *pairs("blocks/mlp/up", "layers.{}.mlp.Wi", True, (1, 2), bias=False),
        *pairs("blocks/mlp/down", "layers.{}.mlp.Wo", True, bias=False),
        *norm("final_norm", "final_norm", bias=False),
    ]
    for number, name in enumerate(("query", "key", "value")):
        table += pairs(f"blocks/attention/{name}", "layers.{}.attn.Wqkv", True, (number, 3), bias=False)
    return table


def starcoder2_entries() -> list[Entry]:
    """Starcoder2's: a decoder before whose branches the norms stand, with rotary positions."""
    layer = "layers.{}."
    table = [
        Entry("embedding", "embed_tokens.weight"),
        *norm("blocks/attention_norm", f"{layer}input_layernorm"),
        *norm("blocks/mlp_norm", f"{layer}post_attention_layernorm"),
        *pairs("blocks/mlp/up", f"{layer}mlp.c_fc", True),
        *pairs("blocks/mlp/down", f"{layer}mlp.c_proj", True),
        *norm("final_norm", "norm"),
    ]
    for name, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
        table += pairs(f"blocks/attention/{name}", f"{layer}self_attn.{theirs}", True)
    return table


GELU = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


def one_of(config: dict[str, Any], key: str, choices: dict[Any, Any], default: Any) -> Any:
    """What a value of config.json means here.

    Raises:
      ValueError: this encoder has no such thing.
    """
    value = config.get(key, default)
    if value not in choices:
        raise ValueError(f"config.json: {key}={value!r}; this encoder knows {', '.join(map(repr, choices))}")
    return choices[value]


def sizes(layers: int, width: int, heads: int, d_ff: int) -> dict[str, Any]:
    """What all families share."""
    if width % heads:
        raise ValueError(f"config.json: a width of {width} does not divide over {heads} heads")
    plain = dict(position="learned", norm="layernorm", bias=True, causal=False, local_window=0, embedding_dim=0)
    counts = dict(num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads, head_dim=width // heads, d_ff=d_ff)
    return plain | counts


def bert_config(config: dict[str, Any]) -> dict[str, Any]:
    """BERT's, RoBERTa's."""
    one_of(config, "position_embedding_type", {"absolute": None}, "absolute")
    return sizes(
        config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    ) | dict(
        norm_position="post",
        final_norm=False,
        embedding_norm=True,
        mlp=one_of(config, "hidden_act", GELU, "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )


def distilbert_config(config: dict[str, Any]) -> dict[str, Any]:
    """DistilBERT's."""
    return sizes(config["n_layers"], config["dim"], config["n_heads"], config["hidden_dim"]) | dict(
        norm_position="post",
        final_norm=False,
        embedding_norm=True,
        mlp=one_of(config, "activation", GELU, "gelu"),
        norm_eps=1e-12,
    )


def gpt2_config(config: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's."""
    for key, usual in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        one_of(config, key, {usual: None}, usual)
    width = config["n_embd"]
    return sizes(config["n_layer"], width, config["n_head"], config.get("n_inner") or 4 * width) | dict(
        norm_position="pre",
        final_norm=True,
        embedding_norm=False,
        causal=True,
        mlp=one_of(config, "activation_function", GELU, "gelu_new"),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
    )


def modernbert_config(config: dict[str, Any]) -> dict[str, Any]:
    """ModernBERT's."""
    for key in ("attention_bias", "mlp_bias", "norm_bias"):
        one_of(config, key, {False: None}, False)
    gelu = one_of(config, "hidden_activation", GELU, "gelu")
    # Newer files write the bases of the rotary positions by kind of layer.
    rope = config.get("rope_parameters") or {}
    return sizes(
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
        global_every=config.get("global_attn_every_n_layers", 3),
        rope_theta=float(rope.get("full_attention", {}).get("rope_theta") or config.get("global_rope_theta", 160_000.0)),
        local_rope_theta=float(rope.get("sliding_attention", {}).get("rope_theta") or config.get("local_rope_theta", 10_000.0)),
    )


def starcoder2_config(config: dict[str, Any]) -> dict[str, Any]:
    """Starcoder2's; `is_causal` false (transformers ≥ 5) makes it an encoder that sees both sides."""
    one_of(config, "use_bias", {True: None}, True)
    one_of(config, "sliding_window", {None: None}, None)
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    return sizes(config["num_hidden_layers"], config["hidden_size"], heads, config["intermediate_size"]) | dict(
        num_kv_heads=config.get("num_key_value_heads") or heads,
        norm_position="pre",
        final_norm=True,
        embedding_norm=False,
        position="rotary",
        causal=config.get("is_causal", True),
        mlp=one_of(config, "hidden_act", GELU, "gelu_pytorch_tanh"),
        norm_eps=config.get("norm_epsilon", 1e-5),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
    )


ACTIVATION = {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "geglu": "gelu_pytorch_tanh", "geglu_exact": "gelu"}


def shared(model: dict[str, Any]) -> dict[str, Any]:
    """What BERT, ModernBERT and Starcoder2 call by one name."""
    return dict(
        hidden_size=model["d_model"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        intermediate_size=model["d_ff"],
        attention_dropout=model["attention_dropout"],
    )


def write_bert(model: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `bert_config`."""
    dropout = dict(hidden_dropout_prob=model["dropout"], attention_probs_dropout_prob=model["attention_dropout"])
    other = dict(hidden_act=ACTIVATION.get(model["mlp"], "gelu"), layer_norm_eps=model["norm_eps"], type_vocab_size=1)
    return shared(model) | dropout | other


def write_gpt2(model: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `gpt2_config`."""
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


def write_modernbert(model: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `modernbert_config`."""
    bases = {"full_attention": model["rope_theta"], "sliding_attention": model["local_rope_theta"]}
    return shared(model) | dict(
        hidden_activation=ACTIVATION.get(model["mlp"], "gelu"),
        norm_eps=model["norm_eps"],
        local_attention=2 * model["local_window"],
        global_attn_every_n_layers=model["global_every"],
        rope_parameters={name: {"rope_type": "default", "rope_theta": theta} for name, theta in bases.items()},
        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), False),
        **dict.fromkeys(("embedding_dropout", "mlp_dropout"), model["dropout"]),
    )


def write_starcoder2(model: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `starcoder2_config`."""
    return shared(model) | dict(
        num_key_value_heads=model["num_kv_heads"],
        hidden_act=ACTIVATION.get(model["mlp"], "gelu_pytorch_tanh"),
        norm_epsilon=model["norm_eps"],
        is_causal=model["causal"],
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        use_cache=False,
        **dict.fromkeys(("embedding_dropout", "residual_dropout"), model["dropout"]),
    )


def family_of(model: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family that an encoder with layers belongs to, and its config.json but for the sizes of its tables.

    Biases that ours lacks are theirs at zero.

    Raises:
      ValueError: it is of no family; the message says by which keys it misses each.
    """
    misses = []
    for name, family in FAMILIES.items():
        if family.write is None:
            continue
        written = family.write(model)
        read = family.config(written) | {"embedding_dim": model["embedding_dim"]}  # the projection is a module of its own
        wrong = [key for key, value in read.items() if model[key] != value and not (key == "bias" and value)]
        if not wrong:
            return name, written | {"model_type": name}
        wanted = ", ".join(f"{key}={read[key]!r} (is {model[key]!r})" for key in wrong)
        misses.append(f"{name} with {wanted}")
    raise ValueError(f"config.model: transformers has no such encoder; it would be {'; '.join(misses)}")


FAMILIES = {
    "bert": Family(bert_entries(), bert_config, "bert.", write_bert),
    "roberta": Family(bert_entries(), bert_config, "roberta."),
    "distilbert": Family(distilbert_entries(), distilbert_config, "distilbert."),
    "gpt2": Family(gpt2_entries(), gpt2_config, "transformer.", write_gpt2),
    "modernbert": Family(
        modernbert_entries(), modernbert_config, "model.", write_modernbert, missing=r"layers\.0\.attn_norm\.weight"
    ),
    "starcoder2": Family(starcoder2_entries(), starcoder2_config, "model.", write_starcoder2),
}
