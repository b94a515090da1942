"""What one worker does: reads pictures, lets the teacher look at them, writes codes."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perceptio_hf.bulk.engines import Result, readers
from perceptio_hf.bulk.item import Fetched, Item
from perceptio_hf.data.depth_maps import DepthMap, depth_from_values, depth_picture
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE, prepare_depth

from .teacher import Teacher

DEPTH_FOLDER, FETCHED_FOLDER = "depth", "journal/fetched"
_IN_A_FOLDER = 1000  # files; more of them make some file systems slow
Load = Callable[[], "tuple[Teacher, DepthVQVAE]"]


@dataclass(frozen=True)
class Seen:
    """A batch, read.

    Args:
        pixels: {item's index: (1, 3, h, w), as the teacher sees it}.
        sizes: {item's index: (height, width) of the picture}.
        errors: {item's index: why it cannot be used}.
        fetched: {item's index: the picture's file, where it came from another machine}.
        bytes: {item's index: size of the file it was read from, where there is one here}.
    """

    pixels: dict[int, Tensor]
    sizes: dict[int, tuple[int, int]]
    errors: dict[int, str]
    fetched: dict[int, bytes]
    bytes: dict[int, int | None]


class Labeller:
    """A worker that writes the depth of pictures as codes.

    Args:
        maps: whether the teacher's maps are kept as well.
    """

    def __init__(self, teacher: Teacher, codec: DepthVQVAE, maps: bool):
        self.teacher, self.codec, self.maps = teacher, codec.to(teacher.model.device), maps
        self._pool = ThreadPoolExecutor(readers(), thread_name_prefix="maps")

    def read(self, batch: Sequence[Item]) -> Seen:
        seen = Seen({}, {}, {}, {}, {})
        for item in batch:
            try:
                seen.bytes[item.index] = item.file_size()
                here = item.fetched()
                picture = here.open()
                if isinstance(here.source, Fetched):
                    seen.fetched[item.index] = here.source.data
                seen.pixels[item.index] = self.teacher.prepare(picture)
                seen.sizes[item.index] = picture.size[::-1]
            except (ValueError, MemoryError) as error:
                seen.errors[item.index] = str(error) or "not enough memory to open it; scale it down first."
        return seen

    def work(self, batch: Sequence[Item], read: Seen) -> list[Result]:
        depths, errors = {}, dict(read.errors)
        for group in _alike(read.pixels):
            depths |= self._look(group, read, errors)
        found = dict(zip(depths, self._pool.map(self._map_of, depths.items()), strict=True))
        for index, (depth_map, _) in found.items():
            if isinstance(depth_map, str):
                errors[index] = depth_map
        codes = self._codes({index: depth for index, (depth, _) in found.items() if index not in errors})
        return [
            Result({"id": item.id, "index": item.index, "error": errors[item.index]})
            if item.index in errors
            else self._labelled(item, read, codes[item.index], found[item.index][1])
            for item in batch
        ]

    def _look(self, group: list[int], read: Seen, errors: dict[int, str]) -> dict[int, Tensor]:
        """The depth of pictures whose pixels have one shape; half of them at a time where memory is short."""
        try:
            pixels = torch.cat([read.pixels[index] for index in group])
            return dict(zip(group, self.teacher.look(pixels, [read.sizes[index] for index in group]), strict=True))
        except (torch.OutOfMemoryError, MemoryError):
            if len(group) == 1:
                errors[group[0]] = "not enough memory for this picture; scale it down first."
                return {}
        half = len(group) // 2
        return self._look(group[:half], read, errors) | self._look(group[half:], read, errors)

    def _map_of(self, entry: tuple[int, Tensor]) -> tuple[DepthMap | str, bytes | None]:
        """A teacher's depth as relative depth, and as the bytes of a file; or why it is no depth."""
        try:
            depth = depth_from_values(entry[1].numpy(), self.teacher.info.unit)
        except ValueError as error:
            return f"the teacher's depth cannot be used: {error}", None
        return depth, _png(depth) if self.maps else None

    def _codes(self, maps: dict[int, DepthMap]) -> dict[int, list[int]]:
        if not maps:
            return {}
        size = self.codec.config.image_size
        ready = [prepare_depth(torch.from_numpy(m.relative), torch.from_numpy(m.valid), size)[0] for m in maps.values()]
        codes = self.codec.encode(torch.cat(ready).to(self.codec.device))
        return dict(zip(maps, codes.tolist(), strict=True))

    def _labelled(self, item: Item, read: Seen, codes: list[int], png: bytes | None) -> Result:
        height, width = read.sizes[item.index]
        name = map_name(item.index) if self.maps else None
        record: dict[str, Any] = {"id": item.id, "index": item.index, "width": width, "height": height}
        record |= {"codes": codes, "depth": name, "bytes": read.bytes[item.index]}
        files = {} if name is None else {name: png}
        if item.index in read.fetched:
            record["fetched"] = _numbered(FETCHED_FOLDER, item.index)
            files[record["fetched"]] = read.fetched[item.index]
        return Result(record, files)


def open_labeller(load: Load, maps: bool) -> Labeller:
    """What `perceptio_hf.bulk.engines` opens in every process."""
    return Labeller(*load(), maps)


def map_name(index: int) -> str:
    """Where the map of the picture with this index lies, below the folder of the labels."""
    return f"{_numbered(DEPTH_FOLDER, index)}.png"


def _numbered(folder: str, index: int) -> str:
    return f"{folder}/{index // _IN_A_FOLDER:03d}/{index:06d}"


def _alike(pixels: dict[int, Tensor]) -> list[list[int]]:
    """The pictures by the shape of their pixels, in their order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, tensor in pixels.items():
        groups.setdefault(tuple(tensor.shape), []).append(index)
    return list(groups.values())


def _png(depth: DepthMap) -> bytes:
    content = io.BytesIO()
    depth_picture(np.asarray(depth.relative), depth.valid).save(content, format="PNG", compress_level=3)
    return content.getvalue()
