"""Overlays, depth colours and sheets show what they claim to show."""

import numpy as np
import pytest
from PIL import Image

from perceptio_hf.visualization import (
    PANEL,
    colorize_depth,
    confidence_veil,
    depth_colors,
    depth_panel,
    depth_scale,
    mask_colors,
    mask_layer,
    mask_legend,
    mask_panel,
    outline,
    overlay,
    panel_size,
    sheet,
)

# How a screen looks to people without one kind of cone: linear RGB to linear RGB (Machado, Oliveira, Fernandes, 2009).
CONES_MISSING = {
    "none": np.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colors, missing="none") -> np.ndarray:
    """uint8 sRGB (n, 3) -> CIE Lab (n, 3) as somebody sees it who lacks one kind of cone."""
    values = np.asarray(colors, float) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(CONES_MISSING[missing]), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def test_overlay_colours_masks_and_nothing_else():
    picture = Image.new("RGB", (60, 40), (100, 100, 100))
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 4:16, 4:18] = True
    masks[1, 20:36, 24:50] = True
    got = np.asarray(overlay(picture, masks)).astype(int)
    assert got.shape == (40, 60, 3)
    around = ~outline(~masks.any(0), 4) & ~masks.any(0)
    assert (got[around] == 100).all(), "only a dark rim lies outside of a mask"
    assert (got[~masks.any(0)] <= 100).all()
    for mask, color in zip(masks, mask_colors(2).astype(int), strict=True):
        assert np.abs(got[outline(mask)] - color).max() <= 25, "the contour has the mask's colour"
        assert (np.abs(got[mask & ~outline(mask, 4)] - (60 + 0.4 * color)) <= 1).all()
    assert (np.asarray(picture) == 100).all(), "the picture handed in must stay as it was"


@pytest.mark.parametrize("size", [128, 500, 2000])
def test_contours_are_crisp_at_the_size_that_is_drawn(size):
    """Contours are as thin, and lie as close to the mask's end, as the drawing's own pixels allow."""
    picture = Image.new("RGB", (125, 125), (100, 100, 100))
    mask = np.zeros((1, 125, 125), bool)
    mask[0, 40:90, 40:90] = True
    got = np.asarray(overlay(picture, mask, size=(size, size))).astype(int)[size // 2]
    solid = np.flatnonzero(np.abs(got - mask_colors(1)[0]).max(-1) <= 25)
    assert max(1, size / 300) <= len(solid) / 2 <= max(2, size / 120)
    rim = np.flatnonzero((got < 80).all(-1))
    assert rim.size and np.abs(solid[:, None] - rim).min() == 1, "the dark rim is right beside the contour"
    assert abs(solid[0] - 40 / 125 * size) <= max(1.5, size / 125), "and it lies where the mask ends"


def test_a_layer_over_its_picture_is_the_overlay():
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    mask = np.zeros((70, 90), bool)
    mask[10:60, 20:70] = np.add.outer(np.arange(50), np.arange(50)) % 23 > 2
    layered = picture.convert("RGBA")
    layered.alpha_composite(mask_layer(mask, mask_colors(1)[0]))
    drawn = np.asarray(overlay(picture, mask[None])).astype(int)
    assert np.abs(np.asarray(layered)[..., :3] - drawn).max() <= 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_overlay_takes_pictures_of_any_mode(mode):
    assert overlay(Image.new(mode, (5, 4)), np.ones((1, 4, 5), bool)).mode == "RGB"


def test_the_border_of_the_picture_is_no_edge():
    mask = np.ones((1, 10, 600), bool)
    mask[0, :, 300:] = False
    got = np.asarray(overlay(Image.new("RGB", (600, 10)), mask))
    solid = np.abs(got.astype(int) - mask_colors(1)[0]).max(-1) <= 25
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


def test_a_label_stands_inside_of_a_mask_with_a_hole():
    ring = np.hypot(*np.mgrid[-150:150, -150:150])
    mask = (ring < 140) & (ring > 90)
    plain, named = (overlay(Image.new("RGB", (300, 300)), mask[None], labels=text) for text in (None, ["7"]))
    changed = (np.asarray(plain) != np.asarray(named)).any(-1)
    assert changed.any() and mask[changed].all()


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


@pytest.mark.parametrize("missing", CONES_MISSING)
def test_colour_blind_readers_can_tell_masks_apart(missing):
    """10 is a difference seen at a glance. Hues around the circle, which were here before, come as near as 1."""
    seen = lab(mask_colors(7), missing)
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 1000 * np.eye(7)
    assert distances.min() > 10


@pytest.mark.parametrize("missing", CONES_MISSING)
def test_equal_steps_of_depth_are_equal_steps_of_lightness(missing):
    """Rainbow maps (turbo, jet) rise and fall, 70 off a straight line; here lightness rises all the way."""
    lightness = lab(depth_colors(), missing)[:, 0]
    assert (np.diff(lightness) > -0.1).all()
    assert np.abs(lightness - np.linspace(lightness[0], lightness[-1], 256)).max() < 15


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


def test_unsure_depth_is_veiled():
    veil = np.asarray(confidence_veil(np.array([[1.0, 0.5, 0.0, np.nan]])))[0, :, 3]
    assert veil[0] == veil[3] == 0 < veil[1] < veil[2]


def test_legends_name_what_they_explain():
    scale = np.asarray(depth_scale(512)).astype(int)
    assert (scale[2, 0] == depth_colors()[0]).all() and (scale[2, -1] == depth_colors()[-1]).all()
    assert (scale[20:].min(-1) < 120).any(), "words below the colours"
    legend = np.asarray(mask_legend(["the cat", None, "dog " * 200], [0.9, 0.5, 0.1]))
    assert legend.shape[1] == PANEL
    for number, color in enumerate(mask_colors(3)):
        rows = legend[number * 30 : (number + 1) * 30]
        assert (rows == color).all(-1).any() and (rows[:, 60:400].min(-1) < 120).any()
    assert (np.asarray(mask_legend([])) < 120).any()


def test_panels_are_drawn_at_their_final_size():
    """A sheet must not scale what has contours."""
    masks = np.ones((2, 30, 40), bool)
    panel = mask_panel(Image.new("RGB", (40, 30)), masks, ["a", "b"], [0.5, 0.5])
    assert panel.picture.size == panel_size((40, 30)) == (PANEL, PANEL * 3 // 4)
    assert panel.legend is not None and mask_panel(Image.new("RGB", (40, 30)), masks).legend is None
    page = np.asarray(sheet([panel, depth_panel(np.ones((30, 40)))], "words"))
    part = page[46 : 46 + panel.picture.height, 24 : 24 + PANEL]
    assert np.array_equal(part, np.asarray(panel.picture))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5000, 3000)])
def test_pictures_of_any_shape_have_a_panel(size):
    panel = mask_panel(Image.new("RGB", size), np.ones((1, *size[::-1]), bool), [None], [0.5])
    assert panel.picture.width <= PANEL and panel.picture.height <= 1.5 * PANEL
    sheet([panel, depth_panel(np.zeros(size[::-1]))], "")


@pytest.mark.parametrize("size", [(20000, 600), (600, 20000)])
def test_a_pixel_is_drawn_however_small_it_becomes(size):
    """Its share of a pixel of the panel is rounded to none."""
    mask = np.zeros((1, *size[::-1]), bool)
    column, row = size[0] // 4, size[1] * 3 // 4
    mask[0, row, column] = True
    drawn = np.asarray(mask_panel(Image.new("RGB", size), mask).picture)
    (found,) = np.argwhere(drawn.any(-1))
    expected = np.array([row, column]) / size[::-1] * drawn.shape[:2]
    assert np.abs(found - expected).max() <= 1


def test_sheet_takes_any_text_and_number_of_panels():
    panel = ("a $title_", Image.new("RGB", (16, 16), "red"))
    one, three = sheet([panel], "short"), sheet([panel] * 3, "How $much_is^ this?\n" + "long words " * 60 + "x" * 900)
    assert three.width > one.width and three.height > one.height
    two_rows = sheet([panel] * 3, "short", columns=2)
    assert two_rows.width < three.width and two_rows.height > one.height * 1.8
    assert (np.asarray(one) == (255, 0, 0)).all(-1).any()
