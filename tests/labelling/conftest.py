"""Pictures, a small random teacher and a small codec, made once."""

import json
from pathlib import Path

import pytest
from component_helpers import codec, save_teacher
from helpers import picture

from perceptio_hf.commands import main


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """A folder with `teacher`, `codec` and `photos`: nine pictures of three shapes."""
    folder = tmp_path_factory.mktemp("label")
    save_teacher(folder / "teacher")
    codec().save_pretrained(folder / "codec")
    (folder / "photos" / "more").mkdir(parents=True)
    for index in range(9):
        size = ((60, 40), (40, 60), (56, 56))[index % 3]
        name = f"more/{index}.png" if index % 2 else f"{index}.jpg"
        picture(*size, seed=index).save(folder / "photos" / name)
    return folder


@pytest.fixture
def label(parts, capsys):
    """Runs the command; gives exit code, what --json printed, and standard error."""

    def run(*words, teacher="teacher", depth_codec="codec") -> tuple[int, dict | None, str]:
        given = ["--teacher", str(parts / teacher), "--depth-codec", str(parts / depth_codec), "--json"]
        code = main.run(["label", *map(str, words), *given])
        said = capsys.readouterr()
        return code, json.loads(said.out) if code == 0 else None, said.err

    return run
