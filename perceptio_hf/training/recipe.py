"""Recipes: YAML files, read by TRL's parser, that say what to train on what.

A recipe holds the settings of `PerceptioSFTConfig` and those of `RecipeArguments`, all on one level:

    model_name_or_path: tiny
    learning_rate: 1.0e-4
    max_steps: 500
    tasks:
      - world: refer                # rendered scenes, see `perceptio_hf.data.world_samples.world_dataset`
        scenes: 2000
        weight: 2
      - samples: data/rooms         # a folder with samples.jsonl, a .jsonl file, or a data set saved to disk
      - depth_folder: data/depth    # pictures with depth maps beside them
        unit: mm
        leave_out_every: 5          # all but the 5th, 10th, ... sample; `take_every: 5` takes just these
        variants: 24                # and 24 of each, see `perceptio_hf.data.variants.with_variants`
"""

import difflib
import inspect
import types
import typing
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from trl import TrlParser

from perceptio_hf.data.mixture import mix_tasks
from perceptio_hf.data.sources import depth_folder, load_samples
from perceptio_hf.data.variants import with_variants
from perceptio_hf.data.world_samples import world_dataset
from perceptio_hf.files import read_yaml

from .config import PerceptioSFTConfig

# The key that says where a task's samples come from -> what reads them; its other arguments are further keys.
SOURCES: dict[str, Callable] = {"world": world_dataset, "samples": load_samples, "depth_folder": depth_folder}
_TASK_KEYS = ("name", "weight", "take_every", "leave_out_every", "variants")
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "keys and values",
}


@dataclass
class RecipeArguments:
    """What a recipe says beside the settings of the trainer.

    Raises:
        ValueError: for a recipe without a model or without tasks.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or repository of a Perceptio checkpoint; 'tiny' is the embedded one."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a repository."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights; bf16: true computes in bfloat16 without storing it."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2."})
    tasks: list[dict] = field(default_factory=list, metadata={"help": "What to train on, see the recipes."})
    eval_tasks: list[dict] = field(default_factory=list, metadata={"help": "What to evaluate on; each by itself."})
    data_folder: str | None = field(
        default=None, metadata={"help": "Folder in which the places of tasks lie, unless they are absolute."}
    )
    mixture_seed: int = field(default=0, metadata={"help": "Seed of the order in which tasks are mixed."})
    lora_r: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank; without it, the whole model is trained."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters times their rank; default: twice the rank."}
    )
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before the adapters; default: 0."})
    lora_layers: list[str] | None = field(
        default=None, metadata={"help": "Linear layers of the language model's blocks, e.g. q_proj; default: all."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Parts trained as a whole; default: seg_projector and mask_decoder."}
    )
    lora_merge: bool = field(
        default=False, metadata={"help": "Also save a plain model with the adapters merged in, as OUT/merged."}
    )
    recipe: str = field(default="sft", metadata={"help": "Kind of training: sft (this one) or tiny."})

    def __post_init__(self):
        if not self.model_name_or_path:
            raise ValueError("The recipe names no model: set model_name_or_path, e.g. to tiny.")
        if not self.tasks:
            raise ValueError(f"The recipe trains on nothing: list tasks, each with one of {', '.join(SOURCES)}.")
        if self.lora_r is None and self.lora_options():
            raise ValueError(
                f"The recipe has {', '.join(f'lora_{name}' for name in self.lora_options())}, but no lora_r; give the "
                "rank, e.g. lora_r: 16, or leave them out to train the whole model."
            )

    def lora_options(self) -> dict[str, Any]:
        """The LoRA settings that were given, except the rank, by the end of their names."""
        names = ("alpha", "dropout", "layers", "modules_to_save")
        values = {name: getattr(self, f"lora_{name}") for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read; `values` are its keys as they stand in the file and on the command line."""

    arguments: RecipeArguments
    settings: PerceptioSFTConfig
    values: dict[str, Any]


class _Parser(TrlParser):
    """TRL's parser, with errors as exceptions."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}.")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe of kind sft.

    Args:
        path: of the YAML file.
        overrides: options as on a command line that take the place of the file's, e.g. ["--max_steps", "10"].

    Raises:
        ValueError: for a key that does not exist (with the one that may have been meant), a value of another type, a
            file that is missing, and settings that make no sense, all in words.
    """
    groups = (RecipeArguments, PerceptioSFTConfig)
    hints = {name: hint for group in groups for name, hint in typing.get_type_hints(group).items()}
    parser = _Parser(groups, allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    values = read_yaml(path)
    check_keys(values, [*actions, "env"], str(path))
    for key, value in values.items():
        if key in actions:
            _check_value(f"{path}: {key}", value, hints[key], actions[key].type)
    options = [_key_of(option) for option in overrides if option.startswith("--")]
    check_keys(options, actions, "The command line")
    read = parser.parse_args_and_config(["--config", str(path), *overrides])
    given = {name: value for group in read for name, value in vars(group).items() if name in {*values, *options}}
    return Recipe(*read, dict(sorted(given.items())))


def _key_of(option: str) -> str:
    """The key that an option such as --no_plot-losses or --max_steps=10 sets."""
    return option[2:].partition("=")[0].replace("-", "_").removeprefix("no_")


def check_keys(keys: Iterable[str], known: Iterable[str], place: str) -> None:
    """Raise ValueError for a key that is not known, with those that look like it."""
    known = list(known)
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sorted(known)[:20])}."
            raise ValueError(f"{place}: unknown key {key!r}; {hint}")


def _check_value(place: str, value: Any, hint: Any, convert: Callable | None = None) -> None:
    """Raise ValueError unless `value` is of a type that `hint` allows. Texts may be what `convert` reads, as argparse
    would: YAML reads 1e-4 as a text."""
    allowed = _plain_types(hint)
    if not allowed or type(value) in allowed or (float in allowed and type(value) is int):
        return
    if isinstance(value, str) and convert is not None and not {list, dict} & allowed:
        try:
            convert(value)
            return
        except (ValueError, TypeError, ArgumentTypeError):
            pass
    expected = " or ".join(text for kind, text in _EXPECTED.items() if kind in allowed)
    raise ValueError(f"{place} must be {expected}, got {value!r}.")


def _plain_types(hint: Any) -> set[type]:
    """The types of YAML values that a type hint allows; none where anything goes."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain_types(part) for part in typing.get_args(hint)]
        return set().union(*parts) if all(parts) else set()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {str}
    if origin in (list, dict):
        return {origin}
    if origin in (Sequence, tuple):
        return {list}
    return {hint} if hint in (*_EXPECTED, type(None)) else set()


def load_tasks(
    tasks: Sequence[Mapping[str, Any]], data_folder: str | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """The data sets of a recipe's tasks, and their weights, by name.

    Args:
        data_folder: where the tasks' places lie, unless they are absolute.

    Raises:
        ValueError: for a task without a source, with two, with unknown keys, or with the name of another.
    """
    datasets, weights = {}, {}
    for number, task in enumerate(tasks, 1):
        place = f"Task {number}"
        if not isinstance(task, Mapping) or sum(key in SOURCES for key in task) != 1:
            raise ValueError(f"{place} is {task!r}; it needs one of the keys {', '.join(SOURCES)}.")
        kind = next(key for key in SOURCES if key in task)
        name = str(task.get("name", task[kind] if kind == "world" else Path(str(task[kind])).stem))
        if name in datasets:
            raise ValueError(f"{place} has the name {name!r} of an earlier one; give it another `name`.")
        weight = task.get("weight", 1.0)
        _check_value(f"{place} ({name}): weight", weight, float)
        dataset = _load_task(task, kind, f"{place} ({name})", data_folder)
        dataset = _part_of(dataset, task, f"{place} ({name})")
        datasets[name], weights[name] = _varied(dataset, task, f"{place} ({name})"), float(weight)
    return datasets, weights


def _load_task(task: Mapping[str, Any], kind: str, place: str, data_folder: str | None):
    known = dict(list(inspect.signature(SOURCES[kind]).parameters.items())[1:])  # the first is the source itself
    check_keys((key for key in task if key != kind), [*known, *_TASK_KEYS], place)
    _check_value(f"{place}: {kind}", task[kind], str)
    given = {key: value for key, value in task.items() if key in known}
    for key, value in given.items():
        _check_value(f"{place}: {key}", value, known[key].annotation)
    missing = [name for name, option in known.items() if option.default is option.empty and name not in given]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}.")
    is_place = kind != "world" and data_folder is not None
    return SOURCES[kind](str(Path(data_folder).expanduser() / task[kind]) if is_place else task[kind], **given)


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


def training_set(arguments: RecipeArguments):
    """The recipe's tasks, mixed."""
    datasets, weights = load_tasks(arguments.tasks, arguments.data_folder)
    return mix_tasks(datasets, weights, seed=arguments.mixture_seed)


def evaluation_sets(arguments: RecipeArguments) -> dict[str, Any] | None:
    """The recipe's evaluation tasks by name, None without any."""
    return load_tasks(arguments.eval_tasks, arguments.data_folder)[0] or None
