"""Counting the bytes of tensors while code runs, also of code that runs on tensors without numbers.

torch's fake tensors have shapes and types, and no memory: a step of a model of any size runs in seconds on any machine.
The words of a batch, though, decide what is computed (which tokens are learnt, where spans lie), so whole numbers and
truth values keep their values here.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MOST_KEPT = 1 << 26  # numbers of one tensor whose values are kept


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that live, each memory once, while its context lasts.

    `now` is what lives, `peak` the most that has lived at once. What was there before is counted from when it is given
    to `watch`. Kernels' own scratch memory, and what an allocator keeps back, is not seen. `gathered` are bytes that no
    tensor has, but would have where processes share a model (`gather`); `gathered_at_peak` their part of the peak.
    """

    def __init__(self, values: "FakeTensorMode | None" = None):
        """`values`: the mode of fake tensors in which whole numbers made inside shall keep their values."""
        super().__init__()
        self.now = self.peak = self.gathered = self.gathered_at_peak = 0
        self._values = values
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def watch(self, tensors: Iterable[Tensor]) -> int:
        """Count these tensors; returns their bytes, as far as they were not counted yet."""
        before = self.now
        for tensor in tensors:
            self._see(tensor)
        return self.now - before

    def gather(self, size: int) -> None:
        """Count so many bytes more, or less."""
        self.gathered += size
        self._add(size)

    def restart(self) -> None:
        """Let the peak be what lives now."""
        self.peak, self.gathered_at_peak = self.now, self.gathered

    def _add(self, size: int) -> None:
        self.now += size
        if self.now > self.peak:
            self.peak, self.gathered_at_peak = self.now, self.gathered

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self._with_value(func, args, kwargs)
        out = func(*args, **kwargs) if out is None else out
        for item in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(item, Tensor):
                self._see(item)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self._add(size)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size

    def _with_value(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """What makes whole numbers out of nothing (arange, zeros) makes them with their values."""
        if self._values is None or (args and isinstance(args[0], Tensor)):  # nearly all are known by their first
            return None
        if any(isinstance(item, Tensor) for item in tree_leaves((args, kwargs))):
            return None
        dtype = kwargs.get("dtype")
        if (dtype or torch.long).is_floating_point or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        with no_dispatch():
            out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.is_floating_point():
            return None
        return _with_values(self._values, out)


@contextmanager
def without_numbers() -> Iterator[FakeTensorMode]:
    """Tensors made in here have no memory. Whole numbers that are computed from others keep their values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # torch keeps the values of single numbers only, has no setting for it, and reads lists number by number.
    limit = patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", _MOST_KEPT)
    with limit, patch.object(fake_tensor.FakeTensor, "tolist", _tolist), mode:
        yield mode


_read_one_by_one = fake_tensor.FakeTensor.tolist


def _tolist(tensor: fake_tensor.FakeTensor) -> list:
    if tensor.constant is None:
        return _read_one_by_one(tensor)
    with no_dispatch():
        return tensor.constant.tolist()


def fake_batch(mode: FakeTensorMode, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch as fake ones; ids, labels and masks keep their values."""
    return {
        name: mode.from_tensor(value, static_shapes=True) if value.is_floating_point() else _with_values(mode, value)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def fake_copy(mode: FakeTensorMode, model: nn.Module) -> nn.Module:
    """A model of the same shapes, types and trained parameters, that takes no memory.

    Args:
        model: a real one, which stays as it is, or one on the meta device, which becomes the copy.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        with FakeCopyMode(mode):
            return copy.deepcopy(model)
    made: dict[int, Tensor] = {}  # what is tied stays tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = made.setdefault(id(tensor), _like(tensor))
    return model


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _with_values(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return mode.fake_tensor_converter.from_real_tensor(mode, tensor, make_constant=True)
