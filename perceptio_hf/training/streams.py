"""Streams that several processes share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import IterableDataset


class SharedStream(torch.utils.data.IterableDataset):
    """A stream of `datasets` as one of torch's.

    accelerate divides those of `datasets` by their shards, and a process whose shards hold less leaves the others
    waiting. Torch's are read by every process, which take batches of them in turn, all as many.
    """

    def __init__(self, stream: "IterableDataset"):
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)
