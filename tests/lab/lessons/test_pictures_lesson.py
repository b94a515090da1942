"""What is learnt about pictures: heads that say what a token shows, masks of what prompts point at."""

import numpy as np
import pytest
import torch

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.lab.lessons.batches import click_prompts, scene_batches
from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer
from perceptio_hf.lab.lessons.pictures_lesson import CellHead, cell_centres, prompted_masks
from perceptio_hf.lab.lessons.stages import fresh_model
from perceptio_hf.world import render_scene, text_corpus


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    codec = DepthVQVAE(DepthVQVAEConfig(image_size=64, downsample=8, num_codes=16, code_dim=8, base_channels=4)).eval()
    processor = tiny_processor(tiny_tokenizer(text_corpus(50)), codec.config)
    return fresh_model(processor, codec).eval(), processor


def test_geometry_is_the_scene_s(parts):
    batch = next(scene_batches(parts[1], size=128, batch_size=3, first_seed=5, phrases=2, way="referred", workers=0))
    seen = 0
    for row in range(3):
        scene = render_scene(5 + row)
        for cell in range(64):
            shape = batch.cells[row, cell, 0]
            values = batch.geometry[row, cell]
            if shape == 0:
                assert not values.any()
                continue
            x, y, depth, width, height = values.tolist()
            thing = scene.objects[scene.instances[int(y * 128), int(x * 128)] - 1]
            left, top, right, bottom = thing.box
            measured = [(right - left) / 128, (bottom - top) / 128]
            assert np.exp(np.array([depth, width, height]) / 0.3) == pytest.approx([thing.depth, *measured], rel=1e-4)
            seen += 1
    assert seen > 20


def test_a_head_that_knows_everything_costs_nothing(parts):
    """Weights that copy the truth out of the features: every part of the loss is then at its least."""
    batch = next(scene_batches(parts[1], size=128, batch_size=2, first_seed=5, way="practice", workers=0))
    head = CellHead(64, 16)
    codes = torch.randint(16, (2, 64), generator=torch.Generator().manual_seed(1))
    kinds = [torch.nn.functional.one_hot(batch.cells[..., index], size) for index, size in enumerate(head.sizes[1:6])]
    said = torch.cat([30.0 * torch.nn.functional.one_hot(codes, 16), *(30.0 * kind for kind in kinds)], -1)
    centres = cell_centres(64, torch.device("cpu"))
    true = torch.cat([said, centres.expand(2, -1, -1), batch.geometry], -1)
    head.linear = torch.nn.Identity()
    loss, figures = head.loss(batch, true, codes)
    assert loss < 1e-4 and figures["letters"] == 1 and figures["off"] == 0
    moved = true.clone()
    moved[..., -5] += 0.125  # one cell to the right
    worse, figures = head.loss(batch, moved, codes)
    torch.testing.assert_close(figures["off"], torch.tensor(1.0))
    assert worse > loss
    assert centres[0].tolist() == [0.0625, 0.0625] and centres[9].tolist() == [0.1875, 0.1875]


def test_masks_are_those_of_the_prompts_asked_for(parts):
    model, processor = parts
    batch = next(scene_batches(processor, size=128, batch_size=3, first_seed=5, phrases=3, way="referred", workers=0))
    with torch.no_grad():
        clicks = click_prompts(model, batch)
        chosen = torch.tensor([4, 1])
        loss, figures = prompted_masks(model, batch, clicks[chosen], chosen)
        alone = [prompted_masks(model, batch, clicks[k : k + 1], torch.tensor([k]))[1] for k in (4, 1)]
    assert torch.isfinite(loss)
    torch.testing.assert_close(figures["iou"], (alone[0]["iou"] + alone[1]["iou"]) / 2, rtol=1e-3, atol=1e-4)
