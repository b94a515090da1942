"""The embedded checkpoint: it is current, it is small, and it has learnt what its card says."""

from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.lab.held_out import answer_items, held_out_items, score_items
from perceptio_hf.modeling.remote_code import flatten_imports

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "perceptio_hf"


def test_its_code_is_the_package_s():
    copies = [path for path in (PACKAGE / "tiny").glob("*.py")]
    assert len(copies) >= 9
    for copy in copies:
        source = next(path for path in PACKAGE.rglob(copy.name) if path.parent.name != "tiny")
        assert copy.read_text() == flatten_imports(source.read_text()), f"save the tiny checkpoint again: {copy.name}"


def test_its_card_is_the_project_s():
    assert (PACKAGE / "tiny" / "README.md").read_text() == (ROOT / "model_card.md").read_text()


@pytest.mark.slow
def test_it_sees_rendered_scenes():
    """Loose bounds on a few held-out scenes; benchmarks/tiny_checkpoint.py measures properly."""
    folder = perceptio_hf.tiny_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    items = [item for item in held_out_items(24) if item.question.kind in ("depth", "refer")]
    scores = score_items(items, answer_items(model, processor, items))
    assert scores["delta1"] > 0.8 and scores["absrel"] < 0.2
    assert scores["miou"] > 0.2 and scores["well_formed"] == 1
