"""Writing files and folders so that a reader sees the old one or the complete new one, never half of it."""

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from safetensors import SafetensorError


def expanded(path: str | os.PathLike) -> Path:
    """The path with `~` and `~user` as home folders. A name that only begins like one, such as ~1.jpg, is left alone;
    pathlib's own way ends in a RuntimeError."""
    return Path(os.path.expanduser(path))


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes the place of `path`, else it is removed.

    Raises:
        OSError: when the folder is missing or may not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """An OSError in the block is about `path` where the operating system names no file, as for a disk that is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def is_want_of_room(error: BaseException) -> bool:
    """Whether a disk is full, a quota used up, or a file as large as it may be."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: str | os.PathLike, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Indented JSON. NaN and infinity, which JSON does not have, are a ValueError."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def out_file(path: str) -> Path:
    """A file that the end of long work is to write, as argparse's `type`: its folder is made before the work begins."""
    found = Path(path)
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


def write_picture(path: str | os.PathLike, picture: Image.Image) -> None:
    """A PNG; Pillow's own level of compression takes several times as long for files that are little smaller."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=3)


@contextmanager
def new_folder(
    path: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike | None] = ()
) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it takes the place of `path`, else it is removed.

    A block that fails, for want of disk space or by Ctrl-C, leaves `path` as it was: absent, or the old folder.
    Old and new lie on the disk together for a while.

    Args:
        path: The folder to make; missing parents are made. A link to a folder is followed.
        overwrite: Replace a folder that is there. It must be one a model was saved in: anything without a config.json
            is refused, so that a slip of the hand does not cost somebody's own files.
        sources: What the new folder is made from: files, folders, Hub names, or None. The folder that is replaced may
            neither be nor hold one of them.

    Raises:
        ValueError: `path` is a file, a folder that is not empty and may not be replaced, or one that is read.
        OSError: It may not be written there.
    """
    path, sources = Path(os.path.realpath(expanded(path))), list(sources)
    check_new_folder(path, overwrite, sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    fresh.mkdir()
    try:
        yield fresh
        try:
            check_new_folder(path, overwrite, sources)  # others may have written there meanwhile
        except ValueError as error:
            os.replace(fresh, kept := path.with_name(f"{path.name}-{os.getpid()}"))
            raise ValueError(f"{error} What was made is in {kept}.") from None
        swap_in(fresh, path, old)
    except SafetensorError as error:  # its way to say that a disk is full; no OSError
        raise OSError(f"{path} could not be written: {error}; make room, or name a folder on another disk.") from error
    finally:
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def swap_in(fresh: Path, path: Path, old: Path) -> None:
    """Rename the folder `fresh` to `path`; a folder that stands there becomes `old`, and comes back if that fails."""
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    finally:
        if old.exists() and not path.exists():  # interrupted between the two
            os.replace(old, path)


def check_new_folder(
    path: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike | None] = ()
) -> None:
    """Raise now what `new_folder` would raise later, before long work. Makes nothing.

    Raises:
        ValueError: as `new_folder`.
    """
    path = expanded(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder to make.")
    if os.path.ismount(path) or path.samefile(os.curdir):  # neither can be replaced by a finished folder
        raise ValueError(f"{path} is {'a mount' if os.path.ismount(path) else 'where you are'}; name a folder in it.")
    for source in sources:  # before --overwrite is spoken of, which is no way out
        _check_apart(path, source)
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{path} exists and is not empty; name another folder, or give --overwrite to replace it.")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not replaced: it holds no config.json, so it is no saved model. Name another one.")


def _check_apart(folder: Path, source: str | os.PathLike | None) -> None:
    """Raise where `source` is the folder or lies in it; a name that only the Hub knows, None and "" lie nowhere."""
    place = Path(os.path.realpath(os.path.expanduser(source))) if source else None
    if place is None or not os.path.exists(place):
        return
    for above in (place, *place.parents):
        if folder.samefile(above):  # which knows file systems where Model and model are one, and mounts
            where = "is to be read" if above == place else f"holds {source}, which is to be read"
            raise ValueError(f"{folder} {where}; name another folder for the result.")
    if place.is_dir():
        for file in place.iterdir():  # such as the Hub's cache: links into another folder
            if file.is_symlink() and file.is_file():
                _check_apart(folder, os.path.realpath(file))


def files_below(folder: str | os.PathLike) -> Iterator[Path]:
    """Every file in a folder and below it; links to folders are followed, each folder once, hidden ones left out."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] != ".")
        yield from () if real in seen else (Path(place, name) for name in files)
        seen.add(real)


def find_recipe(name: str | os.PathLike, below: str = "") -> Path:
    """The recipe at a path; else the one of that name which comes with the package: `sft_world`, `sft_world.yaml` and
    `recipes/sft_world.yaml` are the same.

    Args:
        below: a folder of the recipes, such as accelerate.

    Raises:
        ValueError: there is neither; those that come with the package are named.
    """
    path = expanded(name)
    if path.exists():
        return path
    package = Path(__file__).resolve().parent
    # In an installed package they lie inside of it; in a checkout, for readers, at its top.
    places = [place / below for place in (package / "recipes", package.parent / "recipes") if place.is_dir()]
    shipped = {recipe.stem: recipe for folder in places[:1] for recipe in sorted(folder.glob("*.yaml"))}
    if path.parent in (Path(), Path("recipes", below)) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    raise ValueError(f"There is no recipe {path}; of those that come with the package: {', '.join(shipped) or 'none'}.")


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


_IN_USE = ".in-use"  # in a folder that somebody works in
_held: dict[tuple[int, str], int] = {}  # (process, folder) -> how often it is held


@contextmanager
def in_use(folder: str | os.PathLike, doing: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process; whoever else asks for it meanwhile is told who has it.

    The operating system gives it back when the process ends, however it ends. Within the process, which may ask again,
    and on file systems or systems without such locks, nothing is refused.

    Args:
        folder: Made where it is missing, and removed again where nothing came into it.
        doing: What the others read, e.g. "training".
        patience: Seconds to wait for another process.

    Raises:
        ValueError: Another process has it; named are its id, its machine, and since when.
        OSError: It may not be written there.
    """
    folder = os.path.realpath(folder)
    key = (os.getpid(), folder)
    made = not os.path.exists(folder)
    deadline = time.monotonic() + patience
    file = None if _held.get(key) else _locked(Path(folder, _IN_USE), doing, deadline)
    _held[key] = _held.get(key, 0) + 1
    try:
        yield
    finally:
        _held[key] -= 1
        if file is not None:
            Path(folder, _IN_USE).unlink(missing_ok=True)  # before it is given back: whoever waits looks again
            file.close()
        if made:
            with suppress(OSError):  # it holds something
                os.rmdir(folder)


def _locked(path: Path, doing: str, deadline: float) -> TextIO | None:
    """The open file that holds the lock, None where there are no locks. The deadline is one of `time.monotonic`."""
    try:
        import fcntl
    except ImportError:  # Windows
        path.parent.mkdir(parents=True, exist_ok=True)
        return None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closing it gives the lock back)
        except FileNotFoundError:  # somebody who has made the folder has just removed it again
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise ValueError(
                f"{path.parent} is in use by {holder}. Wait for it, stop it, or name another folder."
            ) from None
        except OSError:  # a network's file system without locks
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()  # of one who has just left
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with named(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({doing}, since {since})")
        file.flush()
    return file
