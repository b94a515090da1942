"""One training sample: pictures, a conversation about them, and the masks and depth that its spatial tokens stand for.

Every task has this one form, whether it comes from a folder, from `datasets`, or from a list of dicts:

    {
        "images": ["kitchen.jpg"],
        "messages": [
            {"role": "user", "content": "Which mug is nearer?"},
            {"role": "assistant", "content": "[SEG][SEG]<DEPTH_START><DEPTH_END>The red mug."},
        ],
        "masks": [{"size": [480, 640], "counts": "..."}, {"size": [480, 640], "counts": "..."}],
        "depth": "kitchen.depth.png",
        "depth_unit": "mm",
    }

`load_sample` reads one and checks that its parts fit one another.
"""

import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from perceptio_hf.processing.pictures import load_picture
from perceptio_hf.tokens import (
    PICTURE_MARK,
    SEG_TOKEN,
    SpatialSequence,
    SpatialVocabulary,
    depth_span,
    picture_mark,
    read_sequence,
)

from .depth_maps import UNITS, DepthMap
from .encoded import as_code_lists, as_list, load_depth, load_mask, open_encoded
from .form import REASONS as REASONS
from .form import Sample as Sample
from .form import SampleError, as_sample, check_here, name_of, picture_sources, read_messages

_SPAN = re.compile(r"<DEPTH_START>((?:<DEPTH_\d+>)*)<DEPTH_END>")
_DEPTH_TOKEN = re.compile(r"<DEPTH_(?:START|END|\d+)>")
_SEG_OR_SPAN = re.compile(re.escape(SEG_TOKEN) + "|" + _SPAN.pattern)
_SPATIAL = re.compile(rf"(?P<mark>{PICTURE_MARK.pattern})|{_SEG_OR_SPAN.pattern}")


@dataclass(frozen=True, eq=False)
class LoadedSample:
    """A checked sample, everything in memory.

    Args:
        pictures: RGB, upright, in reading order.
        messages: the chat, every content a list of parts; spans are written out with their codes, or with code 0 where
            they come as a depth map.
        masks: bool (H, W), one per [SEG] in reading order.
        depths: one per span in reading order; None where the span was given as codes.
        mask_pictures, depth_pictures: index of the picture that each [SEG] and each span speaks of.
    """

    pictures: list[Image.Image]
    messages: list[dict]
    masks: list[np.ndarray]
    depths: list[DepthMap | None]
    mask_pictures: list[int]
    depth_pictures: list[int]


def load_sample(
    sample: Mapping[str, Any], *, num_depth_tokens: int, num_depth_codes: int, position: int | None = None
) -> LoadedSample:
    """Read the pictures, masks and depth of a sample and check them against its conversation.

    Args:
        sample: see `Sample`.
        num_depth_tokens, num_depth_codes: N and K of the codec.
        position: where the sample stands, for messages about a sample without `id`.

    Raises:
        SampleError: naming the sample and what to do, with the reason.
    """
    try:
        return _load(sample, num_depth_tokens, num_depth_codes)
    except SampleError as error:
        raise SampleError(f"Sample {name_of(sample, position)}: {error}", error.reason) from None


def check_sample(sample: Mapping[str, Any], *, num_depth_tokens: int = 100, num_depth_codes: int = 128) -> None:
    """Raise what `load_sample` raises, and keep nothing."""
    load_sample(sample, num_depth_tokens=num_depth_tokens, num_depth_codes=num_depth_codes)


def _load(sample: Mapping[str, Any], num_depth_tokens: int, num_depth_codes: int) -> LoadedSample:
    if not isinstance(sample, Mapping):
        raise SampleError(f"it is a {type(sample).__name__}; a sample is a dict with `messages` and `images`.")
    sample = as_sample(sample)
    messages = read_messages(sample.get("messages"))
    sources = picture_sources(sample.get("images"), messages)
    depths, codes = _depth_of(sample), _codes_of(sample)
    if depths and codes:
        raise SampleError("it has both `depth` and `depth_codes`; give one of them.", "depth")
    given: list[DepthMap | list[int]] = [*depths, *codes]
    filled = _fill_spans(messages, given, num_depth_tokens, num_depth_codes)
    read = _read_pictures(messages, bool(sources))
    owners = [seg.picture for seg in read.segs], [span.picture for span in read.spans]
    _check_owners(sample, "mask_pictures", owners[0], "mask", SEG_TOKEN)
    _check_owners(sample, "depth_pictures", owners[1], "depth", "<DEPTH_START><DEPTH_END>")
    pictures = [_picture(source) for source in sources]
    masks = _masks_of(sample, owners[0], pictures)
    for depth, owner in zip(filled, owners[1], strict=True):
        if depth is not None:
            _check_orientation(depth, pictures[owner])
    return LoadedSample(pictures, messages, masks, filled, *owners)


def _picture(source: Any) -> Image.Image:
    check_here(source)
    try:
        return load_picture(open_encoded(source))
    except Exception as error:  # whatever a file or a value makes Pillow or numpy raise is an error of this sample
        raise SampleError(str(error) or type(error).__name__, "picture") from None


def _depth_of(sample: Mapping[str, Any]) -> list[DepthMap]:
    """The depth maps given, read."""
    sources, valids = as_list(sample.get("depth")), as_list(sample.get("depth_valid"))
    unit = sample.get("depth_unit")
    if sources and not isinstance(unit, str):
        raise SampleError(f"it has `depth` but no `depth_unit`; say one of {', '.join(UNITS)}.", "depth")
    if valids and len(valids) != len(sources):
        raise SampleError(f"it has {len(sources)} depth maps, but {len(valids)} in `depth_valid`.", "depth")
    return [_depth(source, unit, valid) for source, valid in zip(sources, valids or [None] * len(sources), strict=True)]


def _codes_of(sample: Mapping[str, Any]) -> list[list[int]]:
    try:
        return as_code_lists(sample.get("depth_codes"))
    except (TypeError, ValueError):
        raise SampleError(f"its `depth_codes` are {str(sample['depth_codes'])[:40]!r}, no list.", "codes") from None


def _depth(source: Any, unit: str, valid: Any) -> DepthMap:
    try:
        return load_depth(source, unit, None if valid is None else load_mask(valid))
    except Exception as error:  # as for pictures
        raise SampleError(f"its depth cannot be used: {error or type(error).__name__}", "depth") from None


def _check_orientation(depth: DepthMap, picture: Image.Image) -> None:
    try:
        depth.check_orientation(picture.size)
    except ValueError as error:
        raise SampleError(str(error), "depth") from None


def _check_codes(codes: Sequence[int], num_depth_tokens: int, num_depth_codes: int) -> None:
    if len(codes) != num_depth_tokens:
        raise SampleError(
            f"a depth span has {len(codes)} codes; this model's codec writes {num_depth_tokens}. Encode the depth map "
            "with this codec.",
            "codes",
        )
    wrong = [code for code in codes if type(code) is not int or not 0 <= code < num_depth_codes]
    if wrong:
        raise SampleError(
            f"a depth span has code {wrong[0]!r}; codes are whole numbers 0 to {num_depth_codes - 1}.", "codes"
        )


def _fill_spans(
    messages: list[dict], given: list[DepthMap | list[int]], num_depth_tokens: int, num_depth_codes: int
) -> list[DepthMap | None]:
    """Write the codes of every span into `messages`; returns the depth map of each, or None."""
    rest, spans, empty = list(given), [], 0
    texts: list[str] = []
    for message in messages:
        if message["role"] != "assistant":
            continue
        part = message["content"][0]
        for written in _spans_of(part["text"]):
            empty += not written
            source = written or (rest.pop(0) if rest else [0] * num_depth_tokens)
            is_map = isinstance(source, DepthMap)
            codes = [0] * num_depth_tokens if is_map else source
            _check_codes(codes, num_depth_tokens, num_depth_codes)
            spans.append(source if is_map else None)
            texts.append(depth_span(codes))
        part["text"] = _SPAN.sub(lambda _: texts.pop(0), part["text"])
    if empty != len(given):
        raise SampleError(
            f"it has {empty} empty depth spans (<DEPTH_START><DEPTH_END>) in the assistant's words, but depth for "
            f"{len(given)}; write one span for each depth map or list of codes.",
            "depth",
        )
    return spans


def _spans_of(text: str) -> list[list[int]]:
    """The codes of the spans in one response; an empty list for an empty span."""
    found = [[int(code) for code in re.findall(r"\d+", match[1])] for match in _SPAN.finditer(text)]
    broken = _DEPTH_TOKEN.search(_SPAN.sub("", text))
    if broken:
        raise SampleError(
            f"{broken[0]} stands outside of a depth span; a span is <DEPTH_START>, its codes without anything between "
            "them (or none, to have them filled in), and <DEPTH_END>.",
            "depth",
        )
    return found


def _masks_of(sample: Mapping[str, Any], owners: list[int], pictures: list[Image.Image]) -> list[np.ndarray]:
    sources = as_list(sample.get("masks"))
    if len(sources) != len(owners):
        raise SampleError(
            f"its conversation has {len(owners)} [SEG], but {len(sources)} masks are given; give one mask for each "
            "[SEG], in reading order.",
            "masks",
        )
    of_several = "; its [SEG] speaks of {} (write `Image-k: [SEG]` if it lies on another)" if pictures[1:] else ""
    return [
        _mask(item, index, pictures[owner], of_several.format(picture_mark(owner + 1)[:-1]))
        for index, (item, owner) in enumerate(zip(sources, owners, strict=True))
    ]


def _mask(source: Any, index: int, picture: Image.Image, which: str) -> np.ndarray:
    """`which` says in messages which of several pictures `picture` is."""
    wanted = (picture.height, picture.width)
    try:
        # The size that run lengths claim is looked at first: decoding would take as much memory as it says.
        claimed = source.get("size") if isinstance(source, Mapping) else None
        size = tuple(claimed) if claimed is not None else wanted
        mask = load_mask(source, wanted) if size == wanted else None
        size = size if mask is None else mask.shape
    except Exception as error:  # as for pictures
        raise SampleError(
            f"mask {index} cannot be read ({error or type(error).__name__}); give COCO run lengths "
            "{'size': [height, width], 'counts': ...}, its polygons, or a grey picture.",
            "masks",
        ) from None
    if mask is None or size != wanted:
        raise SampleError(
            f"mask {index} is {' x '.join(map(str, size[::-1]))} pixels and its picture {picture.width} x "
            f"{picture.height}; give masks at the size of the (upright) picture{which}.",
            "masks",
        )
    return mask


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


def _read_pictures(messages: list[dict], has_pictures: bool) -> SpatialSequence:
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
