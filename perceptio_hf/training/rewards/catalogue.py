"""The rewards by the names that recipes give them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from perceptio_hf.data.keys import check_keys

from .pictures import DepthError, DepthOrder, MaskIoU
from .texts import Form, right_answer

if TYPE_CHECKING:
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
