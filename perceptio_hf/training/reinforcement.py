"""TRL's GRPO and RLOO for Perceptio: rewards for answers, as TRL has them for other models with pictures.

    trainer = PerceptioGRPOTrainer(model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=prompts,
                                   processing_class=processor, peft_config=lora_config(model))

Everything is TRL's but five things. What a processor returns goes to a method of TRL's that knows the inputs of a few
models by name, and what SAM2 needs is not among them; the probability of a response does not depend on it. And TRL asks
the head for a `bias`, which PEFT does not pass on where rows of the head learn, as `lora_config` has it. And where it
loads the reference model, it asks a checkpoint that brings no code for the names of its code. And it takes the rows of
a batch for prompts without padding, and would have the model attend to what our processor fills up short ones with. And
to the rewards of all evaluation sets it gives one name.

Responses are generated under the grammar of the spatial tokens, as ever, while TRL takes their probability from the
whole vocabulary: where the model leaves much of it on tokens that the grammar forbids, train on samples first.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import dropwhile
from typing import Any

import datasets
import pyarrow.compute as pc
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer
from trl.models.utils import unwrap_model_for_generation

from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration

from . import fsdp, zero3
from .config import warn_of_slow_bfloat16
from .lora import check_has_no_adapter, exact_copies, put_back
from .silence import TellsNobody


@contextmanager
def _own_reference(settings: Any) -> Iterator[None]:
    """Let TRL load the reference model as what it is, instead of looking it up."""
    if settings is None or not settings.beta:
        yield
        return
    kept = settings.model_init_kwargs
    settings.model_init_kwargs = {"architecture": PerceptioForConditionalGeneration} | (kept or {})
    try:
        yield
    finally:
        settings.model_init_kwargs = kept


def _check_pictures(prompts: Any) -> None:
    """ValueError where some prompts have pictures and others none: under ZeRO-3 a process whose prompts have none asks
    for no shard of the vision tower, for which the others wait."""
    if not isinstance(prompts, datasets.Dataset) or "images" not in prompts.column_names:
        return
    lengths = pc.fill_null(pc.list_value_length(prompts.data.column("images")), 0)
    if len(lengths) and not pc.min(lengths).as_py() and pc.max(lengths).as_py():
        raise ValueError(
            "Some prompts have pictures and others have none, which a training by rewards under DeepSpeed's ZeRO-3 "
            "cannot mix: leave out the one or the other, or give every GPU the whole model (recipes/accelerate/"
            "ddp_8gpu.yaml)."
        )


class _WithMaskPixels(TellsNobody):
    """Leaves out what the processor returns for masks and answers; no logit depends on it."""

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        self._evaluated = ""  # the name of the set
        fsdp.check_is_off()
        check_has_no_adapter(model)
        exact = exact_copies(model)
        with _own_reference(args):
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        fsdp.check_adapters(self)
        if zero3.is_on(self.args):
            held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            for prompts in (self.train_dataset, *held_out):
                _check_pictures(prompts)
        if self.accelerator.num_processes > 1:
            # TRL gathers pictures for its tables on the processes that have some, and waits for those that have none.
            self.log_multimodal = False
        warn_of_slow_bfloat16(self.accelerator)
        put_back(self.model, exact)
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        if not hasattr(head, "bias"):
            head.bias = None

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"):
        """As ever; of several sets TRL would give all rewards one name."""
        self._evaluated = metric_key_prefix.removeprefix("eval").removeprefix("_")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        measured = self._metrics["eval"]
        if self._evaluated and not self.model.training:
            for name in list(measured):
                measured[f"{self._evaluated}_{name}"] = measured.pop(name)
        super().log(logs, *args)

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], Any, dict[str, Any]]:
        rows, *rest = super()._tokenize_prompts(prompts)
        pad = self.processing_class.tokenizer.pad_token_id
        return [list(dropwhile(lambda token: token == pad, row)) for row in rows], *rest

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        # How often a reward computes with the model is a matter of each process's own answers: the shards of ZeRO-3,
        # which are gathered by all processes together, would wait for one another for ever.
        shares = zero3.is_on(self.args) and any(getattr(reward, "uses_model", False) for reward in self.reward_funcs)
        whole = unwrap_model_for_generation(self.model_wrapped, self.accelerator) if shares else nullcontext()
        with whole:
            return super()._calculate_rewards(*args, **kwargs)

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
