"""`perceptio codebook`: train, evaluate and use a depth codec."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import numpy as np

    from perceptio_hf import DepthVQVAE
    from perceptio_hf.data.depth_maps import DepthMap

Unit = Literal["mm", "m", "disparity", "relative"]
SHOWN_MAPS = 256  # of the training maps, whose figures are shown at the end
DEFAULTS = {"data": "world", "maps": 4000, "seed": 0, "unit": None, "pattern": None, "steps": None, "minutes": None}

Codec = Annotated[
    Path,
    typer.Argument(
        metavar="CODEC", help="Folder of a depth codec, or of a checkpoint that has one.", show_default=False
    ),
]
UnitOption = Annotated[Unit | None, typer.Option(help="What the values of the files are.", show_default=False)]
Pattern = Annotated[
    str | None, typer.Option(help='Which files of the folder, such as "*.depth.png".', show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

app = typer.Typer(
    help="Train, evaluate and use a depth codec, which writes a depth map as a short sequence of codes.",
    no_args_is_help=True,
)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder to make for the codec.", show_default=False)],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with these options, `codec` and `options`, or the name of one that comes with the package, "
            "codebook_tiny. What is given here wins."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="world, world:SEED or a folder of depth maps. Default: world.")
    ] = None,
    unit: UnitOption = None,
    pattern: Pattern = None,
    maps: Annotated[int | None, typer.Option(min=1, help="Most depth maps to keep in memory. Default: 4000.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps to train.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to train, instead of --steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights and batches. Default: 0.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the codec that is in OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a depth codec from scratch and save it in OUT."""
    from perceptio_hf.files import check_new_folder, new_folder, write_json

    given = {"data": data, "unit": unit, "pattern": pattern, "maps": maps, "steps": steps, "minutes": minutes}
    settings = read_settings(config, given | {"seed": seed})
    check_new_folder(out, overwrite)

    from perceptio_hf import DepthVQVAEConfig
    from perceptio_hf.evaluation.metrics.depth import codec_metrics
    from perceptio_hf.training.codec import CodebookOptions, DepthBank, train_codebook

    from .checkpoints import quieten

    codec_config = _build(DepthVQVAEConfig, settings["codec"], "codec")
    options = _build(CodebookOptions, settings["options"], "options")
    source = [settings[key] for key in ("data", "unit", "pattern", "maps")]
    distances: list[np.ndarray | None] = []
    maps = depth_source(*source, codec_config.image_size, first_seed=0)
    bank = DepthBank.gather(_noting_distances(maps, codec_config.image_size, distances), codec_config)
    limits = {key: settings[key] for key in ("steps", "minutes", "seed")}
    with _bar("training", 1.0) as move:
        try:
            codec = train_codebook(codec_config, bank, options=options, progress=move, **limits)
        except RuntimeError as error:
            if not str(error).startswith("The loss is"):
                raise
            raise ValueError(f"{error} (options: learning_rate in --config)") from None
    shown = zip(bank.head(len(distances)), distances, strict=True)
    trained_on = _known(codec_metrics(codec, (replace(item, metric=metric) for item, metric in shown)))
    record = {"settings": settings, "parameters": codec.num_parameters(), "on_training_maps": trained_on}
    quieten()
    with new_folder(out, overwrite) as folder:
        codec.save_pretrained(folder)
        write_json(folder / "codec.json", record)
    print(json.dumps({"codec": str(out), **record}, indent=2) if as_json else f"{_figures(trained_on)}\nCodec: {out}")


@app.command("eval")
def evaluate(
    codec: Codec,
    data: Annotated[
        str, typer.Option(help="world (scenes no training saw), world:SEED or a folder of depth maps.")
    ] = "world",
    unit: UnitOption = None,
    pattern: Pattern = None,
    maps: Annotated[int, typer.Option(min=1, help="Most depth maps to use.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Measure how well depth maps survive being written as codes."""
    model = load_codec(codec)

    from perceptio_hf.evaluation.metrics.depth import codec_metrics
    from perceptio_hf.world import HELD_OUT_SEED

    source = depth_source(data, unit, pattern, maps, model.config.image_size, first_seed=HELD_OUT_SEED)
    figures = _known(codec_metrics(model, source))
    print(json.dumps(figures, indent=2) if as_json else _figures(figures))


@app.command()
def encode(
    codec: Codec,
    files: Annotated[list[Path], typer.Argument(help="Depth maps: .png, .tif, .npy, .npz.", show_default=False)],
    unit: UnitOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for codes.json and what the codes decode to, as 16-bit PNG.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write depth maps as codes."""
    import torch

    from perceptio_hf.data.depth_maps import read_depth, write_depth_png
    from perceptio_hf.files import write_json

    unit = _needed_unit(unit)
    names = _distinct_names(files)
    _check_apart(files, out)
    model = load_codec(codec)
    rows, decoded = [], []
    for path in files:
        item = read_depth(path, unit)
        codes = model.encode(torch.from_numpy(item.relative), torch.from_numpy(item.valid))
        rows.append({"file": str(path), "codes": codes.tolist()})
        decoded.append(model.decode(codes, size=item.relative.shape).detach().numpy())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, depth in zip(names, decoded, strict=True):
            write_depth_png(out / name, depth)
        write_json(out / "codes.json", rows)
    if as_json or out is None:
        print(json.dumps(rows))
    else:
        print(f"{len(rows)} depth maps written as {model.num_tokens} codes each: {out / 'codes.json'}")


def read_settings(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Join the options of the command line with those of a YAML file; the command line wins.

    Raises:
        ValueError: The file is missing, not YAML, or holds something else than the options.
    """
    from perceptio_hf.files import find_recipe, read_yaml

    known = {**DEFAULTS, "codec": {}, "options": {}}
    read = {} if config is None else read_yaml(find_recipe(config))
    unknown = sorted(set(read) - set(known))
    if unknown:
        raise ValueError(f"{config} holds {', '.join(unknown)}; known are {', '.join(known)}.")
    given = {key: value for key, value in given.items() if value is not None}
    if "steps" in given or "minutes" in given:  # one replaces the other
        read = {key: value for key, value in read.items() if key not in ("steps", "minutes")}
    settings = {**known, **read, **given}
    if settings["steps"] is None and settings["minutes"] is None:
        settings["minutes"] = 5.0
    return settings


def depth_source(
    data: str, unit: str | None, pattern: str | None, maps: int, size: int, first_seed: int
) -> "Iterator[DepthMap]":
    """Depth maps from the rendered world or a folder, behind a progress bar.

    Args:
        data: "world" (scenes from `first_seed` on), "world:SEED", or a folder.
        unit: What the files of a folder hold; needed for a folder, not allowed for the world.
        pattern: Which files of the folder; None takes every depth map.
        maps: The most maps to give.
        size: Side of rendered maps in pixels.

    Raises:
        ValueError: The source does not exist, or the unit is missing.
    """
    from perceptio_hf.data.depth_maps import list_depth_folder, read_depth

    kind, _, start = data.partition(":")
    if kind == "world":
        if unit is not None or pattern is not None:
            raise ValueError("--unit and --pattern are for folders; rendered depth is always in metres.")
        if start and not start.isdigit():
            raise ValueError(f"--data {data}: after `world:` comes the number of the first scene.")
        return _rendered(int(start) if start else first_seed, maps, size)
    paths = list_depth_folder(data, pattern)[:maps]
    unit = _needed_unit(unit)
    return (read_depth(path, unit) for path in _counted(paths, "reading"))


def load_codec(folder: Path) -> "DepthVQVAE":
    """A saved depth codec in evaluation mode, alone or as part of a saved Perceptio; errors as `load_depth_codec`."""
    from perceptio_hf.conversion.saved_models import load_depth_codec

    from .checkpoints import quieten

    quieten()
    return load_depth_codec(folder)


def _rendered(first_seed: int, maps: int, size: int) -> "Iterator[DepthMap]":
    from perceptio_hf.data.depth_maps import DepthMap
    from perceptio_hf.world import render_scene

    for seed in _counted(range(first_seed, first_seed + maps), "rendering"):
        yield DepthMap.from_metric(render_scene(seed, size=size).depth)


def _build(cls: type, fields: Any, name: str) -> Any:
    """`cls(**fields)`, with an error that names the section of the YAML file."""
    import dataclasses

    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(known)) if isinstance(fields, dict) else ["no mapping"]
    if unknown:
        raise ValueError(f"`{name}` holds {', '.join(map(str, unknown))}, which is not a field of {cls.__name__}.")
    try:
        return cls(**{name: _number(value) for name, value in fields.items()})
    except Exception as error:  # ValueError of ours, TypeError, or the type checks of huggingface_hub
        raise ValueError(f"`{name}`: {error}") from error


def _number(value: Any) -> Any:
    """YAML reads 1e-4, without a point, as a text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value.strip()) else value


def _needed_unit(unit: str | None) -> str:
    if unit is None:
        raise ValueError("--unit is needed to read depth files: mm, m, disparity or relative.")
    return unit


def _distinct_names(files: list[Path]) -> list[str]:
    """A .png name for each file; two files that would share one are an error."""
    names = [f"{path.stem}.png" for path in files]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(
                f"{files[names.index(name)]} and {files[index]} would both become {name}; encode one by one."
            )
    return names


def _check_apart(files: list[Path], out: Path | None) -> None:
    """Raises ValueError where what is written could replace the depth maps, or the pictures beside them."""
    beside = next((path for path in files if out is not None and path.resolve().parent == out.resolve()), None)
    if beside is not None:
        raise ValueError(
            f"--out {out} is the folder of {beside}, where files of the same names would be replaced; name another one."
        )


def _noting_distances(
    maps: "Iterator[DepthMap]", size: int, distances: "list[np.ndarray | None]"
) -> "Iterator[DepthMap]":
    """Give `maps` on; of the first ones, whose figures are shown, the distances are kept, (size, size) metres: the bank
    keeps none."""
    for item in maps:
        if len(distances) < SHOWN_MAPS:
            distances.append(None if item.metric is None else _nearest(item.metric, size))
        yield item


def _nearest(array: "np.ndarray", size: int) -> "np.ndarray":
    """(H, W) -> (size, size) by the nearest pixels: between an object and what is behind it lies no distance."""
    import numpy as np

    rows, columns = (((2 * np.arange(size) + 1) * length) // (2 * size) for length in array.shape)
    return array[rows[:, None], columns]


def _known(figures: dict[str, Any]) -> dict[str, Any]:
    """Without those that cannot be had: maps without distances have no AbsRel."""
    return {name: value for name, value in figures.items() if value is not None}


def _figures(figures: dict[str, Any]) -> str:
    lines = [f"{figures['maps']} depth maps"]
    if "absrel" in figures:
        lines.append(f"distance: AbsRel {figures['absrel']:.4f}, delta<1.25 {figures['delta1']:.4f}")
    lines.append(f"relative depth: mean absolute error {figures['relative_mae']:.4f}")
    lines.append(f"codes in use: {figures['codes_used']}, perplexity {figures['perplexity']:.1f}")
    return "\n".join(lines)


@contextmanager
def _bar(name: str, total: float) -> "Iterator[Callable[[float, float], None]]":
    """A progress bar on standard error, moved by calling what this yields with (how much is done, current error)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total, note="")
        yield lambda done, error: progress.update(task, completed=done, note=f"error {error:.4f}")


def _counted(items: Any, name: str) -> Iterator[Any]:
    """Go through `items` behind a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    return track(items, description=name, console=Console(stderr=True), transient=True)
