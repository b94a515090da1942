"""What answers are worth: read by rule, scored one by one, and all together as the metrics do it."""

from dataclasses import replace

import benchmark_helpers
import numpy as np
import pytest

from perceptio_hf import SpatialAnswer
from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.data.run_length import decode_mask, encode_mask
from perceptio_hf.evaluation.metrics.depth import depth_metrics
from perceptio_hf.evaluation.metrics.multiple_choice import multiple_choice_accuracy
from perceptio_hf.evaluation.metrics.relative_depth import relative_depth_accuracy
from perceptio_hf.evaluation.metrics.segmentation import referring_segmentation
from perceptio_hf.evaluation.run.scoring import (
    baselines,
    depth_figures,
    headline,
    read_choice,
    score_answer,
    total_scores,
)
from perceptio_hf.processing.processing_perceptio import PictureGeometry

POINTS = {"answer": "B", "choices": ["A", "B", "C"], "points": 3}


def answered(text: str = "", masks=None, depth=None, codes=None) -> SpatialAnswer:
    masks = np.zeros((0, 4, 4), bool) if masks is None else masks
    return SpatialAnswer(text, (PictureGeometry(masks, np.ones(len(masks)), depth, codes),))


def records(benchmark, answers) -> list[dict]:
    pairs = zip(benchmark.samples, answers, strict=True)
    return [score_answer(benchmark.task, sample, answer) | {"target": sample.target} for sample, answer in pairs]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A p27 d21 B p03 d09: B", "B"),
        ("A p27 B p03 C p104: C.", "C"),
        ("A p27 d21 B p03 d09: none of them", None),
        ("B", "B"),
        ("The answer is (C)", "C"),
        ("A p27 d21 B p03 d09", None),
        ("Options A: B", None),
        ("A p27: D", None),
        ("", None),
    ],
)
def test_letters_are_read_behind_steps_in_words(text, letter):
    assert read_choice("relative_depth", POINTS, text) == letter


def test_points_score_as_the_metric_does():
    benchmark = benchmark_helpers.points(7)
    texts = ["A", "A p00 d01 B p03 d05: B", "no idea", "C", "(B)", "A", "The answer is A"]
    found = records(benchmark, map(answered, texts))
    assert [record["read"] for record in found] == ["A", "B", None, "C", "B", "A", "A"]
    assert [record["score"] for record in found] == [1, 1, 0, 0, 1, 0, 1]
    scores = total_scores("relative_depth", found)
    plain = ["A", "B", "no idea", "C", "(B)", "A", "The answer is A"]
    letters = [sample.target["answer"] for sample in benchmark.samples]
    expected = relative_depth_accuracy(plain, letters, [3] * 7)
    assert {name: scores[name] for name in expected} == expected
    assert scores["accuracy"] == pytest.approx(4 / 7) == np.mean([record["score"] for record in found])
    assert scores["unparsable"] == 1 and headline("relative_depth", scores) == "accuracy"


def test_chance_and_majority_by_number_of_points():
    targets = [("A", 3), ("A", 3), ("B", 3), ("C", 4), ("D", 4), ("D", 4), ("D", 4)]
    rows = [{"target": {"answer": answer, "choices": list("ABCD")[:count]}} for answer, count in targets]
    found = baselines("relative_depth", rows)
    assert found["chance"] == {"accuracy": pytest.approx((3 / 3 + 4 / 4) / 7), "accuracy_3": 1 / 3, "accuracy_4": 1 / 4}
    assert found["majority"] == {"accuracy": pytest.approx(5 / 7), "accuracy_3": 2 / 3, "accuracy_4": 3 / 4}
    assert set(baselines("multiple_choice", rows)["chance"]) == {"accuracy"}
    assert baselines("depth", rows) == {}


def test_choices_score_plain_and_circular():
    benchmark = benchmark_helpers.choices()
    # Row by row the choices are turned by one more: red green blue, green blue red, blue red green.
    texts = ["A", "green", "C", "C", "red", "B", "B", "green", "it is A"]
    found = records(benchmark, map(answered, texts))
    assert [record["read"] for record in found] == ["A", "B", "C", "C", "C", "B", "B", "C", "A"]
    scores = total_scores("multiple_choice", found)
    targets = [sample.target for sample in benchmark.samples]
    expected = multiple_choice_accuracy(
        texts,
        [target["answer"] for target in targets],
        choices=[target["texts"] for target in targets],
        index=[target["index"] for target in targets],
        category=["colour"] * 9,
        l2_category=["attributes"] * 9,
    )
    assert {name: scores[name] for name in expected} == expected
    assert scores["accuracy"] == pytest.approx(8 / 9) and scores["circular_accuracy"] == pytest.approx(2 / 3)
    assert headline("multiple_choice", scores) == "circular_accuracy"
    assert headline("multiple_choice", scores | {"circular_accuracy": None}) == "accuracy"


def test_masks_of_one_answer_count_together_against_all_that_is_referred_to():
    benchmark = benchmark_helpers.masks(3)
    answers, overlaps, unions = [], [], []
    for sample in benchmark.samples:
        size = tuple(sample.target["size"])
        rng = np.random.default_rng(size[0])
        masks = rng.random((2, *size)) < 0.3
        true = np.zeros(size, bool)
        for mask in sample.target["masks"]:
            true |= decode_mask(mask)
        answers.append(answered("Here it is.", masks))
        overlaps.append((masks.any(0) & true).sum())
        unions.append((masks.any(0) | true).sum())
    found = records(benchmark, answers)
    scores = total_scores("referring_segmentation", found)
    assert scores["ciou"] == pytest.approx(sum(overlaps) / sum(unions))
    assert scores["giou"] == pytest.approx(np.mean(np.array(overlaps) / np.array(unions)))
    assert [record["pixels"][0] for record in found] == overlaps
    assert scores["no_target_accuracy"] == 0.0
    again = referring_segmentation(
        [record["mask"] for record in found],
        [
            sample.target["masks"][0] if sample.target["masks"] else encode_mask(np.zeros(sample.target["size"], bool))
            for sample in benchmark.samples
        ],
    )
    assert {name: scores[name] for name in again} == again


def test_no_mask_is_right_where_nothing_is_meant():
    benchmark = benchmark_helpers.masks(2)
    answers = [answered("none", np.zeros((0, *sample.target["size"]), bool)) for sample in benchmark.samples]
    assert [record["score"] for record in records(benchmark, answers)] == [0.0, 1.0]
    assert total_scores("referring_segmentation", records(benchmark, answers))["no_target_accuracy"] == 1.0


def test_a_mask_of_another_size_names_the_sample():
    sample = benchmark_helpers.masks(2).samples[0]
    with pytest.raises(ValueError, match=r"masks 0.*4 x 4"):
        score_answer("referring_segmentation", sample, answered("x", np.ones((1, 4, 4), bool)))


def test_depth_is_compared_in_metres_where_they_are_known():
    truth = benchmark_helpers.true_depth(1)
    depth = np.random.default_rng(0).random(truth.relative.shape).astype(np.float32)
    figures = depth_figures(depth, truth)
    expected = depth_metrics(depth, truth.metric)
    assert {name: figures[name] for name in expected} == expected
    relative = DepthMap(truth.relative, truth.valid)
    assert depth_figures(depth, relative) == {"relative_mae": figures["relative_mae"]}
    # An affine change of the true relative depth is no error; a larger map is compared at the truth's size.
    assert depth_figures(0.2 + 0.5 * truth.relative, relative)["relative_mae"] < 1e-6
    large = np.kron(truth.relative, np.ones((2, 2), np.float32))
    assert depth_figures(large, relative)["relative_mae"] < 0.03


def test_no_depth_counts_as_the_same_depth_everywhere():
    truth = benchmark_helpers.true_depth(2)
    mean = np.abs(truth.relative[truth.valid].mean() - truth.relative[truth.valid]).mean()
    assert depth_figures(None, truth)["relative_mae"] == pytest.approx(mean)
    benchmark = benchmark_helpers.depths(2)
    found = records(benchmark, [answered(), answered(depth=benchmark_helpers.true_depth(1).relative, codes=[1])])
    scores = total_scores("depth", found)
    assert (scores["samples"], scores["without_depth"]) == (2, 1)
    assert scores["delta1"] == pytest.approx(np.mean([record["metrics"]["delta1"] for record in found]))
    assert headline("depth", scores) == "delta1" and headline("depth", {"relative_mae": 0.1}) == "relative_mae"
    assert found[1]["score"] > 0.99 > found[0]["score"]


def test_nothing_answered_has_no_scores():
    with pytest.raises(ValueError, match="no answers"):
        total_scores("depth", [])
    sample = replace(benchmark_helpers.depths(1).samples[0], depth=None)
    with pytest.raises(ValueError, match=r"depth 0: .*no depth"):
        score_answer("depth", sample, answered())


def test_depth_that_was_not_turned_with_its_picture_is_refused():
    """The answer stands as the picture is shown, 30 x 40; the map lies as the sensor stored it."""
    truth = DepthMap.from_metric(1 + np.arange(30 * 40, dtype=np.float32).reshape(30, 40))
    sample = benchmark_helpers.depths(1).samples[0]
    lying = replace(sample, depth=replace(sample.depth, content=lambda: truth))
    with pytest.raises(ValueError, match=r"depth 0: its depth map is 40 x 30 and its picture, shown upright, 30 x 40"):
        score_answer("depth", lying, answered(depth=np.rot90(truth.relative).copy(), codes=[1]))
    assert score_answer("depth", lying, answered(depth=truth.relative, codes=[1]))["score"] == 1
