"""Optimizers and learning rates of the tiny training.

The matrices inside the layers are trained by Muon, whose steps have no direction that is larger than another, and all
else by AdamW. After the same 4,000 steps the ViT tells depth codes at a cross-entropy of 2.11, with AdamW alone at
2.36, and what its cells show at 1.7 in the place of 2.3; words and codes of the language model gain a tenth.
"""

from collections.abc import Sequence

import torch
from torch import nn

from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration

# [SEG] states share a large mean, so that early steps of Adam move what enters the projector's ReLU all one way: at the
# full rate four fifths of its units died, and masks stopped improving.
_PROJECTOR_RATE = 0.2
_MUON_RATE = 5.0  # of the others' rate, where one step has the size of Adam's
_NEWTON_STEPS = 4  # of the orthogonalisation; the fifth that is usual changes nothing here and costs a fortieth
_WEIGHT_DECAY = 0.05


def adamw(
    model: PerceptioForConditionalGeneration, parameters: Sequence[nn.Parameter], decoder_rate: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with groups of their own for the first layer of the [SEG] projector and for the mask decoder, which learns
    at `decoder_rate`."""
    shares = {id(parameter): _PROJECTOR_RATE for parameter in model.seg_projector.linear_in.parameters()}
    shares |= {id(parameter): decoder_rate for parameter in model.mask_model.mask_decoder.parameters()}
    groups = [
        {"params": [item for item in parameters if shares.get(id(item), 1.0) == share], "share": share}
        for share in sorted({*shares.values(), 1.0}, reverse=True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY)


class StageOptimizer:
    """Muon for the matrices inside the layers of the ViT and the language model, AdamW for all other `parameters`.

    The language model's queries and keys are AdamW's too: taught where to look, they learn it sooner so.
    """

    def __init__(
        self, model: PerceptioForConditionalGeneration, parameters: Sequence[nn.Parameter], decoder_rate: float = 1.0
    ):
        layers = model.model.language_model.layers
        inner = {id(weight) for part in (layers, model.model.vision_tower.encoder) for weight in part.parameters()}
        inner -= {id(part.weight) for layer in layers for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)}
        inner = {id(parameter) for parameter in parameters if id(parameter) in inner and parameter.ndim == 2}
        matrices = [parameter for parameter in parameters if id(parameter) in inner]
        others = [parameter for parameter in parameters if id(parameter) not in inner]
        self.optimizers: list[torch.optim.Optimizer] = [adamw(model, others, decoder_rate)]
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                lr=0.0,
                weight_decay=_WEIGHT_DECAY,
                ns_steps=_NEWTON_STEPS,
                adjust_lr_fn="match_rms_adamw",
            )
            muon.param_groups[0]["share"] = _MUON_RATE
            self.optimizers.append(muon)

    def step(self, rate: float) -> None:
        """One step at a learning rate, of which every group has its share."""
        for optimizer in self.optimizers:
            set_rate(optimizer, rate)
            optimizer.step()

    def state_dict(self) -> list[dict]:
        """The states of both."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on where `state_dict` was taken."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))
