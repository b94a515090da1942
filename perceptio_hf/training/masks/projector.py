"""A start of the [SEG] projector from which its units do not die, and whose prompts mean something to SAM2.

At random, [SEG] states lie so close together that a unit of the first layer is on for all of them or for none, and the
mask decoder is prompted with vectors that it has never seen. A few steps at a high learning rate then switch the units
off for good. Here the first layer is centred and scaled on states of real samples, so that every unit is off for about
half of them, and the second one is fitted to the prompts that SAM2 itself makes of clicks on the true masks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceptio_hf.modeling.placement import device_of

_LEAST_SPREAD = 0.01  # of the states around their mean, relative to it: closer ones are not told apart any further
_READ = ("input_ids", "attention_mask", "position_ids", "pixel_values")  # of a batch, by the language model


@dataclass(frozen=True)
class ProjectorStart:
    """What a start was made of.

    Args:
        states: [SEG] states it was fitted to.
        told: how much of where the clicks lie the states tell already, 1 all and 0 nothing: the share of the prompts'
            variance that is explained on states which were left out of the fit.
    """

    states: int
    told: float


@torch.no_grad()
def start_seg_projector(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0) -> ProjectorStart:
    """Give the [SEG] projector of `model` new weights, fitted to its [SEG] states on `batches`.

    Args:
        model: a Perceptio or a PEFT model around one. With adapters the copy that is trained is written.
        batches: of `PerceptioDataCollator`, with depth spans filled in; a few hundred masks in all are enough. The
            pictures for SAM2 are not used.
        seed: of the first layer's directions.

    Raises:
        ValueError: if the batches hold fewer than two [SEG] tokens, or another number of masks.
    """
    states, prompts = [], []
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            of_batch = seg_states(model, batch)
            if len(of_batch):
                states.append(of_batch.float().cpu())
                prompts.append(click_prompts(model, batch["mask_targets"]).cpu())
    finally:
        model.train(was_training)
    if sum(map(len, states)) < 2:
        raise ValueError(
            f"The batches hold {sum(map(len, states))} [SEG] tokens; the start of the [SEG] projector is fitted to "
            "samples with masks. Give some, a few hundred masks are enough."
        )
    return fit_seg_projector(model.seg_projector, torch.cat(states), torch.cat(prompts), seed=seed)


def seg_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(n, hidden) states of the [SEG] tokens that a batch of the collator teaches, in the order of its masks.

    Raises:
        ValueError: if it has another number of masks.
    """
    taught = (batch["input_ids"] == model.config.seg_token_id) & (batch["labels"] == model.config.seg_token_id)
    found, masks = int(taught.sum()), len(batch["mask_targets"])
    if found != masks:
        raise ValueError(f"A batch has {found} [SEG] tokens and {masks} masks; there is one for each.")
    if not found:
        return torch.zeros(0, model.config.text_config.hidden_size, device=batch["input_ids"].device)
    inputs = {name: batch[name] for name in _READ if name in batch}
    outputs = model(**inputs, use_cache=False, logits_to_keep=1)
    return outputs.last_hidden_state[taught.to(outputs.last_hidden_state.device)]


def click_prompts(model: nn.Module, masks: Tensor) -> Tensor:
    """What SAM2 makes of one click well inside each mask, the prompt its decoder was trained on.

    Args:
        masks: (n, h, w) share of each cell inside, at any resolution.

    Returns:
        (n, C) float32.
    """
    encoder = model.mask_model.prompt_encoder
    scale = encoder.input_image_size / torch.tensor([masks.shape[2], masks.shape[1]], device=masks.device)
    points = (inner_points(masks) + 0.5) * scale - 0.5  # SAM2 puts a click into the middle of its pixel
    points = points.to(device_of(encoder))[:, None, None]  # (n, 1 object, 1 point, 2)
    labels = torch.ones(points.shape[:3], dtype=torch.int, device=points.device)
    return encoder(points, labels, None, None)[0][:, 0, 0].float()


def inner_points(masks: Tensor) -> Tensor:
    """(n, h, w) -> (n, 2) x and y of a cell of each mask: the one farthest from its edge and from the picture's, of
    several the one nearest to its middle."""
    height, width = masks.shape[1:]
    inside = (masks >= 0.5 * masks.amax((1, 2), keepdim=True)).float()
    depth, left = torch.zeros_like(inside), inside
    for _ in range(min(height, width) // 2 + 1):
        depth = depth + left
        left = -F.max_pool2d(-F.pad(left[:, None], (1, 1, 1, 1)), 3, stride=1)[:, 0]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([x, y]).to(inside)  # (2, h, w)
    middle = (inside[:, None] * cells).sum((2, 3)) / inside.sum((1, 2))[:, None]
    away = (cells - middle[:, :, None, None]).norm(dim=1) / (height + width)  # below 1, and depth counts in ones
    place = (depth - away).flatten(1).argmax(1)
    return torch.stack([place % width, place.div(width, rounding_mode="floor")], dim=1).float()


@torch.no_grad()
def fit_seg_projector(projector: nn.Module, states: Tensor, prompts: Tensor, *, seed: int = 0) -> ProjectorStart:
    """Write weights into `projector` so that it makes of `states` what can be told of `prompts`.

    First layer: random directions, each centred and scaled on the states. Second layer: ridge regression whose
    strength is the one that predicts states best which are left out of the fit, enlarged until prompts differ from one
    another as much as those that are given.

    Args:
        projector: a `SegProjector`, or PEFT's wrapper around one.
        states: (n, hidden), n >= 2.
        prompts: (n, C), what the mask decoder is to be given for each.
        seed: of the directions.
    """
    states, prompts = states.detach().cpu().double(), prompts.detach().cpu().double()
    first, second = projector.linear_in, projector.linear_out
    generator = torch.Generator().manual_seed(seed)
    mean = states.mean(0)
    directions = torch.randn(first.weight.shape, generator=generator, dtype=torch.double)
    directions /= directions.norm(dim=1, keepdim=True)
    spread = ((states - mean) @ directions.T).std(0)
    least = _LEAST_SPREAD * mean.norm() / len(mean) ** 0.5
    weight = directions / spread.clamp(min=max(float(least), 1e-12))[:, None]
    bias = -weight @ mean
    hidden = (states @ weight.T + bias).relu()
    centred, spread_out = hidden - hidden.mean(0), prompts - prompts.mean(0)
    slope, told = _ridge(centred, spread_out)
    # What the states do not tell, the regression leaves out, and prompts that hardly differ teach nobody anything: made
    # as different as clicks are, they give the decoder something to tell apart, and the states a gradient.
    slope *= spread_out.norm() / (centred @ slope).norm().clamp(min=1e-12)
    first.weight.copy_(weight)
    first.bias.copy_(bias)
    second.weight.copy_(slope.T)
    second.bias.copy_(prompts.mean(0) - hidden.mean(0) @ slope)
    return ProjectorStart(len(states), told)


def _ridge(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, float]:
    """Ridge regression (n, a) -> (n, b), both of mean 0, with the strength of the least error where each row in turn
    is left out: (a, b), and the share of the variance explained so."""
    left, size, right = torch.linalg.svd(inputs, full_matrices=False)
    told, constant = left.T @ outputs, 1 / len(inputs)
    best = None
    for strength in (size[0] ** 2 + 1e-12) * torch.logspace(-5, 2, 29, dtype=torch.double):
        kept = size**2 / (size**2 + strength)
        own = (left**2 @ kept + constant).clamp(max=1 - 1e-6)  # weight of each row in its own prediction
        error = ((outputs - left @ (kept[:, None] * told)) / (1 - own)[:, None]).pow(2).mean()
        if best is None or error < best[0]:
            best = error, strength
    error, strength = best
    unexplained = error / (outputs / (1 - constant)).pow(2).mean().clamp(min=1e-12)
    return right.T @ ((size / (size**2 + strength))[:, None] * told), float(1 - unexplained)
