"""The composite loss: the sum of its parts, from one look at the learnt positions, however a batch is cut."""

import math

import pytest
import torch
from loss_batches import SIZE, SPAN, VOCABULARY, WORDS, loss_codec, padded
from torch import nn

from perceptio_hf.training.losses import (
    LossCounts,
    LossWeights,
    composite_loss,
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

WEIGHTS = LossWeights(text=0.9, marker=0.8, token=0.7, count=0.6, reconstruction=0.5, mask_score=0.4, temperature=0.8)
# Eight rows: with span, mask, both, neither, nothing learnt at all, two responses, two masks.
ROWS = [
    [-100, -100, *SPAN, 1, 2],
    [-100, 3, 0, 1],
    [-100, 3, *SPAN, 0],
    [-100, -100, 2],
    [-100, -100],
    [-100, 1, 3, -100, -100, *SPAN],
    [-100, 0, 1, 2, 3, 3],
    [-100, 0, *SPAN, 3, -100, 16],
]


class Head(nn.Linear):
    """A head that remembers how it was called."""

    def __init__(self):
        super().__init__(6, VOCABULARY)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(states.shape))
        return super().forward(states)


@pytest.fixture(scope="module")
def codec():
    return loss_codec()


@pytest.fixture
def head():
    torch.manual_seed(5)
    return Head()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """The arguments of the loss for all eight rows; the third of the four spans has no valid depth."""
    torch.manual_seed(6)
    labels = padded(ROWS)
    depth, valid = torch.rand(4, SIZE, SIZE), torch.rand(4, SIZE, SIZE) < 0.7
    valid[2] = False
    return {
        "hidden_states": torch.randn(*labels.shape, 6, requires_grad=True),
        "labels": labels,
        "depth": torch.where(valid, depth, math.nan),
        "depth_valid": valid,
        "mask_logits": torch.randn(6, 5, 7, requires_grad=True),
        "mask_targets": torch.rand(6, 5, 7),
        "mask_scores": torch.rand(6, requires_grad=True),
    }


def rows_of(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of a batch, with the depth and masks that belong to them."""
    spans, masks = ((batch["labels"] == token).sum(1).cumsum(0).tolist() for token in (WORDS.depth_start, WORDS.seg))

    def share(ends: list[int]) -> slice:
        return slice(ends[rows.start - 1] if rows.start else 0, ends[rows.stop - 1])

    ranges = {"hidden_states": rows, "labels": rows, "depth": share(spans), "depth_valid": share(spans)}
    return {name: value[ranges.get(name, share(masks))] for name, value in batch.items()}


def compute(batch, head, codec, **options):
    arguments = dict(batch)
    states, labels = arguments.pop("hidden_states"), arguments.pop("labels")
    options = {"codec": codec, "weights": WEIGHTS} | options
    return composite_loss(states, head, labels, WORDS, **arguments, **options)


def gradients(total, batch, head):
    leaves = [value for value in batch.values() if value.requires_grad]
    return torch.autograd.grad(total, [*leaves, *head.parameters()])


def by_hand(batch, head, codec):
    """The same from all logits, one loss after the other."""
    states, labels = batch["hidden_states"], batch["labels"]
    logits = nn.functional.linear(states, head.weight, head.bias)
    is_code = torch.isin(labels[:, 1:], torch.tensor(WORDS.codes))
    code_logits = logits[:, :-1][is_code][:, list(WORDS.codes)].view(-1, 4, 5)
    merged = soft_merge(code_logits, codec, temperature=0.8)
    masks = batch["mask_logits"], batch["mask_targets"]
    parts = {
        "text": text_loss(logits, labels, WORDS),
        "marker": marker_loss(logits, labels, WORDS),
        "token": token_loss(logits, labels, WORDS),
        "count": count_loss(logits, labels, WORDS),
        "reconstruction": reconstruction_loss(merged, batch["depth"], batch["depth_valid"], gradient_weight=0.5),
        **mask_loss(*masks)[1],
        "mask_score": score_loss(batch["mask_scores"], *masks),
    }
    return sum(getattr(WEIGHTS, name) * part for name, part in parts.items()), parts


def test_it_is_the_sum_of_its_parts_from_one_look_at_learnt_positions(batch, head, codec):
    total, parts = compute(batch, head, codec)
    assert head.calls == [(int((batch["labels"] != -100).sum()), 6)]
    reference, reference_parts = by_hand(batch, head, codec)
    assert list(parts) == list(reference_parts)
    for name, part in parts.items():
        torch.testing.assert_close(part, reference_parts[name])
        assert part.requires_grad and part.ndim == 0
    torch.testing.assert_close(total, reference)
    for one, other in zip(gradients(total, batch, head), gradients(reference, batch, head), strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in codec.parameters())


@pytest.mark.parametrize("sizes", [(1,) * 8, (3, 5), (5, 3), (2, 2, 4)], ids=str)
def test_micro_batches_with_the_counts_of_all_add_up_to_the_batch(batch, head, codec, sizes):
    whole, whole_parts = compute(batch, head, codec)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    micro = [rows_of(batch, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    counts = sum((loss_counts(item["labels"], WORDS, item["depth_valid"]) for item in micro), LossCounts())
    assert counts == loss_counts(batch["labels"], WORDS, batch["depth_valid"]) == LossCounts(18, 8, 16, 9, 3, 6)
    results = [compute(item, head, codec, counts=counts) for item in micro]
    for name, part in whole_parts.items():
        torch.testing.assert_close(sum(parts[name] for _, parts in results), part)
    total = sum(total for total, _ in results)
    for one, other in zip(gradients(total, batch, head), gradients(whole, batch, head), strict=True):
        torch.testing.assert_close(one, other)
    # Two processes whose gradients are averaged divide the counts by two, which may leave less than one.
    averaged = sum(compute(item, head, codec, counts=counts / 2)[0] for item in micro) / 2
    torch.testing.assert_close(averaged, whole)


def test_padding_on_the_left_changes_nothing(batch, head, codec):
    shifted = dict(batch, labels=padded(ROWS, "left"))
    lengths = [len(row) for row in ROWS]
    states = torch.zeros_like(batch["hidden_states"])
    for row, length in enumerate(lengths):
        states[row, -length:] = batch["hidden_states"][row, :length].detach()
    shifted["hidden_states"] = states
    torch.testing.assert_close(compute(shifted, head, codec)[0], compute(batch, head, codec)[0])


def test_a_batch_without_anything_is_zero_with_a_graph(batch, head, codec):
    empty = rows_of(batch, slice(4, 5))
    total, parts = compute(empty, head, codec)
    assert total == 0 and all(part == 0 for part in parts.values()) and len(parts) == 8
    assert head.calls == [(0, 6)]
    for gradient in gradients(total, batch, head):
        assert not gradient.any()


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("text", {"text", "count"}),
        ("marker", {"marker", "count"}),
        ("code", {"token", "count", "reconstruction"}),
        ("depth", {"reconstruction"}),
        ("mask_logits", {"mask_bce", "mask_dice"}),
        ("mask_scores", {"mask_score"}),
    ],
)
def test_a_nan_shows_in_the_parts_it_belongs_to_and_in_the_total(batch, head, codec, where, parts):
    batch = {name: value.detach().clone() for name, value in batch.items()}
    if where in ("text", "marker", "code"):
        batch["hidden_states"][0, {"marker": 1, "code": 2, "text": 7}[where]] = math.nan
    else:
        batch[where][0] = math.nan
        batch["depth_valid"][0] |= where == "depth"
    total, values = compute(batch, head, codec)
    assert {name for name, value in values.items() if value.isnan()} == parts and total.isnan()


def test_weight_zero_leaves_parts_out_of_the_sum_and_soft_merge_undone(batch, head):
    batch["mask_logits"] = torch.full_like(batch["mask_logits"], math.nan)
    weights = LossWeights(reconstruction=0, mask_bce=0, mask_dice=0, text=0)
    total, parts = compute(batch, head, codec=object(), weights=weights)
    assert "reconstruction" not in parts and parts["mask_bce"].isnan() and total.isfinite()
    only_masks = LossWeights(text=0, marker=0, token=0, count=0)
    words = {"hidden_states": batch["hidden_states"], "labels": batch["labels"]}
    total, parts = compute(words, head, None, weights=only_masks)
    total.backward()
    assert total == 0 and set(parts) == {"text", "marker", "token", "count"}


def test_depth_of_another_size_is_compared_at_that_size(batch, head, codec):
    batch |= {"depth": torch.rand(4, 9, 6), "depth_valid": None}
    _, parts = compute({name: value for name, value in batch.items() if value is not None}, head, codec)
    assert parts["reconstruction"] > 0


def broken(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"labels": padded(rows), "hidden_states": torch.zeros(*padded(rows).shape, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken([[-100, 0], [-100, *SPAN[:4], 10]]), r"Row 1 .* token 4 at position 1 .* 4 codes .* has 3 codes"),
        (broken([[-100, *SPAN[:-1]]]), "Row 0 .* broken depth span"),  # cut off
        (broken([[-100, *SPAN[:3], -100, *SPAN[3:]]]), "Row 0 .* broken depth span"),  # a hole in the middle
        (broken([[-100, *SPAN[:3]], [*SPAN[2:]]]), "Row 0 .* broken depth span"),  # spread over two rows
        (broken([[-100, 1, *SPAN[1:]]]), "Row 0 .* token 12 at position 2"),  # no start
        (broken([[-100, *SPAN, 5]]), "Row 0 .* token 5 at position 7"),  # a code outside
        (broken([[-100, 99]]), "Row 0 of `labels` holds 99 at position 1; expected token ids from 0 to 16"),
        ({"labels": torch.zeros(8, 3, dtype=torch.long)}, "`labels` has shape"),
        ({"depth": torch.zeros(3, SIZE, SIZE)}, r"`depth` has 3 entries, but .* 4 depth spans \(row 0: 1, row 2: 1"),
        ({"depth_valid": torch.zeros(5, SIZE, SIZE).bool()}, "`depth_valid` has 5 entries"),
        (
            {"depth_valid": torch.zeros(4, SIZE, 3).bool()},
            r"`depth_valid` has shape \(4, 16, 3\), `depth` \(4, 16, 16\)",
        ),
        ({"depth": None}, "`depth` None; give both"),
        ({"mask_logits": torch.zeros(5, 5, 7)}, r"`mask_logits` has 5 entries, but .* 6 \[SEG\] tokens \(row 1: 1"),
        ({"mask_targets": torch.zeros(7, 5, 7)}, "`mask_targets` has 7 entries"),
        ({"mask_targets": torch.zeros(6, 5, 8)}, "the mask decoder's resolution"),
        ({"mask_targets": None}, "`mask_targets` is missing"),
        ({"mask_scores": torch.zeros(2)}, "`mask_scores` has 2 entries"),
        ({"counts": LossCounts(18, 8, 16, 9, 0, 6)}, "`counts` says 0 spans, but this batch alone has 3"),
    ],
)
def test_contradictions_are_errors_that_say_where(batch, head, codec, change, message):
    if "hidden_states" in change:
        batch = {}
    with pytest.raises(ValueError, match=message):
        compute(batch | change, head, codec)
