"""What the guides name is there; that what they show runs, tests/test_documents.py sees to."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from perceptio_hf.commands.main import app

DOCS = Path(__file__).parents[1] / "docs"
RECIPES = DOCS.parent / "recipes"
REAL = [DOCS / "train_a_real_one.md", *sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("accelerate/*.yaml"))]


def test_guides_name_files_that_exist():
    for guide in DOCS.glob("*.md"):
        text = guide.read_text()
        named = re.findall(r"\]\(([a-z_]+\.md)\)", text)
        assert all((DOCS / name).is_file() for name in named), guide
        recipes = re.findall(r"(?<![/\w])(?:recipes|benchmarks)/[a-z_]+\.(?:yaml|py)", text)
        assert all((DOCS.parent / name).is_file() for name in recipes), guide


def commands_in(text: str) -> list[list[str]]:
    """The words of every `perceptio ...` of a guide or of a recipe's comment, behind `perceptio`."""
    whole = re.sub(r"\\\n#?", " ", text)
    return [
        shlex.split(line, comments=True) for line in re.findall(r"^[^`\n]*?\bperceptio ([a-z][^`\n]*)$", whole, re.M)
    ]


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.name)
def test_what_cannot_be_run_here_has_options_that_exist(file):
    from perceptio_hf.training.config import PerceptioSFTConfig
    from perceptio_hf.training.recipe import RecipeArguments

    keys = {field.name for group in (PerceptioSFTConfig, RecipeArguments) for field in dataclasses.fields(group)}
    commands = commands_in(file.read_text(encoding="utf-8"))
    assert commands
    for words in commands:
        command, rest = get_command(app), words
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        known |= {f"--{key}" for key in keys} if command.name == "train" else set()
        options = {word for word in rest if word.startswith("--")}
        assert command.name != "perceptio" and options <= known, words
        assert all(
            parameter.opts[0] in options
            for parameter in command.params
            if parameter.required and parameter.opts[0].startswith("--")
        ), words
