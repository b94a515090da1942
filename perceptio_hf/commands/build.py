"""`perceptio build`: a fresh Perceptio out of a stock InternVL, a SAM2 and a depth codec."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from perceptio_hf.build.checkpoint import BuildReport

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def build(
    internvl: Annotated[
        str,
        typer.Option(
            help="Folder or Hub name of an InternVL, transformers' layout or OpenGVLab's.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    mask_decoder: Annotated[
        str | None,
        typer.Option(help="Meta's SAM2 or SAM2.1 (.pt), or a Sam2Model's folder or Hub name.", show_default=False),
    ] = None,
    depth_codec: Annotated[
        str | None,
        typer.Option(
            help="Folder of a depth codec, or AURORA's vae-final.pt; tiny takes the embedded one's.", show_default=False
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="In place of these two: a Perceptio whose SAM2, codec, [SEG] projector and mask settings are taken, "
            "for an InternVL that `perceptio export` wrote from it.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the InternVL part; auto keeps it. The others are float32.")] = "auto",
    verify: Annotated[
        bool,
        typer.Option(
            help="Check that OUT has the parts' weights, bit for bit, and the InternVL's logits, within rounding."
        ),
    ] = True,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, e.g. 500MB.")] = "5GB",
    seed: Annotated[int, typer.Option(min=0, help="Of the new tokens' rows and of the [SEG] projector.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Join a stock InternVL, a SAM2 and a depth codec to a Perceptio that is ready to be trained.

    It answers as the InternVL does; masks and depth mean nothing before training (`perceptio train`). OUT appears when
    it is complete and verified. Memory for about one copy of the weights is enough.
    """
    from perceptio_hf.build.checkpoint import build as build_folder

    from .checkpoints import or_tiny, quieten

    quieten()
    codec, old = map(or_tiny, (depth_codec, like))
    with _progress(verify) as on_step:
        report = build_folder(
            internvl,
            mask_decoder,
            codec,
            out,
            like=old,
            dtype=dtype,
            verify=verify,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            seed=seed,
            on_step=on_step,
        )
    print(json.dumps(report.as_dict(), indent=2) if as_json else _described(report))


@contextmanager
def _progress(verify: bool) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that advances with every step, where somebody may be watching."""
    from rich.console import Console
    from rich.progress import Progress

    from perceptio_hf.build.checkpoint import STEPS

    steps = [step for step, needed in STEPS.items() if verify or not needed]
    console = Console(stderr=True)
    if not console.is_terminal:  # where older releases of rich would print an empty line
        yield lambda step: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Starting", total=len(steps))
        yield lambda step: progress.update(task, description=step, completed=steps.index(step))


def _described(report: "BuildReport") -> str:
    tokens = (
        "no new tokens" if not report.new_tokens else f"{report.new_tokens} new tokens from {report.first_new_id} on"
    )
    lines = [
        f"{report.folder}: {report.parameters:,} parameters, InternVL with {report.text_model} in {report.dtype}",
        f"    vocabulary: {report.rows_before:,} -> {report.rows:,} rows, {tokens}",
        f"    masks from pictures of {report.mask_image_size} pixels; depth as {report.depth_grid} x "
        f"{report.depth_grid} of {report.depth_codes} codes",
    ]
    if report.like:
        lines.append(f"    SAM2, depth codec, [SEG] projector and mask settings are those of {report.like}")
    elif not report.new_tokens:
        lines.append(
            "    the InternVL knew all spatial tokens, but the [SEG] projector is new: if it was exported from a "
            "Perceptio, --like takes that one's"
        )
    lines += [f"    note: {note}" for note in report.notes]
    check = report.check
    if check is None:
        lines.append("    not verified")
    else:
        lines.append(
            f"    verified: {check.weights:,} tensors are the parts', bit for bit; {check.tokens:,} logits at "
            f"{check.positions:,} positions of {check.prompts} prompts{', a sample,' if check.sampled else ''} are the "
            "InternVL's within rounding; spatial tokens have at most "
            f"{check.spatial_probability:.2g} of the probability"
        )
    return "\n".join(lines)
