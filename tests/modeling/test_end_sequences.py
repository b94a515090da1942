"""Ends of responses that are several tokens long, in our own loop and in those of transformers."""

import copy
import json

import pytest
import torch
from helpers import chat, encode, picture

from perceptio_hf.modeling.spans.end_sequences import EndSequences

NEW = 24


def cut(ids: list[int], end: list[int]) -> list[int]:
    """A response up to the first place where `end` stands."""
    for stop in range(len(end), len(ids) + 1):
        if ids[stop - len(end) : stop] == end:
            return ids[:stop]
    return ids


@pytest.fixture
def inputs(processor):
    return encode(processor, chat(picture()), chat(picture(30, 60), text="What is red here?"))


@pytest.mark.parametrize(
    "options", [{}, {"spatial_decoding": "sequential"}, {"use_cache": False}, {"no_repeat_ngram_size": 3}], ids=str
)
@pytest.mark.parametrize("spatial", ["none", "depth"])
def test_each_row_ends_behind_the_first_of_its_own(model, inputs, spatial, options):
    """Also behind a depth span; a row that goes on is as it was, and the one that has ended is filled."""
    start = inputs["input_ids"].shape[1]
    new = NEW + (18 if spatial == "depth" else 0)
    whole = model.generate(**inputs, spatial=spatial, max_new_tokens=new, **options)[:, start:].tolist()
    ends = [whole[0][-6:-3], [3, 3, 3, 3]]
    expected = [cut(row, ends[0]) for row in whole]
    assert len(expected[0]) < new
    config = copy.deepcopy(model.generation_config)
    for name, value in {**options, "max_new_tokens": new, "end_sequences": ends}.items():
        setattr(config, name, value)
    out = model.generate(**inputs, spatial=spatial, generation_config=config)[:, start:].tolist()
    assert len(out[0]) == max(map(len, expected)) or set(expected[1][len(out[0]) :]) == {config.pad_token_id}
    for found, row in zip(out, expected, strict=True):
        filled = row + [config.pad_token_id] * (new - len(row))
        assert found == filled[: len(found)]


@pytest.mark.parametrize("end", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"spatial_decoding": "sequential"}, {"no_repeat_ngram_size": 5}], ids=str)
def test_the_end_of_a_span_may_be_the_end(model, inputs, options, end):
    """Who wants the depth alone says so by the marker's id, or by the last code and the marker."""
    words, config = model.spatial_vocabulary(), copy.deepcopy(model.generation_config)
    if end == "token":
        config.eos_token_id = [config.eos_token_id, words.depth_end]
    else:
        config.end_sequences = [[code, words.depth_end] for code in words.codes]
    settings = {"spatial": "depth", "max_new_tokens": words.span_length + 9, "generation_config": config, **options}
    out = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert out.shape[1] == words.span_length and (out[:, -1] == words.depth_end).all()


def test_drafted_tokens_go_no_more_than_a_step_too_far(model, processor):
    inputs = encode(processor, chat(picture()))
    start = inputs["input_ids"].shape[1]
    options = {"spatial": "none", "prompt_lookup_num_tokens": 3, "max_new_tokens": NEW}
    whole = model.generate(**inputs, **options)[0, start:].tolist()
    config = copy.deepcopy(model.generation_config)
    config.end_sequences = [whole[8:10]]
    expected = cut(whole, whole[8:10])
    found = model.generate(**inputs, generation_config=config, **options)[0, start:].tolist()
    assert found[: len(expected)] == expected and len(found) <= len(expected) + 3


def test_what_a_prompt_ends_in_counts_for_nothing():
    ids = torch.tensor([[7, 1, 2, 5, 5], [7, 8, 9, 1, 2]])
    criterion = EndSequences([[1, 2]], prompt_length=2)
    assert criterion(ids, None).tolist() == [False, True]
    assert criterion(ids[:, :2], None).tolist() == [False, False]
    assert criterion.ends(ids, torch.tensor([3, 5])).tolist() == [False, True]
    assert criterion.ends(ids, torch.tensor([1, 4])).tolist() == [False, False]


@pytest.mark.parametrize("wrong", [[1, 2], [[]], "<|end|>", [["<|end|>"]]], ids=str)
def test_anything_but_lists_of_ids_is_refused(model, inputs, wrong):
    config = copy.deepcopy(model.generation_config)
    config.end_sequences = wrong
    with pytest.raises(ValueError, match="end_sequences of the generation configuration is"):
        model.generate(**inputs, generation_config=config)


@pytest.mark.parametrize("way", ["model", "configuration", "by hand"])
def test_settings_of_ours_are_saved(model, tmp_path, way):
    """Also where transformers derived the generation configuration from the model's, whose other fields it drops."""
    own = {"spatial": "depth", "spatial_decoding": "sequential", "end_sequences": [[4, 5]]}
    saved, file = copy.deepcopy(model), tmp_path / "generation_config.json"
    saved.generation_config._from_model_config = True
    if way == "model":
        for name, value in own.items():
            setattr(saved.generation_config, name, value)
    saved.save_pretrained(tmp_path)
    if way == "configuration":
        file.unlink()  # which transformers then derives
        config = type(model).from_pretrained(tmp_path).generation_config
        for name, value in own.items():
            setattr(config, name, value)
        config.save_pretrained(tmp_path)
    elif way == "by hand":
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
    found = type(model).from_pretrained(tmp_path).generation_config
    assert {name: getattr(found, name) for name in own} == own
