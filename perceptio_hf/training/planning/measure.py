"""Seconds of a training step, and its memory on a GPU, by training a few steps that are thrown away."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback

from perceptio_hf.training.trainer import PerceptioSFTTrainer

_WARM_UP = 3  # steps at most that are not counted: compiling, filling caches, the first pictures
# Recipe keys that a measurement takes the place of: nothing is saved, evaluated or reported.
WITHOUT_TRACE = (
    *("--save_strategy", "no"),
    *("--eval_strategy", "no"),
    *("--eval_on_start", "false"),
    *("--report_to", "none"),
    *("--plot_losses", "false"),
    *("--load_best_model_at_end", "false"),
)


class _Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def measure_steps(make_trainer: Callable[[], PerceptioSFTTrainer]) -> tuple[float, int | None]:
    """Train, and return the median seconds of a step and the bytes that torch has allocated at most on a GPU.

    Raises:
        ValueError: for a training of fewer than two steps.
    """
    trainer, clock = make_trainer(), _Clock()
    trainer.add_callback(clock)
    on_gpu = torch.cuda.is_available() and not trainer.args.use_cpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    if not seconds:
        raise ValueError(f"Only {len(clock.times)} steps were trained; measure 2 or more.")
    counted = seconds[min(_WARM_UP, len(seconds) - 1) :]
    return statistics.median(counted), torch.cuda.max_memory_allocated() if on_gpu else None
