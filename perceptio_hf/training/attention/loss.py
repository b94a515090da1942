"""Attention taught where to look: an objective for models too small, or data too little, to find it out.

Which part of a sequence a token rests on is often known: a code of the depth span rests on its own place in the
picture, a [SEG] on the object it stands for, a word that reads a depth on the code that says it. From scratch, a small
decoder takes long to find such a place among hundreds; told, it takes minutes. Our own; nothing about the model
changes.
"""

import torch
from torch import Tensor

# Why a token looks somewhere: it writes a code, finds a mark, reads the span, segments or finds an object.
WRITE, FIND, READ, SEGMENT, FIND_OBJECT = 1, 2, 3, 4, 5


def alignment_loss(attention: Tensor, looks: Tensor) -> Tensor:
    """-log(share of the attention that goes where a token was told to look), averaged over heads and tokens.

    Tokens may be told for different reasons, numbered from 1; every reason weighs the same, however many tokens have
    it: a span has a hundred tokens that look at the picture, a word that looks at the span is one.

    Args:
        attention: (b, h, L, S) attention weights of the heads that are taught, rows that sum to 1.
        looks: (b, L, S) bool or uint8, not zero (the reason) at the places each token had better look at; tokens
            without any are free. All places of a token have one reason.

    Returns:
        A scalar; zero (with a graph) where no token is told anything.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if attention.ndim != 4 or looks.shape != (attention.shape[0], *attention.shape[2:]):
        raise ValueError(
            f"`looks` has shape {tuple(looks.shape)}, `attention` {tuple(attention.shape)}; expected (batch, tokens, "
            "places) and (batch, heads, tokens, places)."
        )
    costs, reasons = looking_costs(attention, looks)
    return mean_by_reason(costs, reasons) if len(costs) else attention.sum() * 0


def looking_costs(attention: Tensor, looks: Tensor) -> tuple[Tensor, Tensor]:
    """What each of the m tokens that are told where to look costs, and its reason: (m,) each. As `alignment_loss`."""
    rows, tokens = looks.any(-1).nonzero(as_tuple=True)
    told = looks[rows, tokens]  # (m, S)
    share = torch.where(told[:, None] > 0, attention[rows, :, tokens].float(), 0.0).sum(-1)  # (m, h)
    return -share.clamp(min=1e-6).log().mean(1), told.amax(-1)


def mean_by_reason(costs: Tensor, reasons: Tensor) -> Tensor:
    """The mean over reasons of the mean cost of each; m must not be 0."""
    return torch.stack([costs[reasons == reason].mean() for reason in reasons.unique()]).mean()
