"""Checks the messages of a conversation, reads their pictures, and keeps their words words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .pictures import load_picture

_ROLES = ("user", "assistant", "system", "developer", "tool")  # the usual ones, which hold no token
_PICTURE_KEYS = ("image", "url", "path", "base64")
# Texts of one message, in order, and whether the assistant says them -> the same with their tokens marked.
Marker = Callable[[Sequence[str], bool], list[str]]


def prepare_chat(chat: Any, mark: Marker, name: str = "") -> list[dict]:
    """A copy of one conversation with its pictures read and its texts marked.

    Args:
        mark: see `plain_text.mark_tokens`.
        name: put before the number of a message in errors.

    Raises:
        ValueError: names the message that is no message, has no or other content than text and pictures, a picture
            that cannot be read, or is a user's turn without words.
    """
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"{name}A conversation is a list of messages, not {_kind(chat)}.")
    return [_prepare(message, mark, f"{name}Message {index}") for index, message in enumerate(chat)]


def words_of(message: Mapping, where: str = "A message") -> list[str]:
    """The texts of a message, in order.

    Raises:
        ValueError: as `prepare_chat`, but pictures are not looked at.
    """
    return [part["text"] for part in _parts(message, where) if part["type"] == "text"]


def mark_strings(value: Any, mark: Callable[[str], str]) -> Any:
    """`value` with every string in its lists and mappings marked; keys and all else stay as they are."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {key: mark_strings(item, mark) for key, item in value.items()}
    return [mark_strings(item, mark) for item in value] if isinstance(value, (list, tuple)) else value


def _prepare(message: Any, mark: Marker, where: str) -> dict:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ValueError(f"{where} is {_kind(message)}; expected a mapping with role and content.")
    where = f"{where} ({role})"
    own = role == "assistant"
    if role not in _ROLES and mark([role], False) != [role]:
        raise ValueError(f"{where}: a role is a word such as user, system or assistant.")
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    prepared = {"role": role, **mark_strings(rest, lambda text: mark([_checked(text, where)], own)[0])}
    if message.get("content") is None and own and rest.get("tool_calls"):
        return prepared
    parts = _parts(message, where)
    texts = [part for part in parts if part["type"] == "text"]
    if role == "user" and not "".join(part["text"] for part in texts).strip():
        raise ValueError(f"{where}: the user's turn has no words: ask a question about the picture.")
    for part, text in zip(texts, mark([part["text"] for part in texts], own), strict=True):
        part["text"] = text
    for part in parts:
        if part["type"] == "image":
            _read_picture(part, where)
    return {**prepared, "content": parts}


def _parts(message: Mapping, where: str) -> list[dict]:
    """The content of a message as a new list of its parts, each of type text, with its text, or image."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}: its content is {_kind(content)}; expected text, or a list of parts.")
    return [_part(part, f"{where}, part {index}") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> dict:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {**part, "text": _checked(part.get("text"), where)}
    if kind == "image":
        return dict(part)
    if kind == "image_url":  # OpenAI's way to write it
        source = part.get("image_url")
        return {"type": "image", "url": source.get("url") if isinstance(source, Mapping) else source}
    if kind in ("video", "audio"):
        raise ValueError(f"{where}: Perceptio takes pictures, not {kind}.")
    came = f"of the type {kind!r}" if isinstance(part, Mapping) else _kind(part)
    raise ValueError(f"""{where} is {came}; expected {{"type": "text", "text": ...}} or {{"type": "image", ...}}.""")


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: its text is {_kind(text)}; expected words.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: its text holds {text[error.start]!r} at {error.start}, half a character (a lone surrogate); "
            "read it again with the encoding it was written in."
        ) from None
    return text


def _read_picture(part: dict, where: str) -> None:
    """Replace what names a picture by its pixels. A part without any stands for a picture that comes separately."""
    named = [key for key in _PICTURE_KEYS if part.get(key) is not None]
    if len(named) > 1:
        raise ValueError(f"{where}: a part of type image has {' and '.join(named)}; one part is one picture.")
    for key in _PICTURE_KEYS:
        source = part.pop(key, None)
        if key == "base64" and isinstance(source, str) and not source.startswith("data:"):
            source = f"data:image/png;base64,{source}"
        if source is not None:
            part["image"] = load_picture(source, copy=False)


def _kind(value: Any) -> str:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return "empty"
    return f"a {type(value).__name__}"
