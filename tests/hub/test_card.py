"""Model cards: metadata the Hub takes, code that runs, and words of others that stay."""

import re
from dataclasses import replace

import pytest
import yaml
from helpers import picture
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from perceptio_hf.hub.card import CardFacts, check_card, new_card, read_results, replace_default_card, revised_card
from perceptio_hf.hub.training_record import TrainingRecord

RESULT = EvalResult(
    task_type="image-segmentation",
    dataset_type="lmms-lab/RefCOCO",
    dataset_name="RefCOCO",
    dataset_split="val",
    metric_type="ciou",
    metric_name="cIoU",
    metric_value=0.827,
)
BY_HAND = """---
# mine
license: cc-by-4.0
custom: [1, 2]
tags:
- own
---
# My model

Words | with a table-like sign, and ---
"""


def test_metadata_of_a_new_card(model):
    facts = CardFacts("mit", ("a/b", "c/d"), ("e/f",), ("en", "de"), (RESULT,))
    data = ModelCard(new_card(model, "me/fine", facts)).data.to_dict()
    assert data.pop("tags")[0] == "perceptio"
    assert data.pop("model-index") == eval_results_to_model_index("fine", [RESULT])
    assert data == {
        "license": "mit",
        "base_model": ["a/b", "c/d"],
        "datasets": ["e/f"],
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
    }


def test_what_nobody_knows_is_not_made_up(model):
    text = new_card(model, "me/fine")
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "unknown"
    assert not {"base_model", "datasets", "language", "model-index", "model_name"} & set(data)
    assert "Nothing about its training was recorded" in text and "No figures have been added" in text


def test_the_base_of_the_training_is_the_base_model_unless_one_is_given(model):
    training = TrainingRecord(("Fine-tuned by hand.",), {"learning_rate": 0.1}, "me/base")
    card = ModelCard(new_card(model, "me/fine", training=training))
    assert card.data.base_model == ["me/base"]
    assert "Fine-tuned by hand." in card.text and "| `learning_rate` | 0.1 |" in card.text
    assert ModelCard(new_card(model, "me/fine", CardFacts(base_models=("x/y",)), training)).data.base_model == ["x/y"]


def test_the_table_of_parts_is_the_model_s(model):
    text = new_card(model, "me/fine")
    grid, codes = model.config.depth_config.grid_size, model.config.num_depth_codes
    assert f"{grid} x {grid} codes of {codes}" in text
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters" in text


def test_results_are_a_row_each(model):
    odd = replace(RESULT, dataset_name="a|b", metric_name=None, metric_value="20.0 ± 1.2")
    text = new_card(model, "me/fine", CardFacts(results=(RESULT, odd)))
    assert "| RefCOCO (val) | cIoU | 0.827 |" in text
    assert "| a\\|b (val) | ciou | 20.0 ± 1.2 |" in text


def test_the_code_of_the_card_runs(model, processor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("saved")
    processor.save_pretrained("saved")
    picture(50, 30).save("photo.jpg")
    code = re.search(r"```python\n(.*?)```", new_card(model, "me/fine"), re.DOTALL)[1]
    assert code.count('"me/fine"') == 2
    exec(code.replace("me/fine", "./saved"), {})
    assert "(30, 50)" in capsys.readouterr().out


def test_a_card_by_hand_keeps_its_words_and_its_metadata():
    assert revised_card(BY_HAND, "me/fine", CardFacts()) == BY_HAND
    revised = revised_card(BY_HAND, "me/fine", CardFacts(license="mit", datasets=("a/b",), results=(RESULT,)))
    card = ModelCard(revised)
    assert card.text == ModelCard(BY_HAND).text
    data = card.data.to_dict()
    assert (data["license"], data["datasets"], data["custom"], data["tags"]) == ("mit", ["a/b"], [1, 2], ["own"])
    assert data["model-index"] == eval_results_to_model_index("fine", [RESULT])


def test_results_join_the_others_and_replace_their_own():
    other = replace(RESULT, dataset_split="test")
    first = revised_card(BY_HAND, "me/fine", CardFacts(results=(RESULT, other)))
    better = replace(RESULT, metric_value=0.9, dataset_args={"samples": 10_834})
    again = ModelCard(revised_card(first, "me/other-name", CardFacts(results=(better,)))).data
    assert again.model_name == "fine"
    assert {result.dataset_split: result.metric_value for result in again.eval_results} == {"val": 0.9, "test": 0.827}
    assert len(again.eval_results) == 2


@pytest.mark.parametrize("block", ["a: [1", "- 1", "model-index:\n- name: x", "model-index: 3"])
def test_a_card_that_cannot_be_read(block):
    with pytest.raises(ValueError, match="metadata"):
        check_card(f"---\n{block}\n---\nwords")


@pytest.mark.parametrize(
    ("facts", "wrong"),
    [
        ({"license": "My own!"}, "My own!"),
        ({"base_models": ("a/b", "a/b/c")}, "a/b/c"),
        ({"datasets": ("a b",)}, "a b"),
        ({"languages": ("en", "English")}, "English"),
    ],
)
def test_facts_the_hub_would_refuse(facts, wrong):
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        CardFacts(**facts)


def test_results_as_a_model_index_and_as_a_list(tmp_path):
    index, flat = tmp_path / "index.yaml", tmp_path / "flat.yaml"
    other = replace(RESULT, metric_type="giou", metric_name=None, metric_value="1 ± 2")
    index.write_text(yaml.safe_dump({"model-index": eval_results_to_model_index("x", [RESULT, other])}))
    flat.write_text(yaml.safe_dump([{k: v for k, v in vars(r).items() if v is not None} for r in (RESULT, other)]))
    assert read_results(index) == read_results(flat) == (RESULT, other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[]",
        "[1]",
        "a: 1",
        "model-index: []",
        "model-index: [{name: x}]",
        "[{task_type: x}]",
        "{",
        "\x00",
        None,
    ],
)
def test_results_that_are_none(tmp_path, text):
    path = tmp_path / "card.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_results(path)


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.inf", "NaN", "nan ± 1", "null", "true", "[0.5, .nan]", "{a: NaN}"]
)
def test_a_metric_that_is_no_number_is_refused(tmp_path, value):
    """In a file of results as in the card that somebody has written."""
    path = tmp_path / "card.yaml"
    index = yaml.safe_dump({"model-index": eval_results_to_model_index("x", [RESULT])})
    path.write_text(index.replace("0.827", value))
    with pytest.raises(ValueError, match=r"the metric cIoU on RefCOCO is .*; expected a finite number"):
        read_results(path)
    with pytest.raises(ValueError, match=r"README\.md: the metric cIoU on RefCOCO"):
        revised_card(f"---\n{path.read_text()}---\nMine.\n", "me/fine", CardFacts())


def test_only_the_card_that_transformers_writes_is_replaced(model, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(BY_HAND)
    replace_default_card(card, model, "me/fine")
    assert card.read_text() == BY_HAND
