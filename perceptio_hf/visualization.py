"""Pictures of masks and depth for people to look at: the one way the demo, `predict`, case sheets and the app draw.

Colours of masks can be told apart by colour-blind readers, and every mask has its number; equal steps of depth are
equal steps for the eye, and what a colour means is written below it.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Okabe and Ito's colours, which stay apart for every common kind of colour blindness. Black and grey are left out: they
# do not show on pictures, and grey stands for "no reading".
_OKABE_ITO = ("E69F00", "56B4E9", "CC79A7", "009E73", "F0E442", "0072B2", "D55E00")
_SHADES = ((255, 0.0), (255, 0.3), (0, 0.35), (255, 0.65))  # (towards this grey, share): a round of the colours each
_OPACITY = 0.4
_CASING = 0.6  # share of black in the line around a contour, which sets it off from a background of its own colour
_STRIP = 2_000_000  # pixels that are mixed at a time, so that large pictures take little memory
_NO_DEPTH = (128, 128, 128)  # no colour of the depth scale is grey
_INK, _FAINT_INK, _PAPER = (28, 28, 30), (100, 100, 106), (255, 255, 255)
PANEL = 512  # width of a panel, pixels; higher pictures than wide ones get at most 1.5 times as much
DEPTH_MEANING = "relative, 1 = nearest"


class Panel(NamedTuple):
    """One picture of a sheet, its title, and what explains its colours, if anything."""

    title: str
    picture: Image.Image
    legend: Image.Image | None = None


def mask_colors(count: int) -> np.ndarray:
    """`count` clearly different colours, (count, 3) uint8. The first n are the same for every count."""
    base = np.array([[int(text[i : i + 2], 16) for i in (0, 2, 4)] for text in _OKABE_ITO], dtype=float)
    rounds = [base * (1 - share) + grey * share for grey, share in _SHADES]
    colors = np.round(np.concatenate(rounds)).astype(np.uint8)
    return colors[np.arange(count) % len(colors)]


def overlay(
    picture: Image.Image,
    masks: np.ndarray,
    labels: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The picture with every mask as a translucent colour inside a solid contour with a dark rim.

    Args:
        picture: of any mode; it stays unchanged.
        masks: (n, height, width) bool at the picture's size; n may be 0. Later masks lie on top.
        labels: one short text per mask, written where it is widest.
        size: (width, height) of the result; contours are drawn in it. Default: the picture's.

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
    canvas = np.array(_scale(picture.convert("RGB"), size or picture.size))
    colors = mask_colors(len(masks))
    for mask, color in zip(masks, colors, strict=True):
        if mask.any():
            _tint(canvas, scale_mask(mask, size or picture.size), color)
    drawn = Image.fromarray(canvas)
    for mask, color, label in zip(masks, colors, labels or (), strict=labels is not None):
        if mask.any():
            _write_label(drawn, mask, color, label)
    return drawn


def mask_layer(mask: np.ndarray, color: Sequence[int]) -> Image.Image:
    """One mask (height, width) bool alone, RGBA, to be laid over its picture: the colours `overlay` gives it there."""
    mask = np.asarray(mask, dtype=bool)
    share, dark = _strokes(mask, _blurred(mask), _thickness(mask.shape))
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[..., :3] = np.where(mask[..., None], np.asarray(color, np.uint8), np.uint8(0))
    layer[..., 3] = np.round(255 * (share + dark))  # one of them is 0 everywhere
    return Image.fromarray(layer)


def _tint(canvas: np.ndarray, mask: np.ndarray, color: np.ndarray) -> None:
    """Colour one mask into canvas (height, width, 3), in place."""
    thickness = _thickness(mask.shape)
    box = _bounding_box(mask, margin=4 * thickness + 2)  # large pictures would take long otherwise
    part, mask = canvas[box], mask[box]
    blurred = _blurred(mask, thickness)
    rows = max(1, _STRIP // mask.shape[1])
    for top in range(0, len(mask), rows):
        here = slice(top, top + rows)
        share, dark = _strokes(mask[here], blurred[here], thickness)
        mixed = part[here] * ((1 - share) * (1 - dark))[..., None] + np.float32(color) * share[..., None]
        part[here] = np.round(mixed).astype(np.uint8)


def _blurred(mask: np.ndarray, thickness: int | None = None) -> np.ndarray:
    """uint8 (height, width). The border of the picture is no edge."""
    radius = thickness or _thickness(mask.shape)
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius)))


def _strokes(mask: np.ndarray, blurred: np.ndarray, thickness: int) -> tuple[np.ndarray, np.ndarray]:
    """Opacities (height, width) float32 of a mask's colour inside of it, contour included, and of the rim outside.

    The distance to the edge is read off the blurred mask, so that lines are smooth where a mask goes in steps.
    """
    inside, outside = _opacities(thickness)
    return np.where(mask, inside[blurred], np.float32(0)), np.where(mask, np.float32(0), outside[blurred])


@lru_cache(maxsize=8)
def _opacities(thickness: int) -> tuple[np.ndarray, np.ndarray]:
    """What `_strokes` gives for each value of a mask blurred by `thickness` pixels: two of (256,) float32."""
    distance = thickness * np.array([NormalDist().inv_cdf((value + 0.5) / 256) for value in range(256)])
    line = np.clip(thickness + 0.5 - distance, 0, 1)
    rim = np.clip(max(1.0, thickness / 2) + 0.5 + distance, 0, 1)
    return np.float32(1 - (1 - _OPACITY) * (1 - line)), np.float32(_CASING * rim)


def _thickness(shape: tuple[int, ...]) -> int:
    return min(8, max(1, round(min(shape) / 170)))


def _bounding_box(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The rows and columns of mask (height, width), and `margin` more on each side where there are."""
    used = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return tuple(slice(max(0, places[0] - margin), places[-1] + 1 + margin) for places in used)


def _scale(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == size:
        return picture
    smaller = picture.width > size[0]
    return picture.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.BICUBIC)


def scale_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool -> the same at size (width, height), with smooth edges; what was there does not vanish."""
    if mask.shape == size[::-1]:
        return mask
    scaled = _scale(Image.fromarray(mask.astype(np.uint8) * 255), size)
    factor = size[0] / mask.shape[1]
    shares = np.asarray(scaled if factor < 1.5 else scaled.filter(ImageFilter.GaussianBlur(0.7 * factor)))
    scaled = shares >= min(128, max(1, int(shares.max())))
    if mask.any() and not scaled.any():  # so small that every share was rounded to none
        row, column = (int(places.mean()) for places in np.nonzero(mask))
        scaled[row * size[1] // mask.shape[0], column * size[0] // mask.shape[1]] = True
    return scaled


def _write_label(drawn: Image.Image, mask: np.ndarray, color: np.ndarray, label: str) -> None:
    side = min(drawn.size)
    font = _font(max(9, min(40, round(side / 26))), bold=True)
    place = middle_of(mask) * (np.array(drawn.size) / mask.shape[::-1])
    brush = ImageDraw.Draw(drawn)
    x0, y0, x1, y1 = brush.textbbox((0, 0), label, font=font, anchor="mm")
    pad = font.size * 0.35
    half = max(x1 - x0, y1 - y0) / 2 + pad, (y1 - y0) / 2 + pad
    place = [min(max(p, h), max(limit - h, h)) for p, h, limit in zip(place, half, drawn.size, strict=True)]
    box = [place[0] - half[0], place[1] - half[1], place[0] + half[0], place[1] + half[1]]
    brush.rounded_rectangle(box, radius=pad, fill=tuple(color.tolist()), outline=_INK)
    brush.text(tuple(place), label, font=font, anchor="mm", fill=_ink_on(color))


def _ink_on(color: np.ndarray) -> tuple[int, int, int]:
    return _INK if np.dot(color, (0.299, 0.587, 0.114)) > 120 else _PAPER


def middle_of(mask: np.ndarray) -> np.ndarray:
    """(x, y) of a place far inside of mask (height, width), which its centre of mass need not be."""
    step = max(1, max(mask.shape) // 96)
    small = mask[::step, ::step]
    if not small.any():
        return np.argwhere(mask).mean(0)[::-1] + 0.5
    left = small
    while left.any():
        small, left = left, left & ~outline(left, border=True)
    places = np.argwhere(small)
    return (places[len(places) // 2][::-1] + 0.5) * step


def outline(mask: np.ndarray, thickness: int = 1, border: bool = False) -> np.ndarray:
    """The pixels of mask (height, width) within `thickness` of one outside it; `border`: is the picture's an edge?"""
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1) if border else np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def colorize_depth(depth: np.ndarray, valid: np.ndarray | None = None) -> Image.Image:
    """Relative depth as colours: near is bright and warm, far is dark, no reading is grey. `depth_scale` explains them.

    Args:
        depth: (height, width) in [0, 1], 1 = nearest. Values outside are clipped, NaN counts as no reading.
        valid: (height, width) bool.

    Raises:
        ValueError: where depth is not a plane or valid has another shape.
    """
    depth = np.asarray(depth, dtype=np.float32)
    if depth.ndim != 2 or depth.size == 0:
        raise ValueError(f"A depth map is (height, width), not {depth.shape}.")
    if valid is not None and np.shape(valid) != depth.shape:
        raise ValueError(f"The validity mask is {np.shape(valid)}, the depth map {depth.shape}; give the same shape.")
    known = ~np.isnan(depth) if valid is None else ~np.isnan(depth) & np.asarray(valid, dtype=bool)
    steps = np.clip(np.where(known, depth, 0.0), 0.0, 1.0) * 255.0
    colors = depth_colors()[np.round(steps).astype(np.uint8)]
    colors[~known] = _NO_DEPTH
    return Image.fromarray(colors)


@lru_cache(maxsize=1)
def depth_colors() -> np.ndarray:
    """(256, 3) uint8, farthest first: inferno, whose steps are equally large for the eye."""
    from matplotlib import colormaps

    return np.round(colormaps["inferno"](np.arange(256))[:, :3] * 255.0).astype(np.uint8)


def confidence_veil(confidence: np.ndarray) -> Image.Image:
    """What to lay over depth (height, width), RGBA: grey where the model was unsure of its code, nothing where sure.

    Args:
        confidence: probability of the chosen code at each place; NaN (nobody chose it) is not veiled.
    """
    unsure = 1 - np.clip(np.nan_to_num(np.asarray(confidence, dtype=np.float32), nan=1.0), 0, 1)
    layer = np.empty((*unsure.shape, 4), np.uint8)
    layer[..., :3], layer[..., 3] = 205, np.round(unsure * 235)
    return Image.fromarray(layer)


def depth_scale(width: int = PANEL) -> Image.Image:
    """The colours of `colorize_depth` from farthest to nearest, with their meaning written below."""
    bar, font = 18, _font(17)
    legend = Image.new("RGB", (width, bar + 30), _PAPER)
    ramp = np.linspace(0, 255, width).round().astype(np.uint8)
    legend.paste(Image.fromarray(np.tile(depth_colors()[ramp], (bar, 1, 1))), (0, 0))
    brush = ImageDraw.Draw(legend)
    texts = ((0, "lt", "0 farthest"), (width // 2, "mt", DEPTH_MEANING), (width, "rt", "1 nearest"))
    for x, anchor, text in texts:
        brush.text((x, bar + 8), text, font=font, anchor=anchor, fill=_FAINT_INK if anchor == "mt" else _INK)
    return legend


def mask_legend(
    phrases: Sequence[str | None], scores: Sequence[float] | None = None, width: int = PANEL
) -> Image.Image:
    """One line for each mask: its colour and number, what it is of, and how well it fits as the model expects (IoU)."""
    font, bold, line = _font(17), _font(17, bold=True), 30
    rows = [(_number(index, len(phrases)), phrase or "(not named)") for index, phrase in enumerate(phrases)]
    legend = Image.new("RGB", (width, max(1, len(rows)) * line), _PAPER)
    brush = ImageDraw.Draw(legend)
    if not rows:
        brush.text((0, line // 2), "no mask", font=font, anchor="lm", fill=_FAINT_INK)
    for index, ((number, phrase), color) in enumerate(zip(rows, mask_colors(len(rows)), strict=True)):
        top, middle = index * line, index * line + line // 2
        brush.rounded_rectangle((0, top + 3, 30, top + line - 4), radius=5, fill=tuple(color.tolist()), outline=_INK)
        brush.text((15, middle), number, font=bold, anchor="mm", fill=_ink_on(color))
        score = "" if scores is None else f"expected IoU {float(scores[index]):.2f}"
        room = width - 52 - font.getlength(score)
        brush.text((40, middle), _shorten(phrase, font, room), font=font, anchor="lm", fill=_INK)
        brush.text((width, middle), score, font=font, anchor="rm", fill=_FAINT_INK)
    return legend


def mask_panel(
    picture: Image.Image,
    masks: np.ndarray,
    phrases: Sequence[str | None] | None = None,
    scores: Sequence[float] | None = None,
    title: str = "masks",
) -> Panel:
    """The picture under its masks, with a legend where there are phrases or scores; arguments as in `overlay`."""
    size = panel_size(picture.size)
    labels = [_number(index, len(masks)) for index in range(len(masks))] if len(masks) > 1 else None
    named = phrases is not None or scores is not None
    legend = mask_legend(phrases or [None] * len(masks), scores) if named else None
    return Panel(title, overlay(picture, masks, labels, size), legend)


def _number(index: int, count: int) -> str:
    return str(index + 1) if count > 1 else ""


def depth_panel(depth: np.ndarray, valid: np.ndarray | None = None, title: str = "depth") -> Panel:
    """Depth in colours over their scale; arguments as in `colorize_depth`."""
    return Panel(title, colorize_depth(depth, valid), depth_scale())


def answer_panels(
    picture: Image.Image,
    masks: np.ndarray,
    phrases: Sequence[str | None],
    scores: Sequence[float],
    depth: np.ndarray | None,
) -> list[Panel]:
    """What a model wrote about one picture: its masks, if any, else the picture; and its depth, if any."""
    panels = [mask_panel(picture, masks, phrases, scores) if len(masks) else Panel("picture", picture)]
    return panels if depth is None else [*panels, depth_panel(depth)]


def panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) a picture of this size gets on a sheet."""
    factor = min(PANEL / size[0], 1.5 * PANEL / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def sheet(panels: Sequence[Panel | tuple], caption: str, columns: int = 0) -> Image.Image:
    """Pictures under their titles and over their legends, in rows of `columns` (0: one row), and a caption below.

    The caption's line breaks are kept.
    """
    panels = [_fitted(Panel(*panel)) for panel in panels]
    columns = columns or len(panels)
    gap, head = 24, 46
    width = gap + columns * (PANEL + gap)
    font, spacing = _font(21), 32
    lines = _wrap(caption, font, width - 2 * gap)
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    heights = [head + max(map(_height, row)) + gap for row in rows]
    page = Image.new("RGB", (width, sum(heights) + len(lines) * spacing + gap), _PAPER)
    brush = ImageDraw.Draw(page)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            left = gap + column * (PANEL + gap)
            title = _shorten(panel.title, _font(21, bold=True), PANEL)
            brush.text((left, top + head - 12), title, font=_font(21, bold=True), anchor="ls", fill=_INK)
            page.paste(panel.picture, (left, top + head))
            if panel.legend is not None:
                page.paste(panel.legend, (left, top + head + panel.picture.height + 10))
        top += height
    for number, line in enumerate(lines):
        brush.text((gap, top + number * spacing), line, font=font, fill=_INK)
    return page


def _fitted(panel: Panel) -> Panel:
    return panel._replace(picture=_scale(panel.picture.convert("RGB"), panel_size(panel.picture.size)))


def _height(panel: Panel) -> int:
    return panel.picture.height + (0 if panel.legend is None else panel.legend.height + 10)


@lru_cache(maxsize=32)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: more scripts than Pillow's own."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` on one line of at most `width` pixels."""
    text = " ".join(_printable(text).split())[:400]
    while text and font.getlength(text) > width:
        text = text[: -2 if text.endswith("…") else -1].rstrip() + "…"
        if text == "…":
            return ""
    return text


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, without control characters. Spaces within a line stay."""
    lines = []
    for line in text.splitlines():
        current = ""
        for character in _printable(line):
            if current and font.getlength(current + character) > width:
                head, space, tail = current.rpartition(" ")
                lines.append(head if space and head.strip() else current)
                current = tail if space and head.strip() else ""
            current += character
        lines.append(current.rstrip())
    return lines


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
