"""Pictures of masks and depth for people to look at."""

import colorsys
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN_ANGLE = 0.381966  # of a turn: consecutive hues lie far apart however many there are
_OPACITY = 0.45
_NO_DEPTH = (90, 90, 90)  # no colour of the depth scale comes near this grey


def mask_colors(count: int) -> np.ndarray:
    """`count` clearly different colours, (count, 3) uint8. The first n are the same for every count."""
    turns = ((0.88 + _GOLDEN_ANGLE * i) % 1.0 for i in range(count))
    levels = ((1.0, 1.0), (0.65, 1.0), (1.0, 0.7))  # (saturation, value), changed every eight hues
    colors = [colorsys.hsv_to_rgb(turn, *levels[i // 8 % len(levels)]) for i, turn in enumerate(turns)]
    return np.round(np.array(colors).reshape(count, 3) * 255.0).astype(np.uint8)


def overlay(picture: Image.Image, masks: np.ndarray, labels: Sequence[str] | None = None) -> Image.Image:
    """The picture with every mask as a translucent colour inside a solid outline.

    Args:
        picture: of any mode; it stays unchanged.
        masks: (n, height, width) bool at the picture's size; n may be 0. Later masks lie on top.
        labels: one short text per mask, written at its middle.

    Raises:
        ValueError: where the sizes or the number of labels do not match.
    """
    masks = np.asarray(masks, dtype=bool)
    if masks.ndim != 3 or masks.shape[1:] != (picture.height, picture.width):
        raise ValueError(
            f"Masks are (n, {picture.height}, {picture.width}) for a picture of {picture.width} x {picture.height}, "
            f"not {masks.shape}."
        )
    if labels is not None and len(labels) != len(masks):
        raise ValueError(f"{len(masks)} masks need as many labels, not {len(labels)}.")
    canvas = np.array(picture.convert("RGB"))
    thickness = min(8, max(1, round(min(picture.size) / 250)))
    colors = mask_colors(len(masks))
    for mask, color in zip(masks, colors, strict=True):
        if mask.any():
            _tint(canvas, mask, color, thickness)
    drawn = Image.fromarray(canvas)
    for mask, label in zip(masks, labels or (), strict=labels is not None):
        _write_label(drawn, mask, label)
    return drawn


def _tint(canvas: np.ndarray, mask: np.ndarray, color: np.ndarray, thickness: int) -> None:
    """Colour one mask into canvas (height, width, 3), in place."""
    box = _bounding_box(mask)  # large pictures with many small masks would take long otherwise
    canvas, mask = canvas[box], mask[box]
    percent = round(100 * _OPACITY)
    mixed = canvas[mask].astype(np.uint16) * (100 - percent) + color.astype(np.uint16) * percent
    canvas[mask] = (mixed + 50) // 100
    canvas[outline(mask, thickness)] = color


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of mask (height, width), and one more on each side where there is one."""
    used = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return tuple(slice(max(0, places[0] - 1), places[-1] + 2) for places in used)


def outline(mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """The pixels of mask (height, width) within `thickness` of one outside it. The border of the picture is no edge."""
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _write_label(drawn: Image.Image, mask: np.ndarray, label: str) -> None:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return
    font = ImageFont.load_default(size=max(10, round(min(drawn.size) / 25)))
    place = (float(columns.mean()), float(rows.mean()))
    brush = ImageDraw.Draw(drawn)
    brush.rectangle(brush.textbbox(place, label, font=font, anchor="mm"), fill="black")
    brush.text(place, label, font=font, anchor="mm", fill="white")


def colorize_depth(depth: np.ndarray, valid: np.ndarray | None = None) -> Image.Image:
    """Relative depth as colours: near is bright and warm, far is dark, no reading is grey.

    Args:
        depth: (height, width) in [0, 1], 1 = nearest. Values outside are clipped, NaN counts as no reading.
        valid: (height, width) bool.

    Raises:
        ValueError: where depth is not a plane or valid has another shape.
    """
    from matplotlib import colormaps

    depth = np.asarray(depth, dtype=np.float32)
    if depth.ndim != 2 or depth.size == 0:
        raise ValueError(f"A depth map is (height, width), not {depth.shape}.")
    if valid is not None and np.shape(valid) != depth.shape:
        raise ValueError(f"The validity mask is {np.shape(valid)}, the depth map {depth.shape}; give the same shape.")
    known = ~np.isnan(depth) if valid is None else ~np.isnan(depth) & np.asarray(valid, dtype=bool)
    steps = np.clip(np.where(known, depth, 0.0), 0.0, 1.0) * 255.0
    table = np.round(colormaps["inferno"](np.arange(256))[:, :3] * 255.0).astype(np.uint8)
    colors = table[np.round(steps).astype(np.uint8)]
    colors[~known] = _NO_DEPTH
    return Image.fromarray(colors)


def sheet(panels: Sequence[tuple[str, Image.Image]], caption: str) -> Image.Image:
    """Pictures side by side under their titles, and a caption below them (its line breaks are kept)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _wrap(caption, 40 * len(panels))
    caption_height = 0.26 * len(lines) + 0.25  # inches
    figure = Figure(figsize=(3.6 * len(panels), 3.9 + caption_height), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    share = caption_height / figure.get_figheight()
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, picture) in zip(axes, panels, strict=True):
        axis.imshow(np.asarray(picture), interpolation="nearest")
        axis.set_title(title, fontsize=12)
        axis.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=share, wspace=0.04)
    figure.text(0.015, share - 0.02, "\n".join(lines), fontsize=11, va="top", parse_math=False, linespacing=1.35)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # a script the font lacks: empty boxes
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, without control characters."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]
