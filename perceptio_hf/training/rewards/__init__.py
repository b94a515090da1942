"""Rewards that can be checked, for TRL's GRPO and RLOO: answers, masks and depth against what is known of a sample.

Each is called as TRL calls rewards, with the completions and the columns of their prompts (`prompts`), and gives one
number in [0, 1] for each, or None where a sample does not hold what it is measured by. `recipe` is what a recipe says.
Imports `data`, the model and what is below.
"""

from .catalogue import REWARDS, make_rewards
from .pictures import DepthError, DepthOrder, MaskIoU
from .prompts import as_prompts
from .texts import Form, right_answer

__all__ = ["REWARDS", "DepthError", "DepthOrder", "Form", "MaskIoU", "as_prompts", "make_rewards", "right_answer"]
