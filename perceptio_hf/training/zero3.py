"""What DeepSpeed's ZeRO-3 needs here: settings that fit, and a codec that is whole outside of the model's forward."""

import torch
from transformers import TrainingArguments

from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

NO_START = (
    "seg_projector_start gives the [SEG] projector new weights, but DeepSpeed's ZeRO-3 holds the model in shards from "
    "when it is loaded: leave it out, or share the model by recipes/accelerate/fsdp2_8gpu.yaml, where the start comes "
    "before the first step."
)


def is_on(settings: TrainingArguments) -> bool:
    """Whether these settings share the weights out; ZeRO-1 and ZeRO-2 leave each process its own."""
    plugin = getattr(settings, "deepspeed_plugin", None)
    return plugin is not None and plugin.hf_ds_config.is_zero3()


def check_precision(settings: TrainingArguments) -> None:
    """transformers loads a model under ZeRO-3 in the type that DeepSpeed computes in, every part of it.

    Raises:
        ValueError: for half precision, which would round SAM2 and the codec, and save them so.
    """
    if not is_on(settings):
        return
    config = settings.deepspeed_plugin.hf_ds_config
    for half in ("bf16", "fp16"):
        if config.is_true(f"{half}.enabled"):
            raise ValueError(what_is_rounded(half))


def what_is_rounded(half: str) -> str:
    return (
        f"{half} under DeepSpeed's ZeRO-3 rounds all weights when the model is loaded, those of SAM2 and of the depth "
        f"codec too, which are to stay as they are: set {half}: false and, in accelerate's configuration, "
        "mixed_precision: 'no', or share the model by recipes/accelerate/fsdp2_8gpu.yaml, which computes in bf16 and "
        "keeps them."
    )


def whole_codec(codec: DepthVQVAE, device: torch.device) -> DepthVQVAE:
    """A copy of a model's codec that DeepSpeed does not divide.

    transformers shares parameters out while it loads a model, whatever `zero3_init_flag` says, so that a plain copy
    would be one of shards. All processes must call this together.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(codec.parameters())):
        state = {name: value.detach().clone() for name, value in codec.state_dict().items()}
    whole = DepthVQVAE(codec.config)
    whole.load_state_dict(state)
    return whole.to(device).eval().requires_grad_(False)
