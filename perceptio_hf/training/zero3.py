"""What DeepSpeed's ZeRO-3 needs here: a codec that is whole outside of the model's forward."""

import torch

from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE


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
