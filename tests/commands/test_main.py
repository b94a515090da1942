"""The command's frame: help, version, errors in one line, exit codes."""

import os
import subprocess
import sys

import pytest
import torch
import typer

from perceptio_hf import __version__
from perceptio_hf.commands import main

COMMAND = [sys.executable, "-c", "from perceptio_hf.commands.main import main; main()"]


def user_error(capsys, *arguments: str) -> str:
    """Run the command, insist on exit code 2 and one line on standard error, and return that line."""
    assert main.run(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and captured.out == ""
    return lines[0]


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from perceptio_hf.commands.main import run; run(['--help']); run(['predict', '--help']);"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'numpy', 'PIL', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for name in ("demo", "predict", "codebook"):
        assert name in done.stdout


def test_version(capsys):
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"perceptio {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["codebook"]])
def test_no_arguments_show_the_help(capsys, arguments):
    assert main.run(arguments) == 2
    captured = capsys.readouterr()
    assert "Commands" in captured.out and captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "nonsense"),
        (["--bogus"], "--bogus"),
        (["predict"], "PICTURE"),
        (["predict", "a.png", "What?", "--spatial", "masks"], "seg+depth"),
        (["predict", "a.png", "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["predict", "a.png", "What?", "--batch-size", "x"], "--batch-size"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "extra"], "extra"),
        (["codebook", "nonsense"], "nonsense"),
    ],
)
def test_usage_errors_are_one_line(capsys, arguments, says):
    assert says in user_error(capsys, *arguments)


@pytest.fixture
def failing(monkeypatch):
    """A command `fail` that raises what it is told to."""
    app = typer.Typer()
    raised: list[BaseException] = []

    @app.command()
    def fail() -> None:
        raise raised[0]

    monkeypatch.setattr(main, "app", app)
    monkeypatch.delenv("PERCEPTIO_DEBUG", raising=False)
    return raised


def test_errors_of_the_operating_system_name_the_file(capsys, failing):
    failing.append(PermissionError(13, "Permission denied", "/somewhere/overlay.png"))
    assert user_error(capsys) == "perceptio: /somewhere/overlay.png: Permission denied"


def test_long_messages_become_one_line(capsys, failing):
    failing.append(ValueError("first\n\n  second"))
    assert user_error(capsys) == "perceptio: first second"
    failing[0] = ValueError()
    assert user_error(capsys) == "perceptio: ValueError"


class OwnError(ValueError):
    """As errors of samples are."""


def _bad_row(rows):
    raise OwnError("Sample 'x': mask 0 cannot be read\nin two lines.") from None


def test_what_went_wrong_in_a_worker_is_said_without_its_traceback(capsys, failing):
    from torch.utils.data import DataLoader

    with pytest.raises(OwnError, match="Original Traceback") as caught:
        next(iter(DataLoader([1], num_workers=1, collate_fn=_bad_row)))
    failing.append(caught.value)
    assert user_error(capsys) == "perceptio: Sample 'x': mask 0 cannot be read in two lines."


def test_debug_shows_the_traceback(monkeypatch, failing):
    failing.append(ValueError("why"))
    monkeypatch.setenv("PERCEPTIO_DEBUG", "1")
    with pytest.raises(ValueError, match="why"):
        main.run([])


def test_our_own_mistakes_keep_their_traceback(failing):
    failing.append(AssertionError("a bug"))
    with pytest.raises(AssertionError):
        main.run([])


def test_interrupt_exits_130(capsys, failing):
    failing.append(KeyboardInterrupt())
    assert main.run([]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe as POSIX shells do")
def test_a_reader_that_goes_away_gets_no_traceback():
    done = subprocess.run(
        ["bash", "-c", '"$@" --help | true; exit "${PIPESTATUS[0]}"', "bash", *COMMAND], capture_output=True, text=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["OutOfMemoryError", "MemoryError"])
def test_too_little_memory_is_one_line(capsys, monkeypatch, kind):
    error = MemoryError("x") if kind == "MemoryError" else torch.OutOfMemoryError("CUDA out of memory.\nTried 3 GiB")
    monkeypatch.setattr("perceptio_hf.files.find_recipe", lambda *_: (_ for _ in ()).throw(error))
    assert main.run(["train", "--config", "x"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("perceptio: not enough memory (") and len(line.splitlines()) == 1
