"""GRPO and RLOO: two steps move what learns and nothing else, with every setting that TRL's own classes stop at."""

import pytest
import torch
from datasets import Dataset
from helpers import chat, picture
from sft_helpers import TEXTS
from trl import GRPOConfig, RLOOConfig

from perceptio_hf import PerceptioForConditionalGeneration
from perceptio_hf.training import zero3
from perceptio_hf.training.lora import lora_config
from perceptio_hf.training.reinforcement import PerceptioGRPOTrainer, PerceptioRLOOTrainer

KINDS = {"grpo": (PerceptioGRPOTrainer, GRPOConfig), "rloo": (PerceptioRLOOTrainer, RLOOConfig)}
# The settings, and whether adapters learn instead of the model.
SETTINGS = {
    "plain": ({}, False),
    "reference": ({"beta": 0.1}, False),
    "several steps": ({"steps_per_generation": 2}, False),
    "iterations": ({"num_iterations": 2}, False),
    "adapters": ({"beta": 0.1, "num_iterations": 2}, True),
}


def prompts() -> Dataset:
    turns = [{"role": "user", "content": TEXTS[0]}]
    return Dataset.from_list([{"prompt": turns, "images": [picture(seed=number)]} for number in range(4)])


def length_and_noise(completions: list, **kwargs) -> list[float]:
    """Rewards that differ within every group, whatever is answered."""
    return [len(turns[0]["content"]) / 100 + 0.5 * (index % 2) for index, turns in enumerate(completions)]


@pytest.mark.parametrize("kind", KINDS)
def test_short_prompts_are_not_filled_up(tiny_folder, processor, tmp_path, kind):
    """TRL attends to all of a prompt: in a batch it is what it is alone."""
    trainer_class, config_class = KINDS[kind]
    settings = config_class(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, report_to="none", bf16=False, use_cpu=True
    )
    trainer = trainer_class(
        PerceptioForConditionalGeneration.from_pretrained(tiny_folder),
        reward_funcs=length_and_noise,
        args=settings,
        train_dataset=prompts(),
        processing_class=processor,
    )
    asked = [chat(picture(seed=1), text=words) for words in (TEXTS[0], TEXTS[1])]
    together, alone = trainer._tokenize_prompts(asked)[0], [trainer._tokenize_prompts([one])[0][0] for one in asked]
    assert together == alone and len(together[0]) != len(together[1])


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_told_of_a_training(tiny_folder, processor, tmp_path, monkeypatch, kind):
    told = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: told.append(what))
    monkeypatch.delenv("CI", raising=False)
    trainer_class, config_class = KINDS[kind]
    for variable in ("1", "0"):
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", variable)
        trainer_class(
            PerceptioForConditionalGeneration.from_pretrained(tiny_folder),
            reward_funcs=length_and_noise,
            args=config_class(str(tmp_path), report_to="none", bf16=False, use_cpu=True),
            train_dataset=prompts(),
            processing_class=processor,
        )
    assert len(told) == 1  # where the user asked for it


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_fsdp_are_refused(tiny_folder, processor, tmp_path, monkeypatch, kind):
    trainer_class, config_class = KINDS[kind]
    settings = config_class(str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"by rewards cannot share the model by FSDP.*zero3_8gpu"):
        trainer_class(str(tiny_folder), reward_funcs=length_and_noise, args=settings, processing_class=processor)


@pytest.mark.parametrize("kind", KINDS)
def test_zero3_does_not_mix_prompts_with_and_without_pictures(tiny_folder, processor, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(zero3, "is_on", lambda settings: True)
    trainer_class, config_class = KINDS[kind]
    rows = prompts().to_list()
    mixed = Dataset.from_list([rows[0], rows[1] | {"images": []}], features=prompts().features)
    for data, refused in ((prompts(), False), (mixed, True)):
        options = {
            "reward_funcs": length_and_noise,
            "args": config_class(str(tmp_path), report_to="none", bf16=False, use_cpu=True),
            "train_dataset": data,
            "processing_class": processor,
        }
        model = PerceptioForConditionalGeneration.from_pretrained(tiny_folder)
        if refused:
            with pytest.raises(ValueError, match=r"Some prompts have pictures and others have none.*ddp_8gpu"):
                trainer_class(model, **options)
        else:
            trainer_class(model, **options)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps(tiny_folder, processor, tmp_path, kind, name):
    trainer_class, config_class = KINDS[kind]
    options, adapters = SETTINGS[name]
    model = PerceptioForConditionalGeneration.from_pretrained(tiny_folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = config_class(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=20,
        learning_rate=1e-3,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        model,
        reward_funcs=length_and_noise,
        args=settings,
        train_dataset=prompts(),
        processing_class=processor,
        peft_config=lora_config(model, r=2) if adapters else None,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    after = trainer.model.merge_and_unload().state_dict() if adapters else model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert any("q_proj" in key for key in moved)
    assert all(key.startswith(("model.", "lm_head.")) for key in moved)  # SAM2, codec and projector have no part in it
