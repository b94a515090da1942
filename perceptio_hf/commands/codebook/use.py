"""`perceptio codebook eval` and `encode`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .sources import AsJson, Pattern, UnitOption, depth_source, figures_text, known, load_codec, needed_unit

Codec = Annotated[
    Path,
    typer.Argument(
        metavar="CODEC", help="Folder of a depth codec, or of a checkpoint that has one.", show_default=False
    ),
]


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

    from perceptio_hf.bulk.progress import tracked
    from perceptio_hf.evaluation.metrics.depth import codec_metrics
    from perceptio_hf.world import HELD_OUT_SEED

    source = depth_source(data, unit, pattern, maps, model.config.image_size, first_seed=HELD_OUT_SEED)
    figures = known(codec_metrics(model, map(source.read, tracked(range(len(source)), "reading", "maps"))))
    print(json.dumps(figures, indent=2) if as_json else figures_text(figures))


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

    unit = needed_unit(unit)
    names = _distinct_names(files)
    _check_apart(files, out)
    model = load_codec(codec)
    rows, shapes = [], []
    for path in files:
        item = read_depth(path, unit)
        codes = model.encode(torch.from_numpy(item.relative), torch.from_numpy(item.valid))
        rows.append({"file": str(path), "codes": codes.tolist()})
        shapes.append(item.relative.shape)
    if out is not None:  # once all could be read; one map at a time, since thousands would not fit
        out.mkdir(parents=True, exist_ok=True)
        for name, row, shape in zip(names, rows, shapes, strict=True):
            depth = model.decode(torch.tensor(row["codes"]), size=shape)
            write_depth_png(out / name, depth.detach().numpy())
        write_json(out / "codes.json", rows)
    if as_json or out is None:
        print(json.dumps(rows))
    else:
        print(f"{len(rows)} depth maps written as {model.num_tokens} codes each: {out / 'codes.json'}")


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
