"""The entry point of the command `perceptio`, and what it does with errors.

A user's mistake gets one line on standard error and exit code 2. PERCEPTIO_DEBUG=1 shows the traceback as well.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from perceptio_hf import __version__

from .ablate import ablate
from .build import build
from .codebook import app as codebook
from .convert import app as convert
from .demo import demo
from .eval import evaluate
from .export import export
from .predict import predict
from .push import push
from .report import report
from .train import CONTEXT, train

USER_ERROR, INTERRUPTED = 2, 130

# Newer releases of typer bring their own copy of click's classes; this finds the one in use.
_UsageError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="perceptio",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs of help texts flow with the width of the terminal
)
app.command()(demo)
app.command()(predict)
app.command()(build)
app.command(context_settings=CONTEXT)(train)
app.command("eval")(evaluate)
app.command()(report)
app.command()(ablate)
app.add_typer(codebook, name="codebook")
app.add_typer(convert, name="convert")
app.command()(export)
app.command()(push)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perceptio {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """A vision-language model that writes masks and depth before it answers."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (without the program's name; default: the process's own).

    Returns:
        The exit code: 0, 2 after a user's mistake, 130 after Ctrl-C.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="perceptio", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (ValueError, OSError, ImportError, _UsageError) as error:  # ImportError: an extra is missing
        if os.environ.get("PERCEPTIO_DEBUG", "0") not in ("", "0"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # called without arguments: the help has been printed
            return USER_ERROR
        print(f"perceptio: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    if code == INTERRUPTED:
        print("perceptio: interrupted; files that were written are complete.", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _one_line(error: Exception) -> str:
    text = error.format_message() if isinstance(error, _UsageError) else str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def main() -> None:
    sys.exit(run())
