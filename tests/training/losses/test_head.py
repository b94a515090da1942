"""The head in parts: the values and gradients of all logits at once, of which no more than a part ever stands."""

import pytest
import torch
from loss_batches import SIZE, VOCABULARY, WORDS, loss_codec, padded
from peft import LoraConfig, get_peft_model
from torch import nn

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
    found = {}
    for most in (2**25, 3 * VOCABULARY):
        monkeypatch.setattr(loss_head, "WHOLE", most)
        loss, parts = losses(head, codec, states, token_over=over)
        assert {"text", "marker", "token", "count", "reconstruction"} == set(parts)
        found[most] = {"loss": loss} | parts | gradients(head, states, loss)
    whole, divided = found.values()
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
    """19 rows in parts of 3, forward and backward; the head itself is called once, and makes nothing of its own."""
    monkeypatch.setattr(loss_head, "WHOLE", 3 * VOCABULARY)
    seen = []
    for name in ("_readings", "_logit_gradient"):
        monkeypatch.setattr(loss_head, name, _noting(getattr(loss_head, name), seen))
    head, calls = head_of("plain"), []
    head.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    states = torch.randn(3, LABELS.shape[1], HIDDEN, dtype=torch.float64, requires_grad=True)
    losses(head, None, states)[0].backward()
    assert seen == 2 * [3, 3, 3, 3, 3, 3, 1] and calls == [(19,)]


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
