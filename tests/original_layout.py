"""Small random InternVLs in OpenGVLab's layout, written without any model class or code of theirs."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>"]
CORPUS = [
    "<|im_start|>user\nWhich is closer, the red ball or the blue box?<|im_end|>\n",
    "Segment the red ball, please.",
]


def original_config(text: str = "Qwen2ForCausalLM", *, vision: Mapping = {}, llm: Mapping = {}, **changes) -> dict:
    """A config.json with the fields such files have."""
    vision_config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 4,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "use_flash_attn": True,
    }
    llm_config = {
        "architectures": [text],
        "vocab_size": 400,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "flash_attention_2",
        "torch_dtype": "bfloat16",
    }
    if text == "InternLM2ForCausalLM":
        llm_config |= {"bias": False, "rope_scaling": {"factor": 2.0, "type": "dynamic"}}
    if text == "Qwen2ForCausalLM":
        llm_config |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2}
    if text == "Qwen3ForCausalLM":
        llm_config |= {"head_dim": 8, "attention_bias": False}
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 16,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision_config | vision,
        "llm_config": llm_config | llm,
    } | changes


def original_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor such a checkpoint holds."""
    return {**_vision_shapes(config), **_projector_shapes(config), **_text_shapes(config["llm_config"])}


def random_tensors(config: Mapping, seed: int = 0) -> dict[str, Tensor]:
    """Values large enough that a wrong head, group or norm shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1) + ("norm" in name)
        for name, shape in original_shapes(config).items()
    }


def write_checkpoint(folder: Path, config: Mapping, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """config.json and the weights, and a tokenizer of the kind the language model has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, tensors, shards)
    writer = write_internlm2_tokenizer if "InternLM2" in config["llm_config"]["architectures"][0] else write_tokenizer
    writer(folder)
    return folder


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """model.safetensors, or shards with their index."""
    if shards == 1:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """Qwen2's kind: vocab.json, merges.txt and the added tokens in tokenizer_config.json."""
    from perceptio_hf.lab.lessons.model import tiny_tokenizer

    model = json.loads(tiny_tokenizer(CORPUS, 300).backend_tokenizer.to_str())["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": None, "chat_template": "{{ not InternVL's }}"}
    write_added_tokens(folder, len(model["vocab"]), [*IMAGE_TOKENS, *extra], settings)


def write_added_tokens(
    folder: Path, first: int, tokens: list[str], settings: dict, named: Mapping[int, str] = {}
) -> None:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    ids = dict(named) | {first + place: token for place, token in enumerate(tokens)}
    added = {str(id): {"content": token, **flags} for id, token in ids.items()}
    document = {"added_tokens_decoder": added, "additional_special_tokens": list(ids.values()), **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(document))


def internlm2_pieces() -> list[tuple[str, float, int]]:
    """A small vocabulary: control pieces, bytes, letters, merged words (better ones score higher) and spare pieces."""
    text = " ".join(CORPUS).replace(" ", "\u2581")
    letters = sorted(set(text) - {"\n", "<", "|", ">"})
    words = [
        "ed",
        "he",
        "\u2581t",
        "\u2581the",
        "th",
        "re",
        "red",
        "\u2581re",
        "\u2581red",
        "al",
        "all",
        "ll",
        "ball",
        "us",
        "user",
    ]
    words += [
        "\u2581b",
        "\u2581ball",
        "er",
        "ser",
        "se",
        "bl",
        "blue",
        "ue",
        "\u2581blue",
        "\u2581bl",
        "is",
        "\u2581is",
        "\u2581\u2581",
    ]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    pieces += [(letter, -1000.0 - rank, 1) for rank, letter in enumerate(letters)]
    return [*pieces, *((f"[UNUSED_TOKEN_{i}]", -5000.0 - i, 1) for i in range(2))]


def write_internlm2_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """InternLM2's kind: tokenizer.model, code of its own, and spare pieces that added tokens rename."""
    pieces = internlm2_pieces()
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(pieces))
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    named = {0: "<unk>", 1: "<s>", 2: "</s>", len(pieces) - 2: "<|im_end|>", len(pieces) - 1: "<|im_start|>"}
    write_added_tokens(folder, len(pieces), [*IMAGE_TOKENS, *extra], settings, named)
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")


def sentencepiece_bytes(pieces: list[tuple[str, float, int]], model_type: int = 2, dummy_prefix: bool = False) -> bytes:
    """A SentencePiece ModelProto."""

    def field(number: int, value: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(value)) + value

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value % 128 | 128]) + varint(value // 128)

    document = b""
    for text, score, kind in pieces:
        document += field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
    trainer = b"\x18" + varint(model_type)
    normalizer = field(1, b"identity") + b"\x18" + varint(dummy_prefix) + b"\x20" + varint(0)
    return document + field(2, trainer) + field(3, normalizer)


def _vision_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    vision = config["vision_config"]
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    places = (vision["image_size"] // patch) ** 2 + 1
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, places, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    layer = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    layer |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
    layer |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
    layer |= {name: (width,) for name in ("ls1", "ls2", "norm1.weight", "norm2.weight")}
    if vision["norm_type"] == "layer_norm":
        layer |= {"norm1.bias": (width,), "norm2.bias": (width,)}
    if vision["qkv_bias"]:
        layer["attn.qkv.bias"] = (3 * width,)
    if vision["qk_normalization"]:
        layer |= {"attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,)}
    for index in range(vision["num_hidden_layers"]):
        shapes |= {f"vision_model.encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _projector_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    merged = config["vision_config"]["hidden_size"] * int(1 / config["downsample_ratio"]) ** 2
    hidden = config["llm_config"]["hidden_size"]
    shapes = {"mlp1.0.weight": (merged,), "mlp1.0.bias": (merged,)}
    shapes |= {"mlp1.1.weight": (hidden, merged), "mlp1.1.bias": (hidden,)}
    return shapes | {"mlp1.3.weight": (hidden, hidden), "mlp1.3.bias": (hidden,)}


def _text_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    architecture, hidden, inner = config["architectures"][0], config["hidden_size"], config["intermediate_size"]
    heads, groups, rows = config["num_attention_heads"], config["num_key_value_heads"], (config["vocab_size"],)
    width = config.get("head_dim", hidden // heads)
    internlm2 = architecture == "InternLM2ForCausalLM"
    if internlm2:
        layer = {
            "attention.wqkv.weight": ((heads + 2 * groups) * width, hidden),
            "attention.wo.weight": (hidden, hidden),
        }
        layer |= {f"feed_forward.{name}.weight": (inner, hidden) for name in ("w1", "w3")}
        layer |= {
            "feed_forward.w2.weight": (hidden, inner),
            "attention_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
        }
        if config["bias"]:
            layer |= {"attention.wqkv.bias": ((heads + 2 * groups) * width,), "attention.wo.bias": (hidden,)}
    else:
        sizes = {"q": heads * width, "k": groups * width, "v": groups * width}
        layer = {f"self_attn.{name}_proj.weight": (size, hidden) for name, size in sizes.items()}
        layer |= {"self_attn.o_proj.weight": (hidden, heads * width), "mlp.down_proj.weight": (hidden, inner)}
        layer |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        layer |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if architecture == "Qwen2ForCausalLM":
            layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
        if architecture == "Qwen3ForCausalLM":
            layer |= {f"self_attn.{name}_norm.weight": (width,) for name in "qk"}
    words, head = ("model.tok_embeddings", "output") if internlm2 else ("model.embed_tokens", "lm_head")
    shapes = {f"language_model.{words}.weight": (*rows, hidden), "language_model.model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes[f"language_model.{head}.weight"] = (*rows, hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"language_model.model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes
