"""Converts a run's tokenizer to one of the `tokenizers` library (tokenizer.json), which comes with an export.

A SentencePiece model gives the same ids, except that among pieces of the same score another split may be chosen: "=" twenty
times may become 16 + 4 in one and 4 + 16 in the other. Besides, U+2581 in a text, which SentencePiece writes for a space, is
read as a space; and where a vocabulary lacks their letters, texts like "<0x41>" and "[bos]" are read as those pieces.
"""

import json

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer_json
from contrastive_jax.data.pieces import RESERVED_PIECES
from contrastive_jax.data.tokenizer import LINE_PIECES, Tokenizer
from contrastive_jax.data.tokenizer_json import JsonTokenizer

# The reserved ids get names that texts do not contain, since `tokenizers` finds special tokens in a text too.
NAMES = {name: f"[{name}]" for name in RESERVED_PIECES}
PROMPTS = {"query": "query: ", "document": "document: "}
# View → the reserved names of its delimiters.
DELIMITERS = dict(zip(PROMPTS, tokenizer_json.DELIMITERS, strict=True))
STRIP = normalizers.Replace(Regex(r"\A\s+|\s+\z"), "")
NEVER = -1000.0  # the score of pieces that are not to be found in a text


def convert(
    tokenizer: Tokenizer | JsonTokenizer, max_tokens: int, views: tuple[str, ...] = (), special_tokens: bool = True
) -> tokenizers.Tokenizer:
    """Converts a tokenizer to one that also truncates a text and puts the delimiters around it.

    Args:
      tokenizer: from `data.tokenizer.train`, or from a tokenizer.json.
      max_tokens: ids per text, delimiters included.
      views: () for no delimiters; ("query",) or ("document",): each text gets the delimiters of that view; both: a text that
        begins with one of PROMPTS gets those of its view. A text that is truncated then loses its closing delimiter, because
        `tokenizers` truncates after the delimiters were put.
      special_tokens: whether a tokenizer.json keeps its special tokens. A StaticEmbedding would only find them in texts.

    Raises:
      UserError: the SentencePiece model is from elsewhere, or a tokenizer.json cannot tell the two views apart.
    """
    if isinstance(tokenizer, JsonTokenizer):
        converted = convert_json(tokenizer, views, special_tokens)
    else:
        converted = convert_sentencepiece(tokenizer, views)
    converted.enable_truncation(max_tokens)
    return converted


def convert_json(tokenizer: JsonTokenizer, views: tuple[str, ...], special_tokens: bool) -> tokenizers.Tokenizer:
    """Returns a tokenizer.json that strips texts, as `RunTokenize` does, with delimiters where it has no template of its own.

    Raises:
      UserError: it has no delimiters of its own and shall serve both views, or ids cannot be added after its vocabulary.
    """
    description = json.loads(tokenizer.model)
    if not special_tokens:
        description["added_tokens"] = [token for token in description["added_tokens"] if not token["special"]]
        description["post_processor"] = None
    converted = tokenizers.Tokenizer.from_str(json.dumps(description))
    converted.no_padding()
    converted.normalizer = normalizers.Sequence([STRIP, *filter(None, (converted.normalizer, tokenizer.blanking))])
    if not special_tokens:
        return converted
    if views and tokenizer.has_template:  # which is that of both views
        return converted
    if len(views) > 1:
        raise UserError("--view=both: this tokenizer cannot tell the views apart; export with --view=query or --view=document")
    vocab_size = converted.get_vocab_size()
    added = sorted((index, NAMES[name]) for name, index in tokenizer.reserved.items() if index >= vocab_size)
    converted.add_special_tokens([AddedToken(piece, special=True) for _, piece in added])
    if [converted.token_to_id(piece) for _, piece in added] != [index for index, _ in added]:
        raise UserError("tokenizer.json: its added ids do not follow its vocabulary, so no delimiters can be added")
    wrap(converted, tokenizer.reserved, views)
    return converted


def wrap(converted: tokenizers.Tokenizer, reserved: dict[str, int], views: tuple[str, ...]) -> None:
    """Makes a tokenizer put the delimiters of the view, if there is one, around every text, and nothing else."""
    delimiters = [(NAMES[name], reserved[name]) for view in views for name in DELIMITERS[view]]
    template = f"{delimiters[0][0]} $A {delimiters[1][0]}" if delimiters else "$A"
    converted.post_processor = processors.TemplateProcessing(single=template, special_tokens=delimiters)


def convert_sentencepiece(tokenizer: Tokenizer, views: tuple[str, ...]) -> tokenizers.Tokenizer:
    """Converts SentencePiece's unigram model with bytes, with spaces written as ▁.

    Raises:
      UserError: `prepare` did not train the model; the rules of others are not known.
    """
    processor = tokenizer.processor
    if any(processor.piece_to_id(piece) != index for index, piece in enumerate(RESERVED_PIECES.values())):
        raise UserError("tokenizer.model was not trained by `prepare`; only such tokenizers can be exported")
    converted = tokenizers.Tokenizer(models.Unigram(scored_pieces(tokenizer), unk_id=processor.unk_id(), byte_fallback=True))
    converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    by_prompt = prompt_rules(views) if len(views) > 1 else []
    converted.normalizer = normalizers.Sequence([*by_prompt, STRIP, normalizers.Replace(" ", "▁")])
    if len(views) == 1:
        wrap(converted, tokenizer.reserved, views)
    special = [NAMES["pad"]]
    if views:
        special += [piece for name, piece in NAMES.items() if name.endswith(("_open", "_close"))]
    converted.add_special_tokens([AddedToken(piece, special=True, normalized=True) for piece in special])
    return converted


def scored_pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Returns the vocabulary of a SentencePiece model in the order of its ids, as (piece, score).

    Pieces with the score NEVER are those that do not stand for text: reserved, unknown and byte pieces.
    """
    processor = tokenizer.processor
    size = processor.get_piece_size()
    text_ids = [i for i in range(size) if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))]
    # SentencePiece scores a user-defined piece by its bytes: each counts as the best score of any piece, and 0.1 is subtracted.
    best = max(processor.get_score(i) for i in text_ids if processor.id_to_piece(i) not in LINE_PIECES)
    pieces = [(processor.id_to_piece(i), NEVER) for i in range(size)]
    for i in text_ids:
        piece = processor.id_to_piece(i)
        pieces[i] = (piece, len(piece.encode()) * best - 0.1 if piece in LINE_PIECES else processor.get_score(i))
    for name, piece in NAMES.items():
        pieces[tokenizer.reserved[name]] = (piece, NEVER)
    return pieces


def prompt_rules(views: tuple[str, ...]) -> list[normalizers.Normalizer]:
    """Returns the rules that turn a view's prompt into its opening delimiter and append the closing one.

    They write the delimiters' names into the text, where `tokenizers` then finds them as special tokens.
    """
    rules: list[normalizers.Normalizer] = []
    for view in views:
        opening, closing = (NAMES[name] for name in DELIMITERS[view])
        # \K keeps what was matched before it.
        rules.append(normalizers.Replace(Regex(rf"\A{PROMPTS[view]}[\s\S]*?\K\s*\z"), closing))
        rules.append(normalizers.Replace(Regex(rf"\A{PROMPTS[view]}\s*"), opening))
    return rules
