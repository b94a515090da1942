"""What a checkpoint was trained on, as far as the files that `perceptio train` leaves beside it tell."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

_RECIPE = "recipe.json"
# `perceptio train` writes its recipe into OUT and its models into folders of these names in OUT.
_MODEL_FOLDER = re.compile(r"checkpoint(-\d+)?|merged")
# Settings worth telling. No other ones are told: they may hold places on the user's disk.
_TOLD = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("bf16", "seed", "lora_r", "lora_alpha", "lora_dropout", "freeze_vision_tower"),
)


@dataclass(frozen=True)
class TrainingRecord:
    """Sentences about the training, its settings by name, and the Hub name of the model it began with."""

    lines: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None


def read_training(folder: str | os.PathLike) -> TrainingRecord:
    """The record of the training that made `folder`; an empty one where none is found."""
    folder = Path(folder).resolve()
    places = [folder, *([folder.parent] if _MODEL_FOLDER.fullmatch(folder.name) else [])]
    for place in places:
        try:
            recipe = json.loads((place / _RECIPE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(recipe, dict):
            return _of_recipe(recipe, folder)
    return TrainingRecord()


def _of_recipe(recipe: dict[str, Any], folder: Path) -> TrainingRecord:
    if "codec_scenes" in recipe:  # of kind tiny
        return TrainingRecord(("Trained from scratch on rendered scenes by `perceptio train`, recipe of kind tiny.",))
    if not isinstance(recipe.get("tasks"), list):  # of another program
        return TrainingRecord()
    source = str(recipe.get("model_name_or_path"))
    base = source if is_hub_name(source, folder.parents) and not recipe.get("model_is_folder") else None
    begun = "the tiny checkpoint of the package" if source == "tiny" else base or "a local checkpoint"
    how = "with LoRA adapters" if recipe.get("lora_r") is not None else "as a whole"
    tasks = [_task(task) for task in recipe["tasks"] if isinstance(task, dict)]
    lines = (f"Fine-tuned by `perceptio train` {how}, from {begun}, on:", "", *(f"- {task}" for task in tasks))
    return TrainingRecord(lines, {name: recipe[name] for name in (*_TOLD, *_weights(recipe)) if name in recipe}, base)


def _weights(recipe: dict[str, Any]) -> list[str]:
    """The weights of the parts of the loss, whatever parts there are."""
    return [name for name, value in recipe.items() if name.endswith("_weight") and isinstance(value, (int, float))]


def is_hub_name(source: str, seen_from: Iterable[Path] = ()) -> bool:
    """Whether `source` reads owner/name and is no folder on this disk, seen from here or from one of these places."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return "/" in source and not any((place / source).exists() for place in (Path(), *seen_from))


def _task(task: dict[str, Any]) -> str:
    """One task of a recipe in words. Of a place on the disk only the last part is told."""
    weight = f", weight {task['weight']}" if "weight" in task else ""
    if "world" in task:
        scenes = f", {task['scenes']} scenes" if "scenes" in task else ""
        return f"rendered scenes: {task['world']}{scenes}{weight}"
    kind, place = next(((kind, task[kind]) for kind in ("samples", "depth_folder") if kind in task), ("samples", ""))
    name = task.get("name") or Path(str(place)).stem or "own data"
    return f"{'pictures with depth' if kind == 'depth_folder' else 'samples'}: {name}{weight}"
