"""What processes that share a model hold whole at each moment of a step: FSDP2's order of events, reckoned in bytes.

A block is gathered into a buffer, from which its parameters are copied out, when its forward or backward comes; in the
backward pass the buffer of the next one is there by then. Its whole gradients live until the block is through, and a
copy of them until the next one is. What belongs to no block (embedding, head, projectors, SAM2's frame) is whole from
the first moment to the last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .rehearsal import ByteCounter


class Gathering:
    """Adds to a counter what is gathered while a model runs, that itself is whole.

    Args:
        model: whose blocks (`_no_split_modules`) are gathered one at a time. Its parameters have gradients already.
        counter: of the bytes of a step in which that model runs.
        processes: that share it.
    """

    def __init__(self, model: nn.Module, counter: ByteCounter, processes: int):
        self.counter, self.processes, self._root = counter, processes, model
        names = set(model._no_split_modules or ())
        self._blocks = [module for module in model.modules() if type(module).__name__ in names]
        owners = {parameter: model for parameter in model.parameters()}
        owners |= {parameter: block for block in self._blocks for parameter in block.parameters()}
        self._owners = owners
        self._whole = dict.fromkeys([*self._blocks, model], 0)  # bytes of parameters
        for parameter, owner in owners.items():
            self._whole[owner] += _bytes(parameter)
        self._gradients = dict.fromkeys(self._whole, 0)  # bytes of whole ones
        self._new: tuple[nn.Module, int] | None = None  # one that has been added just now, and still lives itself
        self._order: list[nn.Module] = []  # in which blocks went forward
        self._buffer = self._sent = 0  # bytes of the last gathering, and of the gradients that were exchanged last
        self._open: nn.Module | None = None  # whose backward it is
        self._coming: nn.Module | None = None  # whose buffer is there already
        self._backward = False

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around the forward and backward pass of the one that is looked at."""
        handles = []
        for block in self._blocks:
            handles += [block.register_forward_pre_hook(self._comes), block.register_forward_hook(self._is_through)]
        for parameter, owner in self._owners.items():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(partial(self._has_gradient, owner)))
        before = self.counter.gathered
        self._gather(self._root)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for owner in filter(None, (self._open, self._root)):
            self._finish(owner)
        self.counter.gather(before - self.counter.gathered)

    def _gather(self, owner: nn.Module) -> None:
        """In the forward pass a buffer stays until the next one has been filled."""
        buffer = self._whole[owner] if self.processes > 1 else 0
        self.counter.gather(buffer)
        self.counter.gather(-self._buffer)
        self.counter.gather(self._whole[owner])
        self._buffer = buffer

    def _comes(self, block: nn.Module, inputs: Any) -> None:
        if not self._backward:  # else it is computed again, and is there
            self._gather(block)

    def _is_through(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if self._backward:
            return
        self.counter.gather(-self._whole[block])
        self._order.append(block)
        for item in tree_leaves(output):
            if isinstance(item, Tensor) and item.requires_grad:
                item.register_hook(partial(self._comes_back, len(self._order) - 1))

    def _comes_back(self, place: int, gradient: Tensor) -> None:
        self._note_gradient()
        block = self._order[place]
        if block is self._open:
            return
        if not self._backward:
            self._backward = True
            self.counter.gather(-self._buffer)
        if self._open is not None:
            self._finish(self._open)
        several = self.processes > 1
        if several and self._coming is not block:
            self.counter.gather(self._whole[block])
        self.counter.gather(self._whole[block])
        self._open, self._coming = block, self._order[place - 1] if place else None
        if several:  # this one's buffer gives way to the next one's
            self.counter.gather(-self._whole[block])
            self.counter.gather(self._whole[self._coming] if self._coming is not None else 0)

    def _has_gradient(self, owner: nn.Module, parameter: Tensor) -> None:
        self._note_gradient()
        self._new = owner, _bytes(parameter)

    def _note_gradient(self) -> None:
        if self._new is not None:
            owner, size = self._new
            self._gradients[owner] += size
            self.counter.gather(size)
            self._new = None

    def _finish(self, owner: nn.Module) -> None:
        """The backward pass of this one is through: its gradients are copied, exchanged and dropped."""
        self._note_gradient()
        size, self._gradients[owner] = self._gradients[owner], 0
        self.counter.gather(-self._whole[owner] - self._sent)
        self.counter.gather(size)  # the copy, which stays until the next one is through
        self.counter.gather(-size)
        self._sent = size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
