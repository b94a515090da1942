"""The mask decoder that shares a picture's part among its prompts, beside transformers' own."""

import copy

import pytest
import torch
from helpers import assert_alike, random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam2Config
from transformers.models.sam2 import modeling_sam2
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from perceptio_hf.modeling import mask_prediction, shared_mask_decoder
from perceptio_hf.modeling.shared_mask_decoder import best_masks, can_share


@pytest.fixture(scope="module")
def model(processor):
    return random_model(processor)


@pytest.fixture(autouse=True)
def checked_anew():
    shared_mask_decoder._checked.clear()


@pytest.fixture
def together(monkeypatch):
    """Collects the numbers of prompts that were decoded together."""
    calls = []

    def counting(decoder, embedding, positions, sparse, *rest, **options):
        calls.append(len(sparse))
        return best_masks(decoder, embedding, positions, sparse, *rest, **options)

    monkeypatch.setattr(mask_prediction, "best_masks", counting)
    return calls


def asked(model, count: int = 5, pictures: int = 2):
    """States, pixels and the picture of each state."""
    generator = torch.Generator().manual_seed(count)
    side = model.config.mask_config.prompt_encoder_config.image_size
    states = torch.randn(count, model.config.text_config.hidden_size, generator=generator)
    return states, torch.randn(pictures, 3, side, side, generator=generator), [(2 * k) % pictures for k in range(count)]


def stock(model, *inputs):
    """With gradients the model goes through transformers' decoder."""
    with torch.enable_grad():
        masks, scores = model.predict_masks(*inputs)
    assert masks.requires_grad
    return masks.detach(), scores.detach()


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("count", "pictures"), [(1, 1), (8, 1), (5, 3), (3, 2)])
def test_masks_are_those_of_transformers(model, together, monkeypatch, count, pictures, padding, multimask):
    monkeypatch.setattr(model.config, "mask_padding_points", padding)
    monkeypatch.setattr(model.config, "mask_multimask_output", multimask)
    monkeypatch.setattr(model.mask_model.mask_decoder, "dynamic_multimask_via_stability", False)
    inputs = asked(model, count, pictures)
    with torch.no_grad():
        found = model.predict_masks(*inputs)
    assert together == [count]
    for ours, theirs in zip(found, stock(model, *inputs), strict=True):
        assert_alike(ours, theirs)
    assert together == [count]


@pytest.mark.parametrize(("heads", "rate", "layers"), [(8, 2, 2), (4, 1, 3), (2, 4, 1)])
def test_decoders_of_other_shapes(heads, rate, layers):
    config = Sam2Config().mask_decoder_config
    config.num_attention_heads, config.attention_downsample_rate, config.num_hidden_layers = heads, rate, layers
    assert shared_mask_decoder._computes_the_same(config)


def test_the_check_sees_what_changed(monkeypatch, model, together):
    """A transformers whose blocks compute something else is not pre-empted: its own forward runs."""
    forward = modeling_sam2.Sam2TwoWayAttentionBlock.forward

    def other(self, *args, **kwargs):
        queries, keys, attention = forward(self, *args, **kwargs)
        return queries, keys * 1.0001, attention

    monkeypatch.setattr(modeling_sam2.Sam2TwoWayAttentionBlock, "forward", other)
    inputs = asked(model)
    with torch.no_grad():
        found = model.predict_masks(*inputs)
    assert together == []
    assert_alike(found[0], stock(model, *inputs)[0])


def test_the_check_survives_another_signature(monkeypatch):
    config = Sam2Config().mask_decoder_config
    monkeypatch.setattr(Sam2MaskDecoder, "forward", lambda self, pictures: pictures)
    assert not shared_mask_decoder._computes_the_same(config)


class Own(Sam2MaskDecoder):
    """Somebody's own decoder."""


def wrap(decoder):
    decoder.transformer.layers[0].mlp.register_forward_hook(lambda *_: None)


def replace_forward(decoder):
    decoder.iou_prediction_head.forward = decoder.iou_prediction_head.forward


def replace_layer(decoder):
    layer = decoder.transformer.layers[0].self_attn

    class Adapter(torch.nn.Linear):
        pass

    layer.q_proj = Adapter(layer.q_proj.in_features, layer.q_proj.out_features)


def halve(decoder):
    decoder.upscale_conv1.bfloat16()


def subclass(decoder):
    decoder.__class__ = Own


@pytest.mark.parametrize("change", [wrap, replace_forward, replace_layer, halve, subclass])
def test_decoders_that_were_changed_run_as_they_are(model, change):
    decoder = copy.deepcopy(model.mask_model.mask_decoder)
    embedding = torch.zeros(1, decoder.hidden_size, 2, 2)
    with torch.no_grad():
        assert can_share(decoder, embedding)
        change(decoder)
        assert not can_share(decoder, embedding)


def test_gradients_autocast_and_masks_chosen_by_stability_go_the_usual_way(model, together, monkeypatch):
    inputs = asked(model)
    stock(model, *inputs)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.predict_masks(*inputs)
    monkeypatch.setattr(model.config, "mask_multimask_output", False)
    monkeypatch.setattr(model.mask_model.mask_decoder, "dynamic_multimask_via_stability", True)
    with torch.no_grad():
        found = model.predict_masks(*inputs)
    assert together == []
    for ours, theirs in zip(found, stock(model, *inputs), strict=True):
        assert_alike(ours, theirs)


def test_eight_masks_are_two_thirds_of_the_work_of_transformers(model, monkeypatch):
    """Counted, not timed, at SAM2's own size: `benchmarks/speed.py --parts masks` has the seconds."""
    config = Sam2Config().mask_decoder_config
    with torch.device("meta"):
        decoder = Sam2MaskDecoder(config)
        embedding, positions, sparse = torch.empty(1, 256, 64, 64), torch.empty(1, 256, 64, 64), torch.empty(8, 3, 256)
        fine = [torch.empty(1, 32, 256, 256), torch.empty(1, 64, 128, 128)]
        with torch.no_grad(), FlopCounterMode(display=False) as ours:
            best_masks(decoder, embedding, positions, sparse, fine, [0] * 8)
        with torch.no_grad(), FlopCounterMode(display=False) as theirs:
            decoder(
                image_embeddings=embedding.expand(8, -1, -1, -1),
                image_positional_embeddings=positions.expand(8, -1, -1, -1),
                sparse_prompt_embeddings=sparse[:, None],
                dense_prompt_embeddings=torch.empty(8, 256, 64, 64),
                multimask_output=True,
                high_resolution_features=[part.expand(8, -1, -1, -1) for part in fine],
            )
    assert ours.get_total_flops() < 0.65 * theirs.get_total_flops()
