"""The grammar of spatial tokens for engines that constrain what they sample: for xgrammar, llguidance and outlines.

`modeling/span_grammar.py` says what is allowed; this writes the same down, mode by mode, for engines that do not know
it. Depth codes are named by id wherever the engine can: a grammar of characters also admits ``<DEPTH_3>`` spelled by
ordinary tokens, which a tokenizer reads as the code but nobody can decode.
"""

import os
import re
from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from perceptio_hf.files import write_text
from perceptio_hf.modeling.span_grammar import SPATIAL_MODES
from perceptio_hf.processing.plain_text import structure_ids
from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN, SEG_TOKEN, SpatialVocabulary, depth_token

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

FOLDER = "grammars"  # beside the weights
TOKENS_BEFORE_SPAN = 64
# What a response is made of, for K pictures and at most B tokens in front of each span. `word` is a token of text,
# `free` one of text or [SEG]. EBNF and Lark write this alike.
_SHAPES = {
    "auto": "(free{0,B} span){0,K} free*",
    "none": "word*",
    "seg": "seg free*",
    "depth": "span{K} word*",
    "seg+depth": "(seg{1,B} span){K} word*",
}


def write_grammars(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    folder: str | os.PathLike,
    *,
    pictures: int = 1,
    tokens_before_span: int = TOKENS_BEFORE_SPAN,
) -> None:
    """Write `FOLDER`/MODE.ebnf, .lark and .regex into `folder`, and the same for 2 and more pictures in folders of
    their own, ``2-pictures`` and so on.

    Args:
        model, processor: the checkpoint; `processor` has the tokens that a response must not hold.
        pictures: the most pictures of one prompt to write grammars for.
        tokens_before_span: as in `span_grammar_texts`.

    Raises:
        ValueError: for less than one picture, or less than one token before a span.
    """
    words, forbidden = model.spatial_vocabulary(), forbidden_ids(model, processor)
    strings = processor.tokenizer.convert_ids_to_tokens(
        sorted(forbidden & set(processor.tokenizer.get_vocab().values()))
    )
    for count in range(1, pictures + 1) if pictures >= 1 else (pictures,):
        target = Path(folder, FOLDER) if count == 1 else Path(folder, FOLDER, f"{count}-pictures")
        target.mkdir(parents=True, exist_ok=True)
        for mode in SPATIAL_MODES:
            texts = span_grammar_texts(
                words, mode, forbidden=forbidden, strings=strings, pictures=count, tokens_before_span=tokens_before_span
            )
            for ending, text in texts.items():
                write_text(target / f"{mode}.{ending}", text)


def forbidden_ids(model: "PerceptioForConditionalGeneration", processor: "PerceptioProcessor") -> set[int]:
    """The ids that no response holds, spatial ones left aside: what conversations are built of, pictures, ends of
    turns, and rows of the vocabulary that no token uses."""
    tokenizer, words = processor.tokenizer, model.spatial_vocabulary()
    pictures = [processor.start_image_token, processor.end_image_token, processor.image_token, processor.video_token]
    used = set(tokenizer.get_vocab().values())
    unused = set(range(model.config.text_config.vocab_size)) - used
    return unused | structure_ids(tokenizer, str(processor.chat_template), pictures) | {words.image} | words.turn_ends


def most_tokens_with_spans(words: SpatialVocabulary, pictures: int, tokens_before_span: int) -> int:
    """The `max_tokens` below which an engine may cut a span that its grammar let begin."""
    return pictures * (tokens_before_span + words.span_length)


def span_grammar_texts(
    words: SpatialVocabulary,
    spatial: str,
    *,
    forbidden: Collection[int],
    strings: Iterable[str] = (),
    pictures: int = 1,
    tokens_before_span: int = TOKENS_BEFORE_SPAN,
) -> dict[str, str]:
    """The grammar of one mode by the ending of its file.

    "ebnf" is for xgrammar, "lark" for llguidance and xgrammar; both name tokens by id. "regex" is for what knows
    characters only: it keeps the beginnings of `strings` and of spatial tokens out of words, but cannot keep codes from
    being spelled.

    Args:
        spatial: one of `SPATIAL_MODES`.
        forbidden: ids that no response holds, see `forbidden_ids`.
        strings: the tokens of `forbidden` as text.
        pictures: of the prompt; a prompt without one takes the grammar of "none".
        tokens_before_span: the most tokens from the beginning, or the last span, to a span that follows (characters in
            the regular expression). A grammar does not know when the engine will stop, so this is what keeps a span
            from beginning too late: see `most_tokens_with_spans`.

    Raises:
        ValueError: for an unknown mode, less than one picture, or less than one token before a span.
    """
    if spatial not in SPATIAL_MODES:
        raise ValueError(f"spatial={spatial!r} is unknown; use one of {', '.join(map(repr, SPATIAL_MODES))}.")
    for name, value in (("pictures", pictures), ("tokens_before_span", tokens_before_span)):
        if value < 1:
            raise ValueError(f"{name} is {value}; a grammar with spans needs at least 1.")
    counts = {"B": str(tokens_before_span), "K": str(pictures)}
    shape = re.sub(r"\b[BK]\b", lambda name: counts[name[0]], _SHAPES[spatial])
    kept_out = {*forbidden, words.depth_start, words.depth_end, *words.codes}
    comment = f'Spatial mode "{spatial}", {pictures} picture{"s" * (pictures > 1)}.'
    if "span" in shape:
        least = most_tokens_with_spans(words, pictures, tokens_before_span)
        comment += f" With max_tokens below {least} a span may be cut."
    return {
        "ebnf": _ebnf(shape, words, kept_out, comment),
        "lark": _lark(shape, words, kept_out, comment),
        "regex": _regex(shape, words, strings),
    }


def _ebnf(shape: str, words: SpatialVocabulary, kept_out: set[int], comment: str) -> str:
    def ids(tokens: Iterable[int]) -> str:
        return ", ".join(map(str, sorted(tokens)))

    rules = {
        "free": f"ExcludeToken({ids(kept_out - {words.seg})})",
        "word": f"ExcludeToken({ids(kept_out | {words.seg})})",
        "seg": f"Token({words.seg})",
        "span": f"Token({words.depth_start}) code{{{words.num_depth_tokens}}} Token({words.depth_end})",
        "code": f"Token({ids(words.codes)})",
    }
    return f"# {comment}\nroot ::= {shape}\n" + "".join(f"{name} ::= {rules[name]}\n" for name in _used(shape))


def _lark(shape: str, words: SpatialVocabulary, kept_out: set[int], comment: str) -> str:
    rules = {
        "free": f"<[^{_ranges(kept_out - {words.seg})}]>",
        "word": f"<[^{_ranges(kept_out | {words.seg})}]>",
        "seg": f"<[{words.seg}]>",
        "span": f"<[{words.depth_start}]> code{{{words.num_depth_tokens}}} <[{words.depth_end}]>",
        "code": f"<[{_ranges(words.codes)}]>",
    }
    return f"// {comment}\nstart: {shape}\n" + "".join(f"{name}: {rules[name]}\n" for name in _used(shape))


def _regex(shape: str, words: SpatialVocabulary, strings: Iterable[str]) -> str:
    spatial = (SEG_TOKEN, DEPTH_START_TOKEN, DEPTH_END_TOKEN)
    first = "".join(sorted({re.escape(text[0]) for text in (*strings, *spatial)}))
    word, seg = f"[^{first}]", re.escape(SEG_TOKEN)
    codes = "|".join(re.escape(depth_token(code)) for code in range(len(words.codes)))
    span = f"{DEPTH_START_TOKEN}(?:{codes}){{{words.num_depth_tokens}}}{DEPTH_END_TOKEN}"
    rules = {"free": f"(?:{word}|{seg})", "word": word, "seg": f"(?:{seg})", "span": f"(?:{span})"}
    expression = shape.replace(" ", "").replace("(", "(?:")
    return re.sub("|".join(rules), lambda name: rules[name[0]], expression)


def _used(shape: str) -> list[str]:
    """The rules that a shape needs, in a fixed order."""
    return [name for name in ("free", "word", "seg", "span") if name in shape] + ["code"] * ("span" in shape)


def _ranges(tokens: Iterable[int]) -> str:
    """Ids as llguidance reads them: 1-3,7."""
    ordered = sorted(tokens)
    starts = [ordered[0], *(after for before, after in pairwise(ordered) if after != before + 1)]
    ends = [*(before for before, after in pairwise(ordered) if after != before + 1), ordered[-1]]
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )
