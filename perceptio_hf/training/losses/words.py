"""Losses of the words a model writes: text, and the markers, codes and number of codes of a depth span.

They are our reading of Perceptio's composite depth-token objective (arXiv 2603.18795), whose formulas are not public.
With p_t the model's distribution for the token at t, V_D the K code ids and N the codes of a span:

- text: cross-entropy of the tokens outside spans, [SEG] included;
- marker: cross-entropy of the two markers;
- token: cross-entropy of the codes over p_t renormalised to V_D, or over all of p_t;
- count: smooth L1 of (n - N) / max(N, 1), n = sum of p_t(V_D) over all learnt tokens of a response, N its codes (0
  without a span). It is what punishes codes that leak into text and text that leaks into spans.

All of them follow from three numbers per learnt token: the log of the normaliser, the logit of the target and the
logits of the codes. Logits of the full vocabulary exist at learnt positions only, a part of them at a time (`head`),
and serve all losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from perceptio_hf.tokens import SpatialVocabulary

from .head import read_head
from .labels import LabelLayout, read_labels

TOKEN_OVER = ("codes", "vocabulary")  # what probabilities of codes are renormalised to


@dataclass(frozen=True)
class SupervisedTokens:
    """The n learnt tokens of a batch and what a model predicts for them; the sums are over items, not averaged.

    Args:
        layout: what each token is.
        log_normaliser: (n,) log of the sum of exp(logit) over the vocabulary, float32.
        target_logits: (n,) logit of the token that is right.
        code_logits: (n, K) logits of the depth codes.
    """

    layout: LabelLayout
    log_normaliser: Tensor
    target_logits: Tensor
    code_logits: Tensor

    def text_sum(self) -> Tensor:
        return self._cross_entropy_sum(self.layout.is_text)

    def marker_sum(self) -> Tensor:
        return self._cross_entropy_sum(self.layout.is_marker)

    def token_sum(self, over: str = "codes") -> Tensor:
        is_code = self.layout.is_code
        if over == "vocabulary":  # adds -log p_t(V_D) to what follows
            return self._cross_entropy_sum(is_code)
        return F.cross_entropy(self.code_logits[is_code], self.layout.codes[is_code], reduction="sum")

    def count_sum(self, beta: float = 1.0) -> Tensor:
        layout = self.layout
        share = (self.code_logits.logsumexp(-1) - self.log_normaliser).exp()  # (n,) p_t(V_D)
        zeros = share.new_zeros(layout.num_responses)
        expected = zeros.index_add(0, layout.responses, share)
        true = zeros.index_add(0, layout.responses, layout.is_code.to(share.dtype))
        error = (expected - true) / true.clamp(min=1)
        return F.smooth_l1_loss(error, torch.zeros_like(error), beta=beta, reduction="sum")

    def span_logits(self, num_depth_tokens: int) -> Tensor:
        """(s, N, K) logits of the codes of each depth span."""
        codes = self.code_logits[self.layout.is_code]  # whole spans only, see `read_labels`
        return codes.unflatten(0, (len(codes) // num_depth_tokens, num_depth_tokens))

    def _cross_entropy_sum(self, chosen: Tensor) -> Tensor:
        # Chosen, not multiplied by zero: a NaN shows in the part it belongs to and in no other.
        return (self.log_normaliser[chosen] - self.target_logits[chosen]).sum()


def supervised_tokens(
    hidden_states: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocabulary: SpatialVocabulary,
    *,
    layout: LabelLayout | None = None,
) -> SupervisedTokens:
    """Read a model's predictions at learnt positions, with one call of its head.

    Args:
        hidden_states: (b, L, d).
        lm_head: (n, d) -> (n, V) logits. It is called once, with n = 0 if nothing is learnt, so that every process of
            a training uses its parameters.
        labels: (b, L).
        layout: `read_labels` of these labels, where they have been read already.

    Raises:
        ValueError: as `read_labels`, or if shapes differ, or a label or code lies outside the vocabulary.
    """
    if hidden_states.ndim != 3 or hidden_states.shape[:2] != labels.shape:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)} and the states {tuple(hidden_states.shape)}; expected (batch, "
            "sequence) and (batch, sequence, size)."
        )
    layout = (layout or read_labels(labels, vocabulary)).to(hidden_states.device)
    states = hidden_states[layout.rows, layout.columns]  # (n, d)
    code_ids = torch.tensor(vocabulary.codes, device=states.device)
    check = partial(_check_ids, layout, vocabulary)
    return SupervisedTokens(layout, *read_head(lm_head, states, layout.targets, code_ids, check=check))


def text_loss(logits: Tensor, labels: Tensor, vocabulary: SpatialVocabulary, *, count: float | None = None) -> Tensor:
    """Cross-entropy of the learnt tokens outside depth spans.

    Args:
        logits: (b, L, V).
        labels: (b, L); shifted in here.
        count: what the sum is divided by; None: the number of such tokens here.

    Returns:
        A scalar in float32; zero, with a graph, if there is no such token.

    Raises:
        ValueError: as `supervised_tokens`.
    """
    tokens = _of_logits(logits, labels, vocabulary)
    return mean_of(tokens.text_sum(), tokens.layout.counts().text if count is None else count)


def marker_loss(logits: Tensor, labels: Tensor, vocabulary: SpatialVocabulary, *, count: float | None = None) -> Tensor:
    """Cross-entropy of the start and end markers of depth spans, over the full vocabulary. Arguments as `text_loss`."""
    tokens = _of_logits(logits, labels, vocabulary)
    return mean_of(tokens.marker_sum(), tokens.layout.counts().markers if count is None else count)


def token_loss(
    logits: Tensor,
    labels: Tensor,
    vocabulary: SpatialVocabulary,
    *,
    over: str = "codes",
    count: float | None = None,
) -> Tensor:
    """Cross-entropy of the depth codes over the codes alone. Other arguments as `text_loss`.

    Args:
        over: "codes", or "vocabulary" for the ordinary cross-entropy, which adds -log p_t(V_D): it too keeps
            probability on codes, where otherwise the count loss alone does.

    Raises:
        ValueError: also if `over` is unknown.
    """
    check_over(over)
    tokens = _of_logits(logits, labels, vocabulary)
    return mean_of(tokens.token_sum(over), tokens.layout.counts().codes if count is None else count)


def check_over(over: str) -> None:
    """ValueError unless the token loss may be taken over it."""
    if over not in TOKEN_OVER:
        raise ValueError(f"The token loss is taken over {over!r}; choose one of {', '.join(TOKEN_OVER)}.")


def count_loss(
    logits: Tensor,
    labels: Tensor,
    vocabulary: SpatialVocabulary,
    *,
    beta: float = 1.0,
    count: float | None = None,
) -> Tensor:
    """Smooth L1 of the expected number of codes against the true one, relative to it, per response.

    Zero exactly where every response expects as many codes as it has. Arguments as `text_loss`, `count` of responses,
    and `beta`, the relative error up to which the loss is a parabola. Nothing else keeps the probability inside a span
    on codes, and a parabola hardly does: with one code in a hundred leaking, its slope is a ten-thousandth.
    """
    tokens = _of_logits(logits, labels, vocabulary)
    return mean_of(tokens.count_sum(beta), tokens.layout.counts().responses if count is None else count)


def mean_of(total: Tensor, count: float) -> Tensor:
    """`total / count`; a sum over nothing stays zero."""
    return total / count if count > 0 else total


def _of_logits(logits: Tensor, labels: Tensor, vocabulary: SpatialVocabulary) -> SupervisedTokens:
    return supervised_tokens(logits, lambda chosen: chosen, labels, vocabulary)


def _check_ids(layout: LabelLayout, vocabulary: SpatialVocabulary, size: int) -> None:
    wrong = (layout.targets < 0) | (layout.targets >= size)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"Row {int(layout.rows[place])} of `labels` holds {int(layout.targets[place])} at position "
            f"{int(layout.columns[place]) + 1}; expected token ids from 0 to {size - 1}, or -100 where nothing is "
            "learnt."
        )
    if max(vocabulary.codes) >= size:
        raise ValueError(
            f"The depth codes go up to token {max(vocabulary.codes)}, but the head gives {size} logits; are vocabulary "
            "and model of the same checkpoint?"
        )
