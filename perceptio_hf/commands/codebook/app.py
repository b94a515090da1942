"""The sub-commands of `perceptio codebook`."""

import typer

from .train import train
from .use import encode, evaluate

app = typer.Typer(
    help="Train, evaluate and use a depth codec, which writes a depth map as a short sequence of codes.",
    no_args_is_help=True,
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(encode)
