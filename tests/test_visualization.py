"""Overlays, depth colours and sheets show what they claim to show."""

import numpy as np
import pytest
from PIL import Image

from perceptio_hf.visualization import colorize_depth, mask_colors, outline, overlay, sheet


def test_overlay_colours_masks_and_nothing_else():
    picture = Image.new("RGB", (30, 20), (100, 100, 100))
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 2:8, 2:9] = True
    masks[1, 10:18, 12:25] = True
    got = np.asarray(overlay(picture, masks))
    assert got.shape == (20, 30, 3)
    assert (got[~masks.any(0)] == 100).all()
    for mask, color in zip(masks, mask_colors(2), strict=True):
        edge = outline(mask)
        assert (got[edge] == color).all()
        assert np.abs(got[mask & ~edge].astype(int) - (55 + 0.45 * color.astype(int))).max() <= 1
    assert (np.asarray(picture) == 100).all(), "the picture handed in must stay as it was"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_overlay_takes_pictures_of_any_mode(mode):
    assert overlay(Image.new(mode, (5, 4)), np.ones((1, 4, 5), bool)).mode == "RGB"


def test_the_border_of_the_picture_is_no_edge():
    mask = np.ones((1, 10, 600), bool)
    mask[0, :, 300:] = False
    got = np.asarray(overlay(Image.new("RGB", (600, 10)), mask))
    solid = (got == mask_colors(1)[0]).all(-1)
    assert solid[:, 299].all() and solid.sum() == 10


def test_overlay_without_masks_is_the_picture():
    picture = Image.effect_noise((9, 7), 50).convert("RGB")
    assert np.array_equal(np.asarray(overlay(picture, np.zeros((0, 7, 9), bool))), np.asarray(picture))


def test_overlay_survives_empty_full_and_one_pixel_masks():
    masks = np.stack([np.zeros((1, 1), bool), np.ones((1, 1), bool)])
    assert overlay(Image.new("RGB", (1, 1)), masks, labels=["none", "all"]).size == (1, 1)


def test_overlay_writes_labels():
    picture, masks = Image.new("RGB", (200, 100), "white"), np.ones((1, 100, 200), bool)
    plain, named = overlay(picture, masks), overlay(picture, masks, labels=["dog"])
    assert not np.array_equal(np.asarray(plain), np.asarray(named))


def test_overlay_refuses_what_does_not_fit():
    picture = Image.new("RGB", (30, 20))
    with pytest.raises(ValueError, match=r"\(n, 20, 30\)"):
        overlay(picture, np.zeros((1, 30, 20), bool))
    with pytest.raises(ValueError, match="as many labels"):
        overlay(picture, np.zeros((1, 20, 30), bool), labels=[])


def test_outline_is_inside_the_mask_and_grows_with_thickness():
    mask = np.zeros((12, 12), bool)
    mask[2:10, 3:11] = True
    for thickness in (1, 2, 3):
        edge = outline(mask, thickness)
        inner = np.zeros_like(mask)
        inner[2 + thickness : 10 - thickness, 3 + thickness : 11 - thickness] = True
        assert np.array_equal(edge, mask & ~inner)


def test_twenty_four_colours_are_clearly_different():
    colors = mask_colors(24).astype(int)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(24, dtype=int)
    assert distances.min() > 40
    assert np.array_equal(mask_colors(5), mask_colors(24)[:5])
    assert mask_colors(0).shape == (0, 3)


def test_near_is_bright_and_far_is_dark():
    ramp = np.linspace(0, 1, 50)[None, :].repeat(2, axis=0)
    colors = np.asarray(colorize_depth(ramp)).astype(float)
    brightness = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness[0]) > 0).all()
    assert colors[0, 30, 0] > colors[0, 30, 2] + 50, "near must be warm"


def test_missing_depth_is_grey():
    depth = np.full((3, 4), 0.5)
    depth[0, 0] = np.nan
    valid = np.ones((3, 4), bool)
    valid[2, 3] = False
    colors = np.asarray(colorize_depth(depth, valid))
    assert len(set(colors[0, 0])) == len(set(colors[2, 3])) == 1
    assert len(set(colors[1, 1])) == 3


def test_depth_must_be_a_plane_and_fit_its_mask():
    with pytest.raises(ValueError, match=r"\(height, width\), not \(2, 3, 4\)"):
        colorize_depth(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="same shape"):
        colorize_depth(np.zeros((2, 3)), np.ones((3, 2), bool))


def test_sheet_takes_any_text_and_number_of_panels():
    panel = ("a $title_", Image.new("RGB", (16, 16), "red"))
    one, three = sheet([panel], "short"), sheet([panel] * 3, "How $much_is^ this?\n" + "long words " * 60)
    assert three.width > one.width and three.height > one.height
    assert (np.asarray(one) == (255, 0, 0)).all(-1).any()
