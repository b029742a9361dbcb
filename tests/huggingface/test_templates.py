"""A tokenizer's own template is kept: training, a run and its exported folder read the ids that transformers gives."""

import pathlib

import numpy as np
import pytest
import tokenizers
from hf_folders import write_run
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer as tokenizer_lib
from contrastive_jax.data import views
from contrastive_jax.inference import export, text_model
from contrastive_jax.inference.tokenize import RunTokenize

CORPUS = [f"the cat {i} sat on a mat, a dog {i * i} ran over the lazy fox" for i in range(60)]
TEXTS = ["the cat 7 sat", "  a dog ran ", "<|endoftext|> a fox </s>", "a cat " * 30, "x"]
MAX_TOKENS = 12
# Special tokens and template as of Qwen3-Embedding, Llama 3, EmbeddingGemma, XLM-R and T5.
TEMPLATES = {
    "qwen": (["<|endoftext|>", "<|im_end|>"], "$A <|endoftext|>"),
    "llama": (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|> $A"),
    "gemma": (["<pad>", "<eos>", "<bos>", "<mask>"], "<bos> $A <eos>"),
    "xlmr": (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>"),
    "t5": (["<pad>", "</s>", "<unk>"], "$A </s>"),
}


def write_tokenizer(folder: pathlib.Path, name: str) -> pathlib.Path:
    special, template = TEMPLATES[name]
    if "<unk>" in special:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    else:
        made = tokenizers.Tokenizer(models.BPE())
        made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    ids = [(piece, made.token_to_id(piece)) for piece in special]
    of_template = processors.TemplateProcessing(single=template, special_tokens=ids)
    byte_level = [processors.ByteLevel(trim_offsets=False)] if name == "llama" else []
    made.post_processor = processors.Sequence([*byte_level, of_template]) if byte_level else of_template
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def training_rows(loaded: tokenizer_lib.JsonTokenizer, texts: list[str], length: int) -> list[list[int]]:
    """The rows of a batch whose pairs have these texts as both views, of `length` tokens."""
    ids = loaded.encode_batch([text.strip() for text in texts])
    delimiters = views.delimiter_ids({"reserved": loaded.reserved}, 2)
    sizes = np.array([len(row) for row in ids])
    room = length - (delimiters[0] >= 0).sum()
    begin = np.repeat((np.cumsum(sizes) - sizes)[:, None], 2, axis=1)
    size = np.repeat(np.minimum(sizes, room)[:, None], 2, axis=1).astype(np.int32)
    made = views.make_views(np.concatenate(ids).astype(np.int32), begin, size, length, delimiters)
    rows, segments = made.tokens[:, :, 0], made.segment[:, :, 0]
    np.testing.assert_array_equal(rows[:, 0], rows[:, 1])
    return [row[segment > 0].tolist() for row, segment in zip(rows[:, 0], segments[:, 0], strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(name: str, tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = tokenizer_lib.load(write_tokenizer(tmp_path / name, name))
    assert isinstance(loaded, tokenizer_lib.JsonTokenizer) and loaded.has_template
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / name / "tokenizer.json"), split_special_tokens=True
    )
    texts = [text.strip() for text in TEXTS]
    expected = other(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    run = RunTokenize(lambda: loaded, delimiters=True, max_tokens=MAX_TOKENS)
    assert run(TEXTS, "query").rows == run(TEXTS, "document").rows == expected
    assert training_rows(loaded, TEXTS, MAX_TOKENS) == expected
    # Only names without a piece get an id after the vocabulary, and never a delimiter or the padding.
    added = {key for key, index in loaded.reserved.items() if index >= len(other)}
    assert added <= {"bos", "mask"} and loaded.vocab_size == len(other) + len(added)
    assert loaded.decode(loaded.encode(texts[0])).strip() == texts[0]


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("name", ["qwen", "llama", "xlmr"])
def test_the_exported_folder_sends_what_training_saw(name: str, tmp_path: pathlib.Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    loaded = tokenizer_lib.load(write_tokenizer(tmp_path / name, name))
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", "starcoder2", loaded, pooling="eos", token_weights=False, max_length=MAX_TOKENS)
    model = text_model.load(str(tmp_path / "run"))
    export.export(model, tmp_path / "out")  # which compares the vectors
    exported = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    sent: list[list[int]] = []
    preprocess = exported.preprocess

    def record(texts: list[str], **more: object) -> dict:
        features = preprocess(texts, **more)
        sent.extend(ids[mask > 0].tolist() for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True))
        return features

    exported.preprocess = record
    for encode in (exported.encode_query, exported.encode_document):
        for text in TEXTS:
            encode([text])
    assert sent == 2 * training_rows(loaded, TEXTS, MAX_TOKENS)
    again = text_model.load(str(tmp_path / "out"))
    assert again.tokenize(TEXTS) == sent[: len(TEXTS)]
    np.testing.assert_allclose(again.encode(TEXTS), exported.encode(TEXTS), atol=1e-5)


def test_a_template_of_more_tokens_is_refused(tmp_path: pathlib.Path) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[A]": 1, "[B]": 2, "[UNK]": 3}, "[UNK]"))
    made.post_processor = processors.TemplateProcessing(single="[A] [B] $A", special_tokens=[("[A]", 1), ("[B]", 2)])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer.json: its template puts 2 tokens before a text and 0 after it"):
        tokenizer_lib.load(tmp_path)
