"""Writing a whole folder so that it is there complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it takes the place of `path`, else it is removed.

    A block that fails, for want of disk space or by Ctrl-C, leaves `path` as it was: absent, or the old folder.
    Old and new lie on the disk together for a while.

    Args:
        path: The folder to make; missing parents are made. A link to a folder is followed.
        overwrite: Replace a folder that is there. It must be one a model was saved in: anything without a config.json
            is refused, so that a slip of the hand does not cost somebody's own files.

    Raises:
        ValueError: `path` is a file, or a folder that is not empty and may not be replaced.
        OSError: It may not be written there.
    """
    path = Path(os.path.realpath(Path(path).expanduser()))
    check_new_folder(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    except SafetensorError as error:  # its way to say that a disk is full; no OSError
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        if old.exists() and not path.exists():  # interrupted between the two
            os.replace(old, path)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def check_new_folder(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise now what `new_folder` would raise later, before long work. Makes nothing.

    Raises:
        ValueError: as `new_folder`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder to make.")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{path} exists and is not empty; name another folder, or give --overwrite to replace it.")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not replaced: it holds no config.json, so it is no saved model. Name another one.")
