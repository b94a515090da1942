"""Answers of other engines: what is read, what is refused, and that masks and depth are those of our own generation."""

import json

import numpy as np
import pytest
import torch
from helpers import picture

from perceptio_hf import PerceptioProcessor
from perceptio_hf.evaluation.run.answering import encode_chats
from perceptio_hf.evaluation.run.engine_answers import AnswerReader, EngineAnswer, Refused, decode_answers
from perceptio_hf.tokens import depth_span


@pytest.fixture(scope="module")
def reader(model, processor) -> AnswerReader:
    return AnswerReader(model, processor, "/pictures")


def line(**values) -> bytes:
    return json.dumps({"picture": "a.png", "question": "Where?", **values}).encode() + b"\n"


def refusal(reader, raw: bytes) -> str:
    (row,) = reader.read([raw])
    assert isinstance(row, Refused) and row.line == 1
    return row.reason


def test_ids_and_text_are_the_same_answer(reader, processor):
    said = f"[SEG]{depth_span([3] * 16)} the red ball"
    ids = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.eos_token_id
    lines = [
        line(token_ids=ids),
        b"\n",
        line(token_ids=[*ids, end, 0, 0]),
        line(text=said),
        line(text=f"{said}<|im_end|>"),
    ]
    rows = reader.read(lines)
    assert [row.line for row in rows] == [1, 3, 4, 5]
    assert {row.ids for row in rows} == {tuple(ids)}
    assert {(row.pictures, row.question) for row in rows} == {(("/pictures/a.png",), "Where?")}


def test_text_that_comes_along_may_lack_special_tokens_and_spaces(reader, processor):
    said = f"[SEG]{depth_span([3] * 16)} the red ball"
    ids = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    ids.append(processor.tokenizer.eos_token_id)
    for text in (said, "the red ball", "[SEG] the red ball <|im_end|>"):
        assert isinstance(reader.read([line(token_ids=ids, text=text)])[0], EngineAnswer)


def test_addresses_stay_and_several_pictures_keep_their_order(reader):
    rows = reader.read([line(pictures=["b.png", "/c.png", "https://host/d.png"], text="")])
    assert rows[0].pictures == ("/pictures/b.png", "/c.png", "https://host/d.png") and rows[0].ids == ()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"token_ids": [5, 151673]}, "151673, but the vocabulary has"),
        ({"token_ids": [5, -1]}, "-1, but the vocabulary"),
        ({"token_ids": [5, 1.0]}, "no list of integers"),
        ({"token_ids": [True]}, "no list of integers"),
        ({"token_ids": "5 6"}, "no list of integers"),
        ({"token_ids": [40, 41, 42], "text": "Something else entirely"}, "another vocabulary"),
        ({"text": "a <img> b"}, "(<img>), which no answer holds"),
        ({"text": "<|im_start|>user"}, "(<|im_start|>), which no answer holds"),
        ({"text": "<IMG_CONTEXT>"}, "is the prompt among them"),
        ({"text": 3}, "neither `token_ids`"),
        ({}, "neither `token_ids`"),
        ({"text": "a", "question": " "}, "no `question`"),
        ({"text": "a", "picture": ""}, "no `picture`"),
        ({"text": "a", "pictures": []}, "no `picture`"),
        ({"text": "a", "pictures": "a.png"}, "no `picture`"),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_a_reason(reader, values, says):
    assert says in refusal(reader, line(**values))


NO_OBJECTS = [b"{", b"[1]", b'"a"', b"\xff\xfe", b"[" * 5000, b'{"picture": "\\udce9", "question": "?", "text": ""}']


@pytest.mark.parametrize("raw", NO_OBJECTS, ids=range(6))
def test_a_line_that_is_no_object_is_refused(reader, raw):
    assert "it is" in refusal(reader, raw)


def test_a_byte_order_mark_is_no_obstacle(reader):
    assert isinstance(reader.read([b"\xef\xbb\xbf" + line(text="a")])[0], EngineAnswer)


def generated(model, processor: PerceptioProcessor, spatial: str, sample: bool):
    """Our own answers about one and about two pictures, and the same as answers of an engine."""
    shown = [[picture(50, 40)], [picture(30, 60, seed=1), picture(seed=2)]]
    chats = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": item} for item in row), {"type": "text", "text": "Where?"}],
            }
        ]
        for row in shown
    ]
    inputs = encode_chats(processor, chats)
    torch.manual_seed(5)
    ours = model.generate(**inputs, spatial=spatial, do_sample=sample, max_new_tokens=70, return_dict_in_generate=True)
    responses = ours.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    eos = processor.tokenizer.eos_token_id
    ids = [tuple(row[: row.index(eos)] if eos in row else row) for row in responses]
    answers = [
        EngineAnswer(number, ("a",) * len(row), "Where?", said)
        for number, (row, said) in enumerate(zip(shown, ids, strict=True), 1)
    ]
    return processor.post_process_spatial(ours), answers, shown


@pytest.mark.parametrize("spatial", ["auto", "seg", "depth", "seg+depth"])
@pytest.mark.parametrize("sample", [False, True])
def test_masks_and_depth_are_those_of_our_own_generation(model, processor, spatial, sample):
    ours, answers, shown = generated(model, processor, spatial, sample)
    together = decode_answers(model, processor, answers, shown)
    alone = [decode_answers(model, processor, [answer], [row])[0] for answer, row in zip(answers, shown, strict=True)]
    for read in (together, alone):
        for mine, theirs in zip(ours, read, strict=True):
            assert (mine.text, mine.well_formed) == (theirs.text, theirs.well_formed) and len(mine.pictures) == len(
                theirs.pictures
            )
            for one, other in zip(mine.pictures, theirs.pictures, strict=True):
                assert one.depth_codes == other.depth_codes and one.phrases == other.phrases
                np.testing.assert_allclose(other.mask_scores, one.mask_scores, atol=1e-4)
                assert (one.masks == other.masks).mean() > 0.999 if one.masks.size else not other.masks.size
                if spatial in ("depth", "seg+depth"):
                    np.testing.assert_allclose(other.depth, one.depth, atol=1e-4)
                    np.testing.assert_allclose(other.depth_confidence, one.depth_confidence, atol=1e-4)
    assert spatial not in ("seg", "seg+depth") or all(len(answer.masks) for answer in together)


@pytest.mark.parametrize(
    "said", ["<DEPTH_START><DEPTH_3>", "<DEPTH_START> far", "<DEPTH_3> far", f"{depth_span([1] * 15)}"]
)
def test_a_broken_span_is_flagged_and_has_no_depth(model, processor, reader, said):
    whole = f"[SEG]{depth_span([3] * 16)} near"
    rows = reader.read([line(text=whole), line(text=said), line(text="plain words")])
    read = decode_answers(model, processor, rows, [[picture()]] * 3)
    assert [answer.well_formed for answer in read] == [True, False, True]
    assert [answer.depth is not None for answer in read] == [True, False, False]


def test_codes_spelled_by_ordinary_tokens_are_no_codes(model, processor, reader):
    """What a grammar of characters lets through; by its ids the span is broken."""
    tokenizer = processor.tokenizer
    ids = tokenizer(depth_span([3] * 16), add_special_tokens=False)["input_ids"]
    spelled = [token for part in "<DEPTH_3>" for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    ids[4:5] = spelled
    assert tokenizer.decode(ids) == depth_span([3] * 16)
    rows = reader.read([line(token_ids=ids)])
    assert not decode_answers(model, processor, rows, [[picture()]])[0].well_formed
