"""`perceptio train`: fine-tune a checkpoint by a recipe, or train the tiny one from scratch."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import checkpoints

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor
    from perceptio_hf.evaluation.during.trackers import TrainerFigures
    from perceptio_hf.training.checkpoints import WholeCheckpoints
    from perceptio_hf.training.planning.plan import Plan
    from perceptio_hf.training.recipe import Recipe, RecipeArguments
    from perceptio_hf.training.trainer import PerceptioSFTTrainer

# Options that are not listed here belong to the recipe: `--max_steps 10` takes the place of its `max_steps`.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
SFT, TINY = "sft", "tiny"  # kinds of recipes
REWARDED = ("grpo", "rloo")  # those that learn by rewards
_WAYS_TO_PERCEPTIO = {
    "internvl": "run `perceptio build`, which joins it with a SAM2 and a depth codec, and train the result.",
    "internvl_chat": "run `perceptio build`, which joins it with a SAM2 and a depth codec, and train the result.",
    "sa2va_chat": "run `perceptio convert sa2va`, and train the result.",
}


def train(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Option(
            help="The recipe: a YAML file, or the name of one that comes with the package, e.g. sft_world.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints and the finished model, OUT/checkpoint; a stopped run goes on from it. "
            "Default: the recipe's output_dir, or runs/ and its name.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="From scratch: processes that share every batch (2).", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="From scratch: further processes, of each, that render (1).", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="From scratch: cpu, or a GPU for one process, as cuda (cpu).", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Train nothing: open every source, and print samples, tokens, steps and memory of a GPU."
        ),
    ] = False,
    measure: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --dry-run: also train so many steps, thrown away, for seconds and hours.",
            show_default=False,
        ),
    ] = None,
    launch: Annotated[
        Path | None,
        typer.Option(
            help="With --dry-run: the accelerate configuration that will be used, for the memory of each of its GPUs; "
            "one of recipes/accelerate by name, e.g. fsdp2_8gpu.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON document.")] = False,
) -> None:
    """Train by a recipe: fine-tune a checkpoint on tasks of your own, by samples or (`recipe: grpo`, `recipe: rloo`) by
    rewards, or (`recipe: tiny`) a tiny one from scratch.

    Any key of a fine-tuning recipe can be given as an option, e.g. `--max_steps 10`.
    """
    from perceptio_hf.files import find_recipe, read_yaml

    config = find_recipe(config)
    kind = read_yaml(config).get("recipe", SFT)
    if not dry_run and (measure is not None or launch is not None or as_json):
        raise ValueError("--measure, --launch and --json belong to --dry-run; give it, or leave them out.")
    if dry_run and kind in REWARDED:
        raise ValueError("--dry-run is for training on samples; what rewards take depends on how long answers are.")
    if kind in (SFT, *REWARDED):
        if processes is not None or workers is not None or device is not None:
            raise ValueError(
                "--processes, --workers and --device are for recipes of kind tiny. To train with several processes, "
                "start `accelerate launch --no_python perceptio train ...`; samples are prepared by "
                "dataloader_num_workers."
            )
        if dry_run:
            _plan(config, context.args, measure, launch, as_json)
        else:
            _fine_tune(config, out, context.args, kind)
    elif kind == TINY:
        if dry_run:
            raise ValueError("--dry-run is for fine-tuning; a tiny recipe says in its own file what it trains.")
        if context.args:
            raise ValueError(f"Unknown options {' '.join(context.args)}; change the keys of a tiny recipe in {config}.")
        _from_scratch(config, out or Path("runs/tiny"), processes, workers, device or "cpu")
    else:
        raise ValueError(f"{config}: recipe is {kind!r}; choose {SFT} (the default), {', '.join(REWARDED)} or {TINY}.")


def _from_scratch(config: Path, out: Path, processes: int | None, workers: int | None, device: str) -> None:
    from perceptio_hf.files import in_use
    from perceptio_hf.lab.lessons.stages import TinyRecipe, train_tiny

    checkpoints.quieten()
    checkpoints.check_device(device)
    recipe = TinyRecipe.read(config)
    shares = processes or (2 if device == "cpu" else 1)
    with in_use(out, "perceptio train"):
        done = train_tiny(recipe, out, processes=shares, workers=1 if workers is None else workers, device=device)
        print(f"The finished checkpoint is {done}")


def _fine_tune(config: Path, out: Path | None, overrides: Sequence[str], kind: str) -> None:
    from perceptio_hf.extras import missing
    from perceptio_hf.files import in_use, read_yaml

    try:
        from perceptio_hf.training.recipe import read_recipe
        from perceptio_hf.training.rewards.recipe import read_reward_recipe
    except ModuleNotFoundError as error:
        raise missing(error, "Fine-tuning") from error

    if out is not None:
        overrides = [*overrides, "--output_dir", str(out)]
    elif "output_dir" not in read_yaml(config) and not any(option.startswith("--output") for option in overrides):
        overrides = [*overrides, "--output_dir", str(Path("runs", config.stem))]
    recipe = read_recipe(config, overrides) if kind == SFT else read_reward_recipe(kind, config, overrides)
    _check_file_says(kind, recipe)
    folder = Path(recipe.settings.output_dir)
    checkpoints.quieten()  # not before: the settings take it for a wish to see no progress bar
    first = recipe.settings.process_index == 0  # of several that train together
    with in_use(folder, "perceptio train") if first else nullcontext():
        _train_into(folder, recipe)


def _check_file_says(kind: str, recipe: "Recipe") -> None:
    """ValueError where `--recipe` is given and names another kind than the file."""
    if recipe.arguments.recipe != kind:
        raise ValueError(
            f"--recipe is {recipe.arguments.recipe}, but the file is a recipe of kind {kind}, which decides about its "
            "keys: leave the option out, or change `recipe` in the file."
        )


def _plan(config: Path, overrides: Sequence[str], measure: int | None, launch: Path | None, as_json: bool) -> None:
    from perceptio_hf.extras import missing
    from perceptio_hf.files import find_recipe

    try:
        from perceptio_hf.training.planning import sharding
        from perceptio_hf.training.planning.plan import plan_training
        from perceptio_hf.training.recipe import read_recipe
    except ModuleNotFoundError as error:
        raise missing(error, "Fine-tuning") from error

    file = None if launch is None else find_recipe(launch, "accelerate")
    layout = sharding.layout_of_environment() if file is None else sharding.layout_of_file(file)
    recipe = read_recipe(config, [*overrides, "--output_dir", "planned"])
    _check_file_says(SFT, recipe)
    sharding.check_layout(layout, recipe)
    if file is not None and measure is not None and layout != (here := sharding.layout_of_environment()):
        raise ValueError(
            f"--measure trains with the processes that are here, {here.processes}, and --launch plans for "
            f"{layout.processes}: leave --launch out, or start the command by accelerate launch without it."
        )
    if file is not None:
        sharding.check_precision(file, recipe)
    checkpoints.quieten()
    source, revision = _source(recipe.arguments)
    _check_kind(source, revision)
    plan = plan_training(recipe, source, revision, layout)
    figures = _figures(recipe)
    plan = replace(plan, questions=0 if figures is None else figures.held_out.questions)
    if measure is not None:
        plan = _with_times(plan, config, overrides, measure)
    if recipe.settings.process_index == 0:
        print(json.dumps(plan.as_json(), indent=2) if as_json else "\n".join(plan.lines()))


def _with_times(plan: "Plan", config: Path, overrides: Sequence[str], steps: int) -> "Plan":
    """The plan with seconds of a step, as measured by this process and those beside it."""
    from perceptio_hf.training.planning.measure import WITHOUT_TRACE, measure_steps
    from perceptio_hf.training.recipe import read_recipe

    # The trainer prints its logs, and standard output is for the plan.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        recipe = read_recipe(config, [*overrides, *WITHOUT_TRACE, "--max_steps", str(steps), "--output_dir", folder])
        recipe.arguments.figures = []  # which belong to evaluations
        seconds, peak = measure_steps(lambda: _trainer(recipe))
    return replace(plan, seconds=seconds, measured_peak=peak)


def _train_into(folder: Path, recipe: "Recipe") -> None:
    from perceptio_hf.files import check_new_folder
    from perceptio_hf.training.checkpoints import told_by_first
    from perceptio_hf.training.lora import check_goes_on
    from perceptio_hf.training.recipe import where_to_resume, write_recipe

    resume = told_by_first(lambda: where_to_resume(recipe, folder))
    if resume is not None:
        check_goes_on(resume, recipe.arguments.lora_r)
    merges = recipe.arguments.lora_r is not None and recipe.arguments.lora_merge
    if merges:  # not after hours of training
        check_new_folder(folder / "merged", overwrite=True, sources=[_source(recipe.arguments)[0]])
    if resume is None and (folder / "checkpoint").exists() and not recipe.settings.resume_from_checkpoint:
        if merges and not (folder / "merged").exists() and recipe.settings.process_index == 0:
            _merge_finished(recipe, folder)  # the run was stopped between the two
        print(f"{folder / 'checkpoint'} is finished; choose another --out to train again.")
        return
    trainer = _trainer(recipe)
    if trainer.is_world_process_zero():
        write_recipe(recipe, folder)
    _run(trainer, folder, resume)
    if merges and trainer.is_world_process_zero():
        _save_merged(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, folder / "merged")


def _trainer(recipe: "Recipe") -> "WholeCheckpoints":
    from perceptio_hf.training.logging import show_losses
    from perceptio_hf.training.recipe import check_label_codecs, evaluation_sets, training_set
    from perceptio_hf.training.trainer import PerceptioSFTTrainer

    arguments, settings = recipe.arguments, recipe.settings
    source, revision = _source(arguments)
    model, processor = _start(recipe)
    settings.model_init_kwargs = None
    tasks = [*arguments.tasks, *arguments.eval_tasks]
    # As it is saved: where processes share the model (ZeRO-3), none of them has the codec's weights.
    check_label_codecs(tasks, arguments.data_folder, source, **revision)
    if arguments.recipe in REWARDED:
        from perceptio_hf.training.rewards.recipe import reward_trainer

        settings.model_init_kwargs = revision if revision and settings.beta else None  # of the reference model
        return reward_trainer(recipe, model, processor, _adapters(model, arguments))
    figures = _figures(recipe)
    trainer = PerceptioSFTTrainer(
        model,
        settings,
        train_dataset=training_set(arguments),
        eval_dataset=evaluation_sets(arguments) or (None if figures is None else {}),
        processing_class=processor,
        peft_config=_adapters(model, arguments),
    )
    trainer.figures = figures
    show_losses(trainer)
    return trainer


def _source(arguments: "RecipeArguments") -> tuple[str, dict[str, str]]:
    """The checkpoint that a recipe names, and its revision where it is a repository."""
    source = checkpoints.or_tiny(arguments.model_name_or_path)
    if arguments.lora_r is not None and Path(source).is_dir():  # an adapter names its base, from wherever it is used
        source = os.path.abspath(source)
    return str(source), {} if Path(source).is_dir() else {"revision": arguments.model_revision}


def _figures(recipe: "Recipe") -> "TrainerFigures | None":
    """What every evaluation measures beside the losses, None where the recipe asks for nothing.

    Raises:
        ValueError: where no evaluation is asked for, or `metric_for_best_model` names what none has.
    """
    from perceptio_hf.training.recipe import check_best_metric

    arguments, settings = recipe.arguments, recipe.settings
    if arguments.eval_tasks and settings.eval_strategy == "no" and settings.process_index == 0:
        print("perceptio: eval_strategy is no, so eval_tasks are never evaluated.", file=sys.stderr)
    if not arguments.figures:
        check_best_metric(recipe, [])
        return None
    if settings.eval_strategy == "no":
        raise ValueError("The recipe lists figures, but never evaluates: set eval_strategy: steps and eval_steps.")
    from perceptio_hf.evaluation.during.figures import HeldOutFigures
    from perceptio_hf.evaluation.during.trackers import TrainerFigures

    batch = settings.per_device_eval_batch_size
    held_out = HeldOutFigures(arguments.figures, arguments.data_folder, batch_size=batch)
    check_best_metric(recipe, held_out.prefixes)
    return TrainerFigures(held_out)


def _start(recipe: "Recipe") -> "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]":
    """What the recipe begins with."""
    arguments, (source, revision) = recipe.arguments, _source(recipe.arguments)
    options = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    return _loaded(source, options | (recipe.settings.model_init_kwargs or {}), revision)


def _loaded(
    source: str, options: dict[str, Any], revision: dict[str, str]
) -> "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]":
    """Model and processor that a training begins with.

    Raises:
        ValueError: for a checkpoint of another kind, with what makes a Perceptio of it, or one that cannot be read.
    """
    from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor

    _check_kind(source, revision)
    try:
        model = PerceptioForConditionalGeneration.from_pretrained(source, **revision, **options)
        return model, PerceptioProcessor.from_pretrained(source, **revision)
    except Exception as error:  # whatever transformers, safetensors or the Hub raise: the user named a wrong checkpoint
        raise ValueError(f"{source} cannot be loaded as a Perceptio checkpoint: {error}") from error


def _check_kind(source: str, revision: dict[str, str]) -> None:
    """ValueError for a checkpoint of another kind, with what makes a Perceptio of it, or one that is not there."""
    from transformers import PreTrainedConfig

    from perceptio_hf.training.lora import base_of_adapter

    if (base := base_of_adapter(source)) is not None:
        raise ValueError(
            f"{source} is an adapter of {base}, no model to begin with: merge it into that (lora_merge: true writes "
            "OUT/merged; docs/lora.md), or go on with its own training, by the same recipe and --out."
        )
    try:
        kind = PreTrainedConfig.get_config_dict(source, **revision)[0].get("model_type")
    except Exception as error:  # as above
        raise ValueError(f"{source} cannot be loaded as a Perceptio checkpoint: {error}") from error
    if kind == "perceptio":
        return
    way = _WAYS_TO_PERCEPTIO.get(kind, "name the folder or repository of a Perceptio checkpoint.")
    raise ValueError(f"{source} is a {kind!r} model, no Perceptio: {way}")


def _adapters(model: "PerceptioForConditionalGeneration", arguments: "RecipeArguments") -> "LoraConfig | None":
    """The LoRA section of the recipe, None where it has none."""
    if arguments.lora_r is None:
        return None
    from perceptio_hf.training.lora import lora_config

    options = arguments.lora_options()
    return lora_config(model, r=arguments.lora_r, target_layers=options.pop("layers", None), **options)


def _run(trainer: "WholeCheckpoints", folder: Path, resume: Path | str | None) -> None:
    from perceptio_hf.training.trainer import PerceptioSFTTrainer

    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finished = trainer.save_finished(folder / "checkpoint")
    by_rewards = not isinstance(trainer, PerceptioSFTTrainer)
    if not by_rewards and trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
        trainer.evaluate()
        trainer.draw_losses()
    if trainer.is_world_process_zero():
        for kind, count in ({} if by_rewards else trainer.skipped_samples).items():
            print(f"{count} samples were left out because of their {kind}.")
        print(f"The finished checkpoint is {finished}" + ("" if by_rewards else _and_plot(trainer)))


def _save_merged(model: "PeftModel", processor: "PerceptioProcessor", folder: Path) -> None:
    from perceptio_hf.training.lora import save_merged

    save_merged(model, processor, folder)
    print(f"With the adapters merged in it is {folder}")


def _merge_finished(recipe: "Recipe", folder: Path) -> None:
    from peft import PeftModel

    model, processor = _start(recipe)
    _save_merged(PeftModel.from_pretrained(model, str(folder / "checkpoint")), processor, folder / "merged")


def _and_plot(trainer: "PerceptioSFTTrainer") -> str:
    plot = Path(trainer.args.output_dir) / "losses.png"
    return f", the losses are drawn in {plot}" if trainer.args.plot_losses and plot.exists() else ""
