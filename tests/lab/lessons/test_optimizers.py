"""The optimizers of the tiny training: each parameter has one, and a run that was stopped goes on as it was."""

import copy

import pytest
import torch

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer
from perceptio_hf.lab.lessons.optimizers import StageOptimizer, schedule
from perceptio_hf.lab.lessons.stages import fresh_model
from perceptio_hf.world import text_corpus


@pytest.fixture
def model():
    torch.manual_seed(0)
    codec = DepthVQVAE(DepthVQVAEConfig(image_size=64, downsample=8, num_codes=16, code_dim=8, base_channels=4))
    return fresh_model(tiny_processor(tiny_tokenizer(text_corpus(20)), codec.config), codec)


def _rates(optimizer: StageOptimizer) -> dict[int, float]:
    groups = [group for one in optimizer.optimizers for group in one.param_groups]
    rates = [(id(weight), group["lr"]) for group in groups for weight in group["params"]]
    assert len(rates) == len(dict(rates)), "a parameter with two optimizers"
    return dict(rates)


def test_every_parameter_has_one_optimizer(model):
    parameters = list(model.parameters())
    optimizer = StageOptimizer(model, parameters, decoder_rate=0.5)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    rates = _rates(optimizer)
    assert set(rates) == {id(parameter) for parameter in parameters}
    layer, seeing = model.model.language_model.layers[0], model.model.vision_tower.encoder.layer[0]
    assert rates[id(layer.mlp.up_proj.weight)] == rates[id(seeing.mlp.fc1.weight)] == 5e-3
    assert rates[id(layer.self_attn.v_proj.weight)] == 5e-3
    assert rates[id(layer.self_attn.q_proj.weight)] == rates[id(layer.self_attn.k_proj.weight)] == 1e-3
    assert rates[id(layer.self_attn.q_proj.bias)] == rates[id(model.lm_head.weight)] == 1e-3
    assert rates[id(model.seg_projector.linear_in.weight)] == pytest.approx(2e-4)
    assert rates[id(next(model.mask_model.mask_decoder.parameters()))] == pytest.approx(5e-4)


def test_without_matrices_there_is_adamw_alone(model):
    assert len(StageOptimizer(model, list(model.mask_model.parameters())).optimizers) == 1


def test_it_goes_on_where_it_was(model):
    again = copy.deepcopy(model)

    def steps(model, optimizer, count):
        for number in range(count):
            for parameter in model.parameters():
                parameter.grad = torch.sin(parameter.detach() * (number + 2))
            optimizer.step(1e-2)

    whole = StageOptimizer(model, list(model.parameters()))
    steps(model, whole, 3)
    states, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(model.state_dict())
    steps(model, whole, 2)
    resumed = StageOptimizer(again, list(again.parameters()))
    again.load_state_dict(weights)
    resumed.load_state_dict(states)
    steps(again, resumed, 2)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_schedule():
    values = [schedule(step, 1000) for step in range(1000)]
    assert max(values) == 1.0 and values[0] == 0.01 and 0.02 <= values[-1] < 0.021
    assert values[100:] == sorted(values[100:], reverse=True)
