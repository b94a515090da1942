"""What a recipe will train on, with, and for how long, found without training: `perceptio train --dry-run`."""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from perceptio_hf.data.mixture import mix_tasks
from perceptio_hf.data.tasks import SOURCES, load_tasks
from perceptio_hf.modeling.configuration_perceptio import PerceptioConfig
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.training.collator import PerceptioDataCollator
from perceptio_hf.training.lora import lora_config
from perceptio_hf.training.losses import IGNORED_LABEL
from perceptio_hf.training.recipe import check_label_codecs

from .memory import GIB, MemoryPrediction, predict_memory
from .sharding import Layout

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from perceptio_hf.training.config import PerceptioSFTConfig
    from perceptio_hf.training.recipe import Recipe, RecipeArguments

LOOKED_AT = 24  # samples of each task that are opened


@dataclass(frozen=True)
class TaskPlan:
    """One task of a recipe.

    Args:
        name, source: as in the recipe.
        samples: None for a stream, whose length nobody knows.
        share: of the samples of a step, 0 to 1.
        looked_at: samples that were opened and can be learnt from; the means below are theirs.
        left_out: those that cannot, where `on_error` is "skip".
        tokens, learnt, tiles, masks, spans: means of a sample.
        longest: most tokens of one.
    """

    name: str
    source: str
    samples: int | None
    share: float
    looked_at: int
    left_out: int
    tokens: float
    longest: int
    learnt: float
    tiles: float
    masks: float
    spans: float


@dataclass(frozen=True)
class Plan:
    """A training before it begins.

    Args:
        rows: samples of one step, on all processes.
        steps: optimizer steps of the whole training.
        epoch: samples of an epoch; None for a stream.
        seconds: of a step, measured; None where nothing was measured.
        measured_peak: bytes that torch reported beside `memory.peak`; None off GPUs, or where nothing was measured.
        device_memory: bytes of this machine's accelerator; None without one.
        questions: that every evaluation answers by generation.
    """

    tasks: tuple[TaskPlan, ...]
    layout: Layout
    rows: int
    steps: int
    epoch: int | None
    memory: MemoryPrediction
    seconds: float | None = None
    measured_peak: int | None = None
    device_memory: int | None = None
    questions: int = 0

    @property
    def tokens(self) -> float:
        """Tokens of one step, padding left out."""
        return self.rows * sum(task.share * task.tokens for task in self.tasks)

    @property
    def answering(self) -> int | None:
        """Bytes of the first GPU while it answers with a copy of the whole model; None where it needs no copy."""
        return self.memory.answering if self.questions and self.layout.shards else None

    @property
    def hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.steps / 3600

    def lines(self) -> list[str]:
        """The plan for people."""
        head = ("task", "source", "samples", "share", "tokens", "longest", "learnt", "tiles", "masks", "spans")
        table = [head, *(_cells(task) for task in self.tasks)]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines = ["  ".join(_padded(row, widths)) for row in table]
        looked, left_out = (sum(getattr(task, name) for task in self.tasks) for name in ("looked_at", "left_out"))
        cannot = f"; {left_out} more cannot be learnt from and would be left out" if left_out else ""
        lines += [f"Means of {looked} samples that were opened{cannot}.", ""]
        epochs = f", {self.steps * self.rows / self.epoch:.2f} epochs of {self.epoch:,} samples" if self.epoch else ""
        lines.append(f"A step: {self.rows} samples, about {self.tokens:,.0f} tokens. {self.steps:,} steps{epochs}.")
        share = self.memory.trained / self.memory.parameters
        lines += [f"Trained: {self.memory.trained:,} of {self.memory.parameters:,} parameters ({share:.1%}).", ""]
        processes = f"{self.layout.processes} process{'es' * (self.layout.processes > 1)}"
        sharing = f", {self.layout.strategy}" if self.layout.processes > 1 else ""
        lines += [f"Memory of each GPU ({processes}{sharing}):", *(f"  {line}" for line in self.memory.arithmetic())]
        if self.answering is not None:
            why = "the first GPU gathers the whole model beside its share of weights and optimizer"
            lines.append(f"  {'answering':<12}{self.answering / GIB:9.3f} GiB  for {self.questions:,} questions: {why}")
        return [*lines, *self._measured()]

    def _measured(self) -> list[str]:
        lines = []
        if self.device_memory is not None:
            most = max(self.memory.peak, self.answering or 0)
            fits = "fits into" if most < 0.95 * self.device_memory else "does NOT fit into"
            lines.append(f"  which {fits} the {self.device_memory / GIB:.1f} GiB of this machine's accelerator.")
        if self.measured_peak is not None:
            error = self.memory.peak / self.measured_peak - 1
            lines.append(
                f"  torch has allocated {self.measured_peak / GIB:.3f} GiB: the prediction is {error:+.1%} off."
            )
        if self.seconds is None:
            return [*lines, "", "Seconds and hours: add --measure 20, on the machine that will train."]
        hours = f"{self.hours:.3g} hours for {self.steps:,} steps, without evaluations and saving"
        return [*lines, "", f"Measured: {self.seconds:.3g} s a step, {hours}."]

    def as_json(self) -> dict[str, Any]:
        """The plan for programs; bytes, seconds, hours."""
        memory = {name: getattr(self.memory, name) for name in (*self.memory.notes, "peak")}
        return {
            "tasks": [vars(task) for task in self.tasks],
            "layout": vars(self.layout),
            "samples_per_step": self.rows,
            "tokens_per_step": self.tokens,
            "steps": self.steps,
            "samples_per_epoch": self.epoch,
            "parameters": self.memory.parameters,
            "trained": self.memory.trained,
            "memory": memory | {"batch": list(self.memory.batch), "how": self.memory.notes},
            "questions_per_evaluation": self.questions,
            "answering": self.answering,
            "device_memory": self.device_memory,
            "measured_peak": self.measured_peak,
            "seconds_per_step": self.seconds,
            "hours": self.hours,
        }


def plan_training(recipe: "Recipe", source: str, revision: Mapping[str, str], layout: Layout) -> Plan:
    """Open every source of a recipe, look at some samples of each, and rehearse a step.

    Args:
        source, revision: of the checkpoint that training begins with; of its weights only the codec's are read, to
            compare them with those of labels.
        layout: of the processes that will train.

    Raises:
        ValueError: for a source that cannot be opened, a sample that cannot be learnt from (unless `on_error` is
            "skip"), and where no sample could be used.
    """
    arguments, settings = recipe.arguments, recipe.settings
    config = PerceptioConfig.from_pretrained(source, **revision)
    processor = PerceptioProcessor.from_pretrained(source, **revision)
    datasets, weights = load_tasks(arguments.tasks, arguments.data_folder)
    _check_codes(arguments, source)
    if arguments.eval_tasks:
        load_tasks(arguments.eval_tasks, arguments.data_folder)
    collator = PerceptioDataCollator(
        processor,
        depth_image_size=config.depth_config.image_size,
        on_error=settings.on_error,
        max_length=settings.max_length,
    )
    total = sum(weights.values())
    tasks, seen = [], []
    for task, (name, dataset) in zip(arguments.tasks, datasets.items(), strict=True):
        samples = _some(dataset)
        read = [(sample, collator([sample])) for sample in samples]
        good = [(sample, batch) for sample, batch in read if (batch["labels"] != IGNORED_LABEL).any()]
        if not good:
            raise ValueError(f"Task {name}: none of the {len(samples)} samples that were looked at can be used.")
        left_out = len(read) - len(good)
        tasks.append(_task_plan(name, task, dataset, weights[name] / total, left_out, [batch for _, batch in good]))
        seen += [(batch["input_ids"].shape[1], sample) for sample, batch in good]
    rows = settings.per_device_train_batch_size
    every = rows * settings.gradient_accumulation_steps * layout.processes
    epoch = _epoch(datasets, weights)
    steps = _steps(settings, epoch, every)
    longest = [sample for _, sample in sorted(seen, key=lambda item: -item[0])]
    largest = collator((longest * rows)[:rows])
    memory = predict_memory(
        config, largest, settings, adapters=_adapters(arguments), dtype=_dtype(arguments, config), layout=layout
    )
    return Plan(
        tasks=tuple(tasks),
        layout=layout,
        rows=every,
        steps=steps,
        epoch=epoch,
        memory=memory,
        device_memory=_device_memory(),
    )


def _check_codes(arguments: "RecipeArguments", source: str) -> None:
    """ValueError for labels in the codes of another codec than the model's; that of a repository, which is not here
    yet, is compared when training starts."""
    tasks = [*arguments.tasks, *arguments.eval_tasks]
    if os.path.isdir(source):
        check_label_codecs(tasks, arguments.data_folder, source)


def _some(dataset: "Dataset | IterableDataset") -> list[dict]:
    """Samples from all over a data set; the first ones of a stream."""
    if not hasattr(dataset, "select"):
        return list(dataset.take(LOOKED_AT))
    places = np.unique(np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).round().astype(int))
    return [dataset[int(place)] for place in places]


def _task_plan(
    name: str, task: Mapping[str, Any], dataset: Any, share: float, left_out: int, batches: list[dict]
) -> TaskPlan:
    lengths = [batch["input_ids"].shape[1] for batch in batches]

    def mean(count: Any) -> float:
        return float(np.mean([count(batch) for batch in batches]))

    return TaskPlan(
        name=name,
        source=next(key for key in SOURCES if key in task),
        samples=len(dataset) if hasattr(dataset, "select") else None,
        share=share,
        looked_at=len(batches),
        left_out=left_out,
        tokens=float(np.mean(lengths)),
        longest=max(lengths),
        learnt=mean(lambda batch: int((batch["labels"] != IGNORED_LABEL).sum())),
        tiles=mean(lambda batch: len(batch.get("pixel_values", ()))),
        masks=mean(lambda batch: len(batch["mask_targets"])),
        spans=mean(lambda batch: len(batch["depth_targets"])),
    )


def _cells(task: TaskPlan) -> tuple[str, ...]:
    samples = "stream" if task.samples is None else f"{task.samples:,}"
    means = (f"{value:.1f}" for value in (task.learnt, task.tiles, task.masks, task.spans))
    return (task.name, task.source, samples, f"{task.share:.1%}", f"{task.tokens:.0f}", str(task.longest), *means)


def _padded(row: tuple[str, ...], widths: list[int]) -> list[str]:
    pairs = zip(row, widths, strict=True)
    return [cell.ljust(width) if number < 2 else cell.rjust(width) for number, (cell, width) in enumerate(pairs)]


def _adapters(arguments: "RecipeArguments"):
    if arguments.lora_r is None:
        return None
    options = arguments.lora_options()
    layers = options.pop("layers", None)
    return functools.partial(lora_config, r=arguments.lora_r, target_layers=layers, **options)


def _dtype(arguments: "RecipeArguments", config: PerceptioConfig) -> torch.dtype:
    """Of the weights, as `from_pretrained(dtype=...)` reads it."""
    dtype = config.dtype if arguments.dtype == "auto" else arguments.dtype
    dtype = getattr(torch, str(dtype).removeprefix("torch."), None) if dtype is not None else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {arguments.dtype!r}; expected float32, bfloat16, float16 or auto.")
    return dtype


def _epoch(datasets: Mapping[str, Any], weights: Mapping[str, float]) -> int | None:
    if not all(hasattr(dataset, "select") for dataset in datasets.values()):
        return None
    return len(mix_tasks(datasets, weights))


def _steps(settings: "PerceptioSFTConfig", epoch: int | None, rows: int) -> int:
    if settings.max_steps > 0:
        return settings.max_steps
    if epoch is None:
        raise ValueError("A task is a stream, so that an epoch has no end: set max_steps.")
    return math.ceil(settings.num_train_epochs * math.ceil(epoch / rows))


def _device_memory() -> int | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory
