"""The tables of docs/generation.md are those of the figures that were measured."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_document_has_the_tables_of_the_figures():
    spec = importlib.util.spec_from_file_location("speed_table", ROOT / "benchmarks" / "speed_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text(encoding="utf-8"))["figures"]
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    assert module.table(figures) in text, "python benchmarks/speed_table.py writes it, see there"
    assert module.put(text, figures) == text
    sides = dict.fromkeys(module.SIDES, 2.0) | {"parallel": 0.5}
    assert "| 152 M parameters, batch 1 | 2 | 2 | 2 | 0.5 | 0.25 |" in module.table({"large": {"batch 1": sides}})
