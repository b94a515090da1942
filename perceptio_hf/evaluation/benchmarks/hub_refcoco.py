"""RefCOCO, RefCOCO+ and RefCOCOg in the form of the Hub's lmms-lab/RefCOCO, RefCOCOplus and RefCOCOg.

A row is an object: `image`, `answer` (a list of expressions), `segmentation`, and others that are not used. Its
segmentation is one polygon, so an object that something else divides is not the published mask: scores compare with one
another, but with published ones only those of the published files do.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from perceptio_hf.data.formats.coco_masks import segmentation_mask
from perceptio_hf.data.formats.hub_tables import HubTable, open_table, picture_bytes

from .prompts import ask
from .reading import Request
from .sample import PictureSource, Sample

_COLUMNS = ("image", "answer", "segmentation")
_EXAMPLE = "lmms-lab/RefCOCO: question_id, image, question, answer, segmentation, bbox, iscrowd, file_name"


def read_hub_refcoco(request: Request) -> Iterator[Sample]:
    """Every expression as one sample, in order of the rows.

    Raises:
        ValueError: for missing columns or a missing split, and rows that cannot be used.
    """
    table = open_table(request.path, request.split)
    if not len(table):
        raise ValueError(f"{request.path}: the split {request.split!r} is empty.")
    table.check_columns(_COLUMNS, _EXAMPLE)
    for row, cells in enumerate(table.rows([name for name in table.columns if name != "image"])):
        with request.faults.item(table.place(row)):
            yield from _samples(request.name, table, row, cells)


def _samples(benchmark: str, table: HubTable, row: int, cells: dict[str, Any]) -> Iterator[Sample]:
    picture = PictureSource(table.place(row), partial(_picture, table, row))
    width, height = picture.size()
    if cells.get("iscrowd"):
        raise ValueError("it is a crowd, which has no mask of one object.")
    target = {
        "masks": [segmentation_mask(cells["segmentation"], height, width)],
        "no_target": False,
        "size": [height, width],
    }
    expressions = [cells["answer"]] if isinstance(cells["answer"], str) else cells["answer"]
    if not expressions:
        raise ValueError("it has no expression in `answer`.")
    for number, expression in enumerate(expressions):
        question = ask(benchmark, expression=str(expression).strip())
        yield Sample(f"{cells.get('question_id', row)}-{row}-{number}", picture, question, target)


def _picture(table: HubTable, row: int) -> bytes:
    return picture_bytes(table.cell(row, "image"), table.place(row))
