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
      - llava: data/llava.json      # conversations in LLaVA's form
        images: data/coco           # the folder in which its pictures lie
      - depth_folder: data/depth    # pictures with depth maps beside them
        unit: mm
        leave_out_every: 5          # all but the 5th, 10th, ... sample; `take_every: 5` takes just these
        variants: 24                # and 24 of each, see `perceptio_hf.data.variants.with_variants`
"""

import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import TrlParser

from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.data.keys import check_keys, check_value
from perceptio_hf.data.mixture import mix_tasks
from perceptio_hf.data.published.labels import check_codec, read_label_metadata, saved_label_codecs
from perceptio_hf.data.tasks import SOURCES, load_tasks, task_name
from perceptio_hf.files import expanded, read_yaml, write_json
from perceptio_hf.modeling.codec_identity import codec_fingerprint
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

from .checkpoints import checkpoint_to_go_on_from, last_checkpoint
from .config import PerceptioSFTConfig
from .losses import PARTS

_RECIPE_FILE = "recipe.json"  # in the folder of a training
_IS_FOLDER = "model_is_folder"  # when the training began: "models/start" may be a name on the Hub, seen from elsewhere
_NOT_LEARNT = ("output_dir", "resume_from_checkpoint", "lora_merge")  # of a run, not of what it trains


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
    figures: list[dict] = field(
        default_factory=list,
        metadata={"help": "Benchmarks of `perceptio eval` that every evaluation answers by generation."},
    )
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
    recipe: str = field(default="sft", metadata={"help": "Kind of training: sft, grpo, rloo or tiny."})

    def __post_init__(self):
        if not self.model_name_or_path:
            raise ValueError("The recipe names no model: set model_name_or_path, e.g. to tiny.")
        if not self.tasks:
            raise ValueError(f"The recipe trains on nothing: list tasks, each with one of {', '.join(SOURCES)}.")
        given = [*self.lora_options(), *(["merge"] if self.lora_merge else [])]
        if self.lora_r is None and given:
            raise ValueError(
                f"The recipe has {', '.join(f'lora_{name}' for name in given)}, but no lora_r; give the "
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
    settings: TrainingArguments
    values: dict[str, Any]


class _Parser(TrlParser):
    """TRL's parser, with errors as exceptions."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}.")


def read_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    groups: tuple[type, type] = (RecipeArguments, PerceptioSFTConfig),
) -> Recipe:
    """Read a recipe of kind sft.

    Args:
        path: of the YAML file.
        overrides: options as on a command line that take the place of the file's, e.g. ["--max_steps", "10"].
        groups: what a recipe of another kind consists of.

    Raises:
        ValueError: for a key that does not exist (with the one that may have been meant), a value of another type, a
            file that is missing, and settings that make no sense, all in words.
    """
    hints = {name: hint for group in groups for name, hint in typing.get_type_hints(group).items()}
    parser = _Parser(groups, allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    values = read_yaml(path)
    check_keys(values, [*actions, "env"], str(path))
    for key, value in values.items():
        if key in actions:
            check_value(f"{path}: {key}", value, hints[key], actions[key].type)
    options = [_key_of(option) for option in overrides if option.startswith("--")]
    check_keys(options, actions, "The command line")
    read = parser.parse_args_and_config(["--config", str(path), *overrides])
    given = {name: value for group in read for name, value in vars(group).items() if name in {*values, *options}}
    return Recipe(*read, dict(sorted(given.items())))


def _key_of(option: str) -> str:
    """The key that an option such as --no_plot-losses or --max_steps=10 sets."""
    return option[2:].partition("=")[0].replace("-", "_").removeprefix("no_")


def where_to_resume(recipe: Recipe, folder: Path) -> Path | None:
    """The checkpoint to go on from: the one that is asked for, or the last one of the same recipe.

    Raises:
        ValueError: if nothing is asked for and the folder holds checkpoints of another recipe, or none that can be
            used.
    """
    asked = recipe.settings.resume_from_checkpoint
    wish = str(asked).lower()
    if wish == "false":
        return None
    if asked is not None and wish != "true":
        if not Path(asked).is_dir():
            raise ValueError(f"There is no checkpoint {asked} to resume from.")
        return Path(asked)
    if wish == "true":
        last = last_checkpoint(folder)
        if last is None:
            raise ValueError(f"{folder} holds no complete checkpoint to resume from.")
        return last
    finished = (folder / "checkpoint").exists()
    last = None if finished else checkpoint_to_go_on_from(folder)
    if (last or finished) and _lasting(_recipe_of(folder)) != _lasting(recipe.values):
        raise ValueError(
            f"{folder} holds checkpoints of another recipe; choose another --out, or go on from its last checkpoint "
            "with this recipe by --resume_from_checkpoint true."
        )
    return last


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Note what is trained into a folder, which is made, for `where_to_resume`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = recipe.values.get("model_name_or_path")
    begun = {_IS_FOLDER: isinstance(source, str) and Path(source).is_dir()}
    write_json(folder / _RECIPE_FILE, _lasting(recipe.values) | begun)


def _recipe_of(folder: Path) -> dict:
    """The one whose checkpoints a folder holds; one of no keys where that cannot be read."""
    try:
        values = json.loads((folder / _RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in values.items() if key != _IS_FOLDER} if isinstance(values, dict) else {}


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    """What a recipe trains, as JSON reads it back."""
    return json.loads(json.dumps({key: value for key, value in values.items() if key not in _NOT_LEARNT}, default=str))


def check_label_codecs(
    tasks: Sequence[dict], data_folder: str | None, codec: DepthVQVAE | str, revision: str | None = None
) -> None:
    """Whether all codes that `perceptio label` wrote, in folders of labels or data sets saved here (`samples`, `hub`),
    are the model's own.

    Args:
        codec: the model's, or the checkpoint that it is saved in, with its `revision`; that is read where it is needed.

    Raises:
        ValueError: naming the folder whose codes are another codec's.
    """
    base = expanded(data_folder or "")
    places = [base / expanded(task["labels"]) for task in tasks if "labels" in task and not task.get("maps")]
    written = [(place, read_label_metadata(place).get("codec", {})) for place in places]
    for place in (base / expanded(task[kind]) for task in tasks for kind in ("samples", "hub") if kind in task):
        written += [(place, found) for found in saved_label_codecs(place)]
    if not written:
        return
    codec = load_depth_codec(codec, revision=revision)
    own = codec_fingerprint(codec)
    for place, found in written:
        check_codec(place, found, own, codec.config.num_tokens, codec.config.num_codes)


def training_set(arguments: RecipeArguments):
    """The recipe's tasks, mixed."""
    datasets, weights = load_tasks(arguments.tasks, arguments.data_folder)
    return mix_tasks(datasets, weights, seed=arguments.mixture_seed)


def evaluation_sets(arguments: RecipeArguments) -> dict[str, Any] | None:
    """The recipe's evaluation tasks by name, None without any."""
    return load_tasks(arguments.eval_tasks, arguments.data_folder)[0] or None


def check_best_metric(recipe: Recipe, figures: Sequence[str] = (), parts: Sequence[str] = ("loss", *PARTS)) -> None:
    """Notice before the steps up to the first evaluation that no evaluation has the `metric_for_best_model`. Sets have
    names, so that there is no loss of all of them.

    Args:
        figures: how the names of figures begin.
        parts: what is measured on each set.

    Raises:
        ValueError: naming what there is.
    """
    asked = recipe.settings.metric_for_best_model
    if asked is None or recipe.settings.eval_strategy == "no":
        return
    sets = [task_name(task) for task in recipe.arguments.eval_tasks]
    name = asked.removeprefix("eval_")
    known = {f"{task}_{part}" for task in sets for part in parts}
    if name not in known and not name.startswith(tuple(figures)):
        choice = [*(f"{task}_{parts[0]}" for task in sets), *(f"{prefix}..." for prefix in figures)]
        raise ValueError(
            f"metric_for_best_model is {asked!r}, which no evaluation of this recipe has; there are "
            f"{', '.join(choice) or 'none: list eval_tasks or figures'}."
        )
