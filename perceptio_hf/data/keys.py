"""Keys and values that people write, checked: an unknown key is named with the one that may have been meant."""

import dataclasses
import difflib
import os
import re
import types
import typing
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, TypeVar

_Built = TypeVar("_Built")
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "keys and values",
}


def check_keys(keys: Iterable[str], known: Iterable[str], place: str) -> None:
    """Raise ValueError for a key that is not known, with those that look like it."""
    known = list(known)
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sorted(known)[:20])}."
            raise ValueError(f"{place}: unknown key {key!r}; {hint}")


def check_value(place: str, value: Any, hint: Any, convert: Callable | None = None) -> None:
    """Raise ValueError unless `value` is of a type that `hint` allows. Texts may be what `convert` reads, as argparse
    would: YAML reads 1e-4 as a text."""
    allowed = _plain_types(hint)
    if not allowed or type(value) in allowed or (float in allowed and type(value) is int):
        return
    if isinstance(value, str) and convert is not None and not {list, dict} & allowed:
        try:
            convert(value)
            return
        except (ValueError, TypeError, ArgumentTypeError):
            pass
    expected = " or ".join(text for kind, text in _EXPECTED.items() if kind in allowed)
    raise ValueError(f"{place} must be {expected}, got {value!r}.")


def build(cls: type[_Built], values: Any, place: str) -> _Built:
    """`cls(**values)`, a dataclass, of what a YAML file has for it, where 1e-4 is a text.

    Raises:
        ValueError: `values` are no mapping, a key is unknown, a value of another kind or refused by the class.
    """
    check_value(place, values, dict)
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    check_keys(values, kinds, place)
    values = {key: _number(value) for key, value in values.items()}
    for key, value in values.items():
        check_value(f"{place}: {key}", value, kinds[key])
    try:
        return cls(**values)
    except Exception as error:  # ValueError of ours, TypeError, or the type checks of huggingface_hub
        raise ValueError(f"{place}: {error}") from error


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value.strip()) else value


def _plain_types(hint: Any) -> set[type]:
    """The types of YAML values that a type hint allows; none where anything goes."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain_types(part) for part in typing.get_args(hint)]
        return set().union(*parts) if all(parts) else set()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {str}
    if origin in (list, dict):
        return {origin}
    if origin in (Sequence, tuple):
        return {list}
    if hint is os.PathLike:  # a place, which YAML writes as a text
        return {str}
    return {hint} if hint in (*_EXPECTED, type(None)) else set()
