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
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

CONVERSATIONS = "conversations"
PICTURE_TOKEN = "<image>"  # where a picture stands inside a text, in LLaVA's files and in ours
PART_KEYS = ("image", "path", "url", "base64")  # of a part of a message that names its picture itself
_MEANT = {
    "images": ("image", "img", "imgs", "image_path", "image_paths", "picture", "pictures", "photo", "photos"),
    "messages": ("message", "conversation", CONVERSATIONS, "chat", "dialog", "turns", "texts"),
    "masks": ("mask", "segmentation", "segmentations", "polygons", "rle", "label_mask"),
    "depth": ("depths", "depth_map", "depth_maps", "depth_path", "disparity"),
    "depth_codes": ("codes", "depth_tokens"),
}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PICTURES = ("image", "images")
_NO_NOTES = {name for names in _MEANT.values() for name in names} | {"video", "videos", "audio"}  # but content
_PLACE = re.compile(re.escape(PICTURE_TOKEN) + r"\n?")  # chat templates begin a line after a picture themselves


def as_sample(sample: Mapping[str, Any], known: Collection[str]) -> Mapping[str, Any]:
    """The same sample, turned into our form where it has LLaVA's.

    Args:
        known: the keys of a sample.

    Raises:
        ValueError: for a key that a sample does not have, with the one that may have been meant.
    """
    is_llava = CONVERSATIONS in sample and sample.get("messages") is None
    if is_llava:
        sample = from_llava(sample)
    unknown = {key: meant_by(key, known) for key in sample if key not in known}
    if is_llava:  # other people's files hold notes of their own; what looks like content is no note
        unknown = {key: meant for key, meant in unknown.items() if key in _NO_NOTES}
        sample = {key: value for key, value in sample.items() if key in known}
    for key, meant in unknown.items():
        hint = f"did you mean `{meant}`?" if meant else f"a sample has {', '.join(known)}."
        raise ValueError(f"it has the unknown key {key!r}; {hint} Rename it, or leave it out.")
    return sample


def meant_by(key: Any, known: Collection[str]) -> str | None:
    """The key of a sample that somebody may have meant by another."""
    exact = next((right for right, wrong in _MEANT.items() if str(key).lower() in wrong), None)
    return exact or next(iter(difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)), None)


def from_llava(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with `conversations` -> one with `messages` and `images`; its other keys stay.

    Raises:
        ValueError: for turns of another form or by others than human, gpt and system.
    """
    turns = sample[CONVERSATIONS]
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"its `conversations` are {str(turns)[:40]!r}; expected a list of turns.")
    given = [sample[key] for key in _PICTURES if sample.get(key) is not None]
    if len(given) > 1:
        raise ValueError("it has both `image` and `images`; give one of them.")
    rest = {key: value for key, value in sample.items() if key not in (CONVERSATIONS, *_PICTURES)}
    return rest | {"messages": [_message(turn) for turn in turns]} | ({"images": given[0]} if given else {})


def _message(turn: Any) -> dict[str, Any]:
    known = isinstance(turn, Mapping) and isinstance(turn.get("value"), str)
    role = _ROLES.get(str(turn.get("from")).lower()) if known else None
    if role is None:
        raise ValueError(
            f"a turn of `conversations` is {{'from': 'human', 'gpt' or 'system', 'value': ...}}, not {str(turn)[:80]}."
        )
    return {"role": role, "content": turn["value"]}


def check_message(message: Any) -> tuple[str, str | Sequence]:
    """Role and content of a message.

    Raises:
        ValueError: where it has no such form.
    """
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        raise ValueError(f"`from` and `value` are keys of LLaVA's form; name the list of turns `{CONVERSATIONS}` then.")
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if not role or not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
        raise ValueError(f"a message is {{'role': ..., 'content': ...}}, not {str(message)[:80]}.")
    unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if isinstance(content, str):
        _check_text(content)
    if unknown:
        raise ValueError(f"a message has the unknown key {unknown[0]!r}; it has `role` and `content`. Leave it out.")
    return role, content


def read_part(part: Any) -> dict:
    """A part without the gaps that columns fill with None.

    Raises:
        ValueError: where it is neither a text nor a picture.
    """
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = given.get("type")
    is_text = kind == "text" and isinstance(given.get("text"), str) and len(given) == 2
    if not is_text and (kind != "image" or len(given) > 2 or set(given) - {"type", *PART_KEYS}):
        raise ValueError(f"a part of a message is a text or an image, not {str(part)[:80]}.")
    if is_text:
        _check_text(given["text"])
    return given


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"a text holds half a character, {text.encode('ascii', 'backslashreplace')[:60]!r}.") from None


def picture_of(part: Mapping[str, Any]) -> Any:
    """The picture that a part of a message names itself, or None."""
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    return next((part[key] for key in PART_KEYS if part.get(key) is not None), None)


def split_at_pictures(text: str) -> list[dict[str, str]]:
    """A text as parts of a message: words, and a picture wherever `<image>` stands."""
    words = _PLACE.split(text)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(words):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return parts or [{"type": "text", "text": text}]
