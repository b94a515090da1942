"""Closest points asked fairly, and spans replaced before the answer."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.lab import closest_points as closest
from perceptio_hf.lab.closest_points import REPLACEMENTS, answer_closest, token_replacement
from perceptio_hf.lab.held_out import conclusion
from perceptio_hf.world.fair import fair_sets


@pytest.fixture(scope="module")
def embedded():
    folder = perceptio_hf.tiny_checkpoint()
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def sets():
    return fair_sets(3, 24, scenes=200)


@pytest.fixture(scope="module")
def answered(embedded, sets):
    return answer_closest(*embedded, sets, batch_size=10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A p27 d21 B p03 d09: A", "A"),
        ("B", "B"),
        (" B. ", "B"),
        ("p12 d03 p40 d10: the red ball.", "the red ball"),
        ("", ""),
    ],
)
def test_conclusions(text, expected):
    assert conclusion(text) == expected


def test_the_unchanged_span_gives_the_answers_of_generate(embedded, sets, answered):
    texts, codes = answered
    scores = token_replacement(*embedded, sets, codes, batch_size=7)
    right = np.mean([text == item.answer for text, item in zip(texts, sets, strict=True)])
    assert set(scores) == {f"trt_{name}" for name in REPLACEMENTS}
    assert scores["trt_own"] == pytest.approx(right)
    assert all(0 <= score <= 1 for score in scores.values())


def test_words_alone_have_no_codes(embedded, sets):
    texts, codes = answer_closest(*embedded, sets[:3], spatial="none")
    assert codes is None and len(texts) == 3


def test_an_unknown_replacement(embedded, sets, answered):
    with pytest.raises(ValueError, match="noise"):
        token_replacement(*embedded, sets, answered[1], replacements=["noise"])


def test_true_codes_are_nearer_to_the_own_ones_than_chance(embedded, sets, answered):
    own = answered[1]
    oracle = closest._true_codes(embedded[0], sets)
    chance = own.flatten()[torch.randperm(own.numel(), generator=torch.Generator().manual_seed(0))].view_as(own)
    assert oracle.shape == own.shape
    assert (oracle == own).float().mean() > 2 * (chance == own).float().mean()
