"""4-bit and 8-bit loading shrinks the language part and leaves SAM2, codec and [SEG] projector as they are."""

import pytest
import torch
from helpers import chat, encode, picture
from torch import nn
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig

from perceptio_hf import tiny_checkpoint

OURS = ("mask_model", "depth_model", "seg_projector")


def bits_and_bytes(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def torchao_int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


CONFIGURATIONS = {
    "bitsandbytes 8 bit": lambda: bits_and_bytes(load_in_8bit=True),
    "bitsandbytes 4 bit": lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "torchao 8 bit": torchao_int8,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_quantised_loading_leaves_the_spatial_parts_alone(name):
    folder = tiny_checkpoint()
    before = AutoModel.from_pretrained(folder).state_dict()
    model = AutoModel.from_pretrained(folder, quantization_config=CONFIGURATIONS[name](), dtype=torch.bfloat16)
    kept = {key: value for key, value in model.state_dict().items() if key.startswith(OURS)}
    assert len(kept) == sum(key.startswith(OURS) for key in before) > 0
    assert all(value.dtype == before[key].dtype and torch.equal(value, before[key]) for key, value in kept.items())
    layer = model.model.language_model.layers[0].mlp.down_proj
    assert type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter  # something was quantised
    inputs = encode(AutoProcessor.from_pretrained(folder), chat(picture()))
    out = model.generate(**inputs, spatial="seg+depth", max_new_tokens=80, return_dict_in_generate=True)
    assert len(out.mask_logits[0]) and torch.isfinite(out.mask_logits[0]).all() and len(out.depth_maps[0]) == 1
