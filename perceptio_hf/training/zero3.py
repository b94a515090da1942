"""What DeepSpeed's ZeRO-3 needs here: settings that fit, and a codec that is whole outside of the model's forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed as shared_config

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


def gathered_weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The whole tensors of a module's state, in memory of the CPU, where this process is to `keep` them. All processes
    must call this together; one tensor at a time is whole on every device."""
    import deepspeed

    weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor] if isinstance(tensor, nn.Parameter) else []):
            if keep:
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


@contextmanager
def unnoticed() -> Iterator[None]:
    """Within, models are made and answer as if there were no ZeRO-3. Where transformers knows of it, it would share out
    parts of any model, and have `generate` go on until the last process has finished."""
    kept = shared_config._hf_deepspeed_config_weak_ref
    shared_config.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        shared_config._hf_deepspeed_config_weak_ref = kept


def whole_codec(codec: DepthVQVAE, device: torch.device) -> DepthVQVAE:
    """A copy of a model's codec that DeepSpeed does not divide.

    transformers shares parameters out while it loads a model, whatever `zero3_init_flag` says, so that a plain copy
    would be one of shards. All processes must call this together.
    """
    whole = DepthVQVAE(codec.config)
    whole.load_state_dict(gathered_weights(codec, keep=True))
    return whole.to(device).eval().requires_grad_(False)
