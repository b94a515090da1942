"""How good a relative depth map is, and how much of a codebook is in use.

Relative depth has no scale, so it is first fitted to the reference, as is usual for affine-invariant depth: scale and
shift in inverse depth by least squares over the valid pixels (Ranftl et al. 2020, "Towards Robust Monocular Depth
Estimation"). Errors are then measured on distances in metres.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from perceptio_hf.data.depth_maps import DepthMap
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE


def align_scale_shift(prediction: np.ndarray, reference: np.ndarray, valid: np.ndarray) -> tuple[float, float]:
    """Find a, b that minimise sum((a * prediction + b - reference)^2) over the valid pixels.

    Args:
        prediction, reference: Arrays of one shape, both linear in inverse depth.
        valid: Boolean array of that shape.

    Returns:
        (a, b). A constant prediction gives a = 0 and b = the mean of the reference.

    Raises:
        ValueError: No valid pixel, shapes differ, or a valid value is not finite.
    """
    prediction, reference, valid = np.asarray(prediction), np.asarray(reference), np.asarray(valid, dtype=bool)
    if not prediction.shape == reference.shape == valid.shape:
        raise ValueError(
            f"prediction {prediction.shape}, reference {reference.shape} and valid {valid.shape} must have one shape."
        )
    if not valid.any():
        raise ValueError("no pixel is valid, so there is nothing to compare.")
    x, y = prediction[valid].astype(np.float64), reference[valid].astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a valid pixel is NaN or infinite in the prediction or the reference.")
    spread = np.square(x - x.mean()).sum()
    scale = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 1e-12 * x.size else 0.0
    return scale, float(y.mean() - scale * x.mean())


def depth_metrics(
    prediction_relative: np.ndarray, reference_metric: np.ndarray, valid: np.ndarray | None = None
) -> dict[str, float]:
    """Compare relative inverse depth with distances.

    The prediction is aligned to 1/z, clamped to the smallest and largest 1/z of the reference (the least squares fit
    may leave them, and at or below zero it has no distance), and inverted.

    Args:
        prediction_relative: (H, W) relative inverse depth, larger = nearer.
        reference_metric: (H, W) distances in metres; 0, negative and non-finite ones are left out.
        valid: (H, W) bool; False leaves further pixels out.

    Returns:
        "absrel": mean of |z' - z| / z. "delta1", "delta2", "delta3": share of pixels with max(z'/z, z/z') < 1.25,
        1.25^2, 1.25^3. "rmse": in metres.

    Raises:
        ValueError: As `align_scale_shift`.
    """
    reference = np.asarray(reference_metric, dtype=np.float64)
    usable = _usable(reference, valid)
    inverse = np.divide(1.0, reference, out=np.zeros_like(reference), where=usable)
    scale, shift = align_scale_shift(prediction_relative, inverse, usable)
    true = inverse[usable]
    fitted = np.clip(scale * np.asarray(prediction_relative)[usable] + shift, true.min(), true.max())
    z, z_true = 1.0 / fitted, 1.0 / true
    ratio = np.maximum(z / z_true, z_true / z)
    return {
        "absrel": float(np.mean(np.abs(z - z_true) / z_true)),
        **{f"delta{power}": float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3)},
        "rmse": float(np.sqrt(np.mean(np.square(z - z_true)))),
    }


def mean_depth_metrics(
    predictions: Iterable[np.ndarray],
    references: Iterable[np.ndarray],
    valid: Iterable[np.ndarray | None] | None = None,
) -> dict[str, float | int]:
    """`depth_metrics` of every picture, averaged over pictures.

    Pictures are read one at a time, so the iterables may load them lazily. One with fewer than two valid pixels is left
    out, as any prediction fits it; a constant prediction scores as the mean 1/z of its picture.

    Args:
        predictions: (H, W) relative inverse depth each, larger = nearer.
        references: (H, W) distances in metres each; 0, negative and non-finite ones are left out.
        valid: (H, W) bool each, or None; False leaves further pixels out.

    Returns:
        The means of `depth_metrics`; "images": how many; "images_left_out": how many had too few valid pixels.

    Raises:
        ValueError: iterables of two lengths, no picture with two valid pixels, or as `depth_metrics`, naming the
            picture, counted from 0.
    """
    figures, left_out = [], 0
    pairs = zip(predictions, references, strict=True)
    masks = repeat(None) if valid is None else valid
    for index, ((prediction, reference), mask) in enumerate(zip(pairs, masks, strict=valid is not None)):
        try:
            if _usable(np.asarray(reference, dtype=np.float64), mask).sum() < 2:
                left_out += 1
            else:
                figures.append(depth_metrics(prediction, reference, mask))
        except ValueError as error:
            raise ValueError(f"picture {index}: {error}") from None
    if not figures:
        raise ValueError("no picture has two valid pixels, so there is nothing to compare.")
    means = {key: float(np.mean([item[key] for item in figures])) for key in figures[0]}
    return {**means, "images": len(figures), "images_left_out": left_out}


def _usable(reference: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Where a distance was measured and may be compared."""
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(reference) & (reference > 0.0)
    return usable if valid is None else usable & np.asarray(valid, dtype=bool)


def codebook_usage(codes: np.ndarray, num_codes: int) -> dict[str, float]:
    """Count how many codes occur, and how evenly.

    Args:
        codes: Integers in [0, num_codes), any shape, not empty.
        num_codes: Size K of the codebook.

    Returns:
        "codes_used": how many of them occur. "perplexity": exp of the entropy of their frequencies, 1 to K.

    Raises:
        ValueError: No codes, or one outside [0, num_codes).
    """
    codes = np.asarray(codes).reshape(-1)
    if codes.size == 0 or codes.min() < 0 or codes.max() >= num_codes:
        found = "none" if codes.size == 0 else f"{codes.min()} to {codes.max()}"
        raise ValueError(f"expected codes 0 to {num_codes - 1}, found {found}.")
    counts = np.bincount(codes, minlength=num_codes)
    share = counts[counts > 0] / codes.size
    return {"codes_used": int((counts > 0).sum()), "perplexity": float(np.exp(-(share * np.log(share)).sum()))}


def codec_metrics(codec: "DepthVQVAE", maps: "Iterable[DepthMap]") -> dict[str, float | int | None]:
    """Write depth maps as codes, decode them at their own size, and compare.

    Returns:
        "maps": how many. "relative_mae": mean absolute error of relative depth over valid pixels. "absrel", "delta1",
        "rmse": see `depth_metrics`, None when no map has distances. "codes_used", "perplexity": see `codebook_usage`.
        Errors are means over maps.

    Raises:
        ValueError: There are no maps.
    """
    return mean_map_figures([map_figures(codec, item) for item in maps], codec.config.num_codes)


@torch.no_grad()
def map_figures(codec: "DepthVQVAE", item: "DepthMap") -> dict[str, Any]:
    """One depth map written as codes and decoded: "codes", (N,); "relative_mae"; and, where it has distances, what
    `depth_metrics` gives."""
    codes = codec.encode(torch.from_numpy(item.relative), torch.from_numpy(item.valid))
    decoded = codec.decode(codes, size=item.relative.shape).cpu().numpy()
    figures = {} if item.metric is None else depth_metrics(decoded, item.metric, item.valid)
    error = float(np.abs(decoded - item.relative)[item.valid].mean())
    return {"codes": codes.cpu().numpy(), "relative_mae": error, **figures}


def mean_map_figures(figures: Sequence[dict[str, Any]], num_codes: int) -> dict[str, float | int | None]:
    """What `codec_metrics` gives, of the `map_figures` of every map; errors as there."""
    if not figures:
        raise ValueError("there are no depth maps to evaluate on.")
    metric = [item for item in figures if "absrel" in item]
    means = {key: float(np.mean([m[key] for m in metric])) if metric else None for key in ("absrel", "delta1", "rmse")}
    usage = codebook_usage(np.stack([item["codes"] for item in figures]), num_codes)
    error = float(np.mean([item["relative_mae"] for item in figures]))
    return {"maps": len(figures), "relative_mae": error, **means, **usage}
