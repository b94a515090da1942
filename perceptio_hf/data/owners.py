"""Which picture of a sample each of its masks and depth spans belongs to, by the words it is written with."""

import re
from bisect import bisect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from perceptio_hf.tokens import (
    PICTURE_MARK,
    SEG_TOKEN,
    SpatialSequence,
    SpatialVocabulary,
    picture_mark,
    read_sequence,
)

from .encoded import as_list
from .sample_error import SampleError

SPAN = re.compile(r"<DEPTH_START>((?:<DEPTH_\d+>)*)<DEPTH_END>")
_SEG_OR_SPAN = re.compile(re.escape(SEG_TOKEN) + "|" + SPAN.pattern)
_SPATIAL = re.compile(rf"(?P<mark>{PICTURE_MARK.pattern})|{_SEG_OR_SPAN.pattern}")

_SEG, _START, _CODE, _END, _IMAGE, _TURN_END, _WORDS, _MARKS = range(8)  # marks have ids from _MARKS on
_SCAN_VOCABULARY = SpatialVocabulary(
    seg=_SEG,
    depth_start=_START,
    depth_end=_END,
    codes=(_CODE,),
    num_depth_tokens=1,
    image=_IMAGE,
    turn_ends=frozenset([_TURN_END]),
)


def owners_of(sample: Mapping[str, Any], messages: list[dict], has_pictures: bool) -> tuple[list[int], list[int]]:
    """The index of the picture that each [SEG], and that each depth span, speaks of.

    Args:
        sample: whose `mask_pictures` and `depth_pictures`, if any, must say the same.
        messages: with every content a list of parts.

    Raises:
        SampleError: where words speak of a picture that was not shown, or of another than the sample says, or one
            response writes two spans for one picture.
    """
    read = _read(messages, has_pictures)
    masks, spans = [seg.picture for seg in read.segs], [span.picture for span in read.spans]
    _check_owners(sample, "mask_pictures", masks, "mask", SEG_TOKEN)
    _check_owners(sample, "depth_pictures", spans, "depth", "<DEPTH_START><DEPTH_END>")
    return masks, spans


def _read(messages: list[dict], has_pictures: bool) -> SpatialSequence:
    """The [SEG] and spans with their pictures, by the rule of `perceptio_hf.tokens`, on a sketch of the token ids."""
    ids: list[int] = []
    ends: list[int] = []  # where each message ends
    marks: dict[int, str] = {}
    for message in messages:
        shown = sum(token == _IMAGE for token in ids)
        for part in message["content"]:
            if part["type"] == "image":
                ids += [_IMAGE, _WORDS]
            elif message["role"] == "assistant":
                _check_pictures_named(part["text"], shown, has_pictures)
                for match in _SPATIAL.finditer(part["text"]):
                    ids += _sketch(match, marks)
        ids.append(_TURN_END)
        ends.append(len(ids))
    read = read_sequence(ids, replace(_SCAN_VOCABULARY, mark_pieces=marks))
    _check_one_span_each(read, ends)
    return read


def _sketch(match: re.Match, marks: dict[int, str]) -> list[int]:
    """Token ids that stand for one match of `_SPATIAL`; the id of a mark joins `marks`."""
    if match["mark"]:
        token = _MARKS + len(marks)
        marks[token] = match["mark"]
        return [_WORDS, token]
    return [_SEG] if match[0] == SEG_TOKEN else [_START, _CODE, _END]


def _check_pictures_named(text: str, shown: int, has_pictures: bool) -> None:
    """Whether a response with spatial tokens speaks of pictures that were shown before it."""
    spatial = _SEG_OR_SPAN.search(text)
    if not spatial:
        return
    if not shown:
        what = SEG_TOKEN if spatial[0] == SEG_TOKEN else "a depth span"
        way = "show the picture in a turn before it" if has_pictures else "give the picture in `images`"
        raise SampleError(f"it has {what} but no picture; {way}.", "picture")
    for mark in PICTURE_MARK.finditer(text):
        if int(mark[1]) > shown:
            raise SampleError(
                f"the assistant writes {mark[0]} where {shown} pictures have been shown; a mark before [SEG] or a "
                "depth span counts the conversation's pictures from 1.",
                "picture",
            )


def _check_one_span_each(read: SpatialSequence, ends: list[int]) -> None:
    seen = set()
    for span in read.spans:
        place = bisect(ends, span.position), span.picture
        if place in seen:
            raise SampleError(
                f"one response holds two depth spans for {picture_mark(span.picture + 1)[:-1]}; write at most one for "
                "each picture, in the order they were shown or behind its mark (Image-2: <DEPTH_START><DEPTH_END>).",
                "depth",
            )
        seen.add(place)


def _check_owners(sample: Mapping[str, Any], key: str, owners: list[int], what: str, token: str) -> None:
    """Whether the pictures that a sample names for its masks (or spans) are those its words speak of."""
    given = as_list(sample.get(key))
    if not given:
        return
    if not all(type(named) is int for named in given):
        raise SampleError(f"its {key} are {given!r}; expected whole numbers, the indices of its `images`.", "picture")
    if len(given) != len(owners):
        raise SampleError(f"its {key} name {len(given)} pictures, but its words hold {len(owners)} {token}.", "picture")
    for index, (named, owner) in enumerate(zip(given, owners, strict=True)):
        if named != owner:
            raise SampleError(
                f"{what} {index} belongs to picture {named} of `images` ({key}), but its {token} speaks of picture "
                f"{owner}: write `{picture_mark(named + 1)} {token}`. A mark counts pictures from 1.",
                "picture",
            )
