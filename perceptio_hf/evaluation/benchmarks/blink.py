"""BLINK's relative depth (Fu et al. 2024, "BLINK: Multimodal Large Language Models Can See but Not Perceive").

Rows of the Hub's BLINK-Benchmark/BLINK, Relative_Depth: `idx`, `image_1`, `prompt`, `choices`, `answer` such as "(A)".
The answers of its test split are not public.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from perceptio_hf.data.formats.hub_tables import HubTable, open_table, picture_bytes
from perceptio_hf.evaluation.metrics.answer_parsing import reference_letter
from perceptio_hf.evaluation.metrics.answer_statements import LETTERS

from .prompts import ask
from .reading import Request
from .registration import Prompt, benchmark
from .sample import PictureSource, Sample

_COLUMNS = ("idx", "image_1", "prompt", "choices", "answer")


@benchmark(
    "blink-depth",
    "BLINK's relative depth: which of two marked points is closer",
    files="BLINK's folder Relative_Depth with .parquet files, or a Hub data set on disk",
    prompt=Prompt("{question}", "BLINK's field `prompt`: question and choices"),
    hub=("BLINK-Benchmark/BLINK", "BLINK, relative depth"),
    task="relative_depth",
    spatial="depth",
    splits=("val",),
)
def read_blink_depth(request: Request) -> Iterator[Sample]:
    """One sample for each row.

    Raises:
        ValueError: for missing columns or a missing split, and rows that cannot be used.
    """
    path = request.path
    table = open_table(path / "Relative_Depth" if (path / "Relative_Depth").is_dir() else path, request.split)
    if not len(table):
        raise ValueError(f"{path}: the split {request.split!r} is empty.")
    table.check_columns(_COLUMNS, "BLINK-Benchmark/BLINK, Relative_Depth")
    for row, cells in enumerate(table.rows([name for name in _COLUMNS if name != "image_1"])):
        with request.faults.item(f"{table.place(row)} ({cells['idx']})"):
            target = _target(cells)
            picture = PictureSource(table.place(row), partial(_picture, table, row))
            yield Sample(str(cells["idx"]), picture, ask(request.name, question=cells["prompt"]), target)


def _target(cells: dict[str, Any]) -> dict[str, Any]:
    if cells["answer"] == "(hidden)":
        raise ValueError("its answer is hidden: BLINK's test split is scored by its authors; take the split val.")
    points = len(cells["choices"])
    return {
        "answer": reference_letter(cells["answer"], points),
        "choices": list(LETTERS[:points]),
        "points": points,
    }


def _picture(table: HubTable, row: int) -> bytes:
    return picture_bytes(table.cell(row, "image_1"), table.place(row))
