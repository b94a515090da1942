"""What the labels of a batch ask for: which positions are learnt, what each of them is, and how many there are.

Labels are as in transformers: `labels[b, t]` is the token at t, predicted by the state at t - 1, and -100 where nothing
is learnt. A response is one maximal run of learnt labels in a row. Reading order is row by row, left to right.
"""

from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from perceptio_hf.tokens import SpatialVocabulary

IGNORED_LABEL = -100


@dataclass(frozen=True)
class LossCounts:
    """How many items each loss is averaged over.

    Every loss is a sum over its items divided by one of these. With the counts of all the micro batches (and
    processes) of a step, the losses of the parts add up to the loss of the whole::

        sum((loss_counts(labels, vocabulary) for labels in micro_batches), LossCounts())

    Where gradients are averaged over p processes, divide the sum over all processes by p.

    Args:
        text: learnt tokens outside depth spans, [SEG] included.
        markers: <DEPTH_START> and <DEPTH_END>.
        codes: <DEPTH_k>.
        responses: runs of learnt labels.
        spans: depth spans whose true depth has a valid pixel.
        masks: [SEG] tokens.
    """

    text: float = 0
    markers: float = 0
    codes: float = 0
    responses: float = 0
    spans: float = 0
    masks: float = 0

    def __add__(self, other: "LossCounts") -> "LossCounts":
        return LossCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __truediv__(self, divisor: float) -> "LossCounts":
        return LossCounts(*(count / divisor for count in astuple(self)))


@dataclass(frozen=True)
class LabelLayout:
    """The n learnt tokens of a batch in reading order. b rows; tensors lie on the labels' device.

    Args:
        rows, columns: (n,) the state that predicts each token: `hidden_states[rows, columns]`.
        targets: (n,) token ids.
        codes: (n,) index 0..K-1 in the codebook, -1 where the token is no depth code.
        is_marker: (n,) bool, either marker of a span.
        responses: (n,) the response each token belongs to, 0..R-1 over the batch.
        spans_per_row, segs_per_row: (b,) depth spans and [SEG] tokens.
        items: how many there are of everything, all spans among them; known on the host, where R is `responses`.
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor
    codes: Tensor
    is_marker: Tensor
    responses: Tensor
    spans_per_row: Tensor
    segs_per_row: Tensor
    items: LossCounts

    @property
    def num_responses(self) -> int:
        return int(self.items.responses)

    @property
    def is_code(self) -> Tensor:
        return self.codes >= 0

    @property
    def is_text(self) -> Tensor:
        return ~(self.is_code | self.is_marker)

    def counts(self, has_depth: Tensor | None = None) -> LossCounts:
        """`has_depth` (s,) bool: the spans with a valid depth; None: all spans."""
        return self.items if has_depth is None else replace(self.items, spans=int(has_depth.sum()))

    def with_codes(self, codes: Tensor, tokens: Tensor) -> "LabelLayout":
        """The same with other codes in its spans: (s N,) indices in the codebook and their token ids."""
        is_code = self.is_code
        return replace(
            self,
            codes=self.codes.masked_scatter(is_code, codes),
            targets=self.targets.masked_scatter(is_code, tokens),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "LabelLayout":
        """On another device; what moves batches there (accelerate) asks for it by this name."""
        moved = {
            name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items() if name != "items"
        }
        return replace(self, **moved)

    def check_spans(self, count: int, what: str) -> None:
        """ValueError unless there is one of `count` rows of the tensor `what` for each depth span."""
        _check_one_each(count, what, self.items.spans, self.spans_per_row, "depth spans")

    def check_masks(self, count: int, what: str) -> None:
        """ValueError unless there is one of `count` rows of the tensor `what` for each [SEG]."""
        _check_one_each(count, what, self.items.masks, self.segs_per_row, "[SEG] tokens")


def read_labels(labels: Tensor, vocabulary: SpatialVocabulary) -> LabelLayout:
    """Sort the learnt tokens of `labels` (b, L) by what they are.

    The first column is never learnt: no state comes before it.

    Raises:
        ValueError: if the shape is another, or a depth span is not a start marker, N codes and an end marker, all
            learnt; the row is named.
    """
    if labels.ndim != 2:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}; expected (batch, sequence).")
    ahead = labels[:, 1:]
    learnt = ahead != IGNORED_LABEL
    begins = learnt.clone()
    begins[:, 1:] &= ~learnt[:, :-1]
    rows, columns = learnt.nonzero(as_tuple=True)
    targets = ahead[learnt]
    is_this_code = targets[:, None] == torch.tensor(vocabulary.codes, device=labels.device)  # (n, K)
    codes = torch.where(is_this_code.any(1), is_this_code.int().argmax(1), -1)
    starts, segs = targets == vocabulary.depth_start, targets == vocabulary.seg
    is_marker = starts | (targets == vocabulary.depth_end)
    markers, num_codes = int(is_marker.sum()), int((codes >= 0).sum())
    layout = LabelLayout(
        rows=rows,
        columns=columns,
        targets=targets,
        codes=codes,
        is_marker=is_marker,
        responses=begins.flatten().cumsum(0).view_as(begins)[learnt] - 1,
        spans_per_row=rows[starts].bincount(minlength=len(labels)),
        segs_per_row=rows[segs].bincount(minlength=len(labels)),
        items=LossCounts(
            text=len(targets) - markers - num_codes,
            markers=markers,
            codes=num_codes,
            responses=int(begins.sum()),
            spans=int(starts.sum()),
            masks=int(segs.sum()),
        ),
    )
    _check_whole_spans(layout, starts, vocabulary)
    return layout


def loss_counts(
    labels: Tensor,
    vocabulary: SpatialVocabulary,
    depth_valid: Tensor | None = None,
    *,
    depth_given_as_codes: Tensor | None = None,
    layout: LabelLayout | None = None,
) -> LossCounts:
    """Count a batch without a model; see `LossCounts`.

    Args:
        labels: (b, L).
        depth_valid: (s, H, W) bool, one per depth span in reading order; None: every span has a valid depth.
        depth_given_as_codes: (s,) bool, spans whose true depth is decoded from their codes and so valid everywhere,
            whatever `depth_valid` says.
        layout: `read_labels` of these labels, where they have been read already.

    Raises:
        ValueError: as `read_labels`, or if there are more or fewer depth maps than spans.
    """
    layout = read_labels(labels, vocabulary) if layout is None else layout
    if depth_valid is None:
        return layout.counts()
    layout.check_spans(len(depth_valid), "depth_valid")
    has_depth = depth_valid.bool().flatten(1).any(1)
    if depth_given_as_codes is not None:
        layout.check_spans(len(depth_given_as_codes), "depth_given_as_codes")
        has_depth = has_depth | depth_given_as_codes.bool()
    return layout.counts(has_depth)


def _check_whole_spans(layout: LabelLayout, starts: Tensor, vocabulary: SpatialVocabulary) -> None:
    """Every marker and code must lie in a complete span without gaps."""
    spatial = layout.is_code | layout.is_marker
    if not bool(spatial.any()):
        return
    length, last = vocabulary.span_length, len(spatial) - 1
    steps = torch.arange(length, device=spatial.device)
    places = (starts.nonzero() + steps).clamp(max=last)  # (starts, N + 2) places among the learnt tokens
    whole = layout.is_code[places[:, 1:-1]].all(1) & (layout.targets[places[:, -1]] == vocabulary.depth_end)
    first = places[:, :1]
    side_by_side = (layout.rows[places] == layout.rows[first]) & (
        layout.columns[places] == layout.columns[first] + steps
    )
    stray = spatial.index_fill(0, places[whole & side_by_side.all(1)].flatten(), False)
    if bool(stray.any()):
        place = int(stray.nonzero()[0])
        row, position = int(layout.rows[place]), int(layout.columns[place]) + 1
        found = int((layout.is_code & (layout.rows == row)).sum())
        raise ValueError(
            f"Row {row} of `labels` has a broken depth span: token {int(layout.targets[place])} at position {position} "
            f"is not part of a start marker, {vocabulary.num_depth_tokens} codes and an end marker that are all learnt "
            f"(the row has {found} codes). Was the sample cut off, or its span masked in part?"
        )


def _check_one_each(count: int, what: str, expected: float, per_row: Tensor, items: str) -> None:
    if count != expected:
        rows = ", ".join(f"row {row}: {number}" for row, number in enumerate(per_row.tolist()) if number)
        raise ValueError(
            f"`{what}` has {count} entries, but `labels` hold {expected} {items} ({rows or 'none in any row'}); give "
            "one entry for each, row by row."
        )
