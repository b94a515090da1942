"""A small random SAM2 under Meta's tensor names, and Sa2VA's way through it in plain torch.

Follows projects/llava_sam2/hf/models/sam2.py of Sa2VA's repository (a copy of Meta's code with a language prompt).
"""

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Sam2Config

_NECK_STRIDES = 4  # levels of the image encoder's pyramid


def sam2_shapes(config: Sam2Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of Meta's SAM2, and of three that only videos need."""
    shapes = _trunk_shapes(config.vision_config.backbone_config)
    width = config.vision_config.fpn_hidden_size
    for place, channels in enumerate(config.vision_config.backbone_channel_list):
        shapes |= _affine(f"image_encoder.neck.convs.{place}.conv", (width, channels, 1, 1))
    shapes |= _prompt_shapes(width) | _decoder_shapes(config.mask_decoder_config)
    video = {"maskmem_tpos_enc": (7, 1, 1, 64), "memory_encoder.fuser.layers.0.g_weight": (width,)}
    return shapes | {"no_mem_embed": (1, 1, width), **video, **_affine("obj_ptr_proj.layers.0", (width, width))}


def sa2va_masks(
    tensors: Mapping[str, Tensor], config: Sam2Config, pixels: Tensor, prompt: Tensor
) -> tuple[Tensor, Tensor]:
    """What Sa2VA's `language_embd_inference` computes for one picture and one projected [SEG] state.

    Args:
        tensors: under Meta's names.
        pixels: (1, 3, S, S).
        prompt: (C,).

    Returns:
        (S/4, S/4) logits of the best mask, and its predicted IoU.
    """
    coarse, fine, finest = _pyramid(tensors, config, pixels)
    image = coarse + tensors["no_mem_embed"].view(1, -1, 1, 1)
    not_a_point = tensors["sam_prompt_encoder.not_a_point_embed.weight"]
    # No points were clicked: Sa2VA gives one empty point, the prompt encoder pads it with another.
    prompts = torch.cat([not_a_point, not_a_point, prompt[None]])
    image = image + tensors["sam_prompt_encoder.no_mask_embed.weight"].view(1, -1, 1, 1)
    masks, scores = _decode(
        _under(tensors, "sam_mask_decoder."), config, image, _positions(tensors, image), prompts, fine, finest
    )
    best = int(scores[1:].argmax()) + 1  # the first one is the single mask, which Sa2VA never takes
    return masks[best], scores[best]


def _pyramid(tensors: Mapping[str, Tensor], config: Sam2Config, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Picture -> features at strides 16, 8 and 4."""
    levels = _trunk(_under(tensors, "image_encoder.trunk."), config.vision_config.backbone_config, pixels)
    found, above = {}, None
    for level in reversed(range(_NECK_STRIDES)):
        name = f"image_encoder.neck.convs.{_NECK_STRIDES - 1 - level}.conv"
        lateral = F.conv2d(levels[level], tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        if level == 2:
            lateral = lateral + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
        found[level] = above = lateral
    skip = _under(tensors, "sam_mask_decoder.")
    fine = F.conv2d(found[1], skip["conv_s1.weight"], skip["conv_s1.bias"])
    return found[2], fine, F.conv2d(found[0], skip["conv_s0.weight"], skip["conv_s0.bias"])


def _trunk(get: Mapping[str, Tensor], config, pixels: Tensor) -> list[Tensor]:
    """Hiera: the last states of every stage, (1, channels, h, w)."""
    x = F.conv2d(pixels, get["patch_embed.proj.weight"], get["patch_embed.proj.bias"], stride=4, padding=3)
    side = x.shape[-1]
    window = get["pos_embed_window"]
    x = x + F.interpolate(get["pos_embed"], size=(side, side), mode="bicubic")
    x = (x + window.repeat(1, 1, side // window.shape[2], side // window.shape[3])).permute(0, 2, 3, 1)
    ends = list(accumulate(config.blocks_per_stage))
    levels, stage = [], 0
    for index in range(ends[-1]):
        first = index in ends  # the first block of a later stage: pools, with the window of the stage before
        window_size = config.window_size_per_stage[stage]
        stage += first
        size = 0 if index in config.global_attention_blocks else window_size
        x = _block(_under(get, f"blocks.{index}."), x, config.num_attention_heads_per_stage[stage], size, first)
        if index + 1 in ends:
            levels.append(x.permute(0, 3, 1, 2))
    return levels


def _block(get: Mapping[str, Tensor], x: Tensor, heads: int, window: int, pool: bool) -> Tensor:
    normed = _norm(x, get, "norm1", 1e-6)
    shortcut = _pool(F.linear(normed, get["proj.weight"], get["proj.bias"])) if pool else x
    side, tiles = x.shape[1], x.shape[1] // window if window else 1
    assert side % tiles == 0  # the small sizes here need no padding
    parts = normed.unflatten(2, (tiles, -1)).unflatten(1, (tiles, -1)).transpose(2, 3).flatten(0, 2)
    q, k, v = F.linear(parts, get["attn.qkv.weight"], get["attn.qkv.bias"]).chunk(3, -1)
    q = _pool(q) if pool else q
    height = q.shape[1]
    q, k, v = (part.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2).unflatten(1, (height, -1))
    mixed = F.linear(mixed, get["attn.proj.weight"], get["attn.proj.bias"])
    x = shortcut + mixed.unflatten(0, (-1, tiles, tiles)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x + _mlp(get, "mlp", _norm(x, get, "norm2", 1e-6), 2, F.gelu)


def _positions(tensors: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """(1, C, h, w) random Fourier features of every place of the image embedding."""
    places = (torch.arange(image.shape[-1]) + 0.5) / image.shape[-1]
    y, x = torch.meshgrid(places, places, indexing="ij")
    turns = (2 * torch.stack([x, y], -1) - 1) @ tensors[
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    ]
    return torch.cat([(2 * torch.pi * turns).sin(), (2 * torch.pi * turns).cos()], -1).permute(2, 0, 1)[None]


def _decode(get, config, image, positions, prompts, fine, finest) -> tuple[Tensor, Tensor]:
    """-> (4, h, w) mask logits and (4,) predicted IoU."""
    own = [get[f"{name}.weight"] for name in ("obj_score_token", "iou_token", "mask_tokens")]
    start = torch.cat([*own, prompts])[None]
    keys, where = image.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2)
    heads, tokens = config.mask_decoder_config.num_attention_heads, start
    for layer in range(2):
        part = _under(get, f"transformer.layers.{layer}.")
        q = tokens + start if layer else tokens
        mixed = _attend(part, "self_attn", q, q, tokens, heads)
        tokens = _norm(tokens + mixed if layer else mixed, part, "norm1", 1e-5)
        mixed = _attend(part, "cross_attn_token_to_image", tokens + start, keys + where, keys, heads)
        tokens = _norm(tokens + mixed, part, "norm2", 1e-5)
        tokens = _norm(tokens + _mlp(part, "mlp", tokens, 2, F.relu), part, "norm3", 1e-5)
        mixed = _attend(part, "cross_attn_image_to_token", keys + where, tokens + start, tokens, heads)
        keys = _norm(keys + mixed, part, "norm4", 1e-5)
    part = _under(get, "transformer.")
    mixed = _attend(part, "final_attn_token_to_image", tokens + start, keys + where, keys, heads)
    tokens = _norm(tokens + mixed, part, "norm_final_attn", 1e-5)
    large = _up(get, 0, keys.transpose(1, 2).view_as(image)) + fine
    large = F.gelu(_norm(large.permute(0, 2, 3, 1), get, "output_upscaling.1", 1e-6).permute(0, 3, 1, 2))
    large = F.gelu(_up(get, 3, large) + finest)[0]
    weights = [_mlp(get, f"output_hypernetworks_mlps.{i}", tokens[0, 2 + i], 3, F.relu) for i in range(4)]
    masks = torch.einsum("mc,chw->mhw", torch.stack(weights), large)
    return masks, _mlp(get, "iou_prediction_head", tokens[0, 1], 3, F.relu).sigmoid()


def _attend(get: Mapping[str, Tensor], name: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (
        F.linear(x, get[f"{name}.{letter}_proj.weight"], get[f"{name}.{letter}_proj.bias"])
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for letter, x in (("q", q), ("k", k), ("v", v))
    )
    mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return F.linear(mixed.transpose(1, 2).flatten(2), get[f"{name}.out_proj.weight"], get[f"{name}.out_proj.bias"])


def _mlp(get: Mapping[str, Tensor], name: str, x: Tensor, layers: int, activation) -> Tensor:
    for layer in range(layers):
        x = F.linear(x, get[f"{name}.layers.{layer}.weight"], get[f"{name}.layers.{layer}.bias"])
        x = activation(x) if layer < layers - 1 else x
    return x


def _norm(x: Tensor, get: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], get[f"{name}.weight"], get[f"{name}.bias"], eps)


def _up(get: Mapping[str, Tensor], place: int, x: Tensor) -> Tensor:
    name = f"output_upscaling.{place}"
    return F.conv_transpose2d(x, get[f"{name}.weight"], get[f"{name}.bias"], stride=2)


def _pool(x: Tensor) -> Tensor:
    """(n, h, w, c) -> (n, h/2, w/2, c), the largest of four."""
    return x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax((2, 4))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _affine(name: str, shape: tuple[int, ...], outputs: int | None = None) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (outputs or shape[0],)}


def _mlp_shapes(name: str, *sizes: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (before, after) in enumerate(pairwise(sizes)):
        shapes |= _affine(f"{name}.layers.{layer}", (after, before))
    return shapes


def _trunk_shapes(config) -> dict[str, tuple[int, ...]]:
    trunk, width = "image_encoder.trunk", config.hidden_size
    tile = config.window_size_per_stage[0]
    shapes = _affine(f"{trunk}.patch_embed.proj", (width, 3, 7, 7))
    shapes[f"{trunk}.pos_embed"] = (1, width, *config.window_positional_embedding_background_size)
    shapes[f"{trunk}.pos_embed_window"] = (1, width, tile, tile)
    index = 0
    for blocks, after in zip(config.blocks_per_stage, config.embed_dim_per_stage, strict=True):
        for _ in range(blocks):
            name = f"{trunk}.blocks.{index}"
            shapes |= _affine(f"{name}.norm1", (width,)) | _affine(f"{name}.norm2", (after,))
            shapes |= _affine(f"{name}.attn.qkv", (3 * after, width)) | _affine(f"{name}.attn.proj", (after, after))
            shapes |= _mlp_shapes(f"{name}.mlp", after, int(after * config.mlp_ratio), after)
            if after != width:
                shapes |= _affine(f"{name}.proj", (after, width))
            width, index = after, index + 1
    return shapes


def _prompt_shapes(width: int) -> dict[str, tuple[int, ...]]:
    name = "sam_prompt_encoder"
    shapes = {f"{name}.pe_layer.positional_encoding_gaussian_matrix": (2, width // 2)}
    shapes |= {f"{name}.point_embeddings.{i}.weight": (1, width) for i in range(4)}
    shapes |= {f"{name}.{kind}.weight": (1, width) for kind in ("not_a_point_embed", "no_mask_embed")}
    mask = f"{name}.mask_downscaling"
    shapes |= _affine(f"{mask}.0", (4, 1, 2, 2)) | _affine(f"{mask}.1", (4,)) | _affine(f"{mask}.3", (16, 4, 2, 2))
    return shapes | _affine(f"{mask}.4", (16,)) | _affine(f"{mask}.6", (width, 16, 1, 1))


def _decoder_shapes(config) -> dict[str, tuple[int, ...]]:
    name, width = "sam_mask_decoder", config.hidden_size
    inner = width // config.attention_downsample_rate
    shapes = {
        f"{name}.{token}.weight": (n, width)
        for token, n in (("iou_token", 1), ("mask_tokens", 4), ("obj_score_token", 1))
    }

    def attention(place: str, size: int) -> dict[str, tuple[int, ...]]:
        parts = _affine(f"{place}.out_proj", (width, size))
        for letter in "qkv":
            parts |= _affine(f"{place}.{letter}_proj", (size, width))
        return parts

    for layer in range(2):
        place = f"{name}.transformer.layers.{layer}"
        shapes |= attention(f"{place}.self_attn", width) | _mlp_shapes(f"{place}.mlp", width, config.mlp_dim, width)
        for kind in ("cross_attn_token_to_image", "cross_attn_image_to_token"):
            shapes |= attention(f"{place}.{kind}", inner)
        for norm in range(1, 5):
            shapes |= _affine(f"{place}.norm{norm}", (width,))
    shapes |= attention(f"{name}.transformer.final_attn_token_to_image", inner)
    shapes |= _affine(f"{name}.transformer.norm_final_attn", (width,))
    shapes |= _affine(f"{name}.output_upscaling.0", (width, width // 4, 2, 2), width // 4)
    shapes |= _affine(f"{name}.output_upscaling.1", (width // 4,))
    shapes |= _affine(f"{name}.output_upscaling.3", (width // 4, width // 8, 2, 2), width // 8)
    shapes |= _affine(f"{name}.conv_s0", (width // 8, width, 1, 1)) | _affine(
        f"{name}.conv_s1", (width // 4, width, 1, 1)
    )
    for mask in range(4):
        shapes |= _mlp_shapes(f"{name}.output_hypernetworks_mlps.{mask}", width, width, width, width // 8)
    head = config.iou_head_hidden_dim
    shapes |= _mlp_shapes(f"{name}.iou_prediction_head", width, head, head, 4)
    return shapes | _mlp_shapes(f"{name}.pred_obj_score_head", width, width, width, 1)
