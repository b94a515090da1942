"""What the losses of words read off the head, without the logits of all learnt tokens at once.

Of the n x V logits three things are needed: the log of the normaliser, the logit of the target, the logits of the
codes. At 1,500 tokens and 152,000 words logits and their gradient would take 1.8 GB; here the head's last product is
computed a few rows at a time, and once more for the gradient. Values and gradients, those of the head's weights
included, are the same but for the order in which numbers are added.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WHOLE = 2**25  # logits that may stand at once, 134 MB in float32; up to so many nothing is computed twice
_WIDENED = 2**21  # logits of half precision that are widened at once

Readings = tuple[Tensor, Tensor, Tensor]  # (n,) log of the normaliser, (n,) target's logits, (n, K) codes' logits


def read_head(
    lm_head: Callable[[Tensor], Tensor],
    states: Tensor,
    targets: Tensor,
    code_ids: Tensor,
    *,
    check: Callable[[int], None] = lambda size: None,
) -> Readings:
    """Call the head once with (n, d) states and read what the losses need; float32 or finer.

    The head is called as a whole, so that whatever wraps it (adapters, offloading, sharding) does its part; only the
    product of the states with a (V, d) matrix is taken over from it. A head that ends in something else gives all
    logits.

    Args:
        check: called with V before targets (n,) and codes (K,) are looked up.
    """
    if torch.compiler.is_compiling():
        logits, reader = lm_head(states), None
    else:
        reader = _Reader(states, targets, code_ids, check)
        with reader:
            logits = lm_head(states)
    if reader is not None and reader.readings is not None:
        return reader.readings
    check(logits.shape[-1])
    return _Readout.apply(logits, targets.to(logits.device), code_ids.to(logits.device))


class _Reader(TorchFunctionMode):
    """Watches a head for the product that makes logits of `states`, and reads it in parts where it is large."""

    def __init__(self, states: Tensor, targets: Tensor, code_ids: Tensor, check: Callable[[int], None]):
        super().__init__()
        self.states, self.targets, self.code_ids, self.check = states, targets, code_ids, check
        self.readings: Readings | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.linear or self.readings is not None:
            return func(*args, **kwargs)
        states, weight, bias = _linear_arguments(*args, **kwargs)
        if states is not self.states or len(states) * len(weight) <= WHOLE:
            return func(*args, **kwargs)
        self.check(len(weight))
        self.readings = _PartsOfHead.apply(states, weight, bias, self.targets, self.code_ids, _computes_in(states))
        return self.readings[0]


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _computes_in(states: Tensor) -> torch.dtype:
    """The type in which `linear` would multiply: autocast's where it is on."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


class _Readout(torch.autograd.Function):
    """(n, V) logits -> readings.

    The same as logsumexp, gather and indexing, but the gradient is built once: autograd would build a full one for each
    of the three and add them up. Half precision is widened a few rows at a time, never as a whole.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, code_ids: Tensor) -> Readings:
        readings = _readings(logits, targets, code_ids)
        ctx.save_for_backward(logits, targets, code_ids, readings[0])
        return readings

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, code_ids, normaliser = ctx.saved_tensors
        whole = torch.empty_like(logits)
        for rows in _parts(len(logits), logits.shape[-1], _WIDENED):
            shifted = logits[rows].to(normaliser.dtype) - normaliser[rows, None]
            whole[rows] = _logit_gradient(shifted, targets, code_ids, gradients, rows)
        return whole, None, None


class _PartsOfHead(torch.autograd.Function):
    """(n, d) states and the head's (V, d) weights -> readings; the logits are computed in parts, twice."""

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, code_ids: Tensor, dtype: torch.dtype
    ) -> Readings:
        parts = []
        with torch.autocast(states.device.type, enabled=False):
            own, head, offset = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in _parts(len(states), len(weight), WHOLE):
                parts.append(_readings(F.linear(own[rows], head, offset), targets[rows], code_ids))
        readings = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(states, weight, bias, targets, code_ids, readings[0])
        ctx.dtype = dtype
        return readings

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor):
        states, weight, bias, targets, code_ids, normaliser = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        own, head, offset = states.to(ctx.dtype), weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        of_states = torch.empty_like(states) if wants_states else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        of_bias = torch.zeros_like(bias) if wants_bias else None
        with torch.autocast(states.device.type, enabled=False):
            for rows in _parts(len(states), len(weight), WHOLE):
                shifted = F.linear(own[rows], head, offset).to(normaliser.dtype).sub_(normaliser[rows, None])
                part = _logit_gradient(shifted, targets, code_ids, gradients, rows).to(ctx.dtype)
                del shifted
                if wants_states:
                    of_states[rows] = part @ head
                if wants_weight:
                    _add_product(of_weight, part, own[rows])
                if wants_bias:
                    of_bias += part.sum(0)
        return of_states, of_weight, of_bias, None, None, None


def _add_product(total: Tensor, part: Tensor, states: Tensor) -> None:
    """total (V, d) += part (n, V) transposed times states (n, d)."""
    if total.dtype == part.dtype:
        total.addmm_(part.T, states)
    else:
        total += part.T @ states


def _readings(logits: Tensor, targets: Tensor, code_ids: Tensor) -> Readings:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, _WIDENED // logits.shape[-1])
    normaliser = torch.cat([part.to(dtype).logsumexp(-1) for part in logits.split(rows)])
    return normaliser, logits.gather(1, targets[:, None])[:, 0].to(dtype), logits[:, code_ids].to(dtype)


def _logit_gradient(shifted: Tensor, targets: Tensor, code_ids: Tensor, gradients: Readings, rows: slice) -> Tensor:
    """The gradient of some rows of logits, in float32 or finer, in the memory of `shifted`: the logits less the log of
    their normaliser."""
    of_normaliser, of_target, of_codes = (gradient[rows] for gradient in gradients)
    part = shifted.exp_().mul_(of_normaliser[:, None])
    part.scatter_add_(1, targets[rows, None], of_target[:, None])
    return part.index_add_(1, code_ids, of_codes)


def _parts(rows: int, columns: int, most: int) -> Iterator[slice]:
    """The rows of a matrix in parts of at most `most` numbers, or of one row."""
    step = max(1, most // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
