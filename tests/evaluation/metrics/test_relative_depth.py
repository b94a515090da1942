"""Accuracy of named points, by hand and on the published answers."""

import json

import pytest

from perceptio_hf.evaluation.metrics.intervals import wilson_interval
from perceptio_hf.evaluation.metrics.relative_depth import relative_depth_accuracy


def test_hand_computed():
    texts = ["(A)", "Point B is closest.", "A or B", "D", "The answer is C"]
    scores = relative_depth_accuracy(texts, ["A", "(C)", "A", "D", 2], [3, 3, 3, 4, 4])
    assert scores == {
        "accuracy": 0.6,
        "accuracy_interval": wilson_interval(3, 5),
        "samples": 5,
        "unparsable": 1,
        "accuracy_3": pytest.approx(1 / 3),
        "accuracy_3_interval": wilson_interval(1, 3),
        "samples_3": 3,
        "unparsable_3": 1,
        "accuracy_4": 1.0,
        "accuracy_4_interval": wilson_interval(2, 2),
        "samples_4": 2,
        "unparsable_4": 0,
    }


def test_without_numbers_of_points():
    scores = relative_depth_accuracy(["E", "F"], ["E", "A"])
    assert scores["accuracy"] == 0.5 and scores["unparsable"] == 1
    assert set(scores) == {"accuracy", "accuracy_interval", "samples", "unparsable"}
    mixed = relative_depth_accuracy(["A", "B"], ["A", "B"], [3, None])
    assert mixed["samples"] == 2 and mixed["samples_3"] == 1


def test_a_letter_beyond_the_points_is_no_answer():
    scores = relative_depth_accuracy(["D"], ["A"], [3])
    assert scores["accuracy"] == 0.0 and scores["unparsable"] == 1


def test_confidence_widens():
    low, high = relative_depth_accuracy(["A"] * 9, ["A"] * 9, confidence=0.99)["accuracy_interval"]
    assert (low, high) == wilson_interval(9, 9, 0.99) and low < wilson_interval(9, 9)[0]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no answers"):
        relative_depth_accuracy([], [])
    with pytest.raises(ValueError, match="2 predictions, 1 references and 2"):
        relative_depth_accuracy(["A", "A"], ["A"])
    with pytest.raises(ValueError, match="sample 1: 'D' is no right answer among 3 choices"):
        relative_depth_accuracy(["A", "A"], ["A", "D"], [3, 3])
    with pytest.raises(ValueError, match="sample 0: answers are read among 2 to 8"):
        relative_depth_accuracy(["A"], ["A"], [1])


def test_the_published_answers_are_all_right(shared):
    texts, points = [], []
    for number in (3, 4):
        lines = (shared / f"hardblink/answers/blink_{number}pointscenter_answers.jsonl").read_text().splitlines()
        texts += [json.loads(line)["text"] for line in lines]
        points += [number] * len(lines)
    scores = relative_depth_accuracy(texts, texts, points)
    assert scores["accuracy"] == scores["accuracy_3"] == scores["accuracy_4"] == 1.0
    assert scores["samples_3"] == scores["samples_4"] == 124 and scores["unparsable"] == 0
