"""What is learnt about pictures: masks of what prompts point at, and what each image token shows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.training.losses import mask_loss, score_loss

from .batches import CELL_CLASSES, GEOMETRY, SceneBatch

# Where masks start from nothing and objects are small, the cross-entropy of the background holds every logit down.
_DICE_WEIGHT = 4.0
_SCORE_WEIGHT = 0.5
# Places are shares of the picture, whose squared errors are small beside cross-entropies.
_PLACE_WEIGHT = 10.0


def prompted_masks(
    model: PerceptioForConditionalGeneration, scenes: SceneBatch, prompts: Tensor, masks: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the masks that `prompts` (n, C) give for the [SEG]s number `masks` (n,) of a batch.

    Unlike the model's own path this one lets gradients through to SAM2's image encoder, where it is not frozen.
    """
    sam, rows = model.mask_model, scenes.mask_rows[masks]
    features = sam.vision_encoder(scenes.mask_pixel_values, return_dict=True).fpn_hidden_states
    fine = [sam.mask_decoder.conv_s0(features[0]), sam.mask_decoder.conv_s1(features[1])]
    embedding = features[2] + sam.no_memory_embedding.view(1, -1, 1, 1)
    logits, scores = model.decode_masks(prompts, embedding[rows], [feature[rows] for feature in fine])
    targets = scenes.mask_targets(tuple(logits.shape[1:]))[masks]
    loss, parts = mask_loss(logits, targets, dice_weight=_DICE_WEIGHT)
    parts["mask_score"] = score_loss(scores, logits, targets)
    with torch.no_grad():
        inside, truth = logits > 0, targets > 0.5
        union = (inside | truth).sum((1, 2)).clamp(min=1)
        parts["iou"] = ((inside & truth).sum((1, 2)) / union).mean()
    return loss + _SCORE_WEIGHT * parts["mask_score"], parts


class CellHead(nn.Module):
    """Reads off image tokens what they show, for training only: the depth code; shape, colour, size, material of the
    object and the letter marked there; where the token is, and `GEOMETRY` of the object.

    A token that knows where it is, and where its object is and how near, is what "leftmost" and "behind" are read from.
    """

    def __init__(self, hidden_size: int, num_codes: int):
        super().__init__()
        self.sizes = [num_codes, *CELL_CLASSES, 2, len(GEOMETRY)]
        self.linear = nn.Linear(hidden_size, sum(self.sizes))

    def loss(self, scenes: SceneBatch, features: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of image tokens (b, g * g, d) with the true `codes` (b, g * g)."""
        depth, *kinds, own, thing = self.linear(features).float().split(self.sizes, -1)
        code_loss = F.cross_entropy(depth.flatten(0, 1), codes.flatten())
        kind_losses = [balanced_cross_entropy(kind, scenes.cells[..., index]) for index, kind in enumerate(kinds)]
        shown = scenes.cells[..., :1] > 0
        apart = (thing - scenes.geometry).square() * shown
        here = (own - cell_centres(codes.shape[1], own.device)).square().mean()
        there = apart.sum() / (shown.sum() * len(GEOMETRY)).clamp(min=1)
        parts = {"cell_code": code_loss, "cell_kind": sum(kind_losses), "cell_place": here + there}
        with torch.no_grad():  # in cells
            parts["off"] = (apart[..., :2].sum() / shown.sum().clamp(min=1)).sqrt() * codes.shape[1] ** 0.5
            # Of no letter where none is marked: the mean over no cells would be no number.
            marked = scenes.cells[..., -1] > 0
            right = (kinds[-1].argmax(-1) == scenes.cells[..., -1]) & marked
            parts["letters"] = right.sum() / marked.sum().clamp(min=1)
        return code_loss + sum(kind_losses) + _PLACE_WEIGHT * parts["cell_place"], parts


def cell_centres(cells: int, device: torch.device) -> Tensor:
    """(cells, 2): x and y of the centres of a square grid's cells, as shares of the picture."""
    grid = int(cells**0.5)
    number = torch.arange(cells, device=device)
    return (torch.stack([number % grid, number // grid], -1) + 0.5) / grid


def balanced_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of (b, N, C) logits, averaged over all cells and once more over those that are not background (0),
    which are few."""
    costs = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none")
    shown = classes.flatten() > 0
    return costs.mean() + (costs * shown).sum() / shown.sum().clamp(min=1)
