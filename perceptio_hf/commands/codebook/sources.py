"""What `--data` names: the rendered world, a folder of depth maps, labels, or pictures that a teacher looks at."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from perceptio_hf import DepthVQVAE
    from perceptio_hf.bulk.item import Item
    from perceptio_hf.labelling.teacher import Teacher
    from perceptio_hf.training.codec import DepthSource

Unit = Literal["mm", "m", "m/256", "disparity", "relative"]
_NARROW, _SMALL = 20, 64  # sides of pictures that a teacher's image processor may make nothing of
SCENES = 4000  # of the rendered world, where no number is given
UnitOption = Annotated[Unit | None, typer.Option(help="What the values of the files are.", show_default=False)]
Pattern = Annotated[
    str | None, typer.Option(help='Which files of the folder, such as "*.depth.png".', show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


def depth_source(
    data: str,
    unit: str | None,
    pattern: str | None,
    maps: int | None,
    size: int,
    first_seed: int,
    teacher: "Teacher | None" = None,
    leave_out: Path | None = None,
) -> "DepthSource":
    """The depth maps that a user names.

    Args:
        data: "world" (scenes from `first_seed` on), "world:SEED", a folder of depth maps or one that `perceptio label
            --maps` wrote; with a teacher, pictures as `perceptio label` takes them.
        unit: What the files of a folder hold; needed for a folder, not allowed for the others.
        pattern: Which files of the folder; None takes every depth map.
        maps: The most maps to give; None: all, of the world `SCENES`.
        size: Side of the codec's square.
        leave_out: A folder whose pictures are results, not data.

    Raises:
        ValueError: The source does not exist or is empty, or the unit is missing.
    """
    from perceptio_hf.data.depth_maps import list_depth_folder
    from perceptio_hf.training.codec import FileMaps, TeacherMaps, WorldMaps

    kind, _, start = data.partition(":")
    named = kind == "world" or teacher is not None or os.path.isfile(os.path.join(data, "labels.json"))
    if named and (unit is not None or pattern is not None):
        raise ValueError("--unit and --pattern are for folders of depth maps; the unit of all others is known.")
    if teacher is not None:
        from perceptio_hf.bulk.items import list_items

        return TeacherMaps(_readable(list_items([data], leave_out)[:maps], teacher), teacher, size)
    if kind == "world":
        if start and not start.isdigit():
            raise ValueError(f"--data {data}: after `world:` comes the number of the first scene.")
        return WorldMaps(int(start) if start else first_seed, SCENES if maps is None else maps, size)
    if named:
        return FileMaps(_labelled_maps(Path(data))[:maps], "relative", size)
    paths = list_depth_folder(data, pattern)[:maps]
    return FileMaps(paths, needed_unit(unit), size)


def _readable(items: "list[Item]", teacher: "Teacher") -> "list[Item]":
    """The pictures, after a look at the header of each file: one that is no picture, or too narrow for the teacher,
    would end the training in hours."""
    from PIL import Image

    from perceptio_hf.bulk.engines import readers
    from perceptio_hf.data.lines import SCHEMES

    here = [item for item in items if item.error or (isinstance(item.source, str) and not SCHEMES.match(item.source))]
    with ThreadPoolExecutor(readers()) as pool:
        sizes = list(pool.map(lambda item: item.size(), here))
    wrong = [item.id for item, size in zip(here, sizes, strict=True) if size is None]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(items)} pictures cannot be read, such as {', '.join(wrong[:3])}; remove them, or "
            "let `perceptio label --maps` leave them out and train on what it writes."
        )
    for item, size in zip(here, sizes, strict=True):
        if max(size) >= _NARROW * min(size) or min(size) < _SMALL:
            try:
                teacher.prepare(Image.new("RGB", size))
            except ValueError as error:
                raise ValueError(f"{item.id}: {error}") from None
    return items


def _labelled_maps(folder: Path) -> list[Path]:
    from perceptio_hf.data.published.labels import read_label_metadata
    from perceptio_hf.labelling.labels import read_rows

    if not read_label_metadata(folder)["maps"]:
        raise ValueError(f"{folder} has no maps; run `perceptio label` with --maps, or give pictures and --teacher.")
    return [folder / name for name in read_rows(folder)["depth"]]


def needed_unit(unit: str | None) -> str:
    if unit is None:
        raise ValueError("--unit is needed to read depth files: mm, m, disparity or relative.")
    return unit


def load_codec(folder: Path) -> "DepthVQVAE":
    """A saved depth codec in evaluation mode, alone or as part of a saved Perceptio; errors as `load_depth_codec`."""
    from perceptio_hf.commands.checkpoints import quieten
    from perceptio_hf.conversion.saved_models import load_depth_codec

    quieten()
    return load_depth_codec(folder)


def known(figures: dict[str, Any]) -> dict[str, Any]:
    """Without those that cannot be had: maps without distances have no AbsRel."""
    return {name: value for name, value in figures.items() if value is not None}


def figures_text(figures: dict[str, Any]) -> str:
    lines = [f"{figures['maps']} depth maps"]
    if "absrel" in figures:
        lines.append(f"distance: AbsRel {figures['absrel']:.4f}, delta<1.25 {figures['delta1']:.4f}")
    lines.append(f"relative depth: mean absolute error {figures['relative_mae']:.4f}")
    lines.append(f"codes in use: {figures['codes_used']}, perplexity {figures['perplexity']:.1f}")
    return "\n".join(lines)
