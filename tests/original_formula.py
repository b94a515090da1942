"""What an InternVL in OpenGVLab's layout computes, in plain torch on the tensors' original names.

Follows modeling_intern_vit.py, modeling_internvl_chat.py and modeling_internlm2.py of OpenGVLab's repository, and the
papers of the language models.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_logits(
    tensors: Mapping[str, Tensor], config: Mapping, ids: Tensor, tiles: Tensor, image_id: int
) -> Tensor:
    """(batch, length) ids and (tiles, 3, side, side) -> (batch, length, vocabulary)."""
    states = reference_states(tensors, config, ids, tiles, image_id)
    for name in ("lm_head.weight", "output.weight", "model.embed_tokens.weight"):  # the last where they are tied
        if f"language_model.{name}" in tensors:
            return states @ tensors[f"language_model.{name}"].T
    raise AssertionError("no head")


def reference_states(
    tensors: Mapping[str, Tensor], config: Mapping, ids: Tensor, tiles: Tensor, image_id: int
) -> Tensor:
    """The language model's states after its last norm."""
    words = f"language_model.model.{'tok_embeddings' if _is_internlm2(config) else 'embed_tokens'}.weight"
    embedded = tensors[words][ids].clone()
    embedded[ids == image_id] = picture_tokens(tensors, config, tiles).flatten(0, 1)
    return _language_model(tensors, config["llm_config"], embedded)


def picture_tokens(tensors: Mapping[str, Tensor], config: Mapping, tiles: Tensor) -> Tensor:
    """(tiles, 3, side, side) -> (tiles, tokens, hidden of the language model)."""
    states = _vision_states(tensors, config["vision_config"], tiles)[config["select_layer"]][:, 1:]
    side, step = int(states.shape[1] ** 0.5), int(1 / config["downsample_ratio"])
    n, width = states.shape[0], states.shape[2]
    # Every token takes its step x step neighbours: rows outside, columns inside.
    blocks = states.view(n, side // step, step, side // step, step, width).permute(0, 1, 3, 2, 4, 5)
    merged = blocks.reshape(n, (side // step) ** 2, step * step * width)
    merged = F.layer_norm(merged, merged.shape[-1:], tensors["mlp1.0.weight"], tensors["mlp1.0.bias"])
    hidden = F.gelu(F.linear(merged, tensors["mlp1.1.weight"], tensors["mlp1.1.bias"]))
    return F.linear(hidden, tensors["mlp1.3.weight"], tensors["mlp1.3.bias"])


def _vision_states(tensors: Mapping[str, Tensor], config: Mapping, tiles: Tensor) -> list[Tensor]:
    """Embeddings and the output of every layer."""
    get = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    patches = F.conv2d(
        tiles,
        get["embeddings.patch_embedding.weight"],
        get["embeddings.patch_embedding.bias"],
        stride=config["patch_size"],
    )
    side, positions = patches.shape[-1], get["embeddings.position_embedding"]
    trained = config["image_size"] // config["patch_size"]
    grid = positions[:, 1:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    first = get["embeddings.class_embedding"].expand(len(tiles), -1, -1)
    states = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + torch.cat([positions[:, :1], grid], 1)
    found = [states]
    for layer in range(config["num_hidden_layers"]):
        part = _under(get, f"encoder.layers.{layer}.")
        states = states + _vision_attention(part, config, _vision_norm(part, "norm1", config, states)) * part["ls1"]
        hidden = F.linear(_vision_norm(part, "norm2", config, states), part["mlp.fc1.weight"], part["mlp.fc1.bias"])
        states = states + F.linear(F.gelu(hidden), part["mlp.fc2.weight"], part["mlp.fc2.bias"]) * part["ls2"]
        found.append(states)
    return found


def _vision_norm(part: Mapping[str, Tensor], name: str, config: Mapping, states: Tensor) -> Tensor:
    if config["norm_type"] == "rms_norm":
        return _rms(states, part[f"{name}.weight"], config["layer_norm_eps"])
    return F.layer_norm(
        states, states.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"], config["layer_norm_eps"]
    )


def _vision_attention(part: Mapping[str, Tensor], config: Mapping, states: Tensor) -> Tensor:
    n, length, width = states.shape
    q, k, v = F.linear(states, part["attn.qkv.weight"], part.get("attn.qkv.bias")).split(width, dim=-1)
    if config["qk_normalization"]:
        q, k = (_rms(x, part[f"attn.{name}_norm.weight"], config["layer_norm_eps"]) for name, x in (("q", q), ("k", k)))
    q, k, v = (x.view(n, length, config["num_attention_heads"], -1).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(n, length, width)
    return F.linear(mixed, part["attn.proj.weight"], part["attn.proj.bias"])


def _language_model(tensors: Mapping[str, Tensor], config: Mapping, states: Tensor) -> Tensor:
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        part = _stock_names(_under(tensors, f"language_model.model.layers.{layer}."), config)
        states = states + _causal_attention(part, config, _rms(states, part["input_layernorm.weight"], eps))
        normed = _rms(states, part["post_attention_layernorm.weight"], eps)
        gate, up = normed @ part["mlp.gate_proj.weight"].T, normed @ part["mlp.up_proj.weight"].T
        states = states + (F.silu(gate) * up) @ part["mlp.down_proj.weight"].T
    return _rms(states, tensors["language_model.model.norm.weight"], eps)


def _stock_names(part: dict[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """InternLM2's layer under Llama's names; query heads of a group lie before their key and value."""
    if "attention.wqkv.weight" not in part:
        return part
    names = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj",
    }
    names |= {f"feed_forward.w{i}": f"mlp.{name}_proj" for i, name in ((1, "gate"), (3, "up"), (2, "down"))}
    stock = {
        f"{new}.{end}": part[f"{old}.{end}"]
        for old, new in names.items()
        for end in ("weight", "bias")
        if f"{old}.{end}" in part
    }
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, shared = config["hidden_size"] // heads, heads // groups
    for end in ("weight", "bias"):
        fused = part.get(f"attention.wqkv.{end}")
        if fused is None:
            continue
        rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for chunk, piece in enumerate(fused.split(width)):
            place = chunk % (shared + 2)
            rows["q" if place < shared else "k" if place == shared else "v"].append(piece)
        stock |= {f"self_attn.{name}_proj.{end}": torch.cat(pieces) for name, pieces in rows.items()}
    return stock


def _causal_attention(part: Mapping[str, Tensor], config: Mapping, states: Tensor) -> Tensor:
    n, length, _ = states.shape
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]

    def project(name: str, count: int) -> Tensor:
        x = F.linear(states, part[f"self_attn.{name}_proj.weight"], part.get(f"self_attn.{name}_proj.bias"))
        x = x.view(n, length, count, -1)
        if f"self_attn.{name}_norm.weight" in part:  # Qwen3
            x = _rms(x, part[f"self_attn.{name}_norm.weight"], config["rms_norm_eps"])
        return x.transpose(1, 2)  # (n, count, length, width)

    q, k, v = project("q", heads), project("k", groups), project("v", groups)
    q, k = (_rotate(x, _rope_theta(config, length)) for x in (q, k))
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    mixed = mixed.transpose(1, 2).reshape(n, length, -1)
    return F.linear(mixed, part["self_attn.o_proj.weight"], part.get("self_attn.o_proj.bias"))


def _rope_theta(config: Mapping, length: int) -> float:
    """InternLM2 slows the rotation down where a text is longer than those it was trained on (dynamic NTK)."""
    scaling, trained = config.get("rope_scaling"), config["max_position_embeddings"]
    if not scaling or length <= trained:
        return config["rope_theta"]
    width = config["hidden_size"] // config["num_attention_heads"]
    stretched = scaling["factor"] * length / trained - (scaling["factor"] - 1)
    return config["rope_theta"] * stretched ** (width / (width - 2))


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding: the first half of a head's channels turns with the second half."""
    length, width = x.shape[-2:]
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    a, b = x.split(width // 2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_internlm2(config: Mapping) -> bool:
    return config["llm_config"]["architectures"][0] == "InternLM2ForCausalLM"
