"""`perceptio predict`: questions about one picture, a few, or many."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import unquote, urlsplit

import typer

from .checkpoints import Device, DType, Model

if TYPE_CHECKING:
    from PIL import Image

    from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor, SpatialAnswer
    from perceptio_hf.bulk.engines import Engine
    from perceptio_hf.bulk.item import Item
    from perceptio_hf.evaluation.run.predictions import Load

LoadIn = Literal["4bit", "8bit"]
EngineName = Literal["local", "ray"]
Spatial = Literal["auto", "none", "seg", "depth", "seg+depth"]
Address = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster: auto, HOST:PORT. Default: Ray on this machine.", show_default=False),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Of Ray. Default: one for each GPU, without GPUs one.", show_default=False)
]
_LONGEST_NAME = 60  # characters that an address gives to a folder; file systems allow 255 bytes


def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar='PICTURE... "QUESTION"',
            help="One or more pictures, and last the question. Many: a folder, a pattern, a saved data set, or a "
            ".jsonl file of {picture, question}, which needs no QUESTION.",
            show_default=False,
        ),
    ],
    model: Model = None,
    spatial: Annotated[
        Spatial, typer.Option(help="Which spatial tokens to force; auto lets the model decide, none forbids them.")
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results, one folder per picture in it.")] = Path(
        "perceptio-out"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest answer in tokens, spatial ones included. Default: the model's own.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that go through the model together.")] = 4,
    device: Device = None,
    dtype: DType = "auto",
    load_in: Annotated[
        LoadIn | None, typer.Option(help="Shrink the language model to 4 or 8 bits (bitsandbytes).", show_default=False)
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="What works on many pictures: this process, or workers of Ray.")
    ] = "local",
    address: Address = None,
    workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Many pictures: replace results of another model, question or setting.")
    ] = False,
) -> None:
    """Ask the same QUESTION about every PICTURE, a file or a web address; write masks, depth and the answer for each.

    Each picture gets a folder OUT/NAME with sheet.png (masks and depth with their legends, and the words), overlay.png
    (the picture under its masks) and answer.json. Where the model wrote depth there are also depth.png (16 bit, 65535 =
    nearest) and depth_color.png.

    Many pictures get one line each in OUT/results.jsonl, with masks as COCO run lengths, and OUT/depth. A run that was
    stopped goes on where it was; what cannot be answered is listed in OUT/failures.jsonl.
    """
    many, (pictures, question) = _is_many(words, engine), _split(words)
    for argument in (*words, str(out), model or ""):
        _check_utf8(argument)
    if not many:
        check_pictures(pictures)
    check_out(out)

    from perceptio_hf.bulk.engines import open_engine
    from perceptio_hf.bulk.items import list_items

    from . import checkpoints

    name, opened = checkpoints.resolve(model), open_engine(engine, address, workers, device)
    if device is not None and engine == "local":
        checkpoints.check_device(device)
    note = checkpoints.TINY_NOTE if checkpoints.is_tiny(name) else None
    load = partial(checkpoints.load, os.path.abspath(name) if os.path.isdir(name) else name, device, dtype, load_in)
    if many:
        _check_apart(out, pictures)
        claim = {"model": checkpoints.fingerprint(name), "dtype": dtype, "load_in": load_in}
        items = list_items(pictures, out)
        summary = _predict_many(
            items, question, out, opened, load, claim, spatial, batch_size, max_new_tokens, overwrite
        )
        _print_summary(summary, note, as_json)
        return
    about = {"question": question, "spatial": spatial, "model": "tiny" if note else name, "note": note}
    records = []
    loaded = load()
    for record in _predictions(loaded, pictures, about, out, max_new_tokens, batch_size):
        records.append(record)
        if not as_json:
            _print_answer(record)
    if as_json:
        print(json.dumps({"answers": records}, indent=2, ensure_ascii=False))
    elif note:
        print(note)


def _is_many(words: Sequence[str], engine: str) -> bool:
    """Whether results go into one file of lines. The last word is a question, which may hold a "?", or a collection."""
    from perceptio_hf.bulk.items import LINES_SUFFIX, is_collection

    last = os.path.isdir(words[-1]) or words[-1].lower().endswith(LINES_SUFFIX)
    return last or engine != "local" or any(is_collection(word) for word in words[:-1])


def _split(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The positional arguments -> pictures, and the question, if there is one: lists have questions of their own."""
    from perceptio_hf.bulk.items import LINES_SUFFIX, PICTURE_SUFFIXES

    *pictures, question = words
    if os.path.isdir(question) or question.lower().endswith(LINES_SUFFIX):
        return list(words), None
    if os.path.exists(question) or (" " not in question and question.lower().endswith(PICTURE_SUFFIXES)):
        raise ValueError(f"The last argument is the question, but {question} names a file; add the question after it.")
    if not pictures:
        raise ValueError('Give a picture and a question: perceptio predict photo.jpg "Which object is closest?"')
    if not question.strip():
        raise ValueError("The question is empty; ask something about the picture.")
    return pictures, question


def _check_utf8(argument: str) -> None:
    """JSON, and so every answer, is UTF-8, while a file's name may be any bytes.

    Raises:
        ValueError: for an argument that is not UTF-8.
    """
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        shown = argument.encode("utf-8", "backslashreplace").decode()
        raise ValueError(f"{shown} is not UTF-8, so it cannot be written into an answer; rename it.") from None


def check_pictures(paths: Sequence[str]) -> None:
    """Decode every picture once, so that a damaged one stops the run before hours of work, not after.

    Raises:
        ValueError: names the first picture that cannot be read.
    """
    from perceptio_hf.processing.pictures import load_picture

    for path in paths:
        load_picture(path)


def check_out(out: Path) -> None:
    """Raises ValueError where results could not be written to `out`. Makes nothing yet."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"--out {out}: {existing} is a file; name a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {existing} may not be written; name another folder.")


def name_folders(paths: Sequence[str], out: Path) -> list[Path]:
    """One folder per picture: its name without the ending, numbered where two would be the same: cat, cat-2, cat-3.

    Dots and spaces around a name go: they would hide the folder or lead elsewhere. A name of nothing else, or data
    without a name, gives "picture".
    """
    taken: set[str] = set()
    folders = []
    for stem in map(_stem, paths):
        name, number = stem, 1
        while name.casefold() in taken:  # some file systems do not tell Cat from cat
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        folders.append(out / name)
    return folders


def _stem(source: str) -> str:
    """The name of a file or web address without folders and ending, fit to name a folder."""
    if source.lower().startswith("data:"):
        return "picture"
    if "://" in source:
        source = unquote(urlsplit(source).path)[-_LONGEST_NAME:]
    return Path(source).stem.strip(". ") or "picture"


def _predictions(
    loaded: "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]",
    paths: Sequence[str],
    about: dict,
    out: Path,
    max_new_tokens: int | None,
    batch_size: int,
) -> Iterator[dict]:
    """Answer and write batch by batch; yields what each answer.json holds. A progress bar where it takes long."""
    from perceptio_hf.bulk.progress import tracked
    from perceptio_hf.processing.pictures import load_picture

    folders = name_folders(paths, out)
    for start in tracked(range(0, len(paths), batch_size), "answering"):
        part = slice(start, start + batch_size)
        pictures = [load_picture(path) for path in paths[part]]
        questions = [about["question"]] * len(pictures)
        answers = answer_questions(
            *loaded, pictures, questions, spatial=about["spatial"], max_new_tokens=max_new_tokens
        )
        for path, folder, picture, answer in zip(paths[part], folders[part], pictures, answers, strict=True):
            yield write_answer(folder, picture, answer, {"picture": path, **about})


def _predict_many(
    items: "list[Item]",
    question: str | None,
    out: Path,
    engine: "Engine",
    load: "Load",
    claim: dict,
    spatial: Spatial,
    batch_size: int,
    max_new_tokens: int | None,
    overwrite: bool,
) -> dict:
    """Answer into OUT/results.jsonl; returns how many were answered and failed, and where that is written."""
    from perceptio_hf.bulk.engines import LocalEngine
    from perceptio_hf.bulk.progress import progress
    from perceptio_hf.evaluation.run import predictions
    from perceptio_hf.files import in_use

    from . import checkpoints

    if question is None and not any(str(item.question).strip() for item in items):
        raise ValueError("Nothing is asked: add a question as the last word, or `question` to the lines of the list.")
    asked = predictions.ask_of_all(items, question, spatial)
    with in_use(out, "perceptio predict"):
        if isinstance(engine, LocalEngine):
            loaded = load()
            processor, load = loaded[1], lambda: loaded
        else:
            processor = checkpoints.load_processor(load.args[0])
        with progress("pictures") as watch:
            tally = predictions.predict_items(
                asked,
                out,
                engine,
                load,
                processor,
                claim=claim,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                overwrite=overwrite,
                watch=lambda done, total: watch("answering", done, total, ""),
            )
    if not tally.answered:
        raise ValueError(f"no picture was answered; {out / predictions.FAILURES_FILE} says why of each.")
    files = {"results": str(out / predictions.RESULTS_FILE)}
    if tally.failed:
        files["failures"] = str(out / predictions.FAILURES_FILE)
    return {**vars(tally), "files": files}


def _check_apart(out: Path, pictures: Sequence[str]) -> None:
    """Raises ValueError where a list that is read would be taken for old results."""
    from perceptio_hf.evaluation.run.predictions import FAILURES_FILE, RESULTS_FILE

    old = {os.path.realpath(out / name) for name in (RESULTS_FILE, FAILURES_FILE)}
    lost = [word for word in pictures if os.path.realpath(word) in old]
    if lost:
        raise ValueError(f"--out {out}: {lost[0]} is there, and results would replace it; name another folder.")


def answer_questions(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    pictures: "Sequence[Image.Image]",
    questions: Sequence[str],
    *,
    spatial: Spatial = "auto",
    max_new_tokens: int | None = None,
) -> "list[SpatialAnswer]":
    """One question about each picture, as one batch; greedy.

    Raises:
        ValueError: for an empty question, or where `max_new_tokens` is too small for the spans `spatial` forces.
    """
    from perceptio_hf.evaluation.run.answering import encode_questions

    inputs = encode_questions(processor, pictures, questions).to(model.device)
    settings = {"do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": True}
    settings |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    outputs = model.generate(**inputs, spatial=spatial, **settings)
    return processor.post_process_spatial(outputs)


def write_answer(folder: Path, picture: "Image.Image", answer: "SpatialAnswer", about: dict) -> dict:
    """Write overlay.png, sheet.png, answer.json and the depth files, if any, into `folder`; each whole or not at all.

    Depth files of an earlier run go away where this answer has no depth: they would belong to nothing.

    Args:
        about: what to record beside the answer: picture, question, model and so on.

    Returns:
        What answer.json holds.
    """
    from perceptio_hf.data.depth_maps import write_depth_png
    from perceptio_hf.evaluation.run.answering import describe
    from perceptio_hf.files import write_json, write_picture
    from perceptio_hf.visualization import answer_panels, colorize_depth, overlay, sheet

    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "overlay": folder / "overlay.png",
        "sheet": folder / "sheet.png",
        "depth": folder / "depth.png",
        "depth_color": folder / "depth_color.png",
    }
    write_picture(files["overlay"], overlay(picture, answer.masks))
    panels = answer_panels(picture, answer.masks, answer.phrases, answer.mask_scores, answer.depth)
    caption = f"Question: {about.get('question', '')}\nAnswer:   {answer.text or '(no words)'}"
    write_picture(files["sheet"], sheet(panels, caption))
    if answer.depth is not None:
        write_depth_png(files["depth"], answer.depth)
        write_picture(files["depth_color"], colorize_depth(answer.depth))
    else:
        for stale in (files.pop("depth"), files.pop("depth_color")):
            stale.unlink(missing_ok=True)
    names = {name: str(path) for name, path in files.items()} | {"answer": str(folder / "answer.json")}
    record = {**about, "width": picture.width, "height": picture.height, **describe(answer), "files": names}
    write_json(folder / "answer.json", record)
    return record


def _print_answer(record: dict) -> None:
    masks, named = len(record["masks"]), [phrase for phrase in record["phrases"] if phrase]
    of_what = f" ({'; '.join(named)})" if named else ""
    parts = [f"{masks} mask{'' if masks == 1 else 's'}{of_what}", "depth" if record["depth_codes"] else "no depth"]
    print(f"{record['picture']}: {record['text'] or '(no words)'}")
    print(f"    {', '.join(parts)}; written to {Path(record['files']['answer']).parent}")


def _print_summary(summary: dict, note: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    print(f"{summary['answered']:,} pictures answered; written to {summary['files']['results']}")
    if summary["failed"]:
        print(f"{summary['failed']:,} failed; listed with the reasons in {summary['files']['failures']}")
    if note:
        print(note)
