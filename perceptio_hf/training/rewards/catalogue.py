"""The rewards by the names that recipes give them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from perceptio_hf.data.keys import check_keys

from .pictures import DepthError, DepthOrder, MaskIoU
from .texts import Form, right_answer

if TYPE_CHECKING:
    from datasets import Dataset

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

# Name -> what makes the reward for a model and its processor.
REWARDS: dict[str, Callable] = {
    "right_answer": lambda model, processor: right_answer,
    "form": lambda model, processor: Form(processor.num_depth_tokens),
    "depth_order": lambda model, processor: DepthOrder(model.depth_model),
    "depth_error": lambda model, processor: DepthError(model.depth_model),
    "mask_iou": MaskIoU,
}


_HINTS = {
    "answer": "name tasks whose answers are words",
    "depth": "name tasks with depth maps (of labels with `maps: true`)",
    "masks": "name tasks with masks",
}


def check_rewards_apply(rewards: Sequence[Callable], prompts: "Dataset") -> None:
    """ValueError where a reward finds its truth in none of the prompts: it would train nothing, and say nothing."""
    for reward in rewards:
        column = getattr(reward, "needs", None)
        if column is not None and not any(prompts.select_columns([column])[column]):
            raise ValueError(
                f"The reward {reward.__name__} compares with `{column}`, which none of the {len(prompts)} prompts has: "
                f"{_HINTS[column]}, or leave it out."
            )


def make_rewards(
    weights: Mapping[str, float], model: "PerceptioForConditionalGeneration", processor: "PerceptioProcessor"
) -> tuple[list[Callable], list[float]]:
    """What TRL takes as `reward_funcs` and `reward_weights`.

    Raises:
        ValueError: for a reward that does not exist, or none.
    """
    check_keys(weights, REWARDS, "rewards")
    if not weights:
        raise ValueError(f"There is no reward; give some of {', '.join(REWARDS)} with their weights.")
    return [REWARDS[name](model, processor) for name in weights], [float(weight) for weight in weights.values()]
