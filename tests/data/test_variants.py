"""Variants of samples: picture, depth and holes are cut and mirrored alike, and stay what they are."""

import numpy as np
import pytest
from PIL import Image

from perceptio_hf.data.encoded import load_depth, load_mask, open_encoded
from perceptio_hf.data.rows import dataset_of
from perceptio_hf.data.variants import LONGEST_SIDE, with_variants
from perceptio_hf.processing.pictures import load_picture


def sample(width: int = 640, height: int = 480, **changes) -> dict:
    """Grey grows from left to right as nearness does; the upper third has no reading."""
    nearness = np.broadcast_to(np.linspace(0.2, 0.9, width), (height, width))
    depth = 1 / nearness
    depth[: height // 3] = 0
    return {
        "id": "ramp",
        "images": [Image.fromarray(np.round(nearness * 255).astype(np.uint8)).convert("RGB")],
        "messages": [
            {"role": "user", "content": "How far?"},
            {"role": "assistant", "content": "<DEPTH_START><DEPTH_END>"},
        ],
        "depth": depth,
        "depth_unit": "m",
        **changes,
    }


def read(row: dict):
    valid = load_mask(row["depth_valid"][0]) if row["depth_valid"] else None
    return load_picture(open_encoded(row["images"][0])), load_depth(row["depth"][0], row["depth_unit"], valid)


def test_picture_and_depth_are_cut_and_mirrored_alike():
    rows = with_variants(dataset_of([sample()]), 12)
    assert len(rows) == 13 and rows[0]["id"] == "ramp" and rows[12]["id"] == "ramp, variant 12"
    mirrored, sizes, holes = 0, set(), set()
    for row in rows.select(range(1, 13)):
        picture, depth = read(row)
        assert depth.relative.shape == (picture.height, picture.width) and max(picture.size) <= LONGEST_SIDE
        assert abs(picture.width / picture.height - 4 / 3) < 0.02
        grey = np.asarray(picture.convert("L"), dtype=float)
        assert np.corrcoef(grey[depth.valid], depth.relative[depth.valid])[0, 1] > 0.99
        assert depth.relative[depth.valid].min() == 0 and depth.relative[depth.valid].max() == 1
        mirrored += grey[0, 0] > grey[0, -1]
        sizes.add(picture.size)
        holes.add(round(1 - float(depth.valid.mean()), 3))
        assert row["messages"] == rows[0]["messages"]
    assert 2 <= mirrored <= 10 and len(sizes) > 6 and len(holes) > 6


def test_depth_may_be_smaller_than_its_picture():
    small = 1 / np.broadcast_to(np.linspace(0.2, 0.9, 64), (48, 64))
    for row in with_variants(dataset_of([sample(depth=small)]), 3).select(range(1, 4)):
        picture, depth = read(row)
        grey = np.asarray(picture.convert("L"), dtype=float)
        assert np.corrcoef(grey.ravel(), depth.relative.ravel())[0, 1] > 0.98


def test_a_seed_gives_the_same_variants():
    rows = dataset_of([sample(width=64, height=48)])
    one, same, other = (with_variants(rows, 2, seed=seed)[:] for seed in (0, 0, 1))
    assert one == same and one["images"] != other["images"]


def test_a_part_without_depth_is_not_taken():
    """Two readings in opposite corners: only the whole picture shows both."""
    depth = np.zeros((48, 64))
    depth[0, 0], depth[-1, -1] = 1.0, 2.0
    rows = with_variants(dataset_of([sample(width=64, height=48, depth=depth)]), 3)
    assert all(read(row)[1].valid.sum() == 2 for row in rows.select(range(1, 4)))


@pytest.mark.parametrize(
    ("changes", "variants", "message"),
    [
        ({}, 0, r"variants is 0; expected a whole number of 1 or more"),
        ({"depth": None, "depth_codes": [1, 2]}, 1, r"Sample 'ramp' is not one picture with one depth map"),
        ({"masks": [np.ones((480, 640), bool)]}, 1, r"Sample 'ramp' is not one picture with one depth map"),
        ({"depth": np.zeros((480, 640))}, 1, r"Sample 'ramp': no pixel holds a valid depth"),
    ],
)
def test_what_has_no_variants_is_said(changes, variants, message):
    with pytest.raises(ValueError, match=message):
        with_variants(dataset_of([sample(**changes)]), variants)
