"""`perceptio predict`: one question about one or more pictures."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from PIL import Image

    from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor, SpatialAnswer

Spatial = Literal["auto", "none", "seg", "depth", "seg+depth"]
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar='PICTURE... "QUESTION"', help="One or more pictures, and last the question.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of a checkpoint. Default: the embedded tiny one.", show_default=False),
    ] = None,
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
) -> None:
    """Ask the same QUESTION about every PICTURE; write masks, depth and the answer for each.

    Each picture gets a folder OUT/<its name> with overlay.png (the picture under its masks), answer.json, and where the
    model wrote depth, depth.png (16 bit, 65535 = nearest) and depth_color.png.
    """
    paths, question = _split(words)
    check_pictures(paths)
    check_out(out)

    from perceptio_hf.commands import checkpoints

    name = checkpoints.resolve(model)
    loaded = checkpoints.load(name)
    tiny = checkpoints.is_tiny(name)
    common = {
        "question": question,
        "spatial": spatial,
        "model": "tiny" if tiny else name,
        "note": checkpoints.TINY_NOTE if tiny else None,
    }
    folders = name_folders(paths, out)
    records = []
    for batch, answers in _answers(*loaded, paths, question, spatial, max_new_tokens, batch_size):
        for (path, picture), answer in zip(batch, answers, strict=True):
            folder = folders[len(records)]
            records.append(write_answer(folder, picture, answer, {"picture": str(path), **common}))
            if not as_json:
                _print_answer(records[-1])
    if as_json:
        print(json.dumps({"answers": records}, indent=2, ensure_ascii=False))
    elif tiny:
        print(checkpoints.TINY_NOTE)


def _split(words: Sequence[str]) -> tuple[list[Path], str]:
    """The positional arguments -> pictures and question."""
    *pictures, question = words
    if os.path.exists(question):
        raise ValueError(
            f"The last argument must be the question, but {question} is a file; add the question after it."
        )
    if not pictures:
        raise ValueError('Give a picture and a question: perceptio predict photo.jpg "Which object is closest?"')
    if not question.strip():
        raise ValueError("The question is empty; ask something about the picture.")
    return [Path(picture) for picture in pictures], question


def check_pictures(paths: Sequence[Path]) -> None:
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


def name_folders(paths: Sequence[Path], out: Path) -> list[Path]:
    """One folder per picture: its name without the ending, numbered where two would be the same: cat, cat-2, cat-3."""
    taken: set[str] = set()
    folders = []
    for path in paths:
        name, number = path.stem, 1
        while name.casefold() in taken:  # some file systems do not tell Cat from cat
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.casefold())
        folders.append(out / name)
    return folders


def _answers(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    paths: Sequence[Path],
    question: str,
    spatial: str,
    max_new_tokens: int | None,
    batch_size: int,
) -> "Iterator[tuple[list[tuple[Path, Image.Image]], list[SpatialAnswer]]]":
    """Batches of (path, picture), each with its answers; a progress bar where there are several."""
    from rich.console import Console
    from rich.progress import track

    from perceptio_hf.processing.pictures import load_picture

    starts = range(0, len(paths), batch_size)
    console = Console(file=sys.stderr)
    quiet = len(starts) == 1 or not console.is_terminal
    for start in track(starts, "Answering", console=console, disable=quiet, transient=True):
        batch = [(path, load_picture(path)) for path in paths[start : start + batch_size]]
        pictures = [picture for _, picture in batch]
        yield (
            batch,
            answer_questions(
                model, processor, pictures, [question] * len(pictures), spatial=spatial, max_new_tokens=max_new_tokens
            ),
        )


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
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for picture, question in zip(pictures, questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    ).to(model.device)
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    outputs = model.generate(**inputs, spatial=spatial, do_sample=False, return_dict_in_generate=True, **limit)
    return processor.post_process_spatial(outputs)


def describe(answer: "SpatialAnswer") -> dict:
    """What an answer says, for JSON: words, masks as COCO run lengths, depth as its codes."""
    from perceptio_hf.run_length import encode_mask

    return {
        "text": answer.text,
        "masks": [encode_mask(mask) for mask in answer.masks],
        "mask_scores": [round(float(score), 4) for score in answer.mask_scores],
        "depth_codes": answer.depth_codes,
        "well_formed": answer.well_formed,
    }


def write_answer(folder: Path, picture: "Image.Image", answer: "SpatialAnswer", about: dict) -> dict:
    """Write overlay.png, answer.json and the depth files, if any, into `folder`; each appears complete or not at all.

    Depth files of an earlier run go away where this answer has no depth: they would belong to nothing.

    Args:
        about: what to record beside the answer: picture, question, model and so on.

    Returns:
        What answer.json holds.
    """
    from perceptio_hf.data.depth_maps import write_depth_png
    from perceptio_hf.files import write_json, write_picture
    from perceptio_hf.visualization import colorize_depth, overlay

    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "overlay": folder / "overlay.png",
        "depth": folder / "depth.png",
        "depth_color": folder / "depth_color.png",
    }
    write_picture(files["overlay"], overlay(picture, answer.masks))
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
    masks = len(record["masks"])
    parts = [f"{masks} mask{'' if masks == 1 else 's'}", "depth" if record["depth_codes"] else "no depth"]
    print(f"{record['picture']}: {record['text'] or '(no words)'}")
    print(f"    {', '.join(parts)}; written to {Path(record['files']['answer']).parent}")
