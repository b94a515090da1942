"""The start of the [SEG] projector: where masks are clicked, what is fitted, and that units live on."""

import pytest
import sft_helpers as sft
import torch
from helpers import assert_alike, random_model
from peft import get_peft_model
from torch.nn.functional import mse_loss

from perceptio_hf.modeling.mask_prediction import SegProjector
from perceptio_hf.training.lora import lora_config
from perceptio_hf.training.masks.projector import (
    click_prompts,
    fit_seg_projector,
    inner_points,
    seg_states,
    start_seg_projector,
)

HIDDEN, PROMPT = 48, 12


@pytest.fixture(scope="module")
def processor():
    return sft.processor()


@pytest.fixture(scope="module")
def batches(processor, tmp_path_factory):
    """Filled batches of four samples, two masks in each, as the trainer makes them."""
    trainer = sft.trainer(tmp_path_factory.mktemp("start"), processor=processor)
    rows = list(trainer.train_dataset)
    return [trainer.fill_spans(trainer.data_collator(rows[place : place + 4])) for place in range(0, 16, 4)]


def states_and_prompts(count: int, told: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States that lie close together, as [SEG] states do (cosine .96), and prompts of which they tell a share."""
    generator = torch.Generator().manual_seed(seed)
    meaning, noise = (torch.randn(count, size, generator=generator) for size in (4, PROMPT))
    ways = torch.randn(4, HIDDEN + PROMPT, generator=torch.Generator().manual_seed(9))
    states = torch.ones(HIDDEN) + 0.1 * meaning @ ways[:, :HIDDEN]
    return states, told * meaning @ ways[:, HIDDEN:] + (1 - told) * 2 * noise


def units_off(projector: SegProjector, states: torch.Tensor) -> int:
    return int((projector.linear_in(states) <= 0).all(0).sum())


def test_a_click_lies_well_inside():
    masks = torch.zeros(4, 32, 40)
    masks[0, 4:13, 20:31] = 1  # a box: its middle
    masks[1, :, :9] = 1  # at the border of the picture: not on it
    masks[2, 10:21, 3:14] = 1
    masks[2, 13:18, 14:38] = 1  # a body with a tail: in the body, though the middle of all lies in the tail
    masks[3, 30, 38] = 0.3  # less than a cell
    points = inner_points(masks)
    assert points[0].tolist() == [25, 8]
    assert points[1, 0] == 4 and 14 <= points[1, 1] <= 17
    assert 7 <= points[2, 0] <= 9 and 14 <= points[2, 1] <= 16
    assert points[3].tolist() == [38, 30]


def test_prompts_are_those_of_sam2(processor):
    model = random_model(processor)
    sam, side = model.mask_model, model.mask_size[0]
    masks = torch.zeros(2, side, side)
    masks[0, 8:13, 16:25], masks[1, 3:6, 1:4] = 1, 1
    scale = sam.prompt_encoder.input_image_size / side
    places = torch.tensor([[[[20.5 * scale, 10.5 * scale]]], [[[2.5 * scale, 4.5 * scale]]]]) - 0.5
    expected = sam.get_prompt_embeddings(places, torch.ones(2, 1, 1, dtype=torch.int), None, None)[0][:, 0, 0]
    assert_alike(click_prompts(model, masks), expected)


def test_the_fit_predicts_states_it_has_not_seen():
    projector = SegProjector(HIDDEN, PROMPT)
    states, prompts = states_and_prompts(400, told=0.8)
    start = fit_seg_projector(projector, states[:300], prompts[:300])
    assert start.states == 300
    variance = (prompts[300:] - prompts[:300].mean(0)).pow(2).mean()
    explained = 1 - mse_loss(projector(states[300:]), prompts[300:]).item() / variance.item()
    assert explained > 0.6
    assert start.told == pytest.approx(explained, abs=0.1)


def test_prompts_differ_as_much_as_clicks_do_even_where_states_tell_nothing():
    """Prompts that are all the mean would teach the decoder to ignore them, and give the states no gradient."""
    projector = SegProjector(HIDDEN, PROMPT)
    states, _ = states_and_prompts(60, told=1)
    prompts = torch.randn(60, PROMPT, generator=torch.Generator().manual_seed(1))
    start = fit_seg_projector(projector, states, prompts)
    assert abs(start.told) < 0.1
    found = projector(states).detach()
    torch.testing.assert_close(found.mean(0), prompts.mean(0), atol=1e-4, rtol=0)
    assert found.var(0).mean().item() == pytest.approx(prompts.var(0).mean().item(), rel=1e-3)


def test_units_live_through_a_rate_that_kills_a_random_start():
    torch.manual_seed(0)
    states, prompts = states_and_prompts(300, told=0.9)
    left = {}
    for name in ("random", "fitted"):
        projector = SegProjector(HIDDEN, PROMPT)
        if name == "fitted":
            fit_seg_projector(projector, states, prompts)
            assert units_off(projector, states) == 0
        optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3)
        for step in range(200):
            chosen = torch.arange(step * 16, step * 16 + 16) % len(states)
            optimizer.zero_grad()
            mse_loss(projector(states[chosen]), prompts[chosen]).backward()
            optimizer.step()
        left[name] = units_off(projector, states), mse_loss(projector(states), prompts).item()
    assert left["fitted"][0] <= 1 < HIDDEN // 3 < left["random"][0]
    assert left["fitted"][1] < left["random"][1]


def test_states_come_in_the_order_of_masks(processor, batches):
    model = random_model(processor)
    seen = []
    hook = model.seg_projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        names = ("input_ids", "attention_mask", "pixel_values", "mask_pixel_values", "mask_pixel_pictures")
        model(**{name: batches[0][name] for name in names})
        hook.remove()
        found = seg_states(model, batches[0])
    assert len(found) == len(batches[0]["mask_targets"]) == 2
    assert_alike(found, seen[0])


def test_a_model_is_started_on_batches(processor, batches):
    model, again = random_model(processor), random_model(processor)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = start_seg_projector(model.train(), batches)
    assert start.states == 8 and model.training
    with torch.no_grad():
        states = torch.cat([seg_states(model.eval(), batch) for batch in batches])
    assert units_off(model.seg_projector, states) == 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("seg_projector.")}
    assert start_seg_projector(again, batches) == start
    assert torch.equal(again.seg_projector.linear_out.weight, model.seg_projector.linear_out.weight)


def test_with_adapters_the_trained_copy_is_written(processor, batches):
    model = random_model(processor)
    original = model.seg_projector
    before = original.linear_in.weight.clone()
    model = get_peft_model(model, lora_config(model, r=2))
    start_seg_projector(model, batches)
    copy = model.base_model.model.seg_projector.modules_to_save["default"]
    assert torch.equal(original.linear_in.weight, before)
    assert not torch.equal(copy.linear_in.weight, before)


def test_without_masks_there_is_nothing_to_fit(processor, batches):
    model = random_model(processor)
    words = {name: value[3:4] for name, value in batches[0].items() if name in ("input_ids", "attention_mask")}
    words |= {"labels": batches[0]["labels"][3:4], "pixel_values": batches[0]["pixel_values"][3:4]}
    words |= {"mask_targets": batches[0]["mask_targets"][:0]}
    with pytest.raises(ValueError, match=r"hold 0 \[SEG\] tokens"):
        start_seg_projector(model, [words])
    with pytest.raises(ValueError, match=r"0 \[SEG\] tokens and 2 masks"):
        start_seg_projector(model, [words | {"mask_targets": batches[0]["mask_targets"]}])
