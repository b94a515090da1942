"""Plain and circular accuracy by hand and against a naive count."""

import numpy as np
import pytest

from perceptio_hf.evaluation.metrics.multiple_choice import INDEX_PERIOD, multiple_choice_accuracy

ROTATIONS = [["cat", "dog", "cow"], ["dog", "cow", "cat"], ["cow", "cat", "dog"]]


def test_a_question_counts_if_all_its_rotations_are_right():
    scores = multiple_choice_accuracy(
        ["A", "cat", "The answer is B", "B", "C.", "no idea"],
        ["A", "C", "B", "B", "A", "(C)"],
        choices=ROTATIONS * 2,
        index=[5, INDEX_PERIOD + 5, 2 * INDEX_PERIOD + 5, 6, INDEX_PERIOD + 6, 2 * INDEX_PERIOD + 6],
        category=["animals"] * 3 + ["counting"] * 3,
        l2_category=["perception"] * 6,
    )
    first = {"samples": 3, "questions": 1, "incomplete_questions": 0}
    animals = {"accuracy": 1.0, "circular_accuracy": 1.0, **first, "unparsable": 0}
    counting = {"accuracy": pytest.approx(1 / 3), "circular_accuracy": 0.0, **first, "unparsable": 1}
    everything = {
        "accuracy": pytest.approx(4 / 6),
        "circular_accuracy": 0.5,
        "samples": 6,
        "questions": 2,
        "incomplete_questions": 0,
        "unparsable": 1,
    }
    assert scores == {
        **everything,
        "by_category": {"animals": animals, "counting": counting},
        "by_l2_category": {"perception": everything},
    }


def test_same_as_a_naive_count():
    rng = np.random.default_rng(0)
    index = [question + turn * INDEX_PERIOD for question in range(40) for turn in range(4)]
    order = rng.permutation(len(index))
    index = [index[place] for place in order]
    right = rng.integers(0, 4, len(index))
    said = np.where(rng.random(len(index)) < 0.8, right, rng.integers(0, 4, len(index)))
    scores = multiple_choice_accuracy([f"({'ABCD'[k]})" for k in said], right.tolist(), index=index)
    circular = [all(said[k] == right[k] for k in range(160) if index[k] % INDEX_PERIOD == q) for q in range(40)]
    assert scores["accuracy"] == pytest.approx((said == right).mean())
    assert scores["circular_accuracy"] == pytest.approx(np.mean(circular)) and 0 < np.mean(circular) < 1


def test_without_rotations_there_is_no_circular_accuracy():
    for index in (None, [1, 2]):
        scores = multiple_choice_accuracy(["A", "B"], ["A", "A"], index=index)
        assert scores["accuracy"] == 0.5 and scores["circular_accuracy"] is None
        assert scores["questions"] == scores["incomplete_questions"] == 0 and scores["by_category"] == {}


def test_incomplete_questions_are_left_out_and_said():
    index = [1, INDEX_PERIOD + 1, 2 * INDEX_PERIOD + 1, 2, INDEX_PERIOD + 2]
    choices = [*ROTATIONS, *ROTATIONS[:2]]
    scores = multiple_choice_accuracy(["B", "A", "C", "A", "A"], ["A"] * 5, choices=choices, index=index)
    assert scores["circular_accuracy"] == 0.0 and scores["questions"] == 1 and scores["incomplete_questions"] == 1


def test_rows_with_and_without_choices():
    scores = multiple_choice_accuracy(["dog", "dog"], ["B", "B"], choices=[["cat", "dog"], None])
    assert scores["accuracy"] == 0.5 and scores["unparsable"] == 1


def test_bad_input_is_named():
    cases = {
        "no answers": dict(predictions=[], references=[]),
        "2 predictions, but 1 values of references": dict(predictions=["A", "B"], references=["A"]),
        "2 predictions, but 3 values of category": dict(
            predictions=["A", "B"], references=["A", "B"], category=["x"] * 3
        ),
        "row 1: 'C' is no right answer among 2": dict(
            predictions=["A", "B"], references=["A", "C"], choices=[["x", "y"]] * 2
        ),
        "row 0: answers are read among 2 to 8": dict(predictions=["A"], references=["A"], choices=[["x"]]),
        "rows 0 and 1 both have index 3": dict(predictions=["A", "B"], references=["A", "B"], index=[3, 3]),
        "row 1 has no index": dict(predictions=["A", "B"], references=["A", "B"], index=[3, None]),
        r"row 1: question 3 is in \('x', ''\) and in \('y', ''\)": dict(
            predictions=["A", "B"], references=["A", "B"], index=[3, INDEX_PERIOD + 3], category=["x", "y"]
        ),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            multiple_choice_accuracy(**arguments)
