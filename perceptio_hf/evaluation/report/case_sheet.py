"""A sheet of best, worst and random cases, to see what the numbers do not say."""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.evaluation.benchmarks.sample import Sample, Task
from perceptio_hf.evaluation.metrics.answer_statements import LETTERS
from perceptio_hf.evaluation.run.scoring import SCORINGS, Record, referred_mask
from perceptio_hf.visualization import Panel, depth_panel, mask_panel, sheet

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

_WIDTH = 1080  # of one case, pixels
_GAP, _TITLE = 16, 44


def choose_cases(records: Sequence[Record], each: int, seed: int = 0) -> dict[str, list[Record]]:
    """At most `each` of the best, of the worst and of the others, none twice; equally good ones are drawn.

    With few records each group gets its share.
    """
    each = min(each, -(-len(records) // 3))
    shuffled = random.Random(seed).sample(list(records), len(records))
    ranked = sorted(shuffled, key=lambda record: -record["score"])
    best = ranked[:each]
    worst = ranked[each:][::-1][:each]
    taken = {record["id"] for record in (*best, *worst)}
    others = [record for record in shuffled if record["id"] not in taken]
    return {"best": best, "worst": worst, "random": others[:each]}


def draw_cases(
    task: Task,
    cases: Mapping[str, Sequence[Record]],
    samples: Mapping[str, Sample],
    codec: "DepthVQVAE",
) -> Image.Image:
    """One column for each group of cases.

    Args:
        cases: what `choose_cases` gives.
        samples: by id, at least those of the cases.
        codec: decodes the spans that the model wrote.
    """
    columns = [
        _column(name, [_draw_case(task, record, samples[record["id"]], codec) for record in records])
        for name, records in cases.items()
        if records
    ]
    height = max(column.height for column in columns)
    canvas = Image.new("RGB", (len(columns) * (_WIDTH + _GAP) + _GAP, height), "white")
    for index, column in enumerate(columns):
        canvas.paste(column, (_GAP + index * (_WIDTH + _GAP), 0))
    return canvas


def _column(name: str, cases: Sequence[Image.Image]) -> Image.Image:
    scaled = [_fitted(case) for case in cases]
    column = Image.new("RGB", (_WIDTH, _TITLE + sum(case.height + _GAP for case in scaled)), "white")
    font = ImageFont.load_default(size=26)
    ImageDraw.Draw(column).text((4, 6), f"{name} ({len(cases)})", font=font, fill="black")
    top = _TITLE
    for case in scaled:
        column.paste(case, (0, top))
        ImageDraw.Draw(column).rectangle((0, top, _WIDTH - 1, top + case.height - 1), outline=(200, 200, 200))
        top += case.height + _GAP
    return column


def _fitted(case: Image.Image) -> Image.Image:
    """At most `_WIDTH` wide; a case of few pictures stays as it is."""
    factor = min(1.0, _WIDTH / case.width)
    return case.resize((round(case.width * factor), round(case.height * factor)), Image.Resampling.LANCZOS)


def _draw_case(task: Task, record: Record, sample: Sample, codec: "DepthVQVAE") -> Image.Image:
    picture = sample.picture.open()
    panels = [Panel("picture", picture), *_PANELS.get(task, _no_panels)(record, sample, picture)]
    if record["depth_codes"]:
        panels.append(depth_panel(_decoded(codec, record, picture), title="depth as the model wrote it"))
    if task == "depth":
        truth = sample.depth.open()
        panels.append(depth_panel(truth.relative, truth.valid, title="true depth"))
    return sheet(panels, _caption(task, record), columns=min(len(panels), 3))


def _masks(record: Record, sample: Sample, picture: Image.Image) -> list[Panel]:
    found, true = decode_mask(record["mask"]), decode_mask(referred_mask(sample.target))
    return [
        mask_panel(picture, found[None], title="the model's mask"),
        mask_panel(picture, true[None], title="true mask"),
    ]


def _no_panels(record: Record, sample: Sample, picture: Image.Image) -> list[Panel]:
    return []


_PANELS = {"referring_segmentation": _masks}


def _decoded(codec: "DepthVQVAE", record: Record, picture: Image.Image) -> np.ndarray:
    """(height, width) float32 at the picture's size."""
    codes = torch.tensor(record["depth_codes"], device=codec.device)
    with torch.no_grad():
        return codec.decode(codes, size=(picture.height, picture.width)).float().cpu().numpy()


def _caption(task: Task, record: Record) -> str:
    lines = [record["id"], f"Question: {record['question']}", f"Answer: {record['answer'] or '(no words)'}"]
    if SCORINGS[task].choices:
        target = record["target"]
        texts = dict(zip(LETTERS, target.get("texts", ()), strict=False))
        said = record["read"] or "cannot be read"
        lines.append(f"Reads as {_named(said, texts)}; right is {_named(target['answer'], texts)}")
    else:
        lines.append(f"{SCORINGS[task].running.replace('mean ', '')} {record['score']:.2f}")
    return "\n".join(line if len(line) <= 240 else f"{line[:237]}..." for line in lines)


def _named(letter: str, texts: Mapping[str, str]) -> str:
    return f"{letter} ({texts[letter]})" if letter in texts else letter
