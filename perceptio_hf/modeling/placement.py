"""Parameters that are not always there, and devices that differ within one model.

Under `device_map` with parts on disk, and under ZeRO-3, a parameter exists only while the forward of the module that
owns it runs; with parts on several devices a hook moves the inputs of every module's forward, and nothing else.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

_T = TypeVar("_T")


def is_here(tensor: torch.Tensor) -> bool:
    """Whether its values can be read now: not offloaded, not given away to other processes."""
    return tensor.device.type != "meta" and tensor.numel() > 0


def inside(module: nn.Module, function: Callable[[], _T]) -> _T:
    """Call `function` as though it were the module's forward, so that the module's own parameters are there."""
    # accelerate puts its wrapper in the place of `forward` and calls what it found there by this name.
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    before = module.__dict__.get(name)
    module.__dict__[name] = function
    try:
        return module()
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def read_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of `module` itself, wherever it is kept."""
    value = getattr(module, name)
    return value if is_here(value) else inside(module, lambda: getattr(module, name).clone())


def device_of(module: nn.Module) -> torch.device | None:
    """The device a module computes on; None where that cannot be told."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None
