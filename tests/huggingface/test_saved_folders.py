"""Folders that today's sentence-transformers saves: the same vectors here, whatever their pooling, prompts and Dense."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers
from hf_folders import WORDS

from contrastive_jax.config import UserError
from contrastive_jax.inference import text_model
from contrastive_jax.inference.tokenize import NO_SIDE

torch = pytest.importorskip("torch")
st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # torch's and transformers' own

TEXTS = ["the cat sat on a mat", "  a red hat ", "one big dog ran", "Blue", "", "the cat " * 40]
SIZES = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
PROMPTS = {"query": "a small cat ", "document": "the Big dog "}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random weights and a tokenizer, as transformers saves them: BERT, ModernBERT and GPT-2."""
    root = tmp_path_factory.mktemp("plain")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=32
    )
    special = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    configs = {
        "bert": transformers.BertConfig(**SIZES, max_position_embeddings=40),
        "modernbert": transformers.ModernBertConfig(**SIZES, **special, local_attention=4, global_attn_every_n_layers=2),
        "gpt2": transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=4, n_positions=40),
    }
    torch.manual_seed(0)
    for name, config in configs.items():
        model = transformers.AutoModel.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():  # so that no bias is 0 and no scale is 1
                weight.add_(0.2 * torch.randn(weight.shape))
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return root


def save(
    plain: pathlib.Path, folder: pathlib.Path, family: str, *modules: object, lower: bool = False, **more: object
) -> object:
    """Saves a model of these modules as sentence-transformers does, and returns it."""
    main = st.base.modules.Transformer(str(plain / family), do_lower_case=lower)
    model = st.SentenceTransformer(modules=[main, *modules], device="cpu", **more)
    model.save(str(folder))
    return model


def pooling(mode: object, **more: object) -> object:
    return st.sentence_transformer.modules.Pooling(16, mode, **more)


def dense(width: int, out: int, activation: object, **more: object) -> object:
    torch.manual_seed(width)
    return st.base.modules.Dense(width, out, activation_function=activation, **more)


def check(model: object, folder: pathlib.Path, texts: list[str] = TEXTS) -> text_model.TextModel:
    """The folder's vectors, on both sides and on none, are the model's, to 1e-5."""
    loaded = text_model.load(f"hf:{folder}")
    for ours, theirs in (
        (loaded.encode_query, model.encode_query),
        (loaded.encode_document, model.encode_document),
        (functools.partial(loaded.encode, view=NO_SIDE), model.encode),
    ):
        np.testing.assert_allclose(ours(texts), theirs(texts, normalize_embeddings=True), atol=1e-5)
    return loaded


@pytest.mark.parametrize(
    ("mode", "family", "include_prompt"),
    [
        *((mode, "bert", False) for mode in ("cls", "mean", "lasttoken", "max")),
        *((mode, "bert", True) for mode in ("cls", "lasttoken")),
        ("mean", "modernbert", False),
        ("lasttoken", "gpt2", True),
    ],
)
def test_row_7_every_pooling_with_and_without_the_prompt(
    mode: str, family: str, include_prompt: bool, plain: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    normalize = st.base.modules.Normalize()
    model = save(
        plain, tmp_path / "saved", family, pooling(mode, include_prompt=include_prompt), normalize, prompts=PROMPTS, lower=True
    )
    loaded = check(model, tmp_path / "saved")
    assert loaded.tokenize(TEXTS) == [
        model.preprocess([text], prompt=PROMPTS["query"])["input_ids"][0].tolist() for text in TEXTS
    ]
    if mode != "lasttoken":
        model.set_pooling_include_prompt(not include_prompt)
        assert np.abs(model.encode_query(TEXTS[:3]) - loaded.encode_query(TEXTS[:3])).max() > 1e-3
    assert ("include_prompt" in loaded.protocol()) == (not include_prompt)


def test_row_7_layers_one_after_another(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    identity, tanh = torch.nn.Identity, torch.nn.Tanh
    shapes = {
        "gemma": [dense(16, 24, identity(), bias=False), dense(24, 12, identity(), bias=False)],
        "deep": [dense(16, 24, tanh()), dense(24, 8, identity(), bias=False), dense(8, 12, tanh(), bias=False)],
        "one": [dense(16, 12, None)],
        "labse": [dense(16, 12, tanh())],
    }
    for name, layers in shapes.items():
        model = save(plain, tmp_path / name, "bert", pooling("mean"), *layers, st.base.modules.Normalize())
        loaded = check(model, tmp_path / name)
        assert loaded.dim == 12 and loaded.model_config.embedding_dim == 12 * (
            name == "one"
        )  # as a run with a projection has it
    # An encoder without biases may have layers with biases.
    model = save(plain, tmp_path / "modern", "modernbert", pooling("mean"), *shapes["one"])
    check(model, tmp_path / "modern")


def test_weights_of_tokens(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    known = {word: 0.1 * number for number, word in enumerate(WORDS[:-3], 1)}  # the others have the weight of unknown words
    words = st.sentence_transformer.modules.WordWeights(list(WORDS), known, unknown_word_weight=2.5)
    for layers in ([], [dense(16, 12, torch.nn.Tanh())]):
        folder = tmp_path / f"layers{len(layers)}"
        loaded = check(save(plain, folder, "bert", words, pooling("mean"), *layers), folder)
        assert loaded.model_config.token_weights
    weightless = st.sentence_transformer.modules.WordWeights(list(WORDS), known | {"cat": 0.0})
    save(plain, tmp_path / "zero", "bert", weightless, pooling("mean"))
    with pytest.raises(UserError, match="config.json: the weight of 'cat' is not above 0"):
        text_model.load(f"hf:{tmp_path / 'zero'}")


def test_row_7_prompts_are_those_of_sentence_transformers(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cases = [
        {"document": "a red ", "query": "a cat "},
        {"query": "a cat ", "passage": "the dog "},
        {"query": "a cat ", "document": "the mat ", "passage": "the dog ", "corpus": "a hat "},
        {"corpus": "the dog ", "STS": "a mat "},
    ]
    for number, prompts in enumerate(cases):
        folder = tmp_path / str(number)
        model = save(
            plain, folder, "bert", pooling("mean", include_prompt=False), prompts=prompts, default_prompt_name=[*prompts][-1]
        )
        loaded = check(model, folder)
        for name in prompts:
            z = model.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
            np.testing.assert_allclose(loaded.encode(TEXTS, name), z, atol=1e-5)
        with pytest.raises(ValueError, match=r"view='x': choose one of query, document"):
            loaded.encode(TEXTS, "x")


def test_row_7_a_static_embedding_with_layers(tmp_path: pathlib.Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    bag = st.sentence_transformer.modules.StaticEmbedding(tokenizer, embedding_dim=16)
    layers = [dense(16, 24, torch.nn.Tanh()), dense(24, 12, None)]
    model = st.SentenceTransformer(modules=[bag, *layers, st.base.modules.Normalize()], prompts=PROMPTS, device="cpu")
    model.save(str(tmp_path / "saved"))
    check(model, tmp_path / "saved", [*TEXTS, "a dog " * 400])  # it has no limit


def test_layers_of_modernbert_in_any_order_that_this_encoder_has(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number, kinds in enumerate((["full"] * 2, ["full", "sliding"], ["sliding", "full"])):
        model = shutil.copytree(plain / "modernbert", tmp_path / f"plain{number}")
        config = json.loads((model / "config.json").read_text())
        config.pop("global_attn_every_n_layers", None)
        config["layer_types"] = [f"{kind}_attention" for kind in kinds]
        (model / "config.json").write_text(json.dumps(config))
        saved = save(tmp_path, tmp_path / str(number), model.name, pooling("mean"))
        if kinds[0] == "full":
            check(saved, tmp_path / str(number))
        else:
            with pytest.raises(UserError, match=r"layer_types=.*; this encoder has global layers at 0, n, 2n, ... alone"):
                text_model.load(f"hf:{tmp_path / str(number)}")


def test_what_cannot_be_is_refused_in_one_line(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    normalize = st.base.modules.Normalize

    def refusal(name: str, *modules: object) -> str:
        save(plain, tmp_path / name, "bert", *modules)
        with pytest.raises(UserError) as error:
            text_model.load(f"hf:{tmp_path / name}")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "by cls, mean; this encoder knows" in refusal("two", pooling(("cls", "mean")))
    assert "by weightedmean; this encoder knows" in refusal("weighted", pooling("weightedmean"))
    relu = dense(16, 12, torch.nn.ReLU())
    assert "activation_function=torch.nn.modules.activation.ReLU; this encoder has" in refusal("relu", pooling("mean"), relu)
    residual = dense(16, 16, torch.nn.Tanh(), use_residual=True)
    assert "use_residual=True; this encoder has no such layer" in refusal("residual", pooling("mean"), residual)
    tokens = dense(16, 12, None, module_input_name="token_embeddings", module_output_name="token_embeddings")
    assert "module_input_name=token_embeddings, module_output_name=token_embeddings;" in refusal(
        "tokens", pooling("mean"), tokens
    )
    early = refusal("early", pooling("mean"), normalize(), dense(16, 12, None))
    assert "modules Transformer, Pooling, Normalize, Dense; this encoder has one of each" in early


def test_the_limit_of_tokens_is_that_of_sentence_transformers(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = save(plain, tmp_path / "saved", "bert", pooling("mean"))
    model.max_seq_length = 20
    model.save(str(tmp_path / "saved"))
    assert check(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu"), tmp_path / "saved").max_tokens == 20
    (tmp_path / "saved" / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 24})
    )  # as older versions wrote it
    assert check(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu"), tmp_path / "saved").max_tokens == 24
