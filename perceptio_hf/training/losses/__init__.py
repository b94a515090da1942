"""The objectives of Perceptio: pure functions, each a sum over its items divided by a count that can be given.

Words are in `words`, depth and masks in `pictures`, counts in `labels`; `parts` lists the terms of the objective,
`composite` adds them up. Import all of them from here. Imports the tokens, and types of the model.
"""

from .composite import LossWeights, composite_loss
from .labels import IGNORED_LABEL, LossCounts, loss_counts
from .parts import PARTS, LossBatch, LossPart, loss_part
from .pictures import mask_loss, reconstruction_loss, score_loss, soft_merge
from .words import count_loss, marker_loss, text_loss, token_loss

__all__ = [
    "IGNORED_LABEL",
    "PARTS",
    "LossBatch",
    "LossCounts",
    "LossPart",
    "LossWeights",
    "composite_loss",
    "count_loss",
    "loss_counts",
    "loss_part",
    "marker_loss",
    "mask_loss",
    "reconstruction_loss",
    "score_loss",
    "soft_merge",
    "text_loss",
    "token_loss",
]
