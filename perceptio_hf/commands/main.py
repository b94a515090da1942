"""The entry point of the command `perceptio`, and what it does with errors.

A user's mistake gets one line on standard error and exit code 2. PERCEPTIO_DEBUG=1 shows the traceback as well.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from perceptio_hf import __version__
from perceptio_hf.commands.codebook.app import app as codebook

from .ablate import ablate
from .app import app as page
from .build import build
from .convert import app as convert
from .decode import decode
from .demo import demo
from .eval import evaluate
from .export import export
from .label import label
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
app.command()(label)
app.add_typer(codebook, name="codebook")
app.add_typer(convert, name="convert")
app.command()(export)
app.command()(decode)
app.command()(push)
app.command("app")(page)


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
    _ask_nothing_of_the_network()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        code = app(args=[_with_home(word) for word in given], prog_name="perceptio", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # typer takes a file that ends too early for the end of input
            return _failed(error.__cause__, f"a file ends too early: {error.__cause__}")
        code = INTERRUPTED
    except (ValueError, OSError, ImportError, _UsageError) as error:  # ImportError: an extra is missing
        if type(error).__name__ == "NoArgsIsHelpError":  # called without arguments: the help has been printed
            return USER_ERROR
        return _failed(error, _one_line(error))
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):  # torch's, which is not imported here
            raise
        return _failed(error, f"not enough memory ({_one_line(error)}); try smaller batches or smaller pictures")
    if code == INTERRUPTED:
        print("perceptio: interrupted; files that were written are complete.", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _failed(error: BaseException, line: str) -> int:
    if os.environ.get("PERCEPTIO_DEBUG", "0") not in ("", "0"):
        raise error
    print(f"perceptio: {line}", file=sys.stderr)
    return USER_ERROR


def _ask_nothing_of_the_network() -> None:
    """What libraries send about their use stays off unless the user has set the variable, to 0 say. This is the
    process's own business: a program that imports the package decides for itself."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


# What torch makes of an error in a process that prepares batches: the traceback, and behind it what was said.
_OF_WORKER = re.compile(
    r"Caught (\w+) in DataLoader worker process \d+\.\n.*^[\w.]*\1: (.+)\Z", re.DOTALL | re.MULTILINE
)


def _one_line(error: Exception) -> str:
    from perceptio_hf.files import is_want_of_room

    text = error.format_message() if isinstance(error, _UsageError) else str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    if is_want_of_room(error):
        text += "; make room there and give the same command again, or name a folder on another disk."
    from_worker = _OF_WORKER.match(text)
    return " ".join((from_worker[2] if from_worker else text).split()) or type(error).__name__


def _with_home(word: str) -> str:
    """`--out=~/x` as `--out ~/x` reaches a program: shells leave a tilde alone that no space comes before."""
    option, equals, value = word.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and re.fullmatch(r"--[\w-]+", option) else word


def main() -> None:
    sys.exit(run())
