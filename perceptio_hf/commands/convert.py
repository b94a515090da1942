"""`perceptio convert`: checkpoints that others saved, in the layouts this package reads."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from perceptio_hf.conversion.keys import ConversionReport

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in OUT.")]
Verify = Annotated[bool, typer.Option(help="Read OUT again and compare every weight, bit for bit, and setting.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

app = typer.Typer(
    help="Read checkpoints that others saved: SAM2, AURORA's depth codec, Sa2VA. Nothing in them is executed.",
    no_args_is_help=True,
)


@app.command()
def sam2(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Meta's .pt of SAM2 or SAM2.1, the same as .safetensors, or a folder or Hub name of transformers.",
            show_default=False,
        ),
    ],
    out: Out,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side of the picture a fine-tune of Meta's was made for. Default: 1024.", show_default=False),
    ] = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Meta's SAM2 or SAM2.1, any of the four sizes, to transformers' Sam2Model."""
    from perceptio_hf.conversion.keys import ConversionReport
    from perceptio_hf.conversion.sam2 import load_sam2
    from perceptio_hf.files import check_new_folder

    check_new_folder(out, overwrite, (source,))
    report = ConversionReport(source)
    with _busy():
        _save(load_sam2(source, image_size=image_size, report=report), source, out, overwrite, verify)
    _show(report, out, as_json)


@app.command("aurora-vqvae")
def aurora_vqvae(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="vae-final.pt, or the same as .safetensors.", show_default=False),
    ],
    out: Out,
    image_size: Annotated[int, typer.Option(help="Side of the depth map the codec was trained on.")] = 320,
    value_low: Annotated[float, typer.Option(help="What the network reads for the farthest point.")] = -1.0,
    value_high: Annotated[float, typer.Option(help="What the network reads for the nearest point.")] = 1.0,
    verify: Verify = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """The depth VQ-VAE of AiT, AURORA or MolmoAct to a depth codec of this package."""
    from perceptio_hf.conversion.aurora import load_aurora
    from perceptio_hf.conversion.keys import ConversionReport
    from perceptio_hf.files import check_new_folder

    check_new_folder(out, overwrite, (source,))
    report = ConversionReport(str(source))
    values = {"value_low": value_low, "value_high": value_high}
    with _busy():
        _save(load_aurora(source, image_size=image_size, report=report, **values), source, out, overwrite, verify)
    _show(report, out, as_json)


@app.command()
def sa2va(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder or Hub name of a Sa2VA built on InternVL.", show_default=False),
    ],
    out: Out,
    depth_codec: Annotated[
        str | None,
        typer.Option(
            help="Folder of a depth codec, AURORA's file, or `tiny`, the embedded one. Default: a fresh one, which has "
            "learnt nothing.",
            show_default=False,
        ),
    ] = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A Sa2VA to a Perceptio with its answers and masks; depth remains to be learnt."""
    from perceptio_hf.conversion.sa2va import convert_sa2va

    from .checkpoints import or_tiny

    with _busy():
        report = convert_sa2va(source, out, depth_codec=or_tiny(depth_codec), overwrite=overwrite, verify=verify)
    _show(report, out, as_json)


def _save(model: "PreTrainedModel", source: str | Path, out: Path, overwrite: bool, verify: bool) -> None:
    from perceptio_hf.conversion.written import Written
    from perceptio_hf.files import new_folder

    with new_folder(out, overwrite, (source,)) as folder:
        written = Written.of(model) if verify else None
        model.save_pretrained(folder)
        if written is not None:
            written.check(folder)


@contextmanager
def _busy() -> Iterator[None]:
    """A sign of life on standard error where somebody watches; transformers' own bars and reports are kept away."""
    from rich.console import Console

    from .checkpoints import quieten

    quieten()
    with Console(stderr=True).status("Reading, mapping and writing ..."):
        yield


def _show(report: "ConversionReport", out: Path, as_json: bool) -> None:
    """What was read, mapped, ignored and added, as JSON or as a table."""
    if as_json:
        print(json.dumps({"out": str(out), **report.as_dict()}, indent=2, ensure_ascii=False))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(title=report.layout, title_justify="left", box=None, pad_edge=False)
    table.add_column("tensors", justify="right")
    table.add_column("what became of them", overflow="fold")
    table.add_row(str(report.num_read), f"read from {report.source}")
    table.add_row(str(len(report.mapped)), "mapped")
    for why, names in report.ignored.items():
        table.add_row(str(len(names)), f"ignored: {why} ({names[0]}{', ...' if len(names) > 1 else ''})")
    for name, origin in report.added.items():
        table.add_row("1", f"added: {name}, {origin}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    for note in report.notes:
        console.print(note)
    console.print(f"Written to {out}", soft_wrap=True)
