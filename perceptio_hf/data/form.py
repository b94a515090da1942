"""The form of a sample: which keys it has, and how LLaVA's JSON files become samples of ours.

LLaVA's form, which many data sets have:

    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
            {"from": "gpt", "value": "White and red."},
        ],
    }

It may also hold the other keys of ours, such as `masks`. Keys that neither form has are left out there: in other
people's files they say where a sample comes from.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .encoded import as_list
from .run_length import RunLengths

CONVERSATIONS = "conversations"
PICTURE_TOKEN = "<image>"  # where a picture stands inside a text, in LLaVA's files and in ours
PART_KEYS = ("image", "path", "url", "base64", "image_url")  # of a part of a message that names its picture itself
_MEANT = {
    "images": ("image", "img", "imgs", "image_path", "image_paths", "picture", "pictures", "photo", "photos"),
    "messages": ("message", "conversation", CONVERSATIONS, "chat", "dialog", "turns", "texts"),
    "masks": ("mask", "segmentation", "segmentations", "polygons", "rle", "label_mask"),
    "depth": ("depths", "depth_map", "depth_maps", "depth_path", "disparity"),
    "depth_codes": ("codes", "depth_tokens"),
}
REASONS = ("conversation", "picture", "masks", "depth", "codes", "length")  # why a sample can be unusable
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PICTURES = ("image", "images")
_NO_NOTES = {name for names in _MEANT.values() for name in names} | {"video", "videos", "audio"}  # but content
_PLACE = re.compile(re.escape(PICTURE_TOKEN) + r"\n?")  # chat templates begin a line after a picture themselves


class Sample(TypedDict, total=False):
    """What a sample may hold; only `messages` is needed. A value of None counts as absent; any other key is an error.

    images: pictures in reading order: paths, data: URLs, PIL, uint8 arrays (H, W, 3), encoded bytes, or what
        `datasets.Image` gives.
    messages: the chat. `content` is a string, or parts {"type": "text", "text": ...} and {"type": "image"}; ``<image>``
        in a text is the place of a picture too. A part may name its picture itself, as `image`, `path`, `url`, `base64`
        or as OpenAI's {"type": "image_url", "image_url": {"url": ...}}: a file or a data: URL. Where there is no place,
        all pictures come before the first words of the user. Every turn of the assistant is learnt; in it ``[SEG]`` and
        ``<DEPTH_START><DEPTH_END>`` (an empty span, at most one per picture) are spatial tokens, and ``Image-2:`` says
        that those behind it speak of the second picture (the rule: `perceptio_hf.tokens`).
    masks: one per ``[SEG]`` in reading order, of its picture's size: COCO run lengths or polygons, or a path, an array
        (H, W) or a grey picture, where 0 is outside. Floats up to 1 are probabilities. What could be meant in two ways
        is an error.
    depth: one depth map for each empty span (a list where there are several): a path (.png, .tif, .npy, .npz), an array
        (H, W) or a grey picture.
    depth_unit: what the numbers of `depth` are: "mm", "m", "m/256", "disparity" or "relative".
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


class SampleError(ValueError):
    """A sample that cannot be learnt from; `reason` is one of `REASONS`."""

    def __init__(self, message: str, reason: str = "conversation"):
        super().__init__(message)
        self.reason = reason


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


def as_sample(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same sample, turned into our form where it has LLaVA's.

    Raises:
        SampleError: for a key that a sample does not have, with the one that may have been meant.
    """
    is_llava = CONVERSATIONS in sample and sample.get("messages") is None
    if is_llava:
        sample = from_llava(sample)
    unknown = {key: meant_by(key) for key in sample if key not in SAMPLE_KEYS}
    if is_llava:  # other people's files hold notes of their own; what looks like content is no note
        unknown = {key: meant for key, meant in unknown.items() if key in _NO_NOTES}
        sample = {key: value for key, value in sample.items() if key in SAMPLE_KEYS}
    for key, meant in unknown.items():
        hint = f"did you mean `{meant}`?" if meant else f"a sample has {', '.join(SAMPLE_KEYS)}."
        raise SampleError(f"it has the unknown key {key!r}; {hint} Rename it, or leave it out.")
    return sample


def meant_by(key: Any) -> str | None:
    """The key of a sample that somebody may have meant by another."""
    exact = next((right for right, wrong in _MEANT.items() if str(key).lower() in wrong), None)
    return exact or next(iter(difflib.get_close_matches(str(key), SAMPLE_KEYS, n=1, cutoff=0.7)), None)


def from_llava(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with `conversations` -> one with `messages` and `images`; its other keys stay.

    Raises:
        SampleError: for turns of another form or by others than human, gpt and system.
    """
    turns = sample[CONVERSATIONS]
    if not isinstance(turns, (list, tuple)):
        raise SampleError(f"its `conversations` are {str(turns)[:40]!r}; expected a list of turns.")
    given = [sample[key] for key in _PICTURES if sample.get(key) is not None]
    if len(given) > 1:
        raise SampleError("it has both `image` and `images`; give one of them.")
    rest = {key: value for key, value in sample.items() if key not in (CONVERSATIONS, *_PICTURES)}
    return rest | {"messages": [_message(turn) for turn in turns]} | ({"images": given[0]} if given else {})


def _message(turn: Any) -> dict[str, Any]:
    known = isinstance(turn, Mapping) and isinstance(turn.get("value"), str)
    role = _ROLES.get(str(turn.get("from")).lower()) if known else None
    if role is None:
        raise SampleError(
            f"a turn of `conversations` is {{'from': 'human', 'gpt' or 'system', 'value': ...}}, not {str(turn)[:80]}."
        )
    return {"role": role, "content": turn["value"]}


def check_message(message: Any) -> tuple[str, str | Sequence]:
    """Role and content of a message.

    Raises:
        SampleError: where it has no such form.
    """
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        raise SampleError(
            f"`from` and `value` are keys of LLaVA's form; name the list of turns `{CONVERSATIONS}` then."
        )
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if not role or not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
        raise SampleError(f"a message is {{'role': ..., 'content': ...}}, not {str(message)[:80]}.")
    unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if isinstance(content, str):
        _check_text(content)
    if unknown:
        raise SampleError(f"a message has the unknown key {unknown[0]!r}; it has `role` and `content`. Leave it out.")
    return role, content


def read_part(part: Any) -> dict:
    """A part without the gaps that columns fill with None.

    Raises:
        SampleError: where it is neither a text nor a picture.
    """
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = given.get("type")
    is_text = kind == "text" and isinstance(given.get("text"), str) and len(given) == 2
    is_picture = kind == "image" and len(given) <= 2 and not set(given) - {"type", *PART_KEYS[:-1]}
    if kind == "image_url" and len(given) == 2 and isinstance(_url(given.get("image_url")), str):
        given, is_picture = {"type": "image", "url": _url(given["image_url"])}, True
    if not is_text and not is_picture:
        raise SampleError(f"a part of a message is a text or an image, not {str(part)[:80]}.")
    if is_text:
        _check_text(given["text"])
    else:
        check_here(picture_of(given))
    return given


def _url(value: Any) -> Any:
    """What OpenAI's `image_url` names: it is {"url": ..., "detail": ...}, or the address alone."""
    return value.get("url") if isinstance(value, Mapping) else value


def check_here(picture: Any) -> None:
    """Raises SampleError for an address elsewhere: it would be asked for again in every epoch, by every process."""
    if isinstance(picture, Mapping):
        picture = None if picture.get("bytes") is not None else picture.get("path")
    if isinstance(picture, str) and picture[:8].lower().startswith(("http://", "https://")):
        raise SampleError(
            f"its picture {picture[:80]} lies elsewhere; download it, and give its path or a data: URL.", "picture"
        )


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SampleError(
            f"a text holds half a character, {text.encode('ascii', 'backslashreplace')[:60]!r}."
        ) from None


def picture_of(part: Mapping[str, Any]) -> Any:
    """The picture that a part of a message names itself, or None."""
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    return next(
        (_url(part[key]) if key == "image_url" else part[key] for key in PART_KEYS if part.get(key) is not None), None
    )


def split_at_pictures(text: str) -> list[dict[str, str]]:
    """A text as parts of a message: words, and a picture wherever `<image>` stands."""
    words = _PLACE.split(text)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(words):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return parts or [{"type": "text", "text": text}]


def read_messages(value: Any) -> list[dict]:
    """The turns of a conversation, every content a list of parts; what the assistant says is one part.

    Raises:
        SampleError: where they have no such form.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or not value:
        raise SampleError(f"its `messages` are {str(value)[:40]!r}; expected a list of turns.")
    return [_read_message(message) for message in value]


def _read_message(message: Any) -> dict:
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


def picture_sources(images: Any, messages: list[dict]) -> list:
    """The pictures, each with its place in `messages` (which is changed: places hold no sources any more).

    Args:
        images: the sample's own.

    Raises:
        SampleError: where there are more pictures than places, or fewer.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise SampleError("it has no turn of the assistant, which is what is learnt; add one to `messages`.")
    sources = as_list(images)
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
