"""The document of a run: what it records, its weights' digest, and its results as a model card has them."""

import copy
import json
from pathlib import Path

import benchmark_helpers
import pytest
import torch
import yaml
from helpers import random_model
from huggingface_hub import ModelCard, ModelCardData

from perceptio_hf.evaluation.benchmarks import BENCHMARKS
from perceptio_hf.evaluation.report.hub_results import card_results, check_card, write_card
from perceptio_hf.evaluation.run.runner import RunSettings, run_benchmark
from perceptio_hf.evaluation.run.summary import ModelFacts, build_summary, digest_weights
from perceptio_hf.hub.card import read_results


@pytest.fixture(scope="module")
def facts(model):
    return ModelFacts.of(model, "models/random")


@pytest.fixture(scope="module")
def summaries(model, processor, facts, tmp_path_factory) -> dict[str, dict]:
    """One for each kind of benchmark, as JSON gives it back."""
    found = {}
    for kind, options in (
        ("points", {"replacements": ("random",)}),
        ("masks", {}),
        ("depths", {}),
        ("choices", {}),
    ):
        benchmark = getattr(benchmark_helpers, kind)()
        settings = RunSettings(benchmark.spatial, 24, batch_size=4, **options)
        run = run_benchmark(model, processor, benchmark, tmp_path_factory.mktemp(kind), settings, weights="w")
        summary = build_summary(benchmark, facts, run, path="somewhere", limit=7)
        found[kind] = json.loads(json.dumps(summary, allow_nan=False))
        assert found[kind] == summary, "nothing changes on its way through JSON"
    return found


def test_it_records_all_that_scores_depend_on(summaries, facts, model):
    for kind, summary in summaries.items():
        benchmark = getattr(benchmark_helpers, kind)()
        assert summary["data"] == {"path": "somewhere", "sha256": benchmark.data_hash, "limit": 7}
        assert summary["samples"] == len(benchmark.samples)
        assert summary["model"]["weights_sha256"] == digest_weights(model) == facts.weights_sha256
        assert summary["generation"] == {
            "spatial": benchmark.spatial,
            "max_new_tokens": 24,
            "decoding": "greedy",
            "batch_size": 4,
        }
        assert set(summary["versions"]) == {"perceptio_hf", "transformers", "torch", "numpy", "python"}
        assert summary["prompt"]["template"] and summary["prompt"]["source"]
        headline = summary["headline"]
        assert headline["value"] == summary["scores"][headline["metric"]]
        assert summary["time"]["answered"] == summary["samples"]
        assert summary["time"]["samples_per_second"] == pytest.approx(
            summary["samples"] / summary["time"]["seconds"], rel=0.1
        )
    assert summaries["masks"]["headline"]["metric"] == "ciou"
    assert summaries["choices"]["headline"]["metric"] == "circular_accuracy"
    assert set(summaries["points"]["baselines"]) == {"chance", "majority"} and not summaries["depths"]["baselines"]
    assert set(summaries["points"]["replacement"]["replacements"]) == {"identity", "random"}
    assert summaries["points"]["replacement"]["published"]["accuracy_percent"]["LLaVA-13B"]["oracle"] == 78.8


def test_the_digest_tells_weights_from_one_another(model, processor, tiny_folder):
    from transformers import AutoModel

    digest = digest_weights(model)
    assert digest == digest_weights(AutoModel.from_pretrained(tiny_folder)), "saved and loaded is the same"
    assert digest != digest_weights(random_model(processor, seed=1))
    assert digest != digest_weights(copy.deepcopy(model).to(torch.bfloat16))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight[-1, -1] += 1e-6
    assert digest != digest_weights(changed)


def test_every_benchmark_has_results_for_a_card(summaries):
    kinds = {
        "referring_segmentation": "masks",
        "relative_depth": "points",
        "depth": "depths",
        "multiple_choice": "choices",
    }
    for name, info in BENCHMARKS.items():
        results = card_results(summaries[kinds[info.task]] | {"benchmark": name})
        data = ModelCardData(model_name="m", eval_results=results)
        ModelCard.from_template(data, template_str="---\n{{ card_data }}\n---\n")  # refuses what the Hub would
        assert results[0].dataset_config == name and all(result.metric_value >= 0 for result in results)


def test_a_card_collects_benchmarks_and_keeps_the_newest(summaries, tmp_path):
    path = tmp_path / "made" / "card.yaml"
    for kind in ("masks", "points", "masks"):
        write_card(path, summaries[kind])
    newer = copy.deepcopy(summaries["points"])
    newer["scores"]["accuracy"] = 0.75
    newer["samples"] = 99
    write_card(path, newer)
    results = read_results(path)  # what `perceptio push --eval-results` reads
    found = {(item.dataset_config, item.metric_type): item.metric_value for item in results}
    assert len(found) == len(results)
    assert found["world-closest", "accuracy"] == 0.75
    assert found["world-refer", "ciou"] == round(summaries["masks"]["scores"]["ciou"], 4)
    newer["scores"] = {name: value for name, value in newer["scores"].items() if name == "accuracy"}
    newer["samples"] = 2
    write_card(path, newer)  # of fewer samples, and without what these cannot tell
    points = [item for item in read_results(path) if item.dataset_config == "world-closest"]
    assert [(item.metric_type, item.dataset_args["samples"]) for item in points] == [("accuracy", 2)]
    document = yaml.safe_load(path.read_text())
    assert document["model-index"][0]["name"] == "random"


def test_results_of_another_model_or_another_file_are_not_overwritten(summaries, tmp_path):
    path = tmp_path / "card.yaml"
    write_card(path, summaries["masks"])
    other = copy.deepcopy(summaries["points"])
    other["model"]["name"] = "elsewhere/other"
    for refuse in (lambda: write_card(path, other), lambda: check_card(path, "elsewhere/other")):
        with pytest.raises(ValueError, match=r"the model random, not other.*--overwrite"):
            refuse()
    check_card(path, "random")
    again = copy.deepcopy(summaries["points"])  # trained again, under the same name
    again["model"]["weights_sha256"] = "0" * 64
    for refuse in (lambda: write_card(path, again), lambda: check_card(path, "random", "0" * 64)):
        with pytest.raises(ValueError, match=r"another random, with other weights; name another file"):
            refuse()
    write_card(path, other, overwrite=True)
    assert {item.dataset_config for item in read_results(path)} == {"world-closest"}
    assert len(read_results(path)) == len(card_results(other))
    path.write_text("recipe: 1")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="no card of results, so it is not replaced"):
            write_card(path, other, overwrite=overwrite)
    assert path.read_text() == "recipe: 1"
    assert [item.name for item in tmp_path.iterdir()] == ["card.yaml"]


def test_the_guide_names_every_field_and_replacement(summaries):
    from perceptio_hf.evaluation.replacement.token_replacement import REPLACEMENTS

    guide = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    for word in (*REPLACEMENTS, *(f"`{field}`" for field in summaries["points"] if field != "format")):
        assert word in guide, word
