"""The tasks of a recipe as data sets: where their samples come from, and which part of them is taken.

A new kind of source is one function and one entry in `SOURCES`. Its first argument is what stands behind the key, its
others are further keys of the task, checked by their type hints; those of type `str | os.PathLike` are places on disk.
"""

import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perceptio_hf.data.published.ade20k import ade20k
from perceptio_hf.data.published.coco import coco_instances
from perceptio_hf.data.published.hub import hub
from perceptio_hf.data.published.labels import labels
from perceptio_hf.data.published.referring import grefcoco, refcoco, refcocog, refcocop
from perceptio_hf.files import expanded

from .keys import check_keys, check_value
from .sources import depth_folder, load_llava, load_samples
from .variants import with_variants
from .world_samples import world_dataset

# The key that says where a task's samples come from -> what reads them.
SOURCES: dict[str, Callable] = {
    "world": world_dataset,
    "samples": load_samples,
    "depth_folder": depth_folder,
    "llava": load_llava,
    "labels": labels,
    "refcoco": refcoco,
    "refcocop": refcocop,
    "refcocog": refcocog,
    "grefcoco": grefcoco,
    "coco_instances": coco_instances,
    "ade20k": ade20k,
    "hub": hub,
}
_TASK_KEYS = ("name", "weight", "take_every", "leave_out_every", "variants")


def load_tasks(
    tasks: Sequence[Mapping[str, Any]], data_folder: str | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """The data sets of a recipe's tasks, and their weights, by name.

    Args:
        data_folder: where the tasks' places lie, unless they are absolute.

    Raises:
        ValueError: for a task without a source, with two, with unknown keys, or with the name of another; for sources
            that cannot be opened, all of them.
    """
    datasets, weights, wrong = {}, {}, []
    for number, task in enumerate(tasks, 1):
        place = f"Task {number}"
        if not isinstance(task, Mapping) or sum(key in SOURCES for key in task) != 1:
            raise ValueError(f"{place} is {task!r}; it needs one of the keys {', '.join(SOURCES)}.")
        kind = next(key for key in SOURCES if key in task)
        name = task_name(task)
        if name in datasets:
            raise ValueError(f"{place} has the name {name!r} of an earlier one; give it another `name`.")
        weight = task.get("weight", 1.0)
        check_value(f"{place} ({name}): weight", weight, float)
        datasets[name], weights[name] = None, float(weight)
        try:
            dataset = _load_task(task, kind, f"{place} ({name})", data_folder)
            dataset = _part_of(dataset, task, f"{place} ({name})")
            datasets[name] = _varied(dataset, task, f"{place} ({name})")
        except ValueError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(tasks)} sources cannot be opened: {'; '.join(map(str, wrong))}")
    return datasets, weights


def task_name(task: Mapping[str, Any]) -> str:
    """What a task is called, in logs and among the metrics of evaluations."""
    place = next(task[key] for key in task if key in SOURCES)
    return str(task.get("name", Path(str(place)).stem))


def _load_task(task: Mapping[str, Any], kind: str, place: str, data_folder: str | None):
    source, *options = inspect.signature(SOURCES[kind]).parameters.values()
    known = {option.name: option for option in options}
    check_keys((key for key in task if key != kind), [*known, *_TASK_KEYS], place)
    check_value(f"{place}: {kind}", task[kind], str)
    given = {key: value for key, value in task.items() if key in known}
    for key, value in given.items():
        check_value(f"{place}: {key}", value, known[key].annotation)
    missing = [name for name, option in known.items() if option.default is option.empty and name not in given]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}.")
    if data_folder is not None:
        given = {key: _placed(value, known[key].annotation, data_folder) for key, value in given.items()}
        return SOURCES[kind](_placed(task[kind], source.annotation, data_folder), **given)
    return SOURCES[kind](task[kind], **given)


def _placed(value: Any, hint: Any, folder: str) -> Any:
    """A place on disk as seen from `folder`; other values as they are."""
    is_place = os.PathLike in typing.get_args(hint)
    if not is_place or value is None:
        return value
    return str(expanded(folder) / os.path.expanduser(value))


def _part_of(dataset, task: Mapping[str, Any], place: str):
    """Every n-th sample (`take_every: n`) or all the others (`leave_out_every: n`): a fixed set to train on, and one to
    measure on."""
    asked = {key: task[key] for key in ("take_every", "leave_out_every") if key in task}
    if not asked:
        return dataset
    if len(asked) == 2 or not hasattr(dataset, "select"):
        raise ValueError(
            f"{place}: take_every and leave_out_every are for one of two parts of a set that is no stream."
        )
    (key, step), size = next(iter(asked.items())), len(dataset)
    if isinstance(step, bool) or not isinstance(step, int) or not 2 <= step <= size:
        raise ValueError(
            f"{place}: {key} is {step!r}; expected a whole number from 2 to {size}, the number of samples."
        )
    return dataset.select([index for index in range(size) if (index % step == step - 1) == (key == "take_every")])


def _varied(dataset, task: Mapping[str, Any], place: str):
    if "variants" not in task:
        return dataset
    if not hasattr(dataset, "select"):
        raise ValueError(f"{place}: variants are made of a set that is no stream.")
    try:
        return with_variants(dataset, task["variants"])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
