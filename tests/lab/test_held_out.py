"""Scores on held-out scenes: right answers score 1, wrong ones what the definition says."""

from types import SimpleNamespace

import numpy as np
import pytest

from perceptio_hf.data.depth_maps import relative_from_metric
from perceptio_hf.lab.held_out import answer_items, held_out_items, score_items
from perceptio_hf.world import HELD_OUT_SEED


@pytest.fixture(scope="module")
def items():
    return held_out_items(40)


def perfect(item):
    masks = np.stack(
        [item.scene.instances == target for target in item.question.targets] or [np.zeros((128, 128), bool)]
    )
    return SimpleNamespace(
        text=item.question.answer,
        masks=masks if item.question.targets else masks[:0],
        depth=relative_from_metric(item.scene.depth),
        well_formed=True,
    )


def test_items_are_held_out_and_of_every_kind(items):
    assert min(item.scene.seed for item in items) >= HELD_OUT_SEED
    kinds = {item.question.kind for item in items}
    assert kinds == {"refer", "count", "attribute", "closer_object", "closest_point", "depth"}
    drawn = [item for item in items if item.question.points]
    assert drawn and all((item.picture != item.scene.image).any() for item in drawn)


def test_perfect_answers(items):
    scores = score_items(items, [perfect(item) for item in items])
    for name in ("miou", "ciou", "count", "attribute", "closer_object", "closest_point", "delta1", "well_formed"):
        assert scores[name] == pytest.approx(1.0), name
    assert scores["absrel"] < 1e-3


def test_empty_answers(items):
    nothing = SimpleNamespace(text="", masks=np.zeros((0, 128, 128), bool), depth=None, well_formed=False)
    scores = score_items(items, [nothing] * len(items))
    for name in ("miou", "ciou", "count", "attribute", "closer_object", "closest_point", "delta1", "well_formed"):
        assert scores[name] == 0.0, name
    assert scores["absrel"] == 1.0
    assert 0 < scores["count_majority"] < 0.5 and 0.4 < scores["closer_object_majority"] < 0.8


def test_a_model_s_answers_come_in_order(model, processor, items):
    few = items[:5]
    answers = answer_items(model, processor, few, batch_size=2, spatial="seg+depth", max_new_tokens=30)
    assert len(answers) == 5
    alone = answer_items(model, processor, few[3:4], spatial="seg+depth", max_new_tokens=30)[0]
    assert alone.depth_codes == answers[3].depth_codes and alone.text == answers[3].text
