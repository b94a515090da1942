"""Small random checkpoints of the parts of a Perceptio, in the layouts their own projects save."""

import json
from pathlib import Path

import torch
from helpers import depth_config
from torch import nn
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Sam2Model,
)

from perceptio_hf import DepthVQVAE

TEXTS = ["Which is closer, the red ball or the blue box?", "Segment the red ball.", "Here is the depth map."]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TILE, PATCH, TOKENS_PER_TILE = 32, 4, 16
_TEXT_MODEL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 2048,
}


def stock_tokenizer() -> PreTrainedTokenizerFast:
    """With InternVL's picture tokens and no spatial ones; like many, it pads on the right."""
    from perceptio_hf.lab.lessons.model import tiny_tokenizer

    tokenizer = tiny_tokenizer(TEXTS, vocab_size=300)
    tokenizer.padding_side = "right"
    return tokenizer


def stock_internvl(
    rows: int, *, family: str = "qwen2", tie: bool = True, dtype=torch.float32, image_token_id: int = 0, seed: int = 0
) -> InternVLForConditionalGeneration:
    """A random InternVL whose embedding has `rows` rows."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
            "attention_bias": True,
        },
        text_config={**_TEXT_MODEL, "model_type": family, "vocab_size": rows, "tie_word_embeddings": tie},
        image_token_id=image_token_id,
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.to(dtype)


def save_internvl(folder: Path, *, padding: int = 0, max_shard_size: str = "5GB", **options) -> Path:
    """An InternVL folder as transformers' repositories have it; `padding` rows belong to no token."""
    tokenizer = stock_tokenizer()
    image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = stock_internvl(len(tokenizer) + padding, image_token_id=image_token_id, **options)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        crop_to_patches=False,
        max_patches=5,
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    about = {"image_seq_length": TOKENS_PER_TILE, "processor_class": "InternVLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(about))
    return folder


def mask_model(seed: int = 0) -> Sam2Model:
    """A random SAM2 for pictures of 128 x 128."""
    from perceptio_hf.lab.lessons.model import tiny_mask_config

    torch.manual_seed(seed)
    return Sam2Model(tiny_mask_config()).eval()


def codec(seed: int = 0, **changes) -> DepthVQVAE:
    """A random codec of 16 codes on a 4 x 4 grid."""
    config = depth_config()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return DepthVQVAE(config).eval()


def save_teacher(folder: Path, *, kind: str = "relative", seed: int = 0) -> Path:
    """A small random Depth Anything as transformers' repositories have it: Depth Anything V2's layout, 56 pixels.

    Its numbers differ from place to place in any release: which weights a seed gives is transformers' to choose, and by
    some of them the ReLU at its end cuts off three quarters of a map.
    """
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = Dinov2Config(
        **sizes, image_size=56, patch_size=14, out_features=stages, reshape_hidden_states=False, apply_layernorm=True
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=1 if kind == "relative" else 10,
    )
    model = DepthAnythingForDepthEstimation(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 / parameter[0].numel() ** 0.5)
        last, found = model.head.conv3, []
        last.bias.zero_()
        hook = last.register_forward_hook(lambda layer, given, out: found.append(out))
        model(nn.functional.interpolate(torch.randn(8, 3, 7, 7), 56, mode="bilinear"))
        hook.remove()
        last.weight /= found[0].std()
        above = 4.0 if kind == "relative" else 0.0  # the ReLU that ends it; where a sigmoid does, in its middle
        last.bias += above - found[0].mean() / found[0].std()
    model.save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    DPTImageProcessor(
        size={"height": 56, "width": 56},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=mean,
        image_std=std,
    ).save_pretrained(folder)
    return folder
