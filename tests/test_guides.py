"""The Python of the guides runs as it stands (docs/data.md and docs/lora.md have tests of their own)."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_guide_to_training_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(), re.DOTALL):
        exec(block, names)
    assert (tmp_path / "runs" / "sft" / "checkpoint" / "config.json").is_file()
    assert (tmp_path / "runs" / "sft" / "losses.png").is_file()


def test_the_guide_to_generation_runs(capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "generation.md").read_text(), re.DOTALL):
        exec(block, names)
    assert len(names["second"].mask_logits[0]) >= 1 and names["answer"].depth is not None


def test_guides_name_files_that_exist():
    for guide in DOCS.glob("*.md"):
        text = guide.read_text()
        named = re.findall(r"\]\(([a-z_]+\.md)\)", text)
        assert all((DOCS / name).is_file() for name in named), guide
        recipes = re.findall(r"(?:recipes|benchmarks)/[a-z_]+\.(?:yaml|py)", text)
        assert all((DOCS.parent / name).is_file() for name in recipes), guide
