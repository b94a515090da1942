"""The trainer and masks: learning rates of their own, the projector's start, and the watch in the logs."""

import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import sft_helpers as sft
import torch
from accelerate.utils import DeepSpeedPlugin
from helpers import assert_trained_alike, random_model
from safetensors.torch import load_file
from torch import nn

from perceptio_hf import PerceptioSFTTrainer
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.training.lora import lora_config
from perceptio_hf.training.masks.rates import give_own_rates
from perceptio_hf.training.masks.watch import ALIKE, EMPTY, UNITS_OFF, WATCHED

DECODER, PROJECTOR = "mask_model.mask_decoder.", "seg_projector."


@pytest.fixture(scope="module")
def processor():
    return sft.processor()


@pytest.fixture(scope="module")
def base(processor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in random_model(processor).state_dict().items()}


def moved(model, base) -> dict[str, float]:
    """The largest change of a weight in the language model, the mask decoder and the projector."""
    parts = {"language_model": "model.language_model.", "decoder": DECODER, "projector": PROJECTOR}
    return {
        part: max(
            float((value - base[name]).abs().max()) for name, value in model.state_dict().items() if prefix in name
        )
        for part, prefix in parts.items()
    }


def test_groups_are_divided_and_keep_what_they_have():
    one, two, three = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    parameters = [*one.parameters(), *two.parameters()]
    groups = [{"params": parameters, "weight_decay": 0.1}, {"params": [*three.parameters()], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    give_own_rates(optimizer, [(nn.ModuleList([two, three]), 1e-4), (three, 1e-5)])
    found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert found == {(1e-3, 0.1): 2, (1e-4, 0.1): 2, (1e-5, 0.0): 2}
    with pytest.raises(ValueError, match="a learning rate for Linear, but no parameter of it is trained"):
        give_own_rates(optimizer, [(nn.Linear(2, 2), 1e-4)])


@pytest.mark.parametrize(
    ("rates", "still"),
    [
        ({"mask_learning_rate": 0.0}, {"decoder", "projector"}),
        ({"seg_projector_learning_rate": 0.0}, {"projector"}),
        ({"mask_learning_rate": 0.0, "seg_projector_learning_rate": 0.01}, {"decoder"}),
        ({"learning_rate": 0.0, "mask_learning_rate": 0.01}, {"language_model"}),
    ],
)
def test_each_part_learns_at_its_own_rate(processor, base, tmp_path, rates, still):
    trainer = sft.trainer(tmp_path, processor=processor, max_steps=1, **rates)
    trainer.train()
    assert {part for part, change in moved(trainer.model, base).items() if change == 0} == still


def test_a_schedule_scales_all_rates(processor, tmp_path):
    trainer = sft.trainer(
        tmp_path, processor=processor, max_steps=2, lr_scheduler_type="linear", mask_learning_rate=0.002
    )
    trainer.train()
    rates = sorted({group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups})
    assert rates == [0.0] and {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.01, 0.002}


def test_a_run_with_own_rates_and_a_start_resumes(processor, tmp_path):
    values = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "mask_learning_rate": 0.003,
        "seg_projector_learning_rate": 0.001,
        "seg_projector_start": 6,
        "processor": processor,
    }
    whole = sft.trainer(tmp_path, **values)
    whole.train()
    assert whole.projector_start.states >= 6
    resumed = sft.trainer(tmp_path / "resumed", **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.projector_start is None
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [
        group["lr"] for group in whole.optimizer.param_groups
    ]
    assert_trained_alike(resumed.model.state_dict(), whole.model.state_dict())


def test_the_start_leaves_order_and_skipped_samples_alone(processor, tmp_path):
    broken = sft.sample(0) | {"masks": [encode_mask(np.ones((3, 3), dtype=bool))]}  # of another size than its picture
    rows = sft.Dataset.from_list([broken, *(sft.sample(number) for number in range(1, 16))])
    trainer = sft.trainer(tmp_path, processor=processor, train=rows, on_error="skip", seg_projector_start=100)
    state = torch.random.get_rng_state()
    trainer._start_seg_projector()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.projector_start.states == 7  # of 16 samples every second one has a mask, and one of them is broken
    assert trainer.data_collator.skipped == {}


def test_the_start_can_come_later(processor, tmp_path):
    values = {"max_steps": 3, "seg_projector_start": 8, "seg_projector_start_step": 2, "processor": processor}
    values |= {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    whole = sft.trainer(tmp_path, **values)
    whole.train()
    weights = [
        load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")["seg_projector.linear_in.weight"]
        for step in (1, 2, 3)
    ]
    assert (weights[1] - weights[0]).abs().max() < 0.0015 < 0.1 < (weights[2] - weights[1]).abs().max()
    projector = whole.model.seg_projector.linear_in.weight
    assert whole.optimizer.state[projector]["step"] == 1  # what Adam knew of the old weights is forgotten
    for first, starts in ((1, True), (2, True), (3, False)):
        resumed = sft.trainer(tmp_path / f"from{first}", **values | {"max_steps": 4, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{first}"))
        assert (resumed.projector_start is not None) == starts


def test_a_start_that_never_comes_is_refused(processor, tmp_path):
    """How many steps epochs have is known when the training begins."""
    values = {"max_steps": -1, "num_train_epochs": 1, "seg_projector_start": 4, "seg_projector_start_step": 50}
    with pytest.raises(ValueError, match="seg_projector_start_step is 50, but the training has 2 steps"):
        sft.trainer(tmp_path, processor=processor, **values).train()


def adapted(processor, out: Path, modules: tuple[str, ...], **changes) -> PerceptioSFTTrainer:
    model = random_model(processor)
    return PerceptioSFTTrainer(
        model,
        sft.settings(out, max_steps=1, **changes),
        train_dataset=sft.samples(8),
        processing_class=processor,
        peft_config=lora_config(model, r=2, modules_to_save=modules),
    )


def test_with_adapters(processor, tmp_path):
    trainer = adapted(
        processor,
        tmp_path,
        ("seg_projector", "mask_decoder"),
        seg_projector_start=4,
        seg_projector_learning_rate=0.0,
        mask_learning_rate=0.002,
    )
    trainer.train()
    assert {0.0, 0.002, 0.01} == {group["lr"] for group in trainer.optimizer.param_groups}
    assert trainer.projector_start.states >= 4
    assert WATCHED.keys() <= trainer.state.log_history[0].keys()


def test_what_is_not_trained_gets_neither_rate_nor_start(processor, tmp_path):
    with pytest.raises(ValueError, match=r"seg_projector_start gives the .* not trained"):
        adapted(processor, tmp_path, ("mask_decoder",), seg_projector_start=4).train()
    trainer = sft.trainer(tmp_path, processor=processor, seg_projector_start=4, seg_projector_start_step=1)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="in shards already"):
        trainer._check_start()
    trainer = sft.trainer(tmp_path, processor=processor, seg_projector_start=4)
    for stage, refused in ((2, False), (3, True)):
        trainer.args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=False)
        with pytest.raises(ValueError, match="in shards from when it is loaded") if refused else nullcontext():
            trainer._check_start()
    with pytest.raises(ValueError, match="no parameter of it is trained"):
        adapted(processor, tmp_path, ("seg_projector",), mask_learning_rate=0.1).train()
    trainer = sft.trainer(tmp_path, processor=processor, mask_learning_rate=0.1)
    trainer.optimizer = torch.optim.SGD(trainer.model.lm_head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer came with the call"):
        trainer.train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_learning_rate": -1.0}, "mask_learning_rate is -1.0"),
        ({"seg_projector_learning_rate": float("inf")}, "seg_projector_learning_rate is inf"),
        ({"seg_projector_start": -1}, "seg_projector_start is -1"),
        ({"seg_projector_start_step": -1}, "seg_projector_start_step is -1"),
        ({"mask_patience": -1}, "mask_patience is -1"),
        ({"seg_projector_start_step": 80}, "nothing is started: set seg_projector_start"),
        ({"seg_projector_start": 8, "seg_projector_start_step": 2}, r"the training ends at step 2 \(max_steps\)"),
    ],
)
def test_settings_out_of_range(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        sft.settings(tmp_path, **values)


def test_the_logs_tell_of_dead_units_and_empty_masks(processor, tmp_path, caplog):
    """A projector whose units are off, in front of a decoder: every [SEG] gets the same prompt."""
    model = random_model(processor)
    with torch.no_grad():
        model.seg_projector.linear_in.bias.fill_(-1e4)
    trainer = sft.trainer(tmp_path, processor=processor, model=model, max_steps=8, mask_patience=4, learning_rate=0.0)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "mask_dice" in entry]
    assert all(entry[UNITS_OFF] == 1 for entry in logs)
    assert all(0 <= entry[EMPTY] <= 1 and -1 <= entry[ALIKE] <= 1.0001 for entry in logs)
    told = [record.message for record in caplog.records if "Masks have not got better" in record.message]
    assert len(told) == 2  # at steps 4 and 8
    assert "100 % of the [SEG] projector's units are off" in told[0] and "seg_projector_start: 256" in told[0]
    assert model.seg_projector.linear_in._forward_hooks == {}
