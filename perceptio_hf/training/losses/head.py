"""What the losses of words read off the head, without the logits of all learnt tokens at once.

Of the n x V logits three things are needed: the log of the normaliser, the logit of the target, the logits of the
codes. At 1,500 tokens and 152,000 words logits and their gradient would take 1.8 GB; here the head's last product is
computed a few rows at a time. Where the head's weights are trained, some rows stand until their gradient takes their
place and the others are computed once more for theirs: 0.4 GB. Where the weights are fixed, but for single rows that
PEFT trains, all that the gradient needs is taken along. Values and gradients are the same but for the order in which
numbers are added.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

WHOLE = 2**25  # logits that are computed at once, 134 MB in float32
KEPT = 2  # times as many stay for the gradient, so that up to so many nothing is computed twice
_WIDENED = 2**21  # logits of half precision that are widened at once

# What hooks do with any output: they move it, or have backward passes call them.
_PASSING = (
    Tensor.to,
    Tensor.register_hook,
    Tensor.device.__get__,
    Tensor.requires_grad.__get__,
    Tensor.grad_fn.__get__,
    Tensor.is_leaf.__get__,
)

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
    product of the states with a (V, d) matrix is taken over from it. A head that does not end with it, e.g. one with
    LoRA of its own, gives all logits.

    Args:
        check: called with V before targets (n,) and codes (K,) are looked up.
    """
    if torch.compiler.is_compiling():
        logits = lm_head(states)
    else:
        with _Reader(states, targets, code_ids, check) as reader:
            logits = lm_head(states)
        if any(logits is stand_in for stand_in in reader.standing_in):
            return reader.readings
        if reader.standing_in and logits.ndim == 1:  # something between that no mode can see has wrapped it
            logits = lm_head(states)
    check(logits.shape[-1])
    return _Readout.apply(logits, targets.to(logits.device), code_ids.to(logits.device))


class _Reader(TorchFunctionMode):
    """Watches a head for the product that makes logits of `states`, and reads it in parts.

    In the place of the logits stands a vector, the log of their normaliser. Whatever is done with it, behind the
    product or by hooks, is done with the logits instead; the head ends with the product where it gives the vector back.
    """

    def __init__(self, states: Tensor, targets: Tensor, code_ids: Tensor, check: Callable[[int], None]):
        super().__init__()
        self.states, self.targets, self.code_ids, self.check = states, targets, code_ids, check
        self.readings: Readings | None = None
        self.learns = torch.is_grad_enabled()
        self.product: tuple[Tensor, Tensor, Tensor | None] | None = None  # what the logits are made of
        self.logits: Tensor | None = None  # where they were asked for
        self.standing_in: list[Tensor] = []
        self.trained_rows: tuple[Tensor, Tensor, Tensor] | None = None  # a matrix, its rows that are trained, and which

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.product is not None:
            return self._behind(func, args, kwargs)
        if func is Tensor.index_copy:
            return self._note_rows(func(*args, **kwargs), *args, **kwargs)
        if func is not F.linear or torch.is_grad_enabled() != self.learns:  # the latter inside of autograd functions
            return func(*args, **kwargs)
        states, weight, bias = _linear_arguments(*args, **kwargs)
        fixed, index, rows = self._fixed(weight, bias)
        large = len(states) * len(weight) > WHOLE
        if states is not self.states or not len(states) or not (fixed or large):
            return func(*args, **kwargs)
        self.check(len(weight))
        self.product = states, weight, bias
        common = self.targets, self.code_ids, _computes_in(states)
        if fixed:
            self.readings = _FixedHead.apply(states, weight.detach(), bias, rows, index, *common, self.learns)
        else:
            self.readings = _PartsOfHead.apply(states, weight, bias, *common, self.learns)
        self.standing_in.append(self.readings[0])
        return self.readings[0]

    def _behind(self, func: Callable, args: tuple, kwargs: dict):
        """What is done once the product has been taken over."""
        if not any(self._stands_in(item) for item in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in _PASSING:
            result = func(*args, **kwargs)
            self.standing_in += [result] if isinstance(result, Tensor) else []
            return result
        if self.logits is None:
            self.logits = F.linear(*self.product)
        args, kwargs = tree_map(lambda item: self.logits if self._stands_in(item) else item, (args, kwargs))
        return func(*args, **kwargs)

    def _stands_in(self, item) -> bool:
        return any(item is stand_in for stand_in in self.standing_in)

    def _note_rows(self, matrix: Tensor, whole: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        """PEFT's trainable tokens are copied into the fixed matrix at every call."""
        if dim == 0 and not whole.requires_grad:
            self.trained_rows = matrix, index, source
        return matrix

    def _fixed(self, weight: Tensor, bias: Tensor | None) -> tuple[bool, Tensor | None, Tensor | None]:
        """Whether all of a head but single rows is fixed, and which rows are not."""
        if bias is not None and bias.requires_grad:
            return False, None, None
        if self.trained_rows is not None and weight is self.trained_rows[0]:
            return True, *self.trained_rows[1:]
        return not weight.requires_grad, None, None


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
        whole = logits.clone()
        _become_gradient(whole, normaliser, targets, code_ids, gradients, slice(0, len(whole)))
        return whole, None, None


class _PartsOfHead(torch.autograd.Function):
    """(n, d) states and the head's (V, d) weights -> readings; the logits are computed in parts.

    The first part stays, and becomes its own gradient in the backward pass; the others are computed twice. So is the
    first where the graph is kept for another backward pass.
    """

    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        code_ids: Tensor,
        dtype: torch.dtype,
        learns: bool,
    ) -> Readings:
        found, ctx.kept = [], None
        with torch.autocast(states.device.type, enabled=False):
            own, head, offset = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in _kept_and_other_parts(len(states), len(weight)):
                logits = F.linear(own[rows], head, offset)
                found.append(_readings(logits, targets[rows], code_ids))
                if rows.start == 0 and learns:
                    ctx.kept = logits
                del logits
        readings = tuple(torch.cat(part) for part in zip(*found, strict=True))
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
        logits, ctx.kept = ctx.kept, None
        with torch.autocast(states.device.type, enabled=False):
            for rows in _kept_and_other_parts(len(states), len(weight)):
                logits = F.linear(own[rows], head, offset) if logits is None else logits
                _become_gradient(logits, normaliser, targets, code_ids, gradients, rows)
                if wants_states:
                    of_states[rows] = logits @ head
                if wants_weight:
                    _add_product(of_weight, logits, own[rows])
                if wants_bias:
                    of_bias += logits.sum(0)
                logits = None
        return of_states, of_weight, of_bias, *[None] * 4


class _FixedHead(torch.autograd.Function):
    """The readings of a head of which at most the rows `index` (r,) are trained, `rows` (r, d) of its matrix.

    By the log of the normaliser, a token's state has the gradient p @ weight with p (V,) its probabilities. It is
    computed with the logits, so that nothing of the size of the vocabulary is left for later. Target and codes are left
    out of p there, and their share added in the end: it nearly cancels against their own gradient in what is learnt
    well, which half precision must not see.
    """

    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        index: Tensor | None,
        targets: Tensor,
        code_ids: Tensor,
        dtype: torch.dtype,
        learns: bool,
    ) -> Readings:
        wants_states, wants_rows = learns and ctx.needs_input_grad[0], learns and ctx.needs_input_grad[3]
        parts, others, of_rows = [], [], []
        with torch.autocast(states.device.type, enabled=False):
            own, head, offset = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            for part in _parts(len(states), len(weight), WHOLE):
                logits = F.linear(own[part], head, offset)
                parts.append(_readings(logits, targets[part], code_ids))
                if wants_states or wants_rows:
                    shares = logits.to(parts[-1][0].dtype).sub_(parts[-1][0][:, None]).exp_()
                if wants_rows:
                    of_rows.append(shares[:, index])
                if wants_states:
                    shares.scatter_(1, targets[part, None], 0).index_fill_(1, code_ids, 0)
                    others.append(shares.to(dtype) @ head)
        readings = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(
            torch.cat(others) if wants_states else None,
            *((head[targets], head[code_ids]) if wants_states else (None, None)),
            *((own, torch.cat(of_rows), index) if wants_rows else (None, None, None)),
            targets,
            code_ids,
            *readings,
        )
        ctx.dtypes = states.dtype, None if rows is None else rows.dtype
        return readings

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_normaliser: Tensor, of_target: Tensor, of_codes: Tensor):
        others, target_rows, code_rows, own, row_shares, index, targets, code_ids, *readings = ctx.saved_tensors
        normaliser, target_logits, code_logits = readings
        of_states = of_rows = None
        if row_shares is not None:
            given = (targets[:, None] == index) * of_target[:, None]
            given += of_codes @ (code_ids[:, None] == index).to(of_codes.dtype)
            of_rows = ((row_shares * of_normaliser[:, None] + given).to(own.dtype).T @ own).to(ctx.dtypes[1])
        if others is not None:
            is_target = targets[:, None] == code_ids  # (n, K); one that is a code counts among the codes
            share = (target_logits - normaliser).exp() * of_normaliser + of_target
            shares = (code_logits - normaliser[:, None]).exp() * of_normaliser[:, None] + of_codes
            shares += is_target * of_target[:, None]
            share = share.masked_fill(is_target.any(1), 0)
            of_states = others * of_normaliser[:, None] + target_rows * share[:, None]
            of_states = (of_states + shares.to(code_rows.dtype) @ code_rows).to(ctx.dtypes[0])
        return of_states, None, None, of_rows, *[None] * 5


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


def _become_gradient(
    logits: Tensor, normaliser: Tensor, targets: Tensor, code_ids: Tensor, gradients: Readings, rows: slice
) -> None:
    """Turn the logits of these rows into their gradient, computed in float32 or finer, where they stand."""
    normaliser, targets, of_normaliser, of_target, of_codes = (
        numbers[rows] for numbers in (normaliser, targets, *gradients)
    )
    for few in _parts(len(logits), logits.shape[-1], _WIDENED):
        part = logits[few].to(normaliser.dtype)  # the logits themselves where they are of this type
        part.sub_(normaliser[few, None]).exp_().mul_(of_normaliser[few, None])
        part.scatter_add_(1, targets[few, None], of_target[few, None])
        part.index_add_(1, code_ids, of_codes[few])
        if part.dtype != logits.dtype:
            logits[few] = part


def _parts(rows: int, columns: int, most: int) -> Iterator[slice]:
    """The rows of a matrix in parts of at most `most` numbers, or of one row."""
    step = max(1, most // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _kept_and_other_parts(rows: int, columns: int) -> Iterator[slice]:
    """What of a matrix of logits stays for its gradient, then the rest."""
    kept = max(1, KEPT * WHOLE // columns)
    yield slice(0, min(kept, rows))
    for part in _parts(max(0, rows - kept), columns, WHOLE):
        yield slice(kept + part.start, min(kept + part.stop, rows))
