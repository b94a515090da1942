"""Finds the blocks of a document, and tells commands and Python from what is only shown."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# How a line of a shell block may begin. A block is one of commands where its first line begins so.
SHELL = (
    "perceptio",
    ".venv/bin/perceptio",
    "make",
    "python3",
    ".venv/bin/python",
    ".venv/bin/pip",
    "pip",
    ".",
    "lmms-eval",
)
# Languages of blocks that are data, or are tried elsewhere.
SHOWN = ("json", "yaml", "diff", "text", "bibtex", "python served")


@dataclass(frozen=True)
class Block:
    """language: what stands behind the fence, "" without one; text: without indentation; line: where it begins."""

    language: str
    text: str
    line: int

    @property
    def kind(self) -> str:
        """python, shell, shown, or unknown: what nobody has said how to try."""
        first = self.text.split(maxsplit=1)[0] if self.text.split() else ""
        if self.language.split(" ")[0] == "python" and self.language not in SHOWN:
            return "python"
        if self.language in ("bash", "sh", "shell", "console") or (not self.language and first in SHELL):
            return "shell"
        return "shown" if self.language in SHOWN else "unknown"

    def commands(self) -> Iterator[list[str]]:
        """The words of each command; comments are left out, lines that end in a backslash go on."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks_of(document: Path) -> list[Block]:
    """Fenced blocks, and those that are indented by four spaces behind an empty line."""
    lines = [*document.read_text(encoding="utf-8").splitlines(), ""]
    found, number = [], 0
    while number < len(lines):
        fence = re.fullmatch(r"( *)(```+)(.*)", lines[number])
        begin = number
        if fence:
            number += 1
            while lines[number].strip() != fence[2]:
                number += 1
            found.append(_block(fence[3].strip(), lines[begin + 1 : number], begin))
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            while lines[number].startswith("    ") or (
                not lines[number].strip() and lines[number + 1 :][:1] and lines[number + 1].startswith("    ")
            ):
                number += 1
            found.append(_block("", lines[begin:number], begin))
        number += 1
    return found


def _block(language: str, lines: list[str], begin: int) -> Block:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return Block(language, "\n".join(line[margin:] for line in lines).strip("\n"), begin + 1)
