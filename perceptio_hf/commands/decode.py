"""`perceptio decode`: masks and depth of answers that another engine gave."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checkpoints import Device, DType
from .predict import check_out, name_folders, write_answer

if TYPE_CHECKING:
    from PIL import Image

    from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor
    from perceptio_hf.evaluation.run.engine_answers import EngineAnswer, Refused

RESULTS = "answers.jsonl"


def decode(
    answers: Annotated[
        Path,
        typer.Argument(
            metavar="ANSWERS.jsonl", help="What the engine returned, one answer per line.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of the checkpoint that was exported. Default: the embedded tiny one.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results, one folder per picture in it.")] = Path(
        "perceptio-out"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that go through the model together.")] = 4,
    device: Device = None,
    dtype: DType = "auto",
) -> None:
    """Read ANSWERS.jsonl, what an engine wrote about pictures, and write masks and depth as `perceptio predict` does.

    A line is {"picture": "a.jpg", "question": "...", "token_ids": [...]}, or with "text" instead of ids, the tokens in
    it; several pictures of one prompt are "pictures": ["a.jpg", "b.jpg"]. Nothing is generated: one forward pass reads
    each answer. OUT/answers.jsonl has a line for each picture. Lines that cannot be used are listed there and on
    standard error, with "error", as are answers with broken spans, with "well_formed": false; the others go on.
    """
    check_out(out)
    if not answers.is_file():
        raise ValueError(f"There is no file {answers}; name the answers, one JSON object per line.")

    from perceptio_hf.evaluation.run.engine_answers import AnswerReader, Refused
    from perceptio_hf.files import replacing

    from . import checkpoints

    name = checkpoints.resolve(model)
    if device is not None:
        checkpoints.check_device(device)
    note = checkpoints.TINY_NOTE if checkpoints.is_tiny(name) else None
    loaded = checkpoints.load(name, device, dtype)
    with open(answers, "rb") as lines:
        rows = AnswerReader(*loaded, answers.parent).read(lines)
    if all(isinstance(row, Refused) for row in rows):
        raise ValueError(
            f"{answers} has no answer that can be used" + (f"; line {rows[0].line}: {rows[0].reason}" if rows else ".")
        )
    about = {"model": "tiny" if note else name, "note": note}
    records = []
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / RESULTS) as temporary, open(temporary, "w", encoding="utf-8") as results:
        for record in _decoded(loaded, rows, about, out, batch_size):
            print(json.dumps(record, ensure_ascii=False), file=results)
            if as_json:
                records.append(record)
            _report(answers, record, quiet=as_json)
    if as_json:
        print(json.dumps({"answers": records}, indent=2, ensure_ascii=False))
    elif note:
        print(note)


def _decoded(
    loaded: "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]",
    rows: "Sequence[EngineAnswer | Refused]",
    about: dict,
    out: Path,
    batch_size: int,
) -> Iterator[dict]:
    """Decode and write batch by batch: a record for each picture, or for each line that cannot be used."""
    from perceptio_hf.evaluation.run.engine_answers import EngineAnswer, Refused

    usable = [row for row in rows if isinstance(row, EngineAnswer)]
    names = iter(name_folders([path for row in usable for path in row.pictures], out))
    folders = {row.line: [next(names) for _ in row.pictures] for row in usable}
    for start in range(0, len(rows), batch_size):
        for row, pictures, answer in _answered(loaded, [_open(row) for row in rows[start : start + batch_size]]):
            if isinstance(row, Refused):
                yield {"line": row.line, "error": row.reason, **about}
                continue
            parts = zip(row.pictures, folders[row.line], pictures, answer.pictures, strict=True)
            for path, folder, picture, geometry in parts:
                said = {"line": row.line, "picture": path, "question": row.question, **about}
                yield write_answer(folder, picture, replace(answer, pictures=(geometry,)), said)


def _answered(
    loaded: tuple, opened: "Sequence[tuple[EngineAnswer | Refused, Sequence[Image.Image]]]"
) -> Iterator[tuple]:
    """(row, its pictures, its answer) of a batch; where the batch cannot be decoded, the row is found that cannot."""
    from perceptio_hf.evaluation.run.engine_answers import EngineAnswer, Refused, decode_answers

    batch = [(row, pictures) for row, pictures in opened if isinstance(row, EngineAnswer)]
    try:
        decoded = iter(decode_answers(*loaded, *zip(*batch, strict=True)) if batch else ())
    except ValueError as error:
        for row, pictures in opened:
            if isinstance(row, Refused):
                yield row, (), None
            elif len(batch) == 1:
                yield Refused(row.line, str(error)), (), None
            else:
                yield from _answered(loaded, [(row, pictures)])
        return
    for row, pictures in opened:
        yield row, pictures, (next(decoded) if isinstance(row, EngineAnswer) else None)


def _open(row: "EngineAnswer | Refused") -> tuple:
    """The row with its pictures; one whose pictures cannot be read is refused."""
    from perceptio_hf.evaluation.run.engine_answers import EngineAnswer, Refused
    from perceptio_hf.processing.pictures import load_picture

    if not isinstance(row, EngineAnswer):
        return row, ()
    try:
        return row, [load_picture(path) for path in row.pictures]
    except ValueError as error:
        return Refused(row.line, str(error)), ()


def _report(answers: Path, record: dict, *, quiet: bool) -> None:
    """One line on standard output for what was decoded, one on standard error for what is wrong with it."""
    place = f"{answers}, line {record['line']}"
    if "error" in record:
        print(f"{place}: {record['error']}", file=sys.stderr)
        return
    if not record["well_formed"]:
        print(f"{place}: the answer holds a broken depth span, which has no depth map.", file=sys.stderr)
    if not quiet:
        masks, depth = len(record["masks"]), "depth" if record["depth_codes"] else "no depth"
        what = f"{masks} mask{'' if masks == 1 else 's'}, {depth}"
        print(f"{record['picture']}: {record['text'] or '(no words)'}")
        print(f"    {what}; written to {Path(record['files']['answer']).parent}")
