"""Settings of `PerceptioSFTTrainer`."""

import logging
import math
import os
import warnings
from dataclasses import Field, dataclass, field, make_dataclass

import torch
from accelerate import Accelerator
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import SFTConfig

from perceptio_hf.extras import how_to_install
from perceptio_hf.modeling.placement import multiplies_bfloat16
from perceptio_hf.training.losses.words import TOKEN_OVER, check_over

from . import zero3
from .losses import PARTS, LossPart, LossWeights

_logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
_PRECISION = "ACCELERATE_MIXED_PRECISION"  # what `accelerate launch` sets
TRACKERS = ("tensorboard", "wandb", "trackio")  # what the extra `track` brings; pictures of cases go there too

# Settings of SFTConfig that this trainer has no use for: the values that ask for nothing, and what is done instead.
_WITHOUT_EFFECT: dict[str, tuple[tuple, str]] = {
    "packing": ((False,), "a picture and its answers stay in a row of their own"),
    "eval_packing": ((None, False), "a picture and its answers stay in a row of their own"),
    "padding_free": ((False,), "a picture and its answers stay in a row of their own"),
    "pad_to_multiple_of": (("auto", None), "rows are padded to the longest of their batch"),
    "assistant_only_loss": ((False,), "all that the assistant says is learnt, and nothing else"),
    "completion_only_loss": ((None, False), "all that the assistant says is learnt, and nothing else"),
    "loss_type": (("nll",), "the composite loss takes its place; see the weights, e.g. text_weight"),
    "label_smoothing_factor": ((0, 0.0), "the composite loss takes its place; see the weights, e.g. text_weight"),
    "use_liger_kernel": ((False,), "the composite loss builds no logits where no label is as it is"),
    "shuffle_dataset": ((False,), "the sampler shuffles; see data_seed"),
    "dataset_kwargs": ((None,), "the collator prepares samples"),
    "dataset_num_proc": ((None,), "the collator prepares samples; see dataloader_num_workers"),
    "dataset_text_field": (("text",), "samples have messages"),
    "length_column_name": (("length",), "by length goes what a sample's words and picture take"),
    "packing_strategy": (("bfd",), "a picture and its answers stay in a row of their own"),
    "truncation_mode": (("keep_start",), "no row is ever cut; see max_length and on_error"),
    "average_tokens_across_devices": ((True,), "each part is averaged over what all processes hold"),
    "pad_token": ((None,), "the processor's tokenizer has one"),
    "eos_token": ((None,), "the token that ends a turn is that of the chat template"),
    "chat_template_path": ((None,), "give a processor that has another template as processing_class"),
}


def _weight(part: LossPart) -> tuple[str, type, Field]:
    help_text = f"Weight of {part.name}: {part.meaning}."
    return f"{part.name}_weight", float, field(default=part.weight, metadata={"help": help_text})


def check_uploads_nothing(settings: TrainingArguments) -> None:
    """transformers would upload the output folder while checkpoints in it are written and renamed, the optimizer's
    state with them.

    Raises:
        ValueError: where `push_to_hub` is set.
    """
    if settings.push_to_hub:
        raise ValueError(
            "push_to_hub is set, but a training uploads nothing here: leave it out, and send what is finished by "
            "`perceptio push OUT/checkpoint OWNER/NAME`."
        )


def fit_to_machine(settings: TrainingArguments) -> None:
    """What TRL leaves open and the machine decides; to be called before TRL's own `__post_init__`.

    TRL computes in bfloat16 where nobody says otherwise, which a processor that cannot multiply it does ten times as
    slowly as float32: there it is off by default. What accelerate was launched with counts as said.
    """
    if not torch.accelerator.is_available():
        settings.use_cpu = True  # as it would be anyway; only then does transformers allow bf16 on a CPU
    if settings.bf16 is None and not settings.fp16 and os.environ.get(_PRECISION) in ("bf16", "fp16"):
        settings.bf16, settings.fp16 = (os.environ[_PRECISION] == name for name in ("bf16", "fp16"))
    if settings.bf16 is None and settings.use_cpu and not multiplies_bfloat16(torch.device("cpu")):
        settings.bf16 = False


def keep_precision(settings: TrainingArguments) -> None:
    """To be called behind TRL's `__post_init__`: a `bf16: false` counts, whatever accelerate was launched with.
    transformers takes it for nothing said."""
    if not settings.bf16 and not settings.fp16:
        settings.mixed_precision = "no"


def warn_of_slow_bfloat16(accelerator: Accelerator) -> None:
    """Say so where somebody asked for bfloat16 on a processor that has to convert every number of it."""
    if accelerator.mixed_precision != "bf16" or accelerator.device.type != "cpu":
        return
    if accelerator.is_main_process and not multiplies_bfloat16(accelerator.device):
        _logger.warning(
            "bf16 is on, and this processor does not multiply bfloat16: a step takes several times as long as in "
            "float32. Set bf16: false."
        )


_PartWeights = make_dataclass("_PartWeights", map(_weight, PARTS.values()))


@dataclass
class PerceptioSFTConfig(_PartWeights, SFTConfig):
    """TRL's `SFTConfig`, the weights of the composite loss, and what is trained.

    Other defaults than SFTConfig's: `max_length` None; no row is ever cut here, which would lose picture tokens or the
    end of a depth span, and a conversation longer than a `max_length` that is given is one that cannot be used.
    `remove_unused_columns` False, because the collator chooses the columns it reads.

    Args:
        text_weight, marker_weight, token_weight, count_weight, reconstruction_weight, mask_bce_weight,
            mask_dice_weight, mask_score_weight: weights of the parts of the loss, 0 or more; 0 switches one off. There
            is one for each part in `perceptio_hf.training.losses.PARTS`.
        token_over: what the token loss is taken over, "codes" or "vocabulary", see `token_loss`.
        count_beta: relative error up to which the count loss is a parabola, above 0. At torch's 1 hardly anything keeps
            a span's probability on codes: without the grammar, spans then break.
        gradient_weight: of the gradient-matching term inside the reconstruction loss.
        merge_temperature: of soft-merge, above 0.
        span_noise: mean share of a depth span's *input* codes that are replaced by others of the same span, while the
            targets stay, so that the model learns to correct a guessed span: `generate` then writes spans in fewer
            passes (docs/generation.md has the measurements). Each span draws its own share, up to twice this one.
        look_weight: of teaching attention where to look (`alignment`), 0 by default: codes at their own place in the
            picture, [SEG] at its object. For small models, or little data. Needs a language model with eager attention
            and keeps the attention weights of all its layers in memory.
        look_layer, look_heads: the layer whose first heads are taught; None: the one a third of the way up.
        freeze_language_model, freeze_vision_tower, freeze_projector, freeze_mask_decoder: parts that keep their
            weights. The language model includes embeddings and `lm_head`; the projector is InternVL's. The [SEG]
            projector always learns, SAM2's image encoder and the depth codec never do. With a `peft_config` PEFT
            decides instead.
        mask_learning_rate: of SAM2's mask decoder and the [SEG] projector, None: `learning_rate`. The schedule is the
            same for all.
        seg_projector_learning_rate: of the [SEG] projector alone, None: `mask_learning_rate`.
        seg_projector_start: number of masks, a few hundred, that the [SEG] projector gets new weights from before the
            first step, from which its units do not die (`perceptio_hf.training.masks.projector`); 0: keep its weights.
        seg_projector_start_step: the step before which it gets them instead. Words that are new to the language model
            have to be learnt before a [SEG] can tell what it was written for.
        mask_patience: steps in which masks must get better, or a warning says what is wrong; 0: never.
        on_error: what the collator does with a sample that cannot be used: "raise" stops and names it, "skip" leaves
            it out; the number of skipped samples is reported at the end.
        plot_losses: draw `losses.png` into `output_dir` at the end.

    Raises:
        ValueError: for a negative weight, weights or freezes that leave nothing to train, `max_steps` 0, and settings
            of SFTConfig that have no effect here.
    """

    max_length: int | None = field(
        default=None, metadata={"help": "Longest conversation in tokens; a longer one is an error, see on_error."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Whether to drop the columns that are not those of a sample."}
    )
    token_over: str = field(
        default=LossWeights.token_over,
        metadata={"help": "What the token loss is taken over: codes or vocabulary.", "choices": list(TOKEN_OVER)},
    )
    count_beta: float = field(
        default=0.001, metadata={"help": "Relative error up to which the count loss is a parabola."}
    )
    gradient_weight: float = field(
        default=LossWeights.gradient, metadata={"help": "Weight of gradient matching inside the reconstruction loss."}
    )
    merge_temperature: float = field(
        default=LossWeights.temperature, metadata={"help": "Temperature of soft-merge; towards 0 it decodes hard."}
    )
    span_noise: float = field(
        default=0.0, metadata={"help": "Mean share of a span's input codes that are replaced; targets stay. 0 to 0.5."}
    )
    look_weight: float = field(default=0.0, metadata={"help": "Weight of teaching attention where to look."})
    look_layer: int | None = field(default=None, metadata={"help": "The layer whose attention is taught."})
    look_heads: int = field(default=2, metadata={"help": "How many of its heads are taught."})
    freeze_language_model: bool = field(
        default=False, metadata={"help": "Keep the language model's weights, embeddings and lm_head included."}
    )
    freeze_vision_tower: bool = field(default=True, metadata={"help": "Keep the weights of InternVL's vision tower."})
    freeze_projector: bool = field(default=False, metadata={"help": "Keep the weights of InternVL's projector."})
    freeze_mask_decoder: bool = field(default=False, metadata={"help": "Keep the weights of SAM2's mask decoder."})
    mask_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of mask decoder and [SEG] projector; default: as the rest."}
    )
    seg_projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the [SEG] projector; default: mask_learning_rate."}
    )
    seg_projector_start: int = field(
        default=0, metadata={"help": "Masks that the [SEG] projector is fitted to before the first step; 0: none."}
    )
    seg_projector_start_step: int = field(
        default=0, metadata={"help": "The step before which the [SEG] projector is fitted; 0: before the first."}
    )
    mask_patience: int = field(
        default=200, metadata={"help": "Steps in which masks must get better, or a warning says so; 0: never."}
    )
    on_error: str = field(
        default="raise",
        metadata={"help": "Samples that cannot be used: raise or skip.", "choices": list(ON_ERROR)},
    )
    plot_losses: bool = field(default=True, metadata={"help": "Draw losses.png into output_dir at the end."})

    def __post_init__(self):
        self._check()
        fit_to_machine(self)
        with warnings.catch_warnings():  # the name TRL still gives to activation_checkpointing, whoever sets it
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
            super().__post_init__()
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if (getattr(self, name, None) or {}).get("use_reentrant"):
                raise ValueError(
                    f"{name} has use_reentrant, which loses gradients: SAM2's mask decoder takes inputs by name, and "
                    "reentrant checkpointing sees none of these. Leave it out."
                )
        keep_precision(self)
        zero3.check_precision(self)
        self._keep_batches_whole()
        self._check_reports()

    def _keep_batches_whole(self) -> None:
        """For a stream accelerate would dispatch batches from one process, cutting every tensor at the number of rows;
        a batch has more masks than rows, and they would be lost without a word."""
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config has dispatch_batches, which cuts the masks and depth maps of a batch at its number "
                "of rows. Leave it out: every process reads its own part of the data."
            )
        self.accelerator_config.dispatch_batches = False

    def _check_reports(self) -> None:
        """transformers finds out after the model has been loaded, in a traceback."""
        available = get_available_reporting_integrations()
        untold = {"flyte", "azure_ml"}  # transformers does not tell whether these are there
        lacking = [name for name in self.report_to if name in {*INTEGRATION_TO_CALLBACK} - {*available} - untold]
        if lacking:
            way = how_to_install("track") if lacking[0] in TRACKERS else f"pip install {lacking[0]}"
            raise ValueError(f"report_to names {lacking[0]}, which is not installed: {way}, or leave it out.")
        unknown = [name for name in self.report_to if name not in INTEGRATION_TO_CALLBACK]
        if unknown:
            raise ValueError(
                f"report_to names {unknown[0]!r}; known are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, or none."
            )

    def loss_weights(self) -> LossWeights:
        """The weights of the composite loss, checked."""
        parts = {name: getattr(self, f"{name}_weight") for name in (*PARTS, "gradient")}
        return LossWeights(
            **parts, token_over=self.token_over, count_beta=self.count_beta, temperature=self.merge_temperature
        )

    def mask_rates(self) -> dict[str, float]:
        """The learning rates that differ from `learning_rate`, by the name of the setting whose part they are for; the
        mask decoder has none where it is frozen."""
        rates = {"mask_learning_rate": self.mask_learning_rate}
        own = self.seg_projector_learning_rate
        rates["seg_projector_learning_rate"] = self.mask_learning_rate if own is None else own
        if self.freeze_mask_decoder:
            del rates["mask_learning_rate"]
        return {name: rate for name, rate in rates.items() if rate is not None}

    @property
    def checkpoints_activations(self) -> bool:
        """By the newer of transformers' two names where that was set."""
        newer = getattr(self, "activation_checkpointing", None)
        return self.gradient_checkpointing if newer is None else newer

    def _check(self) -> None:
        for name in (*PARTS, "gradient"):
            value = getattr(self, f"{name}_weight")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}_weight is {value}; a weight of the loss is a finite number of 0 or more.")
        if not (math.isfinite(self.look_weight) and self.look_weight >= 0):
            raise ValueError(f"look_weight is {self.look_weight}; it must be a finite number of 0 or more.")
        if not 0 <= self.span_noise <= 0.5:
            raise ValueError(f"span_noise is {self.span_noise}; a mean share of replaced codes lies between 0 and 0.5.")
        if self.look_weight and self.look_heads < 1:
            raise ValueError(f"look_heads is {self.look_heads}; at least one head can be taught where to look.")
        if self.look_weight and self.checkpoints_activations:
            raise ValueError(
                "look_weight needs attention weights, which gradient checkpointing throws away: set "
                "gradient_checkpointing: false, or leave look_weight out."
            )
        for name in ("mask_learning_rate", "seg_projector_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a finite number of 0 or more, or be left out.")
        for name in ("seg_projector_start", "seg_projector_start_step", "mask_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a whole number of 0 or more.")
        if self.seg_projector_start_step and not self.seg_projector_start:
            raise ValueError(
                f"seg_projector_start_step is {self.seg_projector_start_step}, but nothing is started: set "
                "seg_projector_start too, to the number of masks to fit to (256)."
            )
        if 0 < self.max_steps <= self.seg_projector_start_step:
            raise ValueError(
                f"seg_projector_start_step is {self.seg_projector_start_step}, and the training ends at step "
                f"{self.max_steps} (max_steps): start earlier, or leave it out."
            )
        for name in ("merge_temperature", "count_beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a finite number above 0.")
        if not any(getattr(self, f"{name}_weight") for name in PARTS):
            raise ValueError("This trains nothing: all weights of the loss are 0. Set one, e.g. text_weight: 1.")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError(
                f"This trains nothing: max_steps is {self.max_steps} and num_train_epochs {self.num_train_epochs}. "
                "Set max_steps to 1 or more, or leave it out and set num_train_epochs."
            )
        check_over(self.token_over)
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error is {self.on_error!r}; choose one of {', '.join(ON_ERROR)}.")
        check_uploads_nothing(self)
        for name, (neutral, reason) in _WITHOUT_EFFECT.items():
            value = getattr(self, name)
            if value not in neutral:
                raise ValueError(f"{name} is {value!r}, which is not for this trainer: {reason}. Leave it out.")
