"""A run's tokenizer as one of the `tokenizers` library (tokenizer.json), for those who load an export.

Of a SentencePiece model: the same ids, but for pieces of the same score: "=" twenty times may become 16 + 4 here and 4 + 16
there. Beside it, a U+2581 in the text, which SentencePiece writes for a space, is read as a space, and where a vocabulary lacks
their letters, texts like "<0x41>" and "[bos]" are read as those pieces.
"""

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

from contrastive_jax.data.json_tokenizer import JsonTokenizer
from contrastive_jax.data.tokenizer import LINE_PIECES, RESERVED_PIECES, Tokenizer

# The reserved ids by names that texts do not have: `tokenizers` finds special tokens in a text too.
NAMES = {name: f"[{name}]" for name in RESERVED_PIECES}
PROMPTS = {"query": "query: ", "document": "document: "}
NEVER = -1000.0  # score of pieces that are not found in a text


def convert(words: Tokenizer | JsonTokenizer, length: int, delimiters: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """The tokenizer, which cuts a text at `length` ids and wraps it.

    Args:
      words: trained by `tokenizer.train`, or from the ecosystem.
      length: ids, delimiters included.
      delimiters: () for none; ("x", ) or ("y", ): each text is wrapped as that view; ("x", "y"): a text that begins with one of
        PROMPTS as its view. A text that is cut then loses its closing delimiter: `tokenizers` cuts after it has been put.

    Raises:
      ValueError: the SentencePiece model is from elsewhere, or the two views of another tokenizer need their delimiters.
    """
    made = convert_json(words, delimiters) if isinstance(words, JsonTokenizer) else convert_sentencepiece(words, delimiters)
    made.enable_truncation(length)
    return made


def convert_json(words: JsonTokenizer, delimiters: tuple[str, ...]) -> tokenizers.Tokenizer:
    """One that comes from there goes back as it is, with our delimiters where it had none."""
    made = tokenizers.Tokenizer.from_str(words.model.decode())
    made.no_padding()
    if delimiters and words.wrapped:  # [CLS] and [SEP], for both views
        return made
    if len(delimiters) > 1:
        raise ValueError("--view=both: this tokenizer cannot tell the views apart; export with --view=query or --view=document")
    new = sorted((index, NAMES[name]) for name, index in words.reserved.items() if index >= made.get_vocab_size())
    made.add_special_tokens([AddedToken(piece, special=True) for _, piece in new])
    if [made.token_to_id(piece) for _, piece in new] != [index for index, _ in new]:
        raise ValueError("tokenizer.json: its added ids do not follow its vocabulary")
    wrap(made, words.reserved, delimiters)
    return made


def wrap(made: tokenizers.Tokenizer, reserved: dict[str, int], delimiters: tuple[str, ...]) -> None:
    """Puts the delimiters of the view, if there is one, around every text, and nothing else."""
    ids = [(NAMES[name], reserved[name]) for view in delimiters for name in (f"{view}_open", f"{view}_close")]
    around = f"{ids[0][0]} $A {ids[1][0]}" if ids else "$A"
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)


def convert_sentencepiece(words: Tokenizer, delimiters: tuple[str, ...]) -> tokenizers.Tokenizer:
    """SentencePiece's unigram model with bytes, spaces written as ▁, its rules as those of `tokenizers`."""
    processor = words.processor
    if any(processor.piece_to_id(piece) != index for index, piece in enumerate(RESERVED_PIECES.values())):
        raise ValueError("tokenizer.model is not of `prepare`'s own training; only those are exported")
    # A piece of the user's weighs as much as the best piece for each of its bytes (SentencePiece's unigram model).
    size = processor.get_piece_size()
    found = [i for i in range(size) if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))]
    best = max(processor.get_score(i) for i in found if processor.id_to_piece(i) not in LINE_PIECES)
    vocabulary = [(processor.id_to_piece(i), NEVER) for i in range(size)]
    for i in found:
        piece = processor.id_to_piece(i)
        vocabulary[i] = (piece, len(piece.encode()) * best - 0.1 if piece in LINE_PIECES else processor.get_score(i))
    for name, piece in NAMES.items():
        vocabulary[words.reserved[name]] = (piece, NEVER)
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=processor.unk_id(), byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    special = [NAMES["pad"]]
    # What the rules put is found again as a special token, so both see the text after them.
    rules: list[normalizers.Normalizer] = []
    for view, prompt in zip(delimiters, PROMPTS.values(), strict=False) if len(delimiters) > 1 else ():
        # \K: what stands before it is kept.
        rules.append(normalizers.Replace(Regex(rf"\A{prompt}[\s\S]*?\K\s*\z"), NAMES[f"{view}_close"]))
        rules.append(normalizers.Replace(Regex(rf"\A{prompt}\s*"), NAMES[f"{view}_open"]))
    rules += [normalizers.Replace(Regex(r"\A\s+|\s+\z"), "")]
    made.normalizer = normalizers.Sequence([*rules, normalizers.Replace(" ", "▁")])
    if len(delimiters) == 1:
        wrap(made, words.reserved, delimiters)
    if delimiters:
        special += [piece for name, piece in NAMES.items() if name.endswith(("_open", "_close"))]
    made.add_special_tokens([AddedToken(piece, special=True, normalized=True) for piece in special])
    return made
