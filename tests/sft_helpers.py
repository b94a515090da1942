"""A small training for the tests of the trainer; run as a script, it is one process of distributed trainings.

accelerate launch ... tests/sft_helpers.py OUT FSDP MULTI_CPU
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset, IterableDataset
from helpers import depth_config, picture, random_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import GRPOConfig

from perceptio_hf import PerceptioProcessor, PerceptioSFTConfig, PerceptioSFTTrainer
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.evaluation.during.figures import HeldOutFigures
from perceptio_hf.evaluation.during.trackers import TrainerFigures
from perceptio_hf.training import checkpoints
from perceptio_hf.training.reinforcement import PerceptioGRPOTrainer

TEXTS = ["Which is closer, the red ball or the blue box?", "Segment the red ball.", "Here is the depth map."]
GRID = 16  # depth codes of one span, and codes in the codebook


def processor() -> PerceptioProcessor:
    from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer

    return tiny_processor(tiny_tokenizer(TEXTS, vocab_size=320), depth_config())


def sample(number: int) -> dict:
    """One of four kinds by `number`: mask, depth map with a hole, mask and codes, words of varying length."""
    rng = np.random.default_rng(number)
    kind, ball = number % 4, np.zeros((40, 48), dtype=bool)
    ball[5 : 20 + number % 7, 8:30] = True
    depth = 1 + rng.random((40, 48))
    depth[:6, :9] = 0
    answer = (
        "[SEG] Here is the red ball.",
        "<DEPTH_START><DEPTH_END> the depth map",
        "[SEG] <DEPTH_START><DEPTH_END> Here",
        "the blue box is closer" + " red ball" * (number % 3),
    )[kind]
    return {
        "id": str(number),
        "images": [picture(seed=number)],
        "messages": [{"role": "user", "content": TEXTS[number % 3]}, {"role": "assistant", "content": answer}],
        "masks": [encode_mask(ball)] if kind in (0, 2) else [],
        "depth": depth.tolist() if kind == 1 else None,
        "depth_unit": "m" if kind == 1 else None,
        "depth_codes": rng.integers(0, GRID, GRID).tolist() if kind == 2 else None,
    }


def samples(count: int, first: int = 0) -> Dataset:
    return Dataset.from_list([sample(number) for number in range(first, first + count)])


def some_without_picture(count: int) -> Dataset:
    """`samples`, of which every eighth shows no picture."""
    return Dataset.from_list([sample(number) | ({"images": []} if number % 8 == 7 else {}) for number in range(count)])


def stream(parts: list[list[int]]) -> IterableDataset:
    """Samples by number, in shards."""
    columns = samples(4).features
    return IterableDataset.from_generator(_of_parts, gen_kwargs={"parts": parts}, features=columns)


def _of_parts(parts: list[list[int]]):
    for part in parts:
        yield from map(sample, part)


def settings(out: Path | str, **changes) -> PerceptioSFTConfig:
    """SGD, whose step is the gradient: Adam would turn the noise of gradients that are nearly zero into steps."""
    values = {
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_losses": False,  # which takes longer than these steps
    }
    return PerceptioSFTConfig(**(values | changes))


def trainer(out: Path | str, *, processor=None, model=None, train=None, evaluation=None, **changes):
    processor = processor or globals()["processor"]()
    return PerceptioSFTTrainer(
        model or random_model(processor),
        settings(out, **changes),
        train_dataset=samples(16) if train is None else train,
        eval_dataset=evaluation,
        processing_class=processor,
    )


def answered() -> TrainerFigures:
    """What an evaluation answers by generation, with masks and with spans."""
    sets = [{"benchmark": "world-refer", "limit": 3, "cases": 1}, {"benchmark": "world-depth", "limit": 3, "cases": 1}]
    return TrainerFigures(HeldOutFigures([*sets, {"broken_spans": 4}]))


def main(out: str, *kinds: str) -> None:
    """Train into `out`/KIND by each of the ways that accelerate has, one after another in the same processes, and once
    more from the first checkpoint into `out`/KIND/resumed."""
    torch.set_num_threads(1)
    for kind in kinds:
        AcceleratorState._reset_state()
        os.environ["ACCELERATE_USE_FSDP"] = str(kind == "FSDP").lower()
        distributed(Path(out, kind))


def distributed(out: Path) -> None:
    """Steps of 4 micro batches of 1; writes what was logged and computed."""
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "freeze_vision_tower": False}
    changes |= {"gradient_checkpointing": True, "train": some_without_picture(16)}
    saves = {"save_strategy": "steps", "save_steps": 1}
    training = trainer(out, evaluation=samples(4, first=100), **changes, **saves)
    between = _BetweenMicroBatches()
    training.add_callback(between)
    training.train()
    training.figures = answered()
    evaluation = training.evaluate()
    training.save_model(str(out))
    resumed = trainer(out / "resumed", **changes)
    with patch.object(checkpoints, "fault_of", wraps=checkpoints.fault_of) as check:
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    checked = gather_object([check.call_count])
    resumed.save_model(str(out / "resumed"))
    one, few = [[0, 1, 2, 3], [4, 5]], {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    uneven = trainer(out / "uneven", train=stream(one), evaluation=stream(one), max_steps=3, **few)
    uneven.train()  # of one process the shard holds two samples less
    streamed = uneven.state.global_step, uneven.evaluate(samples(6)), uneven.evaluate()
    thirds = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]  # which two processes do not divide
    few = {"max_steps": 6, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 3}
    divided, again = (trainer(out / name, train=stream(thirds), **few) for name in ("divided", "again"))
    divided.data_collator = _Noting(divided.data_collator)
    divided.train()
    used = gather_object([divided.data_collator.ids])
    again.train(resume_from_checkpoint=str(out / "divided" / "checkpoint-3"))
    for name, run in (("divided", divided), ("again", again)):
        run.save_model(str(out / name))
    halved = in_half_precision(out / "halved", changes)
    if training.accelerator.distributed_type == DistributedType.MULTI_CPU:
        rewarded(out / "rewarded")
    if training.is_world_process_zero():
        result = {
            "streamed": streamed,
            "used": used,
            "checked": checked,
            "halved": halved,
            "gradients": between.numbers,
            "history": training.state.log_history,
            "evaluation": evaluation,
            "kind": str(training.accelerator.distributed_type),
            "sharded": sum(hasattr(parameter, "full_tensor") for parameter in training.model.parameters()),
        }
        (out / "result.json").write_text(json.dumps(result))


def in_half_precision(out: Path, changes: dict) -> dict[str, str]:
    """A step with bf16: what a layer of the language model gives, and what is trained."""
    AcceleratorState._reset_state()
    training, found = trainer(out, **changes | {"bf16": True, "max_steps": 1}), {}
    layer = training.model.model.language_model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: found.update(language=str(output.dtype)))
    training.train()
    return found | {"trained": str(next(training.model.parameters()).dtype)}


class _BetweenMicroBatches(TrainerCallback):
    """Counts the numbers of the gradients that lie in this process's parameters between two micro batches of a step.
    FSDP2 keeps whole gradients elsewhere, so that of those there is none."""

    def __init__(self):
        self.numbers: list[int] = []

    def on_substep_end(self, args, state, control, model, **kwargs):
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found]
        self.numbers.append(sum(gradient.numel() for gradient in local))


class _Noting:
    """A collator like the given one, which keeps the ids of the samples that it gets."""

    def __init__(self, collator):
        self.collator, self.ids = collator, []

    def __getattr__(self, name: str):
        return getattr(self.collator, name)

    def __call__(self, rows: list[dict]) -> dict:
        self.ids += [row["id"] for row in rows]
        return self.collator(rows)


def rewarded(out: Path) -> None:
    """A step by rewards of prompts that have a picture for one process, and none for the other."""
    turns = [{"role": "user", "content": TEXTS[0]}]
    prompts = [{"prompt": turns, "images": [] if number % 2 else [picture(seed=number)]} for number in range(4)]
    settings = GRPOConfig(
        str(out),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        shuffle_dataset=False,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    words = processor()
    PerceptioGRPOTrainer(
        random_model(words),
        reward_funcs=lambda completions, **columns: [float(index % 2) for index in range(len(completions))],
        args=settings,
        train_dataset=Dataset.from_list(prompts),
        processing_class=words,
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
