"""Reads pickles that hold nothing but plain data, such as RefCOCO's annotations; everything else is refused.

Unpickling normally runs whatever functions a file names. Here a file may name only the few below, none of which does
anything but make a container or bytes.
"""

import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_plain_pickle(path: Path) -> Any:
    """Dicts, lists, tuples, sets, texts, bytes, numbers, booleans and None, nested.

    Python 2's files are read too; their texts are taken as Latin-1, as the tools around RefCOCO take them.

    Raises:
        ValueError: for a file that names any other class or function, and for one that is damaged or no pickle.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except _RefusedError as error:
        raise ValueError(
            f"{path} is refused: it names {error}, and only plain data (dicts, lists, texts, numbers) are read from a "
            "pickle. Take the file as it was published."
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path} is no pickle that can be read ({reason}); copy or download it again.") from None


class _RefusedError(Exception):
    """The name of what a pickle asked for."""


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How the protocols 0 to 2 write bytes: a text to be encoded."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError(f"a codec {encoding!r:.40}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _latin1_bytes,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("an object kept elsewhere (a persistent id)")
