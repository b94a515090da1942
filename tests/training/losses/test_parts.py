"""Losses against plain loops, in value and gradient, and the identities they must keep."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import SIZE, SPAN, VOCABULARY, WORDS, label_batches, loss_codec, padded

from perceptio_hf.training.losses import (
    PARTS,
    LossCounts,
    LossWeights,
    count_loss,
    loss_counts,
    marker_loss,
    mask_loss,
    reconstruction_loss,
    score_loss,
    soft_merge,
    text_loss,
    token_loss,
)
from perceptio_hf.training.losses import head as loss_head
from perceptio_hf.training.losses.parts import parts_table

WORD_LOSSES = {"text": text_loss, "marker": marker_loss, "token": token_loss, "count": count_loss}


@pytest.fixture(scope="module")
def codec():
    return loss_codec()


def naive_words(logits: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, torch.Tensor], Counter]:
    """Sum and number of items of the four losses of words."""
    sums, counts = dict.fromkeys(WORD_LOSSES, logits.sum() * 0), Counter()

    def add(name: str, value: torch.Tensor) -> None:
        sums[name], counts[name] = sums[name] + value, counts[name] + 1

    for row in range(len(labels)):
        expected, true, learning = 0.0, 0, False
        for position in range(1, labels.shape[1] + 1):
            label = int(labels[row, position]) if position < labels.shape[1] else -100
            if label != -100:
                learning, probabilities = True, logits[row, position - 1].softmax(-1)
                expected = expected + probabilities[list(WORDS.codes)].sum()
                if label in WORDS.codes:
                    true += 1
                    add("token", -(probabilities[label] / probabilities[list(WORDS.codes)].sum()).log())
                else:
                    add("marker" if label in (4, 10) else "text", -probabilities[label].log())
            elif learning:
                error = (expected - true) / max(true, 1)
                add("count", 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5)
                expected, true, learning = 0.0, 0, False
    return sums, counts


@settings(deadline=None, max_examples=40)
@given(label_batches(), st.integers(0, 9))
def test_losses_of_words_equal_a_loop(labels, seed):
    torch.manual_seed(seed)
    logits = torch.randn(*labels.shape, VOCABULARY, dtype=torch.float64, requires_grad=True)
    sums, counts = naive_words(logits, labels)
    for name, function in WORD_LOSSES.items():
        loss, reference = function(logits, labels, WORDS), sums[name] / max(1, counts[name])
        torch.testing.assert_close(loss, reference)
        gradients = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, reference))
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(function(logits, labels, WORDS, count=7), sums[name] / 7)
    own = loss_counts(labels, WORDS)
    assert [own.text, own.markers, own.codes, own.responses] == [counts[name] for name in WORD_LOSSES]
    assert own.spans * 2 == own.markers and own.masks == (labels == WORDS.seg).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_precision_and_more_rows_than_are_worked_on_at_once(dtype, monkeypatch):
    monkeypatch.setattr(loss_head, "_WIDENED", 7 * VOCABULARY)
    torch.manual_seed(1)
    labels = padded([[-100, *[0, 1, 2] * 15, *SPAN]])
    logits = torch.randn(*labels.shape, VOCABULARY).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    for function in WORD_LOSSES.values():
        loss, reference = function(logits, labels, WORDS), function(exact, labels, WORDS)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
        gradient, true = (torch.autograd.grad(value, x)[0] for value, x in ((loss, logits), (reference, exact)))
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), true, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_perfect_words_cost_nothing():
    labels = padded([[-100, 3, *SPAN, 1, -100, 0, 0], [-100, -100, 2]])
    logits = torch.zeros(*labels.shape, VOCABULARY)
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    logits[rows, columns - 1, labels[rows, columns]] = 120.0  # one-hot, as far as float32 can tell
    for function in WORD_LOSSES.values():
        assert function(logits, labels, WORDS) == 0


@settings(deadline=None, max_examples=25)
@given(st.booleans(), st.floats(-2.5, 2.5), st.integers(0, 9))
def test_count_loss_is_zero_exactly_where_the_expected_count_is_right(has_span, excess, seed):
    labels = padded([[-100, 0, 1, *(SPAN if has_span else []), *[2] * 6]])
    true, learnt = 4 * has_span, int((labels != -100).sum())
    torch.manual_seed(seed)
    expected = min(max(true + excess, 0.01), learnt - 0.01)
    # Shares of the codes at each position, drawn freely but for their sum.
    shares = torch.rand(learnt, dtype=torch.float64) + 0.1
    low, high = torch.tensor(-50.0), torch.tensor(50.0)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (shares.logit(1e-9) + middle).sigmoid().sum() < expected else (low, middle)
    shares = (shares.logit(1e-9) + middle).sigmoid()
    logits = torch.zeros(*labels.shape, VOCABULARY, dtype=torch.float64)
    is_code = torch.isin(torch.arange(VOCABULARY), torch.tensor(WORDS.codes))
    split = torch.where(is_code, shares[:, None] / 5, (1 - shares[:, None]) / (VOCABULARY - 5)).log()
    logits[:, :-1][labels[:, 1:] != -100] = split
    error = abs(float(shares.sum()) - true) / max(true, 1)
    loss = count_loss(logits, labels, WORDS).item()
    assert loss == pytest.approx(0.5 * error**2 if error < 1 else error - 0.5, abs=1e-9)
    assert (loss < 1e-9) == (error < 1e-4)


def test_the_token_loss_over_the_vocabulary_is_the_ordinary_cross_entropy():
    labels = padded([[-100, 0, *SPAN, 2], [-100, *SPAN, 1, 1]])
    logits = torch.randn(*labels.shape, VOCABULARY, dtype=torch.float64)
    ahead, is_code = labels[:, 1:], torch.isin(labels[:, 1:], torch.tensor(WORDS.codes))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][is_code], ahead[is_code])
    torch.testing.assert_close(token_loss(logits, labels, WORDS, over="vocabulary"), expected)
    on_codes = logits[:, :-1][is_code].log_softmax(-1)[:, list(WORDS.codes)].logsumexp(-1)
    difference = token_loss(logits, labels, WORDS, over="vocabulary") - token_loss(logits, labels, WORDS)
    torch.testing.assert_close(difference, -on_codes.mean())
    with pytest.raises(ValueError, match="'words'; choose one of codes, vocabulary"):
        token_loss(logits, labels, WORDS, over="words")


def test_the_guide_shows_the_table_of_parts():
    guide = Path(__file__).parents[3] / "docs" / "training.md"
    assert parts_table() in guide.read_text(encoding="utf-8"), "print(parts_table()) gives it"


@pytest.mark.parametrize("beta", [1.0, 0.1, 1e-3])
def test_a_small_beta_keeps_the_slope_of_the_count_loss(beta):
    """The share of other words at one code position of four: the loss and its slope, by hand."""
    labels = padded([[-100, *SPAN]])
    leak = torch.tensor(0.04, dtype=torch.float64, requires_grad=True)
    is_code = torch.isin(torch.arange(VOCABULARY), torch.tensor(WORDS.codes))
    rows = []
    for position, token in enumerate(SPAN):
        outside = leak if position == 2 else torch.tensor(float(token not in WORDS.codes), dtype=torch.float64)
        rows.append(torch.where(is_code, (1 - outside) / 5, outside / (VOCABULARY - 5)).clamp(min=1e-300).log())
    logits = torch.stack([*rows, torch.zeros(VOCABULARY, dtype=torch.float64)])[None]
    loss = count_loss(logits, labels, WORDS, beta=beta)
    error = 0.04 / 4
    expected = 0.5 * error**2 / beta if error < beta else error - 0.5 * beta
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (slope,) = torch.autograd.grad(loss, leak)
    assert slope.item() == pytest.approx(min(error / beta, 1) / 4, rel=1e-6)


def naive_soft_merge(code_logits, codec, temperature):
    maps = []
    for span in code_logits:
        vectors = []
        for logits in span:
            weights = [((x - max(logits)) / temperature).exp() for x in logits]
            vectors.append(sum(w / sum(weights) * vector for w, vector in zip(weights, codec.codebook, strict=True)))
        grid = torch.stack(vectors).T.reshape(1, -1, 2, 2)
        low, high = codec.config.value_low, codec.config.value_high
        maps.append(((codec.depth_decoder(grid)[0, 0] - low) / (high - low)).clamp(0, 1))
    return torch.stack(maps)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_soft_merge_equals_a_loop(codec, temperature):
    torch.manual_seed(2)
    logits = (torch.randn(3, 4, 5) * 2).requires_grad_()
    merged, reference = soft_merge(logits, codec, temperature=temperature), naive_soft_merge(logits, codec, temperature)
    torch.testing.assert_close(merged, reference)
    weight = torch.rand_like(merged)
    gradients = (torch.autograd.grad((weight * value).sum(), logits)[0] for value in (merged, reference))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 0])
def test_soft_merge_ends_in_the_hard_decode(codec, temperature):
    torch.manual_seed(3)
    logits = (torch.randn(2, 4, 5) * 3).requires_grad_()
    merged = soft_merge(logits, codec, temperature=temperature)
    torch.testing.assert_close(merged, codec.decode(logits.argmax(-1)))
    assert merged.shape == (2, SIZE, SIZE)
    if temperature:
        assert torch.autograd.grad(merged.sum(), logits)[0].isfinite().all()
    else:
        assert not merged.requires_grad


@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_pass_the_decoder_and_leave_it_alone(codec, trainable):
    codec.requires_grad_(trainable)
    try:
        logits = torch.randn(1, 4, 5).to(torch.bfloat16).requires_grad_()
        soft_merge(logits, codec, temperature=0.5, size=(7, 9)).square().sum().backward()
        assert logits.grad.abs().sum() > 0
        for parameter in codec.parameters():
            assert parameter.grad is None and parameter.requires_grad == trainable
    finally:
        codec.requires_grad_(True)


def naive_reconstruction(depth, target, valid, gradient_weight):
    total, count = depth.sum() * 0, 0
    for prediction, truth, known in zip(depth, target, valid, strict=True):
        pixels, pairs = [], []
        for y in range(prediction.shape[0]):
            for x in range(prediction.shape[1]):
                if not known[y, x]:
                    continue
                error = prediction[y, x] - truth[y, x]
                pixels.append(error.abs())
                for v, u in ((y + 1, x), (y, x + 1)):
                    if v < prediction.shape[0] and u < prediction.shape[1] and known[v, u]:
                        pairs.append((prediction[v, u] - truth[v, u] - error).abs())
        if pixels:
            count += 1
            total = total + sum(pixels) / len(pixels) + gradient_weight * sum(pairs) / max(1, len(pairs))
    return total / max(1, count)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (3, 6, 4), (0, 3, 3)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("hole", [math.nan, math.inf, 0.3])
def test_reconstruction_equals_a_loop_and_never_looks_into_holes(shape, share, hole):
    torch.manual_seed(4)
    depth, valid = torch.rand(shape, requires_grad=True), torch.rand(shape) < share
    target = torch.where(valid, torch.rand(shape), hole)
    loss = reconstruction_loss(depth, target, valid, gradient_weight=0.7)
    reference = naive_reconstruction(depth, target, valid, 0.7)
    torch.testing.assert_close(loss, reference)
    gradients = [torch.autograd.grad(value, depth)[0] for value in (loss, reference)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][~valid].any()
    assert reconstruction_loss(torch.where(valid, target, 0.1), target, valid) == 0


def naive_mask_loss(logits, targets, bce_weight, dice_weight):
    bces, dices = [], []
    for rows, truth in zip(logits, targets, strict=True):
        pixels = [(x, t) for row, line in zip(rows, truth, strict=True) for x, t in zip(row, line, strict=True)]
        inside = [1 / (1 + (-x).exp()) for x, _ in pixels]
        bces.append(-sum(t * p.log() + (1 - t) * (1 - p).log() for p, (_, t) in zip(inside, pixels, strict=True)))
        overlap = sum(p * t for p, (_, t) in zip(inside, pixels, strict=True))
        dices.append(1 - (2 * overlap + 1) / (sum(inside) + sum(t for _, t in pixels) + 1))
    pixels = logits[0].numel()
    return bce_weight * sum(bces) / len(bces) / pixels + dice_weight * sum(dices) / len(dices)


@pytest.mark.parametrize(("bce_weight", "dice_weight"), [(2.0, 0.5), (1.0, 4.0)])
def test_mask_loss_equals_a_loop(bce_weight, dice_weight):
    torch.manual_seed(0)
    logits, targets = (torch.randn(3, 5, 7) * 2).requires_grad_(), torch.rand(3, 5, 7)
    loss, parts = mask_loss(logits, targets, bce_weight=bce_weight, dice_weight=dice_weight)
    reference = naive_mask_loss(logits, targets, bce_weight, dice_weight)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx((bce_weight * parts["mask_bce"] + dice_weight * parts["mask_dice"]).item())


def test_perfect_masks_cost_nothing():
    targets = (torch.rand(2, 6, 6) > 0.5).float()
    loss, _ = mask_loss((targets - 0.5) * 200, targets)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_no_masks_give_a_zero_with_a_graph():
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    loss, _ = mask_loss(logits, torch.zeros(0, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert score_loss(torch.zeros(0), logits, torch.zeros(0, 4, 4)).item() == 0


def test_score_loss_measures_the_estimate_of_the_overlap():
    logits = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]])
    targets = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # intersection 1, union 3
    assert score_loss(torch.tensor([1 / 3]), logits, targets).item() == pytest.approx(0, abs=1e-7)
    assert score_loss(torch.tensor([1.0]), logits, targets).item() == pytest.approx((2 / 3) ** 2)


def test_all_weights_are_checked():
    assert LossWeights(text=0).marker == 1
    for values in ({"count": -1.0}, {"text": math.nan}, {"gradient": math.inf}, {"temperature": 0}):
        with pytest.raises(ValueError, match=next(iter(values))):
            LossWeights(**values)
    with pytest.raises(ValueError, match="nothing would be learnt"):
        LossWeights(**dict.fromkeys(PARTS, 0.0))


def test_counts_add_up_and_spans_count_where_depth_is_known():
    labels = padded([[-100, *SPAN, 3], [-100, 1, -100, *SPAN]])
    valid = torch.zeros(2, 3, 3, dtype=torch.bool)
    valid[1, 2, 2] = True
    assert loss_counts(labels, WORDS, valid) == LossCounts(2, 4, 8, 3, 1, 1)
    as_codes = torch.tensor([True, False])
    assert loss_counts(labels, WORDS, valid, depth_given_as_codes=as_codes).spans == 2
    assert sum((loss_counts(row[None], WORDS) for row in labels), LossCounts()) == loss_counts(labels, WORDS)
    assert loss_counts(labels, WORDS) / 2 == LossCounts(1, 2, 4, 1.5, 1, 0.5)
