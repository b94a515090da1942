"""`forward(criterion=...)`: losses computed inside the model, from states instead of logits."""

import pytest
import torch
from helpers import assert_alike, chat, encode, picture

from perceptio_hf.modeling import modeling_perceptio
from perceptio_hf.modeling.mask_prediction import normalised
from perceptio_hf.training.losses import composite_loss


@pytest.fixture
def batch(model, processor) -> dict[str, torch.Tensor]:
    """One row of a prompt and `[SEG] <DEPTH_START> ... <DEPTH_END> Segment the red ball.`"""
    words = model.spatial_vocabulary()
    inputs = encode(processor, chat(picture()))
    inputs = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    text = processor.tokenizer("Segment the red ball.", add_special_tokens=False)["input_ids"]
    codes = [words.codes[index % len(words.codes)] for index in range(words.num_depth_tokens)]
    answer = [words.seg, words.depth_start, *codes, words.depth_end, *text]
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    labels = inputs["input_ids"].clone()
    labels[:, :prompt] = -100
    return inputs | {"labels": labels}


def composite(model, labels, **targets):
    words = model.spatial_vocabulary()

    def criterion(hidden_states, lm_head, outputs):
        return composite_loss(
            hidden_states,
            lm_head,
            labels,
            words,
            codec=model.depth_model,
            mask_logits=outputs.mask_logits,
            mask_scores=outputs.mask_scores,
            **targets,
        )

    return criterion


def test_a_criterion_takes_the_place_of_logits(model, batch):
    labels = batch.pop("labels")
    seen = {}

    def criterion(hidden_states, lm_head, outputs):
        seen.update(states=hidden_states, head=lm_head, outputs=outputs)
        part = hidden_states.square().mean()
        return 2 * part, {"size": part}

    plain = model(**batch)
    output = model(**batch, criterion=criterion)
    assert output.logits is None and seen["outputs"].logits is None and seen["outputs"].loss is None
    assert seen["head"] is model.lm_head and len(plain.mask_logits) == 1
    assert_alike(seen["states"], plain.last_hidden_state)
    assert_alike(seen["outputs"].mask_logits, plain.mask_logits, depth=30)
    assert output.loss_parts["size"] * 2 == output.loss == output.to_tuple()[0]
    assert_alike(output.mask_scores, plain.mask_scores, depth=30)
    assert plain.loss_parts is None
    with pytest.raises(ValueError, match="leave out `labels`"):
        model(**batch, labels=labels, criterion=criterion)


def test_the_composite_loss_trains_what_it_should(model, batch):
    labels = batch.pop("labels")
    size = model.depth_model.config.image_size
    targets = {"depth": torch.rand(1, size, size), "mask_targets": torch.rand(1, *model.mask_size).round()}
    output = model(**batch, criterion=composite(model, labels, **targets))
    assert set(output.loss_parts) == {
        *("text", "marker", "token", "count", "reconstruction", "mask_bce", "mask_dice", "mask_score")
    }
    try:
        output.loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith(("depth_model", "mask_model.vision_encoder")):
                assert parameter.grad is None, name
            elif name.startswith(("model.language_model.layers", "seg_projector")):
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    finally:
        model.zero_grad()


def test_text_loss_equals_transformers_own(model, batch):
    labels = batch.pop("labels")
    words = model.spatial_vocabulary()
    spatial = torch.isin(labels, torch.tensor([words.depth_start, words.depth_end, *words.codes]))
    without = labels.masked_fill(spatial, -100)
    with torch.no_grad():
        output = model(**batch, criterion=composite(model, without, mask_targets=torch.rand(1, *model.mask_size)))
        # Two runs of learnt labels: what is asked is the mean over both.
        assert output.loss_parts["text"].item() == pytest.approx(model(**batch, labels=without).loss.item(), rel=1e-5)


def test_bfloat16_autocast_keeps_losses_in_float32(model, batch):
    labels = batch.pop("labels")
    criterion = composite(model, labels, mask_targets=torch.rand(1, *model.mask_size))
    with torch.no_grad():
        exact = model(**batch, criterion=criterion)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**batch, criterion=criterion)
    for name, part in rough.loss_parts.items():
        assert part.dtype == torch.float32 and part.item() == pytest.approx(exact.loss_parts[name].item(), rel=0.1)


def test_only_pictures_with_masks_need_to_come_and_as_bytes(model, processor, batch):
    """Two rows, a mask on the second row's picture."""
    other = encode(processor, chat(picture(seed=1)))
    seg = model.spatial_vocabulary().seg
    both = {name: torch.cat([batch[name], batch[name]]) for name in ("input_ids", "attention_mask")}
    both["input_ids"][0][both["input_ids"][0] == seg] = 1
    both["pixel_values"] = torch.cat([other["pixel_values"], batch["pixel_values"]])
    pixels = torch.randint(0, 256, batch["mask_pixel_values"].shape, dtype=torch.uint8)
    every = torch.cat([other["mask_pixel_values"], normalised(pixels)])
    with torch.no_grad():
        whole = model(**both, mask_pixel_values=every).mask_logits
        part = model(**both, mask_pixel_values=pixels, mask_pixel_pictures=torch.tensor([1])).mask_logits
    assert len(whole) == 1
    assert_alike(part, whole, depth=30)
    with pytest.raises(ValueError, match="holds only \\[0\\]"):
        model(**both, mask_pixel_values=pixels, mask_pixel_pictures=torch.tensor([0]))


@pytest.mark.parametrize("sharded", [False, True])
def test_without_masks_only_processes_that_share_parameters_use_sam2(model, batch, monkeypatch, sharded):
    monkeypatch.setattr(modeling_perceptio, "_shards", lambda model: sharded)
    del batch["mask_pixel_values"]
    seg = model.spatial_vocabulary().seg
    keep = batch["input_ids"][0] != seg
    batch |= {name: batch[name][:, keep] for name in ("input_ids", "attention_mask", "labels")}
    labels = batch.pop("labels")
    output = model(**batch, criterion=composite(model, labels, mask_targets=torch.zeros(0, *model.mask_size)))
    assert output.mask_logits.shape == (0, *model.mask_size) and output.loss_parts["mask_bce"] == 0
    try:
        output.loss.backward()
        used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert ("seg_projector.linear_in.weight" in used) == sharded
        assert ("mask_model.mask_decoder.conv_s0.weight" in used) == sharded
        assert not model.seg_projector.linear_in.weight.grad.any() if sharded else True
    finally:
        model.zero_grad()


@pytest.mark.parametrize("sharded", [False, True])
def test_without_pictures_only_processes_that_share_parameters_see_a_blank_one(model, batch, monkeypatch, sharded):
    """And the loss stays what it is."""
    monkeypatch.setattr(modeling_perceptio, "_shards", lambda model: sharded)
    words = model.spatial_vocabulary()
    keep = ~torch.isin(batch["input_ids"][0], torch.tensor([words.seg, words.image]))
    batch = {name: batch[name][:, keep] for name in ("input_ids", "attention_mask", "labels")}
    labels = batch.pop("labels")
    criterion = composite(model, labels, mask_targets=torch.zeros(0, *model.mask_size))
    output = model(**batch, criterion=criterion)
    with torch.no_grad():
        monkeypatch.setattr(modeling_perceptio, "_shards", lambda model: False)
        assert torch.equal(output.loss, model(**batch, criterion=criterion).loss)
    try:
        output.loss.backward()
        used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        projector = model.model.multi_modal_projector.linear_1.weight
        assert ("model.multi_modal_projector.linear_1.weight" in used) == sharded
        assert any(name.startswith("model.vision_tower.encoder") for name in used) == sharded
        assert not projector.grad.any() if sharded else True
    finally:
        model.zero_grad()
