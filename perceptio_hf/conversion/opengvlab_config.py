"""The config.json of OpenGVLab's InternVL -> `InternVLConfig`; what the latter cannot express is refused."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tensors import read_json

if TYPE_CHECKING:
    from transformers import InternVLConfig, PreTrainedConfig
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

# Architecture of llm_config -> the text model of transformers that computes the same.
TEXT_MODELS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
}
# What InternVisionConfig takes where config.json is silent (configuration_intern_vit.py): the sizes of InternViT-6B.
_VISION_DEFAULTS = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
_VISION_NAMES = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "projection_dropout",
    "initializer_factor": "layer_scale_init_value",
}
_FLOATS = ("layer_norm_eps", "attention_dropout", "dropout", "initializer_range", "initializer_factor")
_QK_NORM_EPS = 1e-6  # transformers' InternVL has it fixed
_NOT_OF_THE_MODEL = ("architectures", "dtype", "transformers_version", "output_hidden_states", "return_dict")


def read_original_config(folder: Path, architectures: Mapping[str, str]) -> dict[str, Any]:
    """The config.json of `folder`.

    Args:
        architectures: those that are read -> what they are called in an error.

    Raises:
        ValueError: no config.json, not JSON, another architecture, or one that transformers' InternVL cannot express;
            names the field.
    """
    config = read_json(folder / "config.json")
    (architecture, *_) = config.get("architectures") or [None]
    if architecture not in architectures:
        known = ", ".join(f"{name} ({what})" for name, what in architectures.items())
        hint = ""
        if architecture == "InternVLForConditionalGeneration":
            hint = " This folder has transformers' own layout already."
        raise ValueError(f"{folder}: architectures in config.json is {architecture!r}, expected {known}.{hint}")
    for name in ("vision_config", "llm_config"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{folder}: config.json has no {name}, so it is not of {architectures[architecture]}.")
    text_architecture(config)
    _check_expressible(config)
    return config


def is_original_layout(folder: Path, architecture: str = "InternVLChatModel") -> bool:
    """Whether `folder` is a checkpoint of the remote-code `architecture` (no error where it is nothing at all)."""
    try:
        return architecture in (read_json(folder / "config.json").get("architectures") or [])
    except ValueError:
        return False


def text_architecture(config: Mapping[str, Any]) -> str:
    """The language model's original architecture.

    Raises:
        ValueError: if transformers' InternVL has no text model for it.
    """
    (architecture, *_) = config["llm_config"].get("architectures") or [None]
    if architecture not in TEXT_MODELS:
        raise ValueError(
            f"llm_config.architectures is {architecture!r}; supported language models are {', '.join(TEXT_MODELS)}."
        )
    return architecture


def convert_config(config: Mapping[str, Any], image_token_id: int, tied: bool) -> "InternVLConfig":
    """The configuration of transformers' InternVL that computes the same.

    Args:
        config: as `read_original_config` returns it.
        image_token_id: id of ``<IMG_CONTEXT>``.
        tied: whether the embedding matrix is also the head, which the weights decide.
    """
    from transformers import InternVLConfig

    try:
        return InternVLConfig(
            vision_config=_vision_config(config["vision_config"] | {"image_size": picture_side(config)}),
            text_config=_text_config(config, tied),
            image_token_id=image_token_id,
            image_seq_length=tokens_per_tile(config),
            downsample_ratio=_downsample_ratio(config),
            vision_feature_layer=config.get("select_layer", -1),
            tie_word_embeddings=tied,
        )
    except Exception as error:  # ValueError of ours, or the type checks of huggingface_hub
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from error


def picture_side(config: Mapping[str, Any]) -> int:
    """Side in pixels of the square tiles the vision model sees."""
    return config.get("force_image_size") or config["vision_config"].get("image_size", _VISION_DEFAULTS["image_size"])


def tokens_per_tile(config: Mapping[str, Any]) -> int:
    """Language tokens of one tile: its patches, after pixel shuffle has merged them."""
    patch = config["vision_config"].get("patch_size", _VISION_DEFAULTS["patch_size"])
    return int((picture_side(config) // patch) ** 2 * _downsample_ratio(config) ** 2)


def _check_expressible(config: Mapping[str, Any]) -> None:
    """Raises ValueError for the first field that asks for something transformers' InternVL does not do."""
    vision = _VISION_DEFAULTS | config["vision_config"]
    ps_version = config.get("ps_version", "v1")
    if ps_version != "v2":
        raise ValueError(f"ps_version is {ps_version!r}; only 'v2' (InternVL 1.5 and later) orders tokens as needed.")
    for name in ("use_backbone_lora", "use_llm_lora"):
        if config.get(name):
            raise ValueError(f"{name} is {config[name]}: merge the LoRA matrices into the weights first.")
    if config.get("pad2square"):
        raise ValueError("pad2square is true; pictures that are padded to a square are not supported.")
    if config.get("dynamic_image_size") and not config.get("use_thumbnail"):
        raise ValueError("dynamic_image_size without use_thumbnail is not supported: tiles always come with one.")
    layer, layers = config.get("select_layer", -1), vision["num_hidden_layers"]
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise ValueError(f"select_layer is {layer!r}; the vision model has {layers} layers.")
    if vision["norm_type"] not in ("layer_norm", "rms_norm"):
        raise ValueError(f"vision_config.norm_type is {vision['norm_type']!r}, expected 'layer_norm' or 'rms_norm'.")
    if vision["qk_normalization"] and vision["layer_norm_eps"] != _QK_NORM_EPS:
        raise ValueError(
            f"vision_config.layer_norm_eps is {vision['layer_norm_eps']}; with qk_normalization only {_QK_NORM_EPS} is "
            "supported."
        )


def _vision_config(vision: Mapping[str, Any]) -> "InternVLVisionConfig":
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    known = {name: vision.get(name, default) for name, default in _VISION_DEFAULTS.items()}
    known |= {name: float(known[name]) for name in _FLOATS}  # transformers' configurations tell 0 from 0.0
    return InternVLVisionConfig(**{_VISION_NAMES.get(name, name): value for name, value in known.items()})


def _text_config(config: Mapping[str, Any], tied: bool) -> "PreTrainedConfig":
    from transformers import AutoConfig

    architecture = text_architecture(config)
    original = dict(config["llm_config"])
    if architecture == "InternLM2ForCausalLM":
        original["attention_bias"] = original.get("bias", True)  # of wqkv and wo; its MLP never has one
    empty = AutoConfig.for_model(TEXT_MODELS[architecture])
    known = {field.name for field in fields(empty)} - set(_NOT_OF_THE_MODEL)
    values = {name: value for name, value in original.items() if name in known and value is not None}
    values |= {name: original[name] for name in ("rope_theta", "rope_scaling") if original.get(name) is not None}
    # Some checkpoints were written with the cache off, as in training.
    return type(empty)(**values | {"tie_word_embeddings": tied, "use_cache": True})


def _downsample_ratio(config: Mapping[str, Any]) -> float:
    return float(config.get("downsample_ratio", 0.5))
