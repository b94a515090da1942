"""`perceptio export`: a Perceptio checkpoint in a format that other programs load."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

Format = Literal["internvl"]


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a Perceptio checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    form: Annotated[
        Format, typer.Option("--format", help="internvl: what stock InternVLForConditionalGeneration loads.")
    ] = "internvl",
    pictures: Annotated[
        int, typer.Option(min=1, help="Write span grammars for prompts of up to so many pictures.")
    ] = 1,
    tokens_before_span: Annotated[
        int,
        typer.Option(min=1, help="Most tokens that these grammars allow in front of a depth span that is not forced."),
    ] = 64,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Add Perceptio's processor, for programs that are told to trust remote code."),
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Read OUT again and compare every weight, bit for bit, and setting with MODEL's.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there and not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Write the InternVL inside the checkpoint MODEL, spatial vocabulary included, as a stock folder OUT.

    transformers' own classes and serving engines that know InternVL load it. It writes masks and depth as tokens; the
    Perceptio it came from reads them (`perceptio decode`, see docs/export.md). OUT/grammars holds what keeps spans
    whole in structured output, by spatial mode: MODE.ebnf for xgrammar, MODE.lark for llguidance, MODE.regex for
    outlines.
    """
    from perceptio_hf.files import expanded, new_folder
    from perceptio_hf.training.lora import base_of_adapter

    from . import checkpoints

    name = checkpoints.resolve(model)
    with new_folder(out, overwrite, sources=(name, base_of_adapter(name))) as partial:
        from perceptio_hf.conversion.export import stock_internvl, write_internvl
        from perceptio_hf.conversion.written import Written

        loaded, processor = checkpoints.load(name, device="cpu")
        written = Written.of(stock_internvl(loaded)) if verify else None
        options = {"pictures": pictures, "tokens_before_span": tokens_before_span, "with_code": with_code}
        write_internvl(loaded, processor, partial, **options)
        del loaded  # there is memory for one
        if written is not None:
            written.check(partial)
    files = sorted(path.name for path in expanded(out).iterdir())
    if as_json:
        print(json.dumps({"model": model, "format": form, "folder": str(out), "files": files}, indent=2))
    else:
        print(f"{out} is a stock InternVL checkpoint ({len(files)} files); read masks and depth with {model}.")
