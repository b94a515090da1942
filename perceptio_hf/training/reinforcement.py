"""TRL's GRPO and RLOO for Perceptio: rewards for answers, as TRL has them for other models with pictures.

    trainer = PerceptioGRPOTrainer(model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=prompts,
                                   processing_class=processor, peft_config=lora_config(model))

Everything is TRL's but two things. What a processor returns goes to a method of TRL's that knows the inputs of a few
models by name, and what SAM2 needs is not among them; the probability of a response does not depend on it. And TRL asks
the head for a `bias`, which PEFT does not pass on where rows of the head learn, as `lora_config` has it.

Responses are generated under the grammar of the spatial tokens, as ever, while TRL takes their probability from the
whole vocabulary: where the model leaves much of it on tokens that the grammar forbids, train on samples first.
"""

from typing import Any

from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer


class _WithMaskPixels:
    """Leaves out what the processor returns for masks and answers; no logit depends on it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        if not hasattr(head, "bias"):
            head.bias = None

    def _get_per_token_logps_and_entropies(
        self,
        *args: Any,
        mask_pixel_values: Tensor | None = None,
        original_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class PerceptioGRPOTrainer(_WithMaskPixels, GRPOTrainer):
    """TRL's `GRPOTrainer` for a Perceptio, with all of its settings. With a `beta` above 0 and no adapter TRL loads the
    reference model from where the model was loaded from."""


class PerceptioRLOOTrainer(_WithMaskPixels, RLOOTrainer):
    """TRL's `RLOOTrainer` for a Perceptio; as `PerceptioGRPOTrainer`."""
