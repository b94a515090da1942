"""The head in parts: the values and gradients of all logits at once, of which no more than a part ever stands."""

from collections import defaultdict

import pytest
import torch
from loss_batches import SIZE, VOCABULARY, WORDS, loss_codec, padded
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceptio_hf.training.losses import LossWeights, composite_loss
from perceptio_hf.training.losses import head as loss_head

SPAN = [4, 12, 9, 9, 6, 10]
LABELS = padded([[-100, 0, 1, *SPAN, 3], [-100, -100, 2, 1, 0], [-100, *SPAN, 2]])  # 19 learnt tokens
HIDDEN = 6


class Wrapped(nn.Module):
    def __init__(self, head: nn.Linear):
        super().__init__()
        self.lm_head, self.other = head, nn.Linear(2, 2)


def head_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A linear layer, with a bias, frozen, or with rows that PEFT trains one by one."""
    torch.manual_seed(5)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=kind == "bias").to(dtype)
    if kind == "rows":
        tokens = LoraConfig(r=1, target_modules=["other"], trainable_token_indices={"lm_head": [3, 4, 9]})
        return get_peft_model(Wrapped(head), tokens).base_model.model.lm_head
    return head.requires_grad_(kind != "frozen")


def losses(head: nn.Module, codec, states: torch.Tensor, **options) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(6)
    depth = torch.rand(2, SIZE, SIZE)
    return composite_loss(
        states, head, LABELS, WORDS, codec=codec, depth=depth, weights=LossWeights(**options), mask_targets=None
    )


def gradients(head: nn.Module, states: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {"states": states} | {name: value for name, value in head.named_parameters() if value.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("over", ["codes", "vocabulary"])
@pytest.mark.parametrize("kind", ["plain", "bias", "frozen", "rows"])
def test_parts_give_the_whole(monkeypatch, kind, over):
    """The composite loss with its reconstruction, in parts of 3 rows and at once."""
    head, codec = head_of(kind), loss_codec().double()
    torch.manual_seed(7)
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(loss_head, "WHOLE", 3 * VOCABULARY)
    found = []
    for head_or_logits in (lambda chosen: head(1 * chosen), head):  # the first gives all logits: the states are others
        loss, parts = losses(head_or_logits, codec, states, token_over=over)
        assert {"text", "marker", "token", "count", "reconstruction"} == set(parts)
        found.append({"loss": loss} | parts | gradients(head, states, loss))
    whole, divided = found
    assert len(whole) == {"plain": 8, "bias": 9, "frozen": 7, "rows": 8}[kind]
    for name in whole:
        torch.testing.assert_close(divided[name], whole[name], msg=lambda text, name=name: f"{name}: {text}")
        assert name in ("loss", *parts) or whole[name].any()


def _noting(function, seen: list[int]):
    def noting(logits, *rest):
        seen.append(len(logits))
        return function(logits, *rest)

    return noting


def test_no_more_logits_stand_than_asked_for(monkeypatch):
    """19 rows, the first 6 of which stay and the others in parts of 3, forward and backward; the head itself is called
    once, and makes nothing of its own."""
    monkeypatch.setattr(loss_head, "WHOLE", 3 * VOCABULARY)
    seen = []
    for name in ("_readings", "_become_gradient"):
        monkeypatch.setattr(loss_head, name, _noting(getattr(loss_head, name), seen))
    head, calls = head_of("plain"), []
    head.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    losses(head, None, states)[0].backward()
    assert seen == 2 * [6, 3, 3, 3, 3, 1] and calls == [True]


def test_what_stays_is_computed_once_and_again_for_a_second_pass(monkeypatch):
    """Of 19 rows the first 6 once, but for a graph that is kept."""
    monkeypatch.setattr(loss_head, "WHOLE", 3 * VOCABULARY)
    head = head_of("plain")
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    loss, _ = losses(head, None, states)
    first, second, once = [], [], []
    for found in (first, second):
        with Shapes() as shapes:
            found += torch.autograd.grad(loss, [states, *head.parameters()], retain_graph=True)
        once.append((6, VOCABULARY) in shapes.made["aten.mm.default"])
    assert once == [False, True]
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_autocast_computes_as_it_would(monkeypatch):
    """Under bfloat16 the head multiplies in bfloat16; gradients of float32 weights add up in float32."""
    head = head_of("plain", torch.float32)
    states = torch.randn(3, LABELS.shape[1], HIDDEN, requires_grad=True)
    found = []
    for most in (2**25, 3 * VOCABULARY):
        monkeypatch.setattr(loss_head, "WHOLE", most)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = losses(head, None, states)
        found.append({"loss": loss} | gradients(head, states, loss))
    for name, value in found[0].items():
        assert found[1][name].dtype == torch.float32
        torch.testing.assert_close(found[1][name], value, rtol=0.02, atol=2e-3)


def test_a_head_that_ends_otherwise_gives_all_logits(monkeypatch):
    monkeypatch.setattr(loss_head, "WHOLE", 3 * VOCABULARY)
    head = head_of("frozen")
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    doubled, _ = losses(lambda chosen: head(2 * chosen), None, states)
    expected, _ = losses(head, None, 2 * states)
    torch.testing.assert_close(doubled, expected)


class Capped(nn.Module):
    """A head that does something to its logits."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(self.head(states) / 3)


@pytest.mark.parametrize("kind", ["plain", "frozen", "lora"])
def test_a_head_that_goes_on_behind_its_product_has_its_logits(monkeypatch, kind):
    """Capped logits, as Gemma has them, and LoRA on the head: what is done to the logits counts."""
    head = head_of("plain")
    if kind == "lora":
        adapted = get_peft_model(Wrapped(head), LoraConfig(r=2, target_modules=["lm_head"])).base_model.model.lm_head
        nn.init.normal_(adapted.lora_B["default"].weight)
        head = adapted.double()
    else:
        head = Capped(head.requires_grad_(kind == "plain"))
    torch.manual_seed(7)
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    logits = head(states)
    expected, _ = losses(lambda chosen: chosen, None, logits)
    monkeypatch.setattr(loss_head, "WHOLE", 3 * VOCABULARY)
    calls = []
    head.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    loss, _ = losses(head, None, states)
    torch.testing.assert_close(loss, expected)
    wanted = gradients(head, states, expected)
    for name, value in gradients(head, states, loss).items():
        torch.testing.assert_close(value, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    assert calls == [(19, VOCABULARY)]


@pytest.mark.parametrize("kind", ["plain", "frozen", "rows"])
def test_hooks_see_the_logits(monkeypatch, kind):
    """As a debugger's that looks for values that are not finite; what they return counts."""
    head = head_of(kind)
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    expected, _ = losses(lambda chosen: head(1 * chosen), None, states)
    monkeypatch.setattr(loss_head, "WHOLE", 3 * VOCABULARY)
    seen = []
    looking = head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().abs().max(-1)))
    torch.testing.assert_close(losses(head, None, states)[0], expected)
    assert seen[0].values.shape == (19,)
    looking.remove()
    head.register_forward_hook(lambda module, inputs, output: output - output.mean(-1, keepdim=True))
    torch.testing.assert_close(losses(head, None, states)[0], expected)


class Multiplied(torch.autograd.Function):
    """A product of its own, as quantised layers have it."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(weight)
        return nn.functional.linear(states, weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


@pytest.mark.parametrize("learns", [True, False])
def test_a_product_inside_an_autograd_function_is_left_to_it(learns):
    head = head_of("frozen")
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(learns):
        loss, _ = losses(lambda chosen: Multiplied.apply(chosen, head.weight), None, states)
        expected, _ = losses(head, None, states)
    torch.testing.assert_close(loss, expected)
    if learns:
        wanted = torch.autograd.grad(expected, states)
        torch.testing.assert_close(torch.autograd.grad(loss, states), wanted)


class Shapes(TorchDispatchMode):
    """Notes the shapes that operations give."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()
        self.made: dict[str, set[tuple[int, ...]]] = defaultdict(set)  # by the operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        shapes = {tuple(item.shape) for item in tree_leaves(result) if isinstance(item, torch.Tensor)}
        self.seen |= shapes
        self.made[str(func)] |= shapes
        return result


@pytest.mark.parametrize("kind", ["plain", "frozen", "rows"])
def test_a_fixed_head_leaves_nothing_as_large_as_the_vocabulary_for_later(kind):
    """Neither logits nor the gradient of all weights: the backward pass knows the 3 trained rows alone."""
    head = head_of(kind)
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    loss, _ = losses(head, None, states)
    with Shapes() as shapes:
        loss.backward()
    assert (19, HIDDEN) in shapes.seen
    assert any(VOCABULARY in shape for shape in shapes.seen) == (kind == "plain")


def test_what_is_learnt_well_has_its_small_gradient_in_bfloat16():
    """Where the target has nearly all probability, it and the rest of the softmax nearly cancel."""
    torch.manual_seed(0)
    head = nn.Linear(64, 4096, bias=False).to(torch.bfloat16).requires_grad_(False)
    targets, code_ids = torch.arange(40, 56), torch.arange(8)
    values = (27 * nn.functional.normalize(head.weight[targets].float())).bfloat16()
    found = []
    for dtype, at_once in ((torch.float64, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        own, states = nn.Linear(64, 4096, bias=False, dtype=dtype).requires_grad_(False), values.to(dtype, copy=True)
        own.weight.copy_(head.weight)
        states.requires_grad_()
        called = (lambda chosen, own=own: own(1 * chosen)) if at_once else own  # other states: gives all logits
        normaliser, of_target, _ = loss_head.read_head(called, states, targets, code_ids)
        assert 0.95 < (of_target - normaliser).exp().mean() < 0.995
        (normaliser - of_target).sum().backward()
        found.append(states.grad.double())
    exact, whole, divided = found
    assert (divided - exact).norm() < 1.2 * (whole - exact).norm() < 0.2 * exact.norm()
