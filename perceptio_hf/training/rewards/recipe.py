"""Recipes of kind grpo and rloo: what is asked, which rewards count how much, and TRL's settings.

recipe: grpo
model_name_or_path: tiny
tasks:                 # as in other recipes; of each sample the turns before the assistant's last are the prompt
  - world: closest
    scenes: 1200
prompts: 600           # so many of the mixed samples
rewards:
  right_answer: 1.0
  depth_order: 0.2
spatial: depth         # what generate is to write
num_generations: 8     # and the other settings of TRL's GRPOConfig or RLOOConfig
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig, RLOOConfig

from perceptio_hf.data.keys import check_value
from perceptio_hf.training import zero3
from perceptio_hf.training.checkpoints import WholeCheckpoints
from perceptio_hf.training.config import check_uploads_nothing, fit_to_machine, keep_precision
from perceptio_hf.training.recipe import (
    Recipe,
    RecipeArguments,
    check_best_metric,
    evaluation_sets,
    read_recipe,
    training_set,
)
from perceptio_hf.training.reinforcement import PerceptioGRPOTrainer, PerceptioRLOOTrainer

from .catalogue import REWARDS, check_rewards_apply, make_rewards
from .prompts import as_prompts

if TYPE_CHECKING:
    from peft import LoraConfig

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor


@dataclass
class RewardArguments(RecipeArguments):
    """What a recipe says beside the settings of TRL's trainer.

    Raises:
        ValueError: for a recipe without a model, tasks or rewards.
    """

    rewards: dict[str, float] = field(
        default_factory=lambda: {"right_answer": 1.0},
        metadata={"help": f"Weights of rewards: {', '.join(REWARDS)}."},
    )
    prompts: int | None = field(default=None, metadata={"help": "So many of the tasks' samples; default: all."})
    eval_prompts: int | None = field(
        default=None, metadata={"help": "So many of each evaluation set's samples; default: all."}
    )
    spatial: str = field(
        default="auto", metadata={"help": "What is written before words: auto, none, seg, depth or seg+depth."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.rewards or not set(self.rewards) <= set(REWARDS):
            raise ValueError(f"rewards are {self.rewards}; give weights of {', '.join(REWARDS)}.")
        for name, weight in self.rewards.items():
            check_value(f"rewards: {name}", weight, float)
        if self.figures:
            raise ValueError(
                "The recipe has figures, but a training by rewards measures what its rewards do: list eval_tasks in "
                "their place, and measure its checkpoints by `perceptio eval`."
            )


class _OnAnyMachine:
    """Settings whose defaults hold without an accelerator too."""

    def __post_init__(self):
        fit_to_machine(self)
        check_uploads_nothing(self)
        super().__post_init__()
        keep_precision(self)
        zero3.check_precision(self)
        if self.reward_weights is not None:
            raise ValueError(
                f"reward_weights is {self.reward_weights}; in a recipe a weight stands behind the name of its reward: "
                "leave it out, and write rewards: {right_answer: 1.0, ...}."
            )


@dataclass
class _GRPOSettings(_OnAnyMachine, GRPOConfig):
    pass


@dataclass
class _RLOOSettings(_OnAnyMachine, RLOOConfig):
    pass


class _WholeGRPOTrainer(WholeCheckpoints, PerceptioGRPOTrainer):
    pass


class _WholeRLOOTrainer(WholeCheckpoints, PerceptioRLOOTrainer):
    pass


# Kind of recipe -> its settings and its trainer.
KINDS = {"grpo": (_GRPOSettings, _WholeGRPOTrainer), "rloo": (_RLOOSettings, _WholeRLOOTrainer)}


def read_reward_recipe(kind: str, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of one of `KINDS`; arguments and errors as `read_recipe`."""
    return read_recipe(path, overrides, groups=(RewardArguments, KINDS[kind][0]))


def reward_trainer(
    recipe: Recipe,
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    peft_config: "LoraConfig | None" = None,
) -> Any:
    """TRL's trainer for a recipe of one of `KINDS`.

    Raises:
        ValueError: for tasks without samples, pictures that cannot be opened, a reward that no prompt gives, evaluation
            tasks that are never asked, or `metric_for_best_model` that no evaluation has.
    """
    arguments, settings = recipe.arguments, recipe.settings
    if arguments.eval_tasks and settings.eval_strategy == "no":
        raise ValueError("The recipe lists eval_tasks, but never evaluates: set eval_strategy: steps and eval_steps.")
    if settings.remove_unused_columns:
        raise ValueError("remove_unused_columns is true, which takes from rewards what they measure by: leave it out.")
    check_best_metric(recipe, parts=("reward", *(f"rewards/{name}/mean" for name in arguments.rewards), "loss"))
    rewards, settings.reward_weights = make_rewards(arguments.rewards, model, processor)
    held_out = evaluation_sets(arguments) or {}
    prompts = as_prompts(training_set(arguments), arguments.prompts)
    check_rewards_apply(rewards, prompts)
    settings.generation_kwargs = {"spatial": arguments.spatial} | (settings.generation_kwargs or {})
    return KINDS[arguments.recipe][1](
        model,
        reward_funcs=rewards,
        args=settings,
        train_dataset=prompts,
        eval_dataset={name: as_prompts(samples, arguments.eval_prompts) for name, samples in held_out.items()} or None,
        processing_class=processor,
        peft_config=peft_config,
    )
