"""What the guides name is there; that what they show runs, tests/test_documents.py sees to."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_guides_name_files_that_exist():
    for guide in DOCS.glob("*.md"):
        text = guide.read_text()
        named = re.findall(r"\]\(([a-z_]+\.md)\)", text)
        assert all((DOCS / name).is_file() for name in named), guide
        recipes = re.findall(r"(?<![/\w])(?:recipes|benchmarks)/[a-z_]+\.(?:yaml|py)", text)
        assert all((DOCS.parent / name).is_file() for name in recipes), guide
