"""What transformers asks of every model that generates, asked of a Perceptio with grammar and masks taking part."""

import copy

import pytest
import torch
from helpers import chat, encode, picture
from transformers import GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList

NEW = 24  # room for [SEG], a span of 18 and five words
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling beams": {"do_sample": True, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "several of the beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}
MODES = ("auto", "seg+depth", "none")


@pytest.fixture(scope="module")
def one(processor) -> dict[str, torch.Tensor]:
    return dict(encode(processor, chat(picture())))


@pytest.fixture(scope="module")
def two(processor) -> dict[str, torch.Tensor]:
    return dict(
        encode(processor, chat(picture()), chat(picture(seed=1), text="Segment the red ball, and the blue box."))
    )


def answers(model, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    torch.manual_seed(0)
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, **({"max_new_tokens": NEW} | kwargs))[:, length:]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_with_and_without_a_dict(model, two, way, mode):
    options = WAYS[way] | {"spatial": mode}
    ids = answers(model, two, **options)
    assert ids.shape[0] == 2 * options.get("num_return_sequences", 1) and ids.shape[1] <= NEW
    torch.manual_seed(0)
    out = model.generate(**two, **options, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences[:, two["input_ids"].shape[1] :], ids)
    assert len(out.scores) >= ids.shape[1] and out.well_formed == [True] * len(ids)
    assert len(out.mask_logits) == len(out.depth_maps) == len(ids)
    spans = [len(depth) for depth in out.depth_maps]
    masks = [len(logits) for logits in out.mask_logits]
    if mode == "seg+depth":
        assert spans == [1] * len(ids) and min(masks) >= 1
    if mode == "none":
        assert spans == masks == [0] * len(ids)
    assert all(not depth.isnan().any() for depth in [*out.depth_maps, *out.depth_confidence])


@pytest.mark.parametrize("mode", MODES)
def test_a_row_says_alone_what_it_says_in_a_batch(model, processor, two, mode):
    together = answers(model, two, do_sample=False, spatial=mode)
    texts = ("Where is the red ball?", "Segment the red ball, and the blue box.")
    for row, text in enumerate(texts):
        alone = answers(model, encode(processor, chat(picture(seed=row), text=text)), do_sample=False, spatial=mode)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_with_and_without_a_cache(model, two, mode):
    wanted = answers(model, two, do_sample=False, spatial=mode)
    assert torch.equal(answers(model, two, do_sample=False, spatial=mode, use_cache=False), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_prompt_look_up_is_greedy(model, one, mode):
    wanted = answers(model, one, do_sample=False, spatial=mode)
    assert torch.equal(answers(model, one, do_sample=False, spatial=mode, prompt_lookup_num_tokens=3), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_the_model_as_its_own_assistant_is_greedy(model, one, mode):
    wanted = answers(model, one, do_sample=False, spatial=mode)
    assert torch.equal(answers(model, one, do_sample=False, spatial=mode, assistant_model=model), wanted)
    options = {"do_sample": False, "spatial": mode, "max_new_tokens": NEW, "return_dict_in_generate": True}
    found, plain = (model.generate(**one, **options, **extra) for extra in ({"assistant_model": model}, {}))
    assert torch.equal(found.sequences, plain.sequences)
    for name in ("mask_logits", "depth_maps", "depth_confidence"):
        for left, right in zip(getattr(found, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_from_embeddings_alone(model, one):
    """As from their tokens; without a picture, whose tokens embeddings do not show."""
    ids = one["input_ids"][:, -12:]
    assert model.config.image_token_id not in ids
    embeds = model.get_input_embeddings()(ids)
    options = {"do_sample": False, "max_new_tokens": NEW, "spatial": "none"}
    found = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(found, model.generate(input_ids=ids, **options)[:, 12:])


# The name that every version knows; transformers 5.24 has another one.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_going_on_from_what_was_written(model, one):
    """From the tokens and from the cache of a first call, in the middle of a span too."""
    length = one["input_ids"].shape[1]
    start = model.generate(**one, do_sample=False, spatial="seg+depth", max_new_tokens=NEW)[:, : length + 8]
    inside = dict(one, input_ids=start, attention_mask=torch.ones_like(start))
    whole = model.generate(**inside, do_sample=False, max_new_tokens=NEW - 8)
    for first in (8, 12, 21):
        part = dict(one, input_ids=whole[:, : length + first])
        part["attention_mask"] = torch.ones_like(part["input_ids"])
        assert torch.equal(model.generate(**part, do_sample=False, max_new_tokens=NEW - first), whole)
        rows = {name: part[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            past = model(
                input_ids=rows["input_ids"][:, :-1],
                attention_mask=rows["attention_mask"][:, :-1],
                pixel_values=one["pixel_values"],
                use_cache=True,
            ).past_key_values
        found = model.generate(**rows, past_key_values=past, do_sample=False, max_new_tokens=NEW - first)
        assert torch.equal(found, whole)


def test_states_attentions_scores_and_logits_of_every_step(model, two):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    out = eager.generate(
        **two,
        do_sample=False,
        spatial="seg+depth",
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    length, text = two["input_ids"].shape[1], eager.config.text_config
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == len(out.attentions) == NEW
    for step in range(NEW):
        width = length if step == 0 else 1
        assert out.scores[step].shape == out.logits[step].shape == (2, text.vocab_size)
        assert all(state.shape == (2, width, text.hidden_size) for state in out.hidden_states[step])
        shape = (2, text.num_attention_heads, width, length + step)
        assert all(weights.shape == shape for weights in out.attentions[step])
        chosen = out.sequences[:, length + step, None]
        assert torch.equal(out.scores[step].argmax(-1, keepdim=True), chosen)  # under the grammar
        assert out.logits[step].isfinite().all()


def test_the_model_may_be_told_how_by_its_generation_configuration(model, two):
    wanted = answers(model, two, do_sample=False)
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=model.generation_config.eos_token_id)
    config.pad_token_id = model.generation_config.pad_token_id
    found = model.generate(**two, generation_config=config)
    assert torch.equal(found[:, two["input_ids"].shape[1] :], wanted)


class After(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def after(length: int) -> StoppingCriteriaList:
    return StoppingCriteriaList([After(length)])


def test_stopping_criteria_end_a_response_but_no_span(model, one):
    length, stop = one["input_ids"].shape[1], model.config.depth_end_token_id
    options = {"do_sample": False, "return_dict_in_generate": True}
    short = model.generate(
        **one, **options, max_new_tokens=40, stopping_criteria=StoppingCriteriaList([After(length + 3)])
    )
    assert short.sequences.shape[1] == length + 3
    inside = model.generate(**one, **options, spatial="seg+depth", max_new_tokens=NEW).sequences[:, : length + 8]
    assert model.config.depth_start_token_id in inside and stop not in inside
    rows = dict(one, input_ids=inside, attention_mask=torch.ones_like(inside))
    out = model.generate(
        **rows, **options, max_new_tokens=40, stopping_criteria=StoppingCriteriaList([After(length + 10)])
    )
    assert out.sequences[0, -1] == stop and out.sequences.shape[1] < length + 8 + 18 and out.well_formed == [True]


def test_a_streamer_sees_every_token(model, one):
    class Kept:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    kept = Kept()
    whole = model.generate(**one, do_sample=False, spatial="seg+depth", max_new_tokens=NEW, streamer=kept)
    assert kept.tokens == whole[0].tolist() and kept.ended


def test_training_mode_and_the_configuration_stay_as_they_were(model, one):
    before = model.generation_config.to_dict()
    answers(model, one, spatial="seg+depth", do_sample=True, temperature=0.5)
    assert model.generation_config.to_dict() == before and not model.training
