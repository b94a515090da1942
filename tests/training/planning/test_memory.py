"""Memory that is predicted beside memory that a real training takes."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from perceptio_hf import (
    PerceptioConfig,
    PerceptioForConditionalGeneration,
    PerceptioProcessor,
    PerceptioSFTConfig,
    tiny_checkpoint,
)
from perceptio_hf.data.rows import dataset_of
from perceptio_hf.data.world_samples import iter_world_samples
from perceptio_hf.training.collator import PerceptioDataCollator
from perceptio_hf.training.lora import lora_config
from perceptio_hf.training.planning.memory import predict_memory
from perceptio_hf.training.planning.rehearsal import ByteCounter
from perceptio_hf.training.planning.sharding import Layout, shares_of
from perceptio_hf.training.trainer import PerceptioSFTTrainer

ROWS = 2


@pytest.fixture(scope="module")
def samples() -> list[dict]:
    """All alike in length, so that every batch is as large as any."""
    return list(islice(iter_world_samples("spatial", seeds=range(100)), ROWS)) * 2


@pytest.fixture(scope="module")
def batch(samples) -> dict[str, torch.Tensor]:
    processor = PerceptioProcessor.from_pretrained(tiny_checkpoint())
    return PerceptioDataCollator(processor, depth_image_size=128)(samples[:ROWS])


def settings_for(folder, **changes) -> PerceptioSFTConfig:
    options = {"max_steps": 2, "per_device_train_batch_size": ROWS, "report_to": "none", "save_strategy": "no"}
    return PerceptioSFTConfig(str(folder), plot_losses=False, disable_tqdm=True, **(options | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": False, "bf16": True, "freeze_language_model": True},
    ],
    ids=["plain", "checkpointing", "accumulation", "bf16"],
)
def test_a_training_takes_what_was_predicted(changes, samples, batch, tmp_path):
    settings = settings_for(tmp_path, **changes)
    predicted = predict_memory(PerceptioConfig.from_pretrained(tiny_checkpoint()), batch, settings)
    model = PerceptioForConditionalGeneration.from_pretrained(tiny_checkpoint())
    trainer = PerceptioSFTTrainer(model, settings, train_dataset=dataset_of(samples))
    with ByteCounter() as counter:
        weights = counter.watch([*model.parameters(), *model.buffers()])
        trainer.train()
    assert predicted.weights == weights
    assert predicted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert predicted.peak == pytest.approx(counter.peak, rel=0.15)
    assert predicted.activations > 0.05 * predicted.peak  # the comparison is not one of weights alone


def test_adapters_and_a_given_model_are_predicted_alike(batch, tmp_path):
    settings = settings_for(tmp_path, gradient_checkpointing=False)
    model = PerceptioForConditionalGeneration.from_pretrained(tiny_checkpoint())
    adapters = partial(lora_config, r=4)
    of_config = predict_memory(model.config, batch, settings, adapters=adapters)
    from peft import get_peft_model

    adapted = get_peft_model(model, adapters(model))
    of_model = predict_memory(adapted, batch, settings)
    assert of_model == of_config
    assert of_config.trained == adapted.get_nb_trainable_parameters()[0]
    assert of_config.gradients < 0.5 * predict_memory(model.config, batch, settings).gradients
    assert not any(isinstance(parameter, FakeTensor) for parameter in adapted.parameters())  # it stays as it was


def test_lines_of_the_arithmetic_add_up(batch, tmp_path):
    config = PerceptioConfig.from_pretrained(tiny_checkpoint())
    predicted = predict_memory(config, batch, settings_for(tmp_path))
    lines = predicted.arithmetic()
    assert predicted.peak == sum((predicted.weights, predicted.gradients, predicted.optimizer, predicted.activations))
    assert [line.split()[0] for line in lines] == ["weights", "gradients", "optimizer", "activations", "peak"]
    assert "2 rows of" in lines[3] and predicted.optimizer == pytest.approx(2 * predicted.gradients, rel=0.01)


def test_half_precision_is_for_internvls_part(batch, tmp_path):
    config = PerceptioConfig.from_pretrained(tiny_checkpoint())
    half = predict_memory(config, batch, settings_for(tmp_path), dtype=torch.bfloat16)
    with torch.device("meta"):
        model = PerceptioForConditionalGeneration(config)
    parts = (model.mask_model, model.depth_model, model.seg_projector)
    whole = sum(parameter.numel() for part in parts for parameter in part.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert half.weights == pytest.approx(2 * (half.parameters + whole) + buffers, rel=0.01)


class _Block(nn.Linear):
    pass


class _Stack(nn.Module):
    _no_split_modules = ("_Block",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(10, 10, bias=False) for _ in range(4))
        self.head = nn.Linear(10, 30, bias=False)


def test_shards_are_divided_and_blocks_gathered():
    model = _Stack()
    weights = 4 * (4 * 100 + 300)
    alone = shares_of(Layout(), model, weights, weights, 2 * weights)
    assert (alone.weights, alone.optimizer, alone.gathered) == (weights, 2 * weights, 0)
    copies = shares_of(Layout(4), model, weights, weights, 2 * weights)
    assert (copies.weights, copies.gathered) == (weights, weights)
    shards = shares_of(Layout(4, "fsdp"), model, weights, weights, 2 * weights)
    assert (shards.weights, shards.gradients, shards.optimizer) == (weights // 4, weights // 4, weights // 2)
    assert shards.gathered == 2 * 4 * 300 + 3 * 4 * 100  # the head and its gradient, two blocks and one gradient


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


def test_an_optimizer_that_cannot_be_predicted_is_said(batch, tmp_path):
    config = PerceptioConfig.from_pretrained(tiny_checkpoint())
    with pytest.raises(ValueError, match=r"optim: .*galore.* cannot be predicted"):
        predict_memory(config, batch, settings_for(tmp_path, optim="galore_adamw", optim_target_modules=["q_proj"]))


@pytest.mark.parametrize(("processes", "strategy"), [(0, "ddp"), (2, "zero1")])
def test_a_layout_that_is_none(processes, strategy):
    with pytest.raises(ValueError, match="expected 1 or more, and one of ddp, fsdp, zero3"):
        Layout(processes, strategy)
