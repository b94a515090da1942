"""Which parameters of a model learn."""

from torch import Tensor, nn

from ..modeling.modeling_perceptio import PerceptioForConditionalGeneration
from .config import PerceptioSFTConfig


def choose_trainable(model: PerceptioForConditionalGeneration, args: PerceptioSFTConfig) -> None:
    """Set which parameters of `model` require gradients: what `args` does not freeze."""
    model.requires_grad_(False)
    model.seg_projector.requires_grad_(True)
    for frozen, modules in (
        (args.freeze_language_model, (model.model.language_model, model.lm_head)),
        (args.freeze_projector, (model.model.multi_modal_projector,)),
        (args.freeze_vision_tower, (model.model.vision_tower,)),
        (args.freeze_mask_decoder, (model.mask_model.mask_decoder,)),
    ):
        for module in modules:
            module.requires_grad_(not frozen)
    model.mask_model.mask_decoder.pred_obj_score_head.requires_grad_(False)  # speaks of objects in videos; unused


def check_trains(model: nn.Module) -> None:
    """ValueError if no parameter requires a gradient."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "This trains nothing: no parameter of the model requires a gradient. Freeze less, or give a peft_config."
        )


def zero_of(modules: list[nn.Module]) -> Tensor:
    """A zero that depends on all their trainable parameters, so that each gets a gradient in every micro batch, with
    and without masks. FSDP exchanges the gradients there are, and waits for ever where processes differ in them; an
    optimizer steps where there is one, and must do so however a batch is divided."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return sum((parameter.sum() * 0 for parameter in parameters), 0.0)
