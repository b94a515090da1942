"""Memory that is predicted beside memory that a real training takes."""

from functools import partial

import pytest
import sft_helpers as sft
import torch
from helpers import random_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from perceptio_hf import PerceptioConfig, PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio_hf.training.collator import PerceptioDataCollator
from perceptio_hf.training.lora import lora_config
from perceptio_hf.training.planning.gathering import Gathering
from perceptio_hf.training.planning.memory import MemoryPrediction, predict_memory
from perceptio_hf.training.planning.rehearsal import ByteCounter
from perceptio_hf.training.planning.sharding import Layout, shares_of

ROWS = 2
PLAIN = {"optim": "adamw_torch_fused", "per_device_train_batch_size": ROWS}


@pytest.fixture(scope="module")
def processor() -> PerceptioProcessor:
    return sft.processor()


@pytest.fixture(scope="module")
def samples():
    """All alike, with mask and codes, so that every batch is as large as any."""
    return sft.samples(3, first=2).select([0] * 2 * ROWS)


@pytest.fixture(scope="module")
def batch(samples, processor, config) -> dict:
    side = config.depth_config.image_size
    return PerceptioDataCollator(processor, depth_image_size=side)(list(samples)[:ROWS])


@pytest.fixture(scope="module")
def config(processor) -> PerceptioConfig:
    return random_model(processor).config


@pytest.fixture(scope="module")
def plain(config, batch) -> MemoryPrediction:
    return predict_memory(config, batch, sft.settings("unused", **PLAIN))


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "bf16": True}],
    ids=["plain", "checkpointing, bf16"],
)
def test_a_training_takes_what_was_predicted(changes, samples, batch, plain, config, processor, tmp_path):
    predicted = predict_memory(config, batch, sft.settings(tmp_path, **PLAIN, **changes)) if changes else plain
    model = random_model(processor)
    trainer = sft.trainer(tmp_path, processor=processor, model=model, train=samples, **PLAIN, **changes)
    with ByteCounter() as counter:
        weights = counter.watch([*model.parameters(), *model.buffers()])
        trainer.train()
    assert predicted.weights == weights
    assert predicted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert predicted.peak == pytest.approx(counter.peak, rel=0.15)
    assert predicted.activations > 0.2 * predicted.peak  # the comparison is not one of weights alone


def test_adapters_and_a_given_model_are_predicted_alike(batch, plain, config, processor):
    from peft import get_peft_model

    settings, adapters = sft.settings("unused", **PLAIN), partial(lora_config, r=4)
    of_config = predict_memory(config, batch, settings, adapters=adapters)
    model = random_model(processor)
    adapted = get_peft_model(model, adapters(model))
    assert predict_memory(adapted, batch, settings) == of_config
    assert of_config.trained == adapted.get_nb_trainable_parameters()[0] < plain.trained
    assert not any(isinstance(parameter, FakeTensor) for parameter in adapted.parameters())  # it stays as it was


def test_lines_of_the_arithmetic_add_up(plain):
    lines = plain.arithmetic()
    assert plain.peak == sum((plain.weights, plain.gradients, plain.optimizer, plain.activations))
    assert [line.split()[0] for line in lines] == ["weights", "gradients", "optimizer", "activations", "peak"]
    assert "2 rows of" in lines[3] and "x 4 bytes" in lines[0]
    assert plain.optimizer == pytest.approx(2 * plain.gradients, rel=0.01)


def test_half_precision_is_for_internvls_part(batch, config):
    half = predict_memory(config, batch, sft.settings("unused", **PLAIN), dtype=torch.bfloat16)
    with torch.device("meta"):
        model = PerceptioForConditionalGeneration(config)
    parts = (model.mask_model, model.depth_model, model.seg_projector)
    whole = sum(parameter.numel() for part in parts for parameter in part.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert half.weights == pytest.approx(2 * (half.parameters + whole) + buffers, rel=0.01)


class _Noting(ByteCounter):
    most_gathered = 0

    def gather(self, size: int) -> None:
        super().gather(size)
        self.most_gathered = max(self.most_gathered, self.gathered)


class _Block(nn.Linear):
    pass


class _Stack(nn.Module):
    _no_split_modules = ("_Block",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(10, 10, bias=False) for _ in range(4))
        self.head = nn.Linear(10, 30, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            states = checkpoint(block, states, use_reentrant=False) if self.training else block(states)
        return self.head(states)


def test_shards_are_divided():
    weights = 4 * (4 * 100 + 300)
    alone = shares_of(Layout(), weights, weights, 2 * weights)
    assert (alone.weights, alone.optimizer, alone.gathered) == (weights, 2 * weights, 0)
    copies = shares_of(Layout(4), weights, weights, 2 * weights)
    assert (copies.weights, copies.gathered) == (weights, weights)
    shards = shares_of(Layout(4, "fsdp"), weights, weights, 2 * weights, 50)
    assert (shards.weights, shards.gradients, shards.optimizer) == (weights // 4, weights // 4, weights // 2)
    assert shards.gathered == 50
    late = shares_of(Layout(4, "fsdp"), weights, weights, 2 * weights, 50, shares_gradients=False)
    assert (late.weights, late.gradients, late.optimizer) == (weights // 4, weights, weights // 2)


@pytest.mark.parametrize("training", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize(
    ("processes", "trained", "expected"),
    [
        # head and its gradient, a block and its gradient, a copy of the last block's gradient
        (1, 4, 1200 + 1200 + 3 * 400),
        # the next block, too
        (4, 4, 1200 + 1200 + 4 * 400),
        # the head alone learns: it, its gradient, and no block any more
        (1, 0, 1200 + 1200),
        # no gradient yet: the head and its buffer, and that of the first block
        (4, 0, 1200 + 1200 + 400),
    ],
)
def test_what_is_gathered_at_once(processes, trained, expected, training):
    model, states = _Stack().train(training), torch.zeros(1, 10)
    for block in model.blocks[: 4 - trained]:
        block.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    counter = _Noting()
    with counter, Gathering(model, counter, processes).micro_batch():
        model(states).sum().backward()
    assert counter.most_gathered == expected
    assert counter.gathered == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_that_wait_for_a_steps_end_are_whole(batch, config):
    """accelerate's way, which ours is not: the first micro batch's gradients are exchanged with the last one's."""
    late = {"gradient_accumulation_kwargs": {"sync_each_batch": False}}
    found = [
        predict_memory(config, batch, sft.settings("unused", **PLAIN, **changes), layout=Layout(4, "fsdp"))
        for changes in (
            {"gradient_accumulation_steps": 2},
            {"gradient_accumulation_steps": 2, "accelerator_config": late},
            {"gradient_accumulation_steps": 1, "accelerator_config": late},
        )
    ]
    assert found[0].gradients == found[2].gradients == -(-found[1].gradients // 4)
    assert "sync_each_batch" in found[1].notes["gathered"]
    assert found[1].gradients == predict_memory(config, batch, sft.settings("unused", **PLAIN)).gradients


def test_bytes_are_counted_once_and_given_back():
    counter = ByteCounter()
    given = torch.zeros(100)
    assert counter.watch([given, given[:10]]) == 400
    with counter:
        made = torch.ones(50) + 1  # for a moment two
        view = made[:5]
        assert counter.now == 600
        del made, view
    assert counter.now == 400
    assert counter.peak == 800


def test_an_optimizer_that_cannot_be_predicted_is_said(batch, config):
    settings = sft.settings("unused", optim="galore_adamw", optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"optim: .*galore.* cannot be predicted"):
        predict_memory(config, batch, settings)


@pytest.mark.parametrize(("processes", "strategy"), [(0, "ddp"), (2, "zero1")])
def test_a_layout_that_is_none(processes, strategy):
    with pytest.raises(ValueError, match="expected 1 or more, and one of ddp, fsdp, zero3"):
        Layout(processes, strategy)
