"""Writing files so that a reader sees the old one or the complete new one, never half of it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes the place of `path`, else it is removed.

    Raises:
        OSError: when the folder is missing or may not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Indented JSON. NaN and infinity, which JSON does not have, are a ValueError."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_picture(path: str | os.PathLike, picture: Image.Image) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The keys and values of a recipe.

    Raises:
        ValueError: if the file does not exist, is no YAML or no mapping.
    """
    import yaml  # here: most commands read none

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold keys and values, e.g. `seed: 0`.")
    return values
