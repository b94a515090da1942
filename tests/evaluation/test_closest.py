"""Closest points asked fairly, and spans replaced before the answer."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.data.world.fair import fair_sets
from perceptio_hf.evaluation import closest
from perceptio_hf.evaluation.closest import REPLACEMENTS, answer_closest, token_replacement
from perceptio_hf.evaluation.scenes import conclusion


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


def test_what_takes_the_place_of_codes(embedded, sets, answered):
    own = answered[1]
    oracle = closest._true_codes(embedded[0], sets)
    spans = closest._replaced(own, oracle, REPLACEMENTS, torch.Generator().manual_seed(0))
    assert all(span.shape == own.shape for span in spans.values())
    assert torch.equal(spans["own"], own) and torch.equal(spans["oracle"], oracle)
    assert (spans["first_repeat"] == own[:, :1]).all()
    rows = {tuple(row) for row in own.tolist()}
    assert all(tuple(row) in rows for row in spans["other_image"].tolist())
    assert not (spans["other_image"] == own).all(1).any()
    assert set(spans["random"].flatten().tolist()) <= set(oracle.flatten().tolist())
    # The oracle is nearer to what the model sees than codes drawn by chance.
    assert (spans["oracle"] == own).float().mean() > 2 * (spans["random"] == own).float().mean()
    with pytest.raises(ValueError, match="noise"):
        closest._replaced(own, oracle, ["noise"], torch.Generator())
