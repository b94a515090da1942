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

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from perceptio_hf.processing.pictures import load_picture
from perceptio_hf.tokens import depth_span, picture_mark

from .depth_maps import DepthMap
from .encoded import as_code_lists, as_list, load_depth, load_mask, open_encoded
from .owners import SPAN, owners_of
from .run_length import RunLengths
from .sample_error import SampleError

_DEPTH_TOKEN = re.compile(r"<DEPTH_(?:START|END|\d+)>")
_TRANSPOSED = 0.05  # relative difference of side ratios up to which a depth map counts as lying on its side


class Sample(TypedDict, total=False):
    """What a sample may hold; only `messages` is needed. A value of None counts as absent; any other key is an error.

    images: pictures in reading order: paths, data: URLs, PIL, uint8 arrays (H, W, 3), encoded bytes, or what
        `datasets.Image` gives.
    messages: the chat. `content` is a string, or parts {"type": "text", "text": ...} and {"type": "image"}; ``<image>``
        in a text is the place of a picture too. Where there is no place, all pictures come before the first words of
        the user. Every turn of the assistant is learnt; in it ``[SEG]`` and ``<DEPTH_START><DEPTH_END>`` (an empty
        span, at most one per picture) are spatial tokens, and ``Image-2:`` says that those behind it speak of the
        second picture (the rule: `perceptio_hf.tokens`).
    masks: one per ``[SEG]`` in reading order, of its picture's size: COCO run lengths or polygons, or a path, an array
        (H, W) or a grey picture, where 0 is outside. Floats up to 1 are probabilities. What could be meant in two ways
        is an error.
    depth: one depth map for each empty span (a list where there are several): a path (.png, .tif, .npy, .npz), an array
        (H, W) or a grey picture.
    depth_unit: what the numbers of `depth` are: "mm", "m", "disparity" or "relative".
    depth_valid: like one of `masks`; outside where `depth` has no reading.
    depth_codes: instead of `depth`: the N codes of the span (a list of lists where there are several).
    mask_pictures: optional, to be checked: the picture each mask lies on, as an index (0, 1, ...) of `images`.
    depth_pictures: the same for each depth span.
    task: a name for counting.
    id: a name for error messages.
    """

    images: list[Any]
    messages: list[dict]
    masks: list[RunLengths | Any]
    depth: Any
    depth_unit: str
    depth_valid: RunLengths | Any
    depth_codes: list[int]
    mask_pictures: list[int]
    depth_pictures: list[int]
    task: str
    id: str


SAMPLE_KEYS = tuple(Sample.__annotations__)


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
    except ValueError as error:
        reason = error.reason if isinstance(error, SampleError) else "conversation"
        raise SampleError(f"Sample {name_of(sample, position)}: {error}", reason) from None


def check_sample(sample: Mapping[str, Any], *, num_depth_tokens: int = 100, num_depth_codes: int = 128) -> None:
    """Raise what `load_sample` raises, and keep nothing."""
    load_sample(sample, num_depth_tokens=num_depth_tokens, num_depth_codes=num_depth_codes)


def name_of(sample: Mapping[str, Any], position: int | None = None) -> str:
    """The sample's `id`, or else its place, its first picture's file and the beginning of its words."""
    if not isinstance(sample, Mapping):
        return f"number {position}"
    if sample.get("id") is not None:
        return repr(sample["id"])
    place = [] if position is None else [f"number {position} of its batch"]
    images = sample.get("images", sample.get("image"))
    first = images[0] if isinstance(images, (list, tuple)) and images else images
    path = first.get("path") if isinstance(first, Mapping) else first
    file = [os.fspath(path)[:200]] if isinstance(path, (str, os.PathLike)) else []
    said = str(sample.get("messages", sample.get(CONVERSATIONS, "")))[:2000]
    words = re.search(r"'(?:content|text|value)': '([^']{1,40})", said)
    return " ".join([*place, "(" + ", ".join([*file, *([repr(words[1])] if words else [])]) + ")"])


def _load(sample: Mapping[str, Any], num_depth_tokens: int, num_depth_codes: int) -> LoadedSample:
    if not isinstance(sample, Mapping):
        raise SampleError(f"it is a {type(sample).__name__}; a sample is a dict with `messages` and `images`.")
    sample = as_sample(sample, SAMPLE_KEYS)
    messages = _messages(sample.get("messages"))
    sources = _picture_sources(sample, messages)
    depths, codes = _depth_of(sample), _codes_of(sample)
    if depths and codes:
        raise SampleError("it has both `depth` and `depth_codes`; give one of them.", "depth")
    given: list[DepthMap | list[int]] = [*depths, *codes]
    filled = _fill_spans(messages, given, num_depth_tokens, num_depth_codes)
    owners = owners_of(sample, messages, bool(sources))
    pictures = [_picture(source) for source in sources]
    masks = _masks_of(sample, owners[0], pictures)
    for depth, owner in zip(filled, owners[1], strict=True):
        if depth is not None:
            _check_orientation(depth, pictures[owner])
    return LoadedSample(pictures, messages, masks, filled, *owners)


def _messages(value: Any) -> list[dict]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or not value:
        raise SampleError(f"its `messages` are {str(value)[:40]!r}; expected a list of turns.")
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> dict:
    """A copy whose content is a list of parts; what the assistant says is one part."""
    role, content = check_message(message)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [read_part(part) for part in content]
    if role == "assistant":
        if any(part["type"] != "text" or PICTURE_TOKEN in part["text"] for part in parts):
            raise SampleError("the assistant's turn holds a picture; pictures belong to the user's turns.")
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
        if not parts[0]["text"].strip():
            raise SampleError("a turn of the assistant has no words; there is nothing to learn.")
    else:
        parts = [
            piece for part in parts for piece in (split_at_pictures(part["text"]) if "text" in part else [dict(part)])
        ]
    return {"role": role, "content": parts}


def _picture_sources(sample: Mapping[str, Any], messages: list[dict]) -> list:
    """The pictures, each with its place in `messages` (which is changed: places hold no sources any more)."""
    if not any(message["role"] == "assistant" for message in messages):
        raise SampleError("it has no turn of the assistant, which is what is learnt; add one to `messages`.")
    sources = as_list(sample.get("images"))
    places = [part for message in messages for part in message["content"] if part["type"] == "image"]
    named = [picture for part in places if (picture := picture_of(part)) is not None]
    for part in places:
        for key in PART_KEYS:
            part.pop(key, None)
    if not sources:
        sources = named
    elif named:
        raise SampleError("it names pictures both in `images` and in `messages`; keep them in `images`.", "picture")
    if sources and not places:
        user = next((message for message in messages if message["role"] == "user"), None)
        if user is None:
            raise SampleError("it has pictures, but no turn of the user to show them in.")
        user["content"][:0] = places = [{"type": "image"} for _ in sources]
    if len(places) != len(sources):
        raise SampleError(
            f"its messages show {len(places)} pictures (parts, or {PICTURE_TOKEN}), but {len(sources)} are given; "
            "give one for each.",
            "picture",
        )
    return sources


def _picture(source: Any) -> Image.Image:
    try:
        return load_picture(open_encoded(source))
    except Exception as error:  # whatever a file or a value makes Pillow or numpy raise is an error of this sample
        raise SampleError(str(error) or type(error).__name__, "picture") from None


def _depth_of(sample: Mapping[str, Any]) -> list[DepthMap]:
    """The depth maps given, read."""
    sources, valids = as_list(sample.get("depth")), as_list(sample.get("depth_valid"))
    unit = sample.get("depth_unit")
    if sources and not isinstance(unit, str):
        raise SampleError('it has `depth` but no `depth_unit`; say "mm", "m", "disparity" or "relative".', "depth")
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
    """A depth map may have any size, but one that lies while its picture stands was not turned with it."""
    height, width = depth.relative.shape
    mirrored = height / width * (picture.height / picture.width)
    if abs(mirrored - 1) < _TRANSPOSED and abs(height / width - 1) > 2 * _TRANSPOSED:
        raise SampleError(
            f"its depth map is {width} x {height} and its picture, shown upright, {picture.width} x {picture.height}; "
            "turn the depth map as well.",
            "depth",
        )


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
        part["text"] = SPAN.sub(lambda _: texts.pop(0), part["text"])
    if empty != len(given):
        raise SampleError(
            f"it has {empty} empty depth spans (<DEPTH_START><DEPTH_END>) in the assistant's words, but depth for "
            f"{len(given)}; write one span for each depth map or list of codes.",
            "depth",
        )
    return spans


def _spans_of(text: str) -> list[list[int]]:
    """The codes of the spans in one response; an empty list for an empty span."""
    found = [[int(code) for code in re.findall(r"\d+", match[1])] for match in SPAN.finditer(text)]
    broken = _DEPTH_TOKEN.search(SPAN.sub("", text))
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
