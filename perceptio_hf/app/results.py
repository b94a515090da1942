"""Answers as the page shows them and as files to keep."""

import base64
import html
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from perceptio_hf.data.depth_maps import write_depth_png
from perceptio_hf.evaluation.run.answering import describe
from perceptio_hf.files import write_json
from perceptio_hf.processing.processing_perceptio import SpatialAnswer
from perceptio_hf.processing.streaming import DepthRowEvent, MaskEvent, SpatialEvent, TextEvent
from perceptio_hf.visualization import confidence_veil, mask_colors, mask_layer, middle_of, scale_mask

SHOWN = 1024  # the longest side of a picture on the page, pixels
_FINE = 768  # smaller pictures get masks of this size
_DEPTH_SHOWN = 512
_STEP = re.compile(r"\bp\d\d d\d\d\b")  # of an answer that looks nearness up, see perceptio_hf.world.cells


def write_files(answer: SpatialAnswer, folder: Path) -> dict[str, str | None]:
    """Files of an answer: `masks` (a PNG, several of them in a ZIP), `lengths` (COCO run lengths), `depth` (16 bit)."""
    files: dict[str, str | None] = {"masks": None, "lengths": None, "depth": None}
    if len(answer.masks):
        pictures = [_png(Image.fromarray(mask)) for mask in answer.masks]
        path = folder / ("mask.png" if len(pictures) == 1 else "masks.zip")
        if len(pictures) == 1:
            path.write_bytes(pictures[0])
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for number, data in enumerate(pictures, 1):
                    archive.writestr(f"mask-{number}.png", data)
        write_json(
            folder / "masks.json", {name: describe(answer)[name] for name in ("masks", "phrases", "mask_scores")}
        )
        files |= {"masks": str(path), "lengths": str(folder / "masks.json")}
    if answer.depth is not None:
        write_depth_png(folder / "depth.png", answer.depth)
        files["depth"] = str(folder / "depth.png")
    return files


def show_picture(picture: Image.Image) -> str:
    """A data URL of the picture as large as the page shows it."""
    shown = picture.copy()
    shown.thumbnail((SHOWN, SHOWN))
    data = io.BytesIO()
    shown.save(data, "JPEG", quality=92)
    return _url(data.getvalue(), "jpeg")


def show_masks(answer: SpatialAnswer) -> list[dict]:
    """For each mask its layer, where its number stands (shares of width and height), colour, phrase and score."""
    colors = mask_colors(len(answer.masks))
    shown = []
    for mask, phrase, score, color in zip(answer.masks, answer.phrases, answer.mask_scores, colors, strict=True):
        small = scale_mask(mask, _shown_size(mask.shape[::-1]))
        place = (middle_of(small) / small.shape[::-1]).tolist() if small.any() else None
        shown.append(
            {
                "url": _url(_png(mask_layer(small, color))),
                "at": place,
                "color": "#" + bytes(color).hex(),
                "phrase": phrase,
                "score": round(float(score), 2),
            }
        )
    return shown


def show_depth(depth: np.ndarray, rows: int = 1, of: int = 1) -> dict:
    """Depth as grey values that the page colours and reads, and the share of it that is written."""
    grey = Image.fromarray(np.round(np.clip(depth, 0, 1) * 255).astype(np.uint8))
    grey.thumbnail((_DEPTH_SHOWN, _DEPTH_SHOWN))
    return {"url": _url(_png(grey)), "rows": rows, "of": of}


def show_veil(confidence: np.ndarray) -> str:
    """What lies over depth where the model was unsure."""
    step = max(1, max(confidence.shape) // 128)
    return _url(_png(confidence_veil(confidence[::step, ::step])))


def show_words(question: str | None, words: str, writing: bool = False) -> str:
    """Question and answer as HTML, words of users and models escaped; without a question the page's own words."""
    if question is None:
        return f'<div class="pp-answer"><p class="pp-faint">{html.escape(words)}</p></div>'
    steps, _, last = words.rpartition(":")
    looked_up = bool(_STEP.search(steps) and last.strip())
    said = html.escape(last.strip() if looked_up else words)
    if not said and not writing:
        said = '<span class="pp-faint">(no words)</span>'
    caret = '<span class="pp-caret"></span>' if writing else ""
    aside = (
        f'<p class="pp-aside">{html.escape(steps)}<br><span class="pp-faint">p27: a cell of the depth grid; d21: the '
        "nearness read there, d31 = nearest</span></p>"
    )
    return (
        f'<div class="pp-answer" aria-live="polite"><p class="pp-asked">{html.escape(question)}</p>'
        f'<p class="pp-said">{said}{caret}</p>{aside if looked_up else ""}</div>'
    )


def show_written(events: Sequence[SpatialEvent]) -> str:
    """What the model wrote, in its order, as HTML: words, [SEG] with its colour, depth spans folded."""
    parts, span = [], []
    masks = [event for event in events if isinstance(event, MaskEvent)]
    colors = mask_colors(len(masks))
    for event in events:
        if isinstance(event, DepthRowEvent):
            if event.row == 0 and span:
                parts.append(_folded(span))
                span = []
            span.append(event)
            continue
        if span:
            parts.append(_folded(span))
            span = []
        if isinstance(event, TextEvent):
            parts.append(html.escape(event.text))
        elif isinstance(event, MaskEvent):
            color = "#" + bytes(colors[event.number]).hex()
            parts.append(f'<span class="pp-token" style="--of:{color}">[SEG]</span> ')
    if span:
        parts.append(_folded(span))
    return f'<div class="pp-written">{"".join(parts)}</div>'


def _folded(span: Sequence[DepthRowEvent]) -> str:
    count, of = sum(len(row.codes) for row in span), span[0].rows ** 2
    cells = "".join(f"<span>{code}</span>" for row in span for code in row.codes)
    grid = f'<div class="pp-codes" style="--rows:{span[0].rows}">{cells}</div>'
    return f"<details><summary>depth span: {count} of {of} codes</summary>{grid}</details>"


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in which masks are drawn for a picture of this size: fine lines, also on small pictures."""
    factor = min(max(1.0, _FINE / max(size)), SHOWN / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def _url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
