"""Where parameters are and what they are: not always there, on devices that differ within one model, and in float32.

Under `device_map` with parts on disk, and under ZeRO-3, a parameter exists only while the forward of the module that
owns it runs; with parts on several devices a hook moves the inputs of every module's forward, and nothing else.

Parts that need float32 keep it when the model is cast, and compute in it whatever torch's settings allow.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 itself.

    Others convert number by number: a processor with AVX2 takes ten times as long as for float32, and torch calls the
    older GPUs, which do the same, capable of it unless asked in this way.
    """
    if device.type == "cpu":
        known = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def without_casts_down(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` is to do to the tensors of a part that keeps its precision.

    `model.to(bfloat16)`, `.half()` and `.to("cuda", bfloat16)` hand one function to every tensor of the model; here it
    moves them, and casts them to float32 or finer only.
    """

    def apply(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        if converted.element_size() >= min(tensor.element_size(), torch.float32.itemsize):
            return converted
        return tensor.to(converted.device, torch.float32)

    return apply


def is_traced() -> bool:
    """Whether this runs to become a graph (torch.compile, torch.export, ONNX), where no value can be looked at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class _Products:
    """torch's settings of how products of float32 are computed, and who asks at the moment for full precision.

    They are global: with several threads the first one in sets them, and the last one out puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._found: list[tuple[object, str]] = []
        self._matmul = "highest"

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._set()
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def _set(self) -> None:
        backends = torch.backends
        settings = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
        self._found = [(setting, setting.fp32_precision) for setting in settings]
        try:
            self._matmul = torch.get_float32_matmul_precision()
        except RuntimeError:  # torch refuses to name it where somebody used the settings above instead
            self._matmul = "highest"
        if self._matmul != "highest":  # both ways of saying it have to agree, or torch refuses to multiply
            torch.set_float32_matmul_precision("highest")
        for setting, value in self._found:
            if value not in ("none", "ieee"):
                setting.fp32_precision = "ieee"

    def _restore(self) -> None:
        if self._matmul != "highest":
            torch.set_float32_matmul_precision(self._matmul)
        for setting, value in self._found:
            if setting.fp32_precision != value:
                setting.fp32_precision = "none"  # which takes after `torch.backends.fp32_precision`, maybe as before
            if setting.fp32_precision != value:
                setting.fp32_precision = value


_products = _Products()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products and convolutions of float32 in float32, on all devices: no autocast, no TF32, no bfloat16.

    TF32, which torch uses in convolutions unless told otherwise, keeps 10 of 23 bits. In a graph that is being traced
    the settings are whatever they are when it runs.

    Args:
        device: where the tensors are.
    """
    with torch.autocast(device.type, enabled=False):
        if is_traced():
            yield
            return
        _products.enter()
        try:
            yield
        finally:
            _products.leave()
