"""The floors of the package: an import may only point down, also inside a function. CONTRIBUTING.md shows the plan."""

import ast
import importlib.util
import re
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "perceptio_hf"
# From the ground up. What stands on one floor knows nothing of its neighbours.
FLOORS = (
    ("tokens", "files", "visualization", "extras"),
    ("world",),
    ("modeling",),
    ("processing",),
    ("data",),
    ("bulk",),
    ("labelling",),
    ("conversion",),
    ("build",),
    ("training",),
    ("evaluation",),
    ("hub",),
    ("lab",),
    ("app",),
    ("commands",),
    ("integrations",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
MOST_FILES, MOST_LINES = 16, 400
LONG_FILES = {  # the few that are longer, and why
    "modeling/generation_perceptio.py": "generate and what it returns are read together",
    "modeling/modeling_depth_vqvae.py": "the codec alone, as transformers has one file for a model",
    "modeling/modeling_perceptio.py": "what is added to InternVL, as transformers has one file for a model",
    "processing/processing_perceptio.py": "the processor, as transformers has one file for a processor",
    "training/trainer.py": "one class, whose methods are TRL's hooks",
    "lab/lessons/stages.py": "the stages of one recipe in their order",
}


def _sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _imports(path: Path, source: str | None = None):
    """(line, imported module or name, level) of every import, those inside functions too."""
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or node.names[0].name, node.level
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)


def _broken_rules(path: Path, source: str | None = None) -> list[str]:
    where = path.relative_to(ROOT)
    folder = ".".join(where.parts[:-1])
    own = where.parts[1].removesuffix(".py")
    broken = []
    for line, module, level in _imports(path, source):
        target = folder + "." + module if level else module
        if level > 1 or (level and "." in module):
            broken.append(f"{where}:{line}: relative imports stay within their folder; write the whole name instead")
        elif not target.startswith("perceptio_hf."):
            continue
        elif not level and target.rpartition(".")[0] == folder:
            broken.append(f"{where}:{line}: within a folder imports are relative: from .{module.rpartition('.')[2]}")
        name = target.split(".")[1]
        if own not in FLOOR_OF or name == own or name not in FLOOR_OF:
            continue  # the roof, __init__ and registration, names everything
        if FLOOR_OF[name] > FLOOR_OF[own]:
            broken.append(f"{where}:{line}: {own} may not import {name}, which stands above it")
        elif FLOOR_OF[name] == FLOOR_OF[own]:
            broken.append(f"{where}:{line}: {own} may not import {name}, which stands beside it")
    return broken


def test_imports_point_down():
    assert [line for path in _sources() for line in _broken_rules(path)] == []


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("def f():\n    from perceptio_hf.training.losses import PARTS", ":2: modeling may not import training"),
        ("import perceptio_hf.hub.card", ":1: modeling may not import hub"),
        ("from perceptio_hf.modeling.span_grammar import SpanGrammar", "within a folder imports are relative"),
        ("from ..tokens import SEG_TOKEN", "relative imports stay within their folder"),
        ("if TYPE_CHECKING:\n    from perceptio_hf.data.samples import Sample", ":2: modeling may not import data"),
    ],
)
def test_the_rule_that_is_broken_is_named(source, rule):
    assert rule in "\n".join(_broken_rules(PACKAGE / "modeling" / "modeling_perceptio.py", source))


def test_every_part_has_a_floor():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in _sources()}
    assert parts - set(FLOOR_OF) == {"__init__", "__main__", "registration"}


def test_folders_are_small_and_say_what_lives_there():
    files = Counter(path.parent for path in _sources())
    crowded = {str(folder.relative_to(ROOT)): count for folder, count in files.items() if count > MOST_FILES}
    assert crowded == {}
    for folder in files:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert text and len(text) > 40, folder


def test_long_files_have_a_reason():
    long = {str(path.relative_to(PACKAGE)) for path in _sources() if len(path.read_text().split("\n")) > MOST_LINES}
    assert long <= set(LONG_FILES)


def test_contributing_shows_the_floors():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text[text.index("From the ground up") :]
    shown = shown[: shown.index("\n## ")]
    names = [name for name in re.findall(r"`([a-z_]+)(?:\.py|/)`", shown) if name in FLOOR_OF]
    assert sorted(set(names)) == sorted(FLOOR_OF)
    order = [FLOOR_OF[name] for name in dict.fromkeys(names)]
    assert order == sorted(order), "from the ground up"


def test_the_picture_of_the_plan_is_drawn_from_the_imports(tmp_path):
    path = ROOT / "docs" / "draw_architecture.py"
    spec = importlib.util.spec_from_file_location("draw_architecture", path)
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    assert list(drawing.FLOORS) == [name for names in FLOORS for name in names]
    edges = drawing.imports()
    assert edges["training", "data"] > 5 and all(FLOOR_OF[a] > FLOOR_OF[b] for a, b in edges)
    drawing.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 50_000


def test_guides_name_files_that_exist():
    for guide in ("README.md", "docs/architecture.md", "CONTRIBUTING.md"):
        text = (ROOT / guide).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w/]+\.(?:py|md))`", text):
            assert any((base / name).is_file() for base in (ROOT, PACKAGE, PACKAGE / "training" / "losses")), name


def test_no_folder_of_tests_is_passed_by(pytestconfig):
    """pytest goes past folders whose names are on a list of its own, "build" among them, without a word."""
    passed_by = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in Path(__file__).parent.rglob("test_*.py")}
    assert [folder.name for folder in folders if any(fnmatch(folder.name, name) for name in passed_by)] == []
