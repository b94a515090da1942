"""One picture of many: where it is, what is asked about it. It stays closed until it is asked for."""

import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from perceptio_hf.data.encoded import local, open_encoded
from perceptio_hf.data.lines import SCHEMES
from perceptio_hf.processing.picture_sources import find_picture
from perceptio_hf.processing.pictures import load_picture

from .archives import Place, TarMember

_WEB = re.compile(r"https?://", re.IGNORECASE)
_HEAD = 1 << 17  # bytes of a picture in a shard that tell its size: JPEG's header with EXIF and a colour profile
_ASKERS = 8  # threads that ask for the sizes of files
_ORIENTATION = 0x0112  # EXIF tag; values above 4 exchange width and height


@dataclass(frozen=True, slots=True)
class Fetched:
    """A picture of another machine, fetched."""

    address: str
    data: bytes

    def encoded(self) -> dict[str, Any]:
        return {"bytes": self.data, "path": self.address}


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, and what is asked about it.

    Args:
        index: its place among all items, from 0.
        id: as the line says; else its path below the folder, the place of its line, or the row of its data set.
        picture: what to call it: a path or an address.
        source: where it is: an absolute path or an address; a place in a larger file; None where a line names none.
        question: "" where the item has none of its own. Whether it is a text is for those to check who ask it.
        spatial: as in `model.generate`; None where the item does not say.
        extra: what else the line or row says, carried along.
        error: why it cannot be used, where that is known already.
    """

    index: int
    id: str
    picture: str | None
    source: str | Place | Fetched | None
    question: Any = ""
    spatial: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def file(self) -> str | None:
        """The file that holds the picture, on whatever machine it is opened; None where none does."""
        if isinstance(self.source, str):
            return None if SCHEMES.match(self.source) else self.source
        return getattr(self.source, "file", getattr(self.source, "folder", None))

    def file_size(self) -> int | None:
        """Bytes of the file that is or holds the picture, of a picture in a shard its own; None where there is none."""
        if isinstance(self.source, TarMember):
            return self.source.size
        try:
            return os.stat(self.file).st_size if self.file and os.path.isfile(self.file) else None
        except OSError:
            return None

    def open(self) -> Image.Image:
        """The picture, RGB and upright.

        Raises:
            ValueError: naming a picture that cannot be read.
        """
        if self.error is not None:
            raise ValueError(self.error)
        if isinstance(self.source, str):
            return load_picture(self.source)
        try:
            return load_picture(open_encoded(self.source.encoded()))
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.picture}: {error}") from None

    def encoded(self) -> dict[str, Any]:
        """The picture as `datasets.Image` keeps it: a file by its path, one on another machine by its address, one out
        of a larger file or a data: URL by its bytes.

        Raises:
            ValueError: where there is none.
        """
        content = self.source if isinstance(self.source, str) else self.source.encoded()
        if isinstance(content, dict) and content.get("bytes") is None:
            content = content.get("path")
        if isinstance(content, dict):
            return content
        if isinstance(content, bytes):  # of a column of plain bytes
            return {"bytes": content, "path": None}
        if not isinstance(content, str):
            raise ValueError(f"{self.picture}: it has no picture, but {content!r:.40}.")
        if content[:5].lower() == "data:":
            return {"bytes": find_picture(content)[0].getvalue(), "path": None}
        return {"bytes": None, "path": absolute(local(content))}

    def fetched(self) -> "Item":
        """The item with its picture in memory, where that is on another machine; else the item itself.

        Raises:
            ValueError: naming an address that cannot be fetched.
        """
        if self.error is not None or isinstance(self.source, TarMember | Fetched):
            return self
        try:
            content = {"path": self.source} if isinstance(self.source, str) else self.encoded()
        except (ValueError, OSError):  # opening it says why, and of which picture
            return self
        address = content["path"] if content.get("bytes") is None else None
        if address is None or not _WEB.match(address):
            return self
        return replace(self, source=Fetched(address, find_picture(address)[0].getvalue()))

    def size(self) -> tuple[int, int] | None:
        """(width, height) as seen, read from the header; None where that cannot be read, or not without the network."""
        if self.error is not None or (isinstance(self.source, str) and SCHEMES.match(self.source)):
            return None
        head = _size_of(self.source.read(_HEAD)) if isinstance(self.source, TarMember) else None
        if head is not None:
            return head
        try:
            content = self.encoded()
        except Exception:  # pyarrow's own kinds; opening the picture will say which
            return None
        return _size_of(content["path"] if content["bytes"] is None else content["bytes"])


def _size_of(source: str | bytes) -> tuple[int, int] | None:
    """(width, height) as seen of a picture, or of the beginning of one."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            turned = picture.getexif().get(_ORIENTATION, 1) > 4
            return (picture.height, picture.width) if turned else picture.size
    except Exception:  # Pillow's readers raise many kinds; reading the whole picture will say which
        return None


def file_sizes(items: Sequence[Item]) -> list[int | None]:
    """`Item.file_size` of many."""
    with ThreadPoolExecutor(_ASKERS) as pool:
        return list(pool.map(Item.file_size, items))


def absolute(path: str) -> str:
    """Workers elsewhere have other working folders."""
    return path if SCHEMES.match(path) else os.path.abspath(os.path.expanduser(path))
