"""Events of a stream, put together, are the answer; errors and leaving listeners end the generation."""

import copy
import threading

import pytest
import torch
from helpers import chat, encode, picture

from perceptio_hf import SpatialStreamer
from perceptio_hf.modeling.spans import spatial_loop
from perceptio_hf.processing.streaming import (
    AnswerEvent,
    DepthRowEvent,
    MaskEvent,
    StreamClosed,
    TextEvent,
    stream_answer,
)
from perceptio_hf.tokens import depth_span


@pytest.fixture(scope="module")
def inputs(processor):
    return encode(processor, chat(picture(), text="Segment the red ball."))


@pytest.mark.parametrize("decoding", ["parallel", "sequential"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": True, "temperature": 1.7}])
@pytest.mark.parametrize("spatial", ["auto", "none", "seg", "depth", "seg+depth"])
def test_events_put_together_are_the_answer(model, processor, inputs, spatial, options, decoding, monkeypatch):
    monkeypatch.setitem(spatial_loop._PLACES, "cpu", 1000)
    torch.manual_seed(3)
    options = {"spatial": spatial, "spatial_decoding": decoding, "max_new_tokens": 60, **options}
    *events, last = stream_answer(model, processor, inputs, **options)
    assert isinstance(last, AnswerEvent)
    answer = last.answer
    assert "".join(event.text for event in events if isinstance(event, TextEvent)) == answer.text
    masks = [event for event in events if isinstance(event, MaskEvent)]
    assert [mask.number for mask in masks] == list(range(len(answer.masks)))
    assert [mask.phrase for mask in masks] == answer.phrases
    rows = [event for event in events if isinstance(event, DepthRowEvent)]
    assert [row.row for row in rows] == [*range(4)] * (len(rows) // 4) and {row.rows for row in rows} <= {4}
    assert [code for row in rows for code in row.codes] == (answer.depth_codes or [])
    if "depth" in spatial:
        assert rows and (not masks or events.index(masks[0]) < events.index(rows[0])), "in the order they are written"


def test_words_come_as_they_are_written_and_never_change(processor, model, inputs):
    """Fed token by token: letters of several tokens whole, tags and doubled spaces never told."""
    tokenizer = processor.tokenizer
    text = "<p> the red ball </p> [SEG] and <p>das Öl</p>[SEG]  日本 <b> ok "
    streamer = SpatialStreamer(model, processor)
    streamer.put(inputs["input_ids"])
    told = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    told = list(streamer)
    words = "".join(event.text for event in told if isinstance(event, TextEvent))
    assert words == processor.words(streamer.response).strip()
    assert "�" not in words and "p>" not in words and "日本" in words
    assert [event.phrase for event in told if isinstance(event, MaskEvent)] == ["the red ball", "das Öl"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It is [SEG]." + depth_span(range(16)) + "The cat", "It is . The cat"),
        ("the ball[SEG]the cone[SEG].", "the ball the cone."),
        ("[SEG]x  =  1", "x  =  1"),
        ("a <p>b</p> c", "a b c"),
    ],
)
def test_what_a_token_kept_apart_stays_apart(processor, model, inputs, text, words):
    streamer = SpatialStreamer(model, processor)
    streamer.put(inputs["input_ids"])
    for token in processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    told = "".join(event.text for event in streamer if isinstance(event, TextEvent))
    assert told == words == processor.words(streamer.response).strip()


def test_the_words_that_end_a_response_are_not_told(processor, model, inputs):
    """Where the tokenizer has no token for the end, as in checkpoints of Phi-3: it comes in pieces."""
    ours = copy.copy(processor)
    ours.response_end = "<|end|>"
    for text, words in (("a <| b, it is red.<|end|>", "a <| b, it is red."), ("no end <|", "no end <|")):
        streamer = SpatialStreamer(model, ours)
        streamer.put(inputs["input_ids"])
        for token in processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(event.text for event in streamer) == words == ours.words(streamer.response)


def test_a_mark_says_which_picture_events_speak_of(processor, model):
    two = encode(processor, chat(picture(), picture(seed=1), text="Compare."))
    streamer = SpatialStreamer(model, processor)
    streamer.put(two["input_ids"])
    span = "<DEPTH_START>" + "<DEPTH_3>" * 16 + "<DEPTH_END>"
    for token in processor.tokenizer(f"[SEG]{span}[SEG]{span}", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    pictures = [event.picture for event in streamer if not isinstance(event, TextEvent)]
    assert pictures == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_a_span_begun_in_the_prompt_goes_on(processor, model, inputs):
    begun = processor.tokenizer("<DEPTH_START>" + "<DEPTH_5>" * 6, add_special_tokens=False, return_tensors="pt")
    prompt = {**inputs, "input_ids": torch.cat([inputs["input_ids"], begun["input_ids"]], 1)}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    *events, last = stream_answer(model, processor, prompt, max_new_tokens=20)
    codes = [code for event in events if isinstance(event, DepthRowEvent) for code in event.codes]
    assert codes == last.answer.depth_codes and codes[:6] == [5] * 6


def test_errors_of_generate_reach_the_listener(model, processor, inputs):
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream_answer(model, processor, inputs, spatial="depth", max_new_tokens=3))


def test_a_batch_is_refused(model, processor):
    inputs = encode(processor, chat(picture(), text="Where?"), chat(picture(seed=1), text="Where is it?"))
    with pytest.raises(ValueError, match="one conversation"):
        list(stream_answer(model, processor, inputs))


def test_generation_stops_when_nobody_listens(model, processor, inputs):
    before = threading.active_count()
    stream = stream_answer(model, processor, inputs, spatial="depth", max_new_tokens=4000, eos_token_id=-1)
    assert isinstance(next(event for event in stream if isinstance(event, DepthRowEvent)), DepthRowEvent)
    stream.close()
    assert threading.active_count() == before
    streamer = SpatialStreamer(model, processor)
    streamer.close()
    with pytest.raises(StreamClosed):
        model.generate(**inputs, streamer=streamer, max_new_tokens=8)
