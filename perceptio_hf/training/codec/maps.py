"""Where the depth maps of a training come from, and in what order they are seen.

A source has a length and gives each of its maps by number; nothing of it stays in memory but what `DepthBank` is asked
to keep. Every epoch goes through all maps in a new random order, read ahead by worker processes. What is seen at which
step depends on the seed and the step alone, so that a run goes on where another stopped.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from perceptio_hf.bulk.item import Item
from perceptio_hf.data.depth_maps import DepthMap, depth_from_values, read_depth
from perceptio_hf.labelling.teacher import Teacher
from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import prepare_depth
from perceptio_hf.world import render_scene

Pair = tuple[Tensor, Tensor]  # (B, S, S) float32 each: relative inverse depth without holes, and its weight
_FEW = 10  # maps that may be left out of any source
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unusable:
    """In the place of a map: why there is none."""

    reason: str


class DepthSource(ABC):
    """Depth maps by number. One that cannot be used is left out with a warning, since a training that has run for hours
    must not end for it; where more than ten and than a tenth are like this, something else is wrong.

    Args:
        size: side of the codec's square, S.
    """

    size: int

    @cached_property
    def left_out(self) -> dict[str, None]:
        """What this process left out so far: a line for each map, which begins with its name."""
        return {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> DepthMap:
        """A whole map, at its own size; errors as `read_depth`."""

    def prepare(self, index: int) -> Any:
        """What a worker process makes of a map."""
        return _square(self.read(index), self.size)

    def finish(self, prepared: Sequence[Any]) -> list[Pair | Unusable]:
        """What the training's process makes of that, for the maps of a batch."""
        return list(prepared)

    def read_each(self, indices: Iterable[int]) -> Iterator[tuple[int, DepthMap]]:
        """Whole maps with their numbers, but those that cannot be used.

        Raises:
            ValueError: That is true of all, or of too many.
        """
        none = True
        for index in indices:
            try:
                found = self.read(index)
            except ValueError as error:
                self.leave_out(str(error))
                continue
            none = False
            yield index, found
        self._check_some(none)

    def batch(self, prepared: Sequence[Any]) -> Pair:
        """The maps of a batch that can be used; errors as `read_each`."""
        found = self.finish([item for item in prepared if not isinstance(item, Unusable)])
        for item in (*prepared, *found):
            if isinstance(item, Unusable):
                self.leave_out(item.reason)
        pairs = [item for item in found if not isinstance(item, Unusable)]
        self._check_some(not pairs)
        return tuple(torch.stack(parts) for parts in zip(*pairs, strict=True))

    def leave_out(self, reason: str) -> None:
        if reason in self.left_out:
            return
        self.left_out[reason] = None
        if len(self.left_out) > max(_FEW, len(self) // 10):
            raise ValueError(
                f"{len(self.left_out)} of {len(self)} depth maps cannot be used, such as {next(iter(self.left_out))}"
            )
        _logger.warning("left out: %s", reason)

    def _check_some(self, none: bool) -> None:
        if none and self.left_out:
            raise ValueError(f"no depth map can be used, of a whole batch or of all: {next(iter(self.left_out))}")


def _square(item: DepthMap, size: int) -> Pair:
    """(S, S) twice."""
    filled, weight = prepare_depth(torch.from_numpy(item.relative), torch.from_numpy(item.valid), size)
    return filled[0, 0], weight[0, 0]


@dataclass
class DepthBank(DepthSource):
    """Depth maps in memory, at one size.

    Args:
        relative: (M, S, S) float32 relative inverse depth in [0, 1], holes filled.
        weight: (M, S, S) float32 in [0, 1], share of valid readings behind each pixel.
    """

    relative: Tensor
    weight: Tensor

    @classmethod
    def gather(cls, maps: Iterable[DepthMap], config: DepthVQVAEConfig) -> "DepthBank":
        """Resample depth maps to the size of a codec and keep them.

        Raises:
            ValueError: There are none.
        """
        pairs = [_square(item, config.image_size) for item in maps]
        if not pairs:
            raise ValueError("there are no depth maps to train on.")
        return cls(*(torch.stack(parts) for parts in zip(*pairs, strict=True)))

    @property
    def size(self) -> int:
        return self.relative.shape[-1]

    def __len__(self) -> int:
        return len(self.relative)

    def read(self, index: int) -> DepthMap:
        return DepthMap(self.relative[index].numpy(), self.weight[index].numpy() >= 0.5)

    def prepare(self, index: int) -> Pair:
        return self.relative[index], self.weight[index]

    def head(self, count: int) -> Iterator[DepthMap]:
        """The first maps of the bank, at its size."""
        return map(self.read, range(min(count, len(self))))


@dataclass
class FileMaps(DepthSource):
    """Depth maps in files, all of one unit (see `read_depth`)."""

    paths: Sequence[Path]
    unit: str
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> DepthMap:
        return read_depth(self.paths[index], self.unit)


@dataclass
class WorldMaps(DepthSource):
    """Depth of rendered scenes, from number `first` on."""

    first: int
    count: int
    size: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> DepthMap:
        return DepthMap.from_metric(render_scene(self.first + index, size=self.size).depth)


@dataclass
class TeacherMaps(DepthSource):
    """What a depth teacher sees in pictures: workers read these, the training's process asks the teacher."""

    items: Sequence[Item]
    teacher: Teacher
    size: int

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> DepthMap:
        pixels, size, name = self.prepare(index)
        return self._map_of(self.teacher.look(pixels, [size])[0], name)

    def prepare(self, index: int) -> tuple[Tensor, tuple[int, int], str | None]:
        item = self.items[index]
        picture = item.open()
        try:
            pixels = self.teacher.prepare(picture)
        except ValueError as error:
            raise ValueError(f"{item.picture}: {error}") from None
        return pixels, picture.size[::-1], item.picture

    def finish(self, prepared: Sequence[Any]) -> list[Pair | Unusable]:
        seen: dict[int, Tensor] = {}
        for shape in {tuple(pixels.shape) for pixels, *_ in prepared}:
            group = [place for place, (pixels, *_) in enumerate(prepared) if tuple(pixels.shape) == shape]
            pixels = torch.cat([prepared[place][0] for place in group])
            seen |= dict(zip(group, self.teacher.look(pixels, [prepared[place][1] for place in group]), strict=True))
        return [self._pair_of(seen[place], name) for place, (*_, name) in enumerate(prepared)]

    def _pair_of(self, depth: Tensor, name: str | None) -> Pair | Unusable:
        try:
            return _square(self._map_of(depth, name), self.size)
        except ValueError as error:
            return Unusable(str(error))

    def _map_of(self, depth: Tensor, name: str | None) -> DepthMap:
        try:
            return depth_from_values(depth.numpy(), self.teacher.info.unit)
        except ValueError as error:
            raise ValueError(f"{name}: the teacher's depth cannot be used: {error}") from None


class _Prepared(Dataset):
    def __init__(self, source: DepthSource):
        self.source = source

    def __getitem__(self, index: int) -> Any:
        try:
            return self.source.prepare(index)
        except ValueError as error:
            return Unusable(str(error))


class Order:
    """The numbers of the maps of every step, without end: epoch by epoch a random order over all.

    Args:
        maps: how many there are.
        batch_size: of one process.
        part, parts: which process of how many; they share out every order.
        first: the step to begin with.
    """

    def __init__(self, maps: int, batch_size: int, seed: int, part: int = 0, parts: int = 1, first: int = 0):
        self.maps, self.batch_size, self.seed = maps, batch_size, seed
        self.part, self.parts, self.first = part, parts, first
        self._epoch: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        together = self.batch_size * self.parts
        step = self.first
        while True:
            start = step * together + self.part * self.batch_size
            yield [self._at(place) for place in range(start, start + self.batch_size)]
            step += 1

    def _at(self, place: int) -> int:
        epoch, row = divmod(place, self.maps)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(self.maps, generator=generator)
        return int(self._epoch[1][row])


def batches(source: DepthSource, order: Order, *, workers: int = 0) -> Iterator[Pair]:
    """The maps of every step, each mirrored left to right half of the time.

    Args:
        workers: processes that read ahead; 0 reads in this one.
    """
    loader = DataLoader(
        _Prepared(source),
        batch_sampler=order,
        collate_fn=list,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # of its workers' seeds, which would come out of the caller's random state
    )
    for step, prepared in enumerate(loader, start=order.first):
        generator = torch.Generator().manual_seed((order.seed * 1_000_003 + step) * order.parts + order.part)
        pair = source.batch(prepared)
        mirror = torch.rand(len(pair[0]), 1, 1, generator=generator) < 0.5
        yield tuple(torch.where(mirror, x.flip(-1), x) for x in pair)


def some_maps(source: DepthSource, count: int, *, workers: int = 0, batch_size: int = 16) -> Iterator[Pair]:
    """Maps spread evenly over all, in batches, not mirrored."""
    rows = spread(len(source), count)
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    loader = DataLoader(
        _Prepared(source), batch_sampler=parts, collate_fn=list, num_workers=workers, generator=torch.Generator()
    )
    return map(source.batch, loader)


def spread(total: int, count: int) -> list[int]:
    """At most `count` numbers below `total`, evenly."""
    count = min(total, count)
    return [row * total // count for row in range(count)]
