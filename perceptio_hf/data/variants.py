"""More samples of the depth task out of few: parts of the pictures, mirrored, in other light."""

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance

from perceptio_hf.processing.pictures import load_picture

from .depth_maps import DepthMap, relative_from_disparity
from .encoded import load_depth, load_mask, open_encoded
from .rows import dataset_of, import_datasets
from .samples import name_of

if TYPE_CHECKING:
    from datasets import Dataset

LEAST_SHARE = 0.6  # of the height and width that a variant shows
LIGHT = 0.3  # brightness, contrast and colour become 0.7 to 1.3 times what they were
LONGEST_SIDE = 448  # pixels of a variant: InternVL's tile
_TRIES = 20
_LIGHTS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def with_variants(samples: "Dataset", variants: int, *, seed: int = 0) -> "Dataset":
    """The samples, and `variants` further ones made of each.

    A variant shows a random part of the picture, one in two is mirrored, and the light is changed; its depth map is cut
    and mirrored alike. The words stay: they must not speak of places in the picture. All are made at once and kept in
    memory, about 0.1 MB each: this is for small sets.

    Args:
        samples: in the form of `perceptio_hf.data.rows.sample_features`, each with one picture and its depth map.
        variants: of each sample, 1 or more.
        seed: of everything random.

    Raises:
        ValueError: for samples of other tasks, which cannot be cut (named), and a number of variants below 1.
    """
    if isinstance(variants, bool) or not isinstance(variants, int) or variants < 1:
        raise ValueError(f"variants is {variants!r}; expected a whole number of 1 or more.")
    made = dataset_of(_all_variants(samples, variants, np.random.default_rng(seed)))
    return import_datasets().concatenate_datasets([samples, made])


def _all_variants(samples: "Dataset", variants: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for row in samples:
        picture, depth = _picture_and_depth(row)
        for number in range(variants):
            yield {**row, **_variant(picture, depth, rng), "id": f"{row['id']}, variant {number + 1}"}


def _picture_and_depth(row: Mapping[str, Any]) -> tuple[Image.Image, DepthMap]:
    if len(row["images"] or ()) != 1 or len(row["depth"] or ()) != 1 or row["masks"] or row["depth_codes"]:
        raise ValueError(
            f"Sample {name_of(row)} is not one picture with one depth map and nothing else (masks, codes), so no "
            "variants can be made of it."
        )
    try:
        valid = load_mask(row["depth_valid"][0]) if row["depth_valid"] else None
        return load_picture(open_encoded(row["images"][0])), load_depth(row["depth"][0], row["depth_unit"], valid)
    except ValueError as error:
        raise ValueError(f"Sample {name_of(row)}: {error}") from None


def _variant(picture: Image.Image, depth: DepthMap, rng: np.random.Generator) -> dict[str, Any]:
    """The fields of a sample that differ in a variant."""
    shown, values, valid = _cut(picture, depth, rng)
    for light in _LIGHTS:
        shown = light(shown).enhance(rng.uniform(1 - LIGHT, 1 + LIGHT))
    if rng.random() < 0.5:
        shown, values, valid = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT), values[:, ::-1], valid[:, ::-1]
    steps = np.round(relative_from_disparity(values, valid) * 65535).astype(np.uint16)
    return {
        "images": [_encoded(shown, format="JPEG", quality=92)],
        "depth": _encoded(Image.fromarray(steps), format="PNG", compress_level=1),
        "depth_unit": "relative",
        "depth_valid": valid.copy(),
    }


def _cut(picture: Image.Image, depth: DepthMap, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A random part of the picture, and the relative depth and validity of that part at its size."""
    for part in [_part(rng) for _ in range(_TRIES)] + [(0.0, 0.0, 1.0, 1.0)]:
        left, top, right, bottom = part
        box = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
        shrink = min(1.0, LONGEST_SIDE / max(picture.size))
        size = round((box[2] - box[0]) * shrink) or 1, round((box[3] - box[1]) * shrink) or 1
        pixels = np.ix_(
            _places(top, bottom, depth.valid.shape[0], size[1]), _places(left, right, depth.valid.shape[1], size[0])
        )
        values, valid = depth.relative[pixels], depth.valid[pixels]
        if valid.any() and np.ptp(values[valid]) > 0:  # a part that is all hole, or all one distance, has no depth
            break
    return picture.resize(size, Image.Resampling.BILINEAR, box=box), values, valid


def _encoded(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def _part(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a random part of the same shape, as shares of width and height."""
    share = rng.uniform(LEAST_SHARE, 1.0)
    left, top = rng.uniform(0.0, 1.0 - share, 2)
    return left, top, left + share, top + share


def _places(start: float, stop: float, length: int, count: int) -> np.ndarray:
    """The `count` pixels, of `length` along a side, nearest to an even grid from `start` to `stop` (shares)."""
    grid = start + (stop - start) * (np.arange(count) + 0.5) / count
    return np.minimum((grid * length).astype(int), length - 1)
