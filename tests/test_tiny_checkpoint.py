"""The embedded checkpoint: it is current, it is small, and it has learnt what its card says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.lab.embedded import embed
from perceptio_hf.lab.held_out import answer_items, held_out_items, score_items

ROOT = Path(__file__).parents[1]
TINY = Path(perceptio_hf.tiny_checkpoint())


def test_it_holds_weights_and_configurations_only():
    names = {path.name for path in TINY.iterdir() if path.name != "__pycache__"}
    assert not [name for name in names if name.endswith(".py")]
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= names
    assert not [path.name for path in TINY.glob("*.json") if "auto_map" in path.read_text(encoding="utf-8")]


def test_a_copy_that_is_saved_carries_its_code_and_is_embedded_without_it(tmp_path):
    """Saving brings code and auto_map, `embed` takes them away; what was embedded computes the same."""
    model, processor = AutoModel.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    assert (saved / "modeling_perceptio.py").is_file()
    assert "auto_map" in json.loads((saved / "config.json").read_text())
    embedded = embed(saved, tmp_path / "embedded")
    assert not list(embedded.glob("*.py"))
    for name in ("config.json", "processor_config.json"):
        found, kept = (json.loads((folder / name).read_text()) for folder in (embedded, TINY))
        for values in (found, kept):
            values.pop("transformers_version", None)  # of whoever saved it last
        assert found == kept, name
    again = AutoModel.from_pretrained(embedded).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_embedding_refuses_what_is_no_checkpoint(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no saved model"):
        embed(TINY, tmp_path / "notes")
    with pytest.raises(ValueError, match=r"no config\.json"):
        embed(tmp_path, tmp_path / "embedded")
    (tmp_path / "notes" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="to be read"):
        embed(tmp_path / "notes", tmp_path / "notes")


def test_its_card_is_the_project_s():
    assert (TINY / "README.md").read_text() == (ROOT / "model_card.md").read_text()


@pytest.mark.slow
def test_it_sees_rendered_scenes():
    """Loose bounds on a few held-out scenes; benchmarks/tiny_checkpoint.py measures properly."""
    folder = perceptio_hf.tiny_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    items = [item for item in held_out_items(24) if item.question.kind in ("depth", "refer")]
    scores = score_items(items, answer_items(model, processor, items))
    assert scores["delta1"] > 0.8 and scores["absrel"] < 0.2
    assert scores["miou"] > 0.2 and scores["well_formed"] == 1
