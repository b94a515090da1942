"""Which words a mask was written for."""

import pytest
import torch
from helpers import chat, encode, picture

from perceptio_hf.processing.phrases import joined, phrases_of

CASES = {
    "the cat [SEG] and the dog [SEG]": ["the cat", "the dog"],
    "The cat[SEG], the big dog[SEG] and a bird [SEG].": ["The cat", "the big dog", "a bird"],
    "<p> A cat </p> [SEG] sits beside <p> a dog </p> [SEG].": ["A cat", "a dog"],  # Sa2VA and GLaMM
    "<p>Two cats</p>[SEG][SEG] and <p>a mat</p> , [SEG]": ["Two cats", "Two cats", "a mat"],
    "the two cats [SEG] and [SEG]": ["the two cats"] * 2,
    "It is [SEG].": [None],
    "Sure, [SEG].": [None],
    "Sure, the segmentation result is [SEG].": [None],
    "[SEG] Here is the mug.": [None],
    "[SEG][SEG] The red mug.": [None, None],
    "1. cat [SEG]\n2. dog [SEG]": ["cat", "dog"],
    "- cat: [SEG]\n- dog: [SEG]": ["cat", "dog"],
    "cat: [SEG], dog: [SEG]": ["cat", "dog"],
    "There is a lot to see. The (red) ball ([SEG])": ["The (red) ball"],
    "Image-2: [SEG] and Image-1: [SEG]": [None, None],
    "Image-2: the dog [SEG] Image-1: the cat [SEG]": ["the dog", "the cat"],
    "the cat [SEG]\n[SEG]": ["the cat", None],  # the line end stands for a depth span as well
    "猫 [SEG]，狗 [SEG]": ["猫", "狗"],
    "": [],
}


@pytest.mark.parametrize(("text", "phrases"), CASES.items())
def test_phrases(text, phrases):
    assert phrases_of(text.split("[SEG]")[:-1]) == phrases


def answer(model, processor, response: str, *pictures):
    """What is read from `response`, written by another engine about the pictures."""
    inputs = encode(processor, chat(*pictures))
    ids = processor.tokenizer(response, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.decode_spatial(torch.cat([inputs.input_ids, ids], 1), **inputs)
    return processor.post_process_spatial(out)[0]


def test_answers_have_one_for_each_mask(model, processor):
    read = answer(model, processor, "the cat [SEG] and the dog [SEG]", picture())
    assert read.phrases == ["the cat", "the dog"] and len(read.masks) == 2
    assert read.text == "the cat and the dog"
    read = answer(model, processor, "<p> the cat </p> [SEG] and <p> the dog </p> [SEG]", picture())
    assert read.phrases == ["the cat", "the dog"] and read.text == "the cat and the dog"


def test_each_picture_has_those_of_its_own_masks(model, processor):
    response = "Image-2: the dog [SEG] and its tail [SEG] Image-1: the cat [SEG]"
    read = answer(model, processor, response, picture(), picture(20, 30))
    assert [item.phrases for item in read.pictures] == [["the cat"], ["the dog", "its tail"]]
    assert [item.masks.shape for item in read.pictures] == [(1, 40, 48), (2, 30, 20)]
    assert read.phrases == ["the cat"]


def test_words_that_spell_the_token_are_no_mask(model, processor):
    inputs = encode(processor, chat(picture()))
    words = processor.tokenizer
    ids = [*words("the [SE")["input_ids"], *words("G] sign ")["input_ids"], processor.seg_token_id]
    out = model.decode_spatial(torch.cat([inputs.input_ids, torch.tensor([ids])], 1), **inputs)
    read = processor.post_process_spatial(out)[0]
    assert len(read.masks) == len(read.phrases) == 1 and "sign" in read.phrases[0]


def test_without_mask_pixels_there_are_neither(model, processor):
    inputs = encode(processor, chat(picture()))
    ids = torch.tensor([[processor.seg_token_id]])
    inputs.pop("mask_pixel_values")
    read = processor.post_process_spatial(model.decode_spatial(torch.cat([inputs.input_ids, ids], 1), **inputs))[0]
    assert len(read.masks) == 0 and read.phrases == []


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["the cat ", " and the dog ", "."], "the cat and the dog ."),
        (["Here it is.", "It is the ball."], "Here it is. It is the ball."),
        (["the ball", "the cone", "."], "the ball the cone."),
        (["It is ", "."], "It is ."),
        (["x  =  1 ", ""], "x  =  1 "),
        (["the dog", "'s ear"], "the dog's ear"),
        (["a (", "mask)"], "a (mask)"),
        (["第一只猫", "和狗"], "第一只猫和狗"),
        (["Here:\n", "A"], "Here:\nA"),
        ([], ""),
    ],
)
def test_words_on_both_sides_of_a_token(pieces, text):
    assert joined(pieces) == text
