"""`perceptio app`: a page to ask about pictures, on this machine; or the files of a Hugging Face Space."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from perceptio_hf.extras import missing

from .checkpoints import Device, DType, Model


def app(
    context: typer.Context,
    model: Model = None,
    device: Device = None,
    dtype: DType = "auto",
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in.", envvar="GRADIO_SERVER_NAME")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="GRADIO_SERVER_PORT")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also open gradio's public tunnel to this machine (contacts gradio).")
    ] = False,
    space: Annotated[
        Path | None,
        typer.Option(help="Write a Hugging Face Space into this new folder instead of serving.", show_default=False),
    ] = None,
) -> None:
    """Ask about pictures in a browser: masks, depth and words while they are written, and which point is closest.

    Everything stays on this machine. The same is an HTTP interface (docs/serve.md).
    """
    from . import checkpoints

    name = checkpoints.resolve(model)
    if space is not None:
        given = [key for key in ("device", "dtype", "host", "port", "share") if _on_command_line(context, key)]
        if given:
            raise ValueError(
                f"--{' and --'.join(given)} {'is' if len(given) == 1 else 'are'} about serving here; --space writes "
                "files, and the Space decides where it runs."
            )
        from perceptio_hf.app.space import write_space

        checkpoints.quieten()
        write_space(space, None if checkpoints.is_tiny(name) else name)
        print(f"Wrote a Space to {space}; try it with: cd {space} && python app.py")
        return
    if find_spec("gradio") is None:  # it is imported later, when its folder is known
        raise missing(ModuleNotFoundError(name="gradio"), "The page")

    from perceptio_hf.app.assistant import Assistant
    from perceptio_hf.app.serving import check_port, serve

    check_port(host, port)
    if device is not None:
        checkpoints.check_device(device)
    loaded = checkpoints.load(name, device, dtype)
    note = checkpoints.TINY_NOTE if checkpoints.is_tiny(name) else None
    serve(Assistant(*loaded, "embedded tiny checkpoint" if note else name, note), host=host, port=port, share=share)


def _on_command_line(context: typer.Context, option: str) -> bool:
    """Other sources are defaults and environment variables, which are there for every command."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"
