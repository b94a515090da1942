"""The tables of docs/generation.md are those of the figures that were measured, and how random weights are measured."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import chat, encode, picture
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.modeling.spans import spatial_loop

ROOT = Path(__file__).parents[1]


def test_the_document_has_the_tables_of_the_figures():
    spec = importlib.util.spec_from_file_location("speed_table", ROOT / "benchmarks" / "speed_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text(encoding="utf-8"))["figures"]
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    assert module.table(figures) in text, "python benchmarks/speed_table.py writes it, see there"
    assert module.put(text, figures) == text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.short(figures) in readme and module.put(readme, figures) == readme
    assert module.short(figures).count("152 M parameters") == len(figures["large"])
    sides = dict.fromkeys(module.SIDES, 2.0) | {"parallel": 0.5}
    assert "| 152 M parameters, batch 1 | 2 | 2 | 2 | 0.5 | 0.25 |" in module.table({"large": {"batch 1": sides}})
    steps = module.table({"steps": {"batch 8": {"stock": 2.0, "loop": 3.0, "ours": 2.1}}})
    assert "batch 8 | 1.05 of" in steps and "loop 1.50 |" in steps
    assert "batch 1 | 0.90 of AiT" in module.table({"codec": {"batch 1": {"AiT": 1.0, "ours": 0.9}}})


def test_the_figure_shows_a_span_of_the_embedded_checkpoint(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import draw_span

    folder = perceptio_hf.tiny_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    _, codes, final = draw_span.spans(model, processor)
    assert final[-2] < final[-1] == model.config.num_depth_tokens
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    # One pass more or less on another processor, whose last digits decide between wrong guesses.
    near = [draw_span.caption(codes.shape[1], len(codes) - 1 + more) for more in (-1, 0, 1)]
    assert any(f"![{named}](images/span.png)" in text for named in near), "python docs/draw_span.py draws it anew"


def test_spans_of_random_weights_take_the_passes_that_are_arranged(model, processor, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from speed import converging, counted_passes

    inputs = encode(processor, chat(picture(seed=1)), chat(picture(seed=2), text="Where?"))
    options = {"spatial": "depth", "max_new_tokens": model.spatial_vocabulary().span_length + 3, "eos_token_id": 10**6}
    ids = model.generate(**inputs, spatial_decoding="sequential", **options)
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    for share in (0.0, 0.25, 0.5):
        with converging(ids, share), counted_passes() as passes:
            assert torch.equal(model.generate(**inputs, **options), ids)
        hard = round(share * model.config.num_depth_tokens)
        assert hard <= passes[0] - 4 <= hard + 2, "words, the first guess and the codes that have to wait"


def test_random_weights_write_as_many_masks_as_are_arranged(model, processor, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from speed import check_answers, writing

    model = copy.deepcopy(model)  # its head is written to
    inputs = encode(processor, chat(picture(seed=1)), chat(picture(seed=2)))
    start, words = inputs["input_ids"].shape[1], model.spatial_vocabulary()
    options = {"spatial": "seg+depth", "max_new_tokens": 3 + words.span_length + 5}
    with writing(model, start, 3):
        ways = [model.generate(**inputs, spatial_decoding=way, **options) for way in ("sequential", "parallel")]
    for ids in ways:
        check_answers(model, ids, 3)
        assert ids.shape[1] == start + options["max_new_tokens"]
        assert (ids[:, start : start + 3] == words.seg).all() and (ids[:, start + 3] == words.depth_start).all()
    with pytest.raises(RuntimeError, match="not 2 times"):
        check_answers(model, ways[0], 2)
