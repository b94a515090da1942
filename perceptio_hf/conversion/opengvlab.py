"""OpenGVLab's InternVL checkpoints (those that come with their own code) -> transformers' InternVL.

InternVL 1.5, 2, 2.5, 3 and 3.5 are published in this layout. The code beside the weights is never run.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .keys import ConversionReport, KeyMap, fill_model, refusal
from .local_copy import local_copy
from .opengvlab_config import (
    convert_config,
    read_original_config,
    text_architecture,
)
from .opengvlab_processor import (
    IMAGE_TOKEN,
    TURN_END,
    ProcessorParts,
    processor_parts,
)
from .tensors import read_json, read_tensors

if TYPE_CHECKING:
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        PreTrainedTokenizerBase,
    )

_PROCESSOR_FILES = ("*.json", "*.txt", "*.model")
FILES = (*_PROCESSOR_FILES, "*.safetensors", "*.bin")  # what is read of a repository
ARCHITECTURES = {"InternVLChatModel": "InternVL, OpenGVLab's layout"}
# Names end in the state dict of InternVLForConditionalGeneration; FUSED ones are cut into three afterwards.
_FUSED = ".qkv_proj."
_VISION = [
    (r"vision_model\.embeddings\.class_embedding", r"model.vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", r"model.vision_tower.embeddings.position_embeddings"),
    (
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        r"model.vision_tower.embeddings.patch_embeddings.projection.\1",
    ),
    *(
        (rf"vision_model\.encoder\.layers\.(\d+)\.{old}", rf"model.vision_tower.encoder.layer.\1.{new}")
        for old, new in (
            (r"attn\.qkv\.(weight|bias)", rf"attention{_FUSED}\2"),
            (r"attn\.proj\.(weight|bias)", r"attention.projection_layer.\2"),
            (r"attn\.([qk]_norm)\.weight", r"attention.\2.weight"),
            (r"norm1\.(weight|bias)", r"layernorm_before.\2"),
            (r"norm2\.(weight|bias)", r"layernorm_after.\2"),
            (r"ls([12])", r"lambda_\2"),
            (r"mlp\.(fc[12])\.(weight|bias)", r"mlp.\2.\3"),
        )
    ),
]
_PROJECTOR = [
    (rf"mlp1\.{place}\.(weight|bias)", rf"model.multi_modal_projector.{name}.\1")
    for place, name in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2"))
]
_STOCK_TEXT = [
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"language_model\.(lm_head\.weight)", r"\1"),
]
_INTERNLM2 = [
    (r"language_model\.model\.tok_embeddings\.weight", r"model.language_model.embed_tokens.weight"),
    (r"language_model\.model\.norm\.weight", r"model.language_model.norm.weight"),
    (r"language_model\.output\.weight", r"lm_head.weight"),
    *(
        (rf"language_model\.model\.layers\.(\d+)\.{old}", rf"model.language_model.layers.\1.{new}")
        for old, new in (
            (r"attention\.wqkv\.(weight|bias)", rf"self_attn{_FUSED}\2"),
            (r"attention\.wo\.(weight|bias)", r"self_attn.o_proj.\2"),
            (r"feed_forward\.w1\.weight", r"mlp.gate_proj.weight"),
            (r"feed_forward\.w2\.weight", r"mlp.down_proj.weight"),
            (r"feed_forward\.w3\.weight", r"mlp.up_proj.weight"),
            (r"attention_norm\.weight", r"input_layernorm.weight"),
            (r"ffn_norm\.weight", r"post_attention_layernorm.weight"),
        )
    ),
]
_IGNORED = {r".*\.rotary_emb\.inv_freq": "follows from the configuration"}
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_HEADS = ("language_model.lm_head.weight", "language_model.output.weight")


class OriginalInternVL(NamedTuple):
    """A checkpoint of the original layout: the model in transformers' class, and what its processor is made of."""

    model: "InternVLForConditionalGeneration"
    processor: ProcessorParts


def load_opengvlab(
    folder: str | os.PathLike, *, dtype: torch.dtype | None = None, report: ConversionReport | None = None
) -> OriginalInternVL:
    """Read a folder in the original layout: weights (one file or shards), configuration, tokenizer and prompt.

    Takes memory for one copy of the weights: the files are mapped and copied tensor by tensor.

    Args:
        folder: folder or Hub name, as published, e.g. a download of OpenGVLab/InternVL2_5-1B.
        dtype: of the model; default: the one the weights are stored in.
        report: filled in with what was read, mapped and ignored.

    Returns:
        The model, in evaluation mode; its `generation_config` ends answers where the original chat does. And what its
        processor is made of.

    Raises:
        ValueError: a folder that is no such checkpoint, is damaged, or uses what transformers' InternVL does not have;
            names the field, or the first unexpected and missing tensors.
    """
    folder = local_copy(folder, FILES)
    config = read_original_config(folder, ARCHITECTURES)
    parts = processor_parts(folder, config)
    report = ConversionReport(str(folder)) if report is None else report
    report.layout = f"{ARCHITECTURES['InternVLChatModel']} ({text_architecture(config)})"
    model = internvl_from_tensors(read_tensors(folder), config, parts.tokenizer, dtype=dtype, report=report)
    set_generation(model, parts.tokenizer, folder)
    return OriginalInternVL(model, parts)


def load_opengvlab_processor(folder: str | os.PathLike) -> ProcessorParts:
    """What the processor of such a folder is made of; the weights are not read.

    Raises:
        ValueError: as `load_opengvlab`.
    """
    folder = local_copy(folder, _PROCESSOR_FILES)
    return processor_parts(folder, read_original_config(folder, ARCHITECTURES))


def internvl_from_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtype: torch.dtype | None = None,
    report: ConversionReport,
) -> "InternVLForConditionalGeneration":
    """The model alone, from tensors under their original names.

    Args:
        config: the original config.json.

    Raises:
        ValueError: as `load_opengvlab`.
    """
    from transformers import InternVLForConditionalGeneration
    from transformers.initialization import no_init_weights

    stored = text_architecture(config)
    tied = not any(name in tensors for name in _HEADS) and _may_be_tied(config)
    stock = convert_config(config, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tied)
    text = _INTERNLM2 if stored == "InternLM2ForCausalLM" else _STOCK_TEXT
    renamed = KeyMap([*_VISION, *_PROJECTOR, *text], _IGNORED).apply(tensors, report)
    split = _split_fused(renamed, stock, report)
    _resample_positions(split, config["vision_config"], stock, report)
    with no_init_weights():
        model = InternVLForConditionalGeneration._from_config(stock, dtype=dtype or _stored_dtype(tensors))
    model.tie_weights()
    fill_model(model, split, report, report.layout, optional=("lm_head.weight",) if tied else ())
    return model.eval()


def set_generation(
    model: "InternVLForConditionalGeneration", tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> None:
    """End answers at the end of the turn, and where the folder's generation_config.json says so."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        values = read_json(folder / "generation_config.json")
        if not values.get("do_sample"):  # they would have no effect, and transformers does not save both
            values = {name: value for name, value in values.items() if name not in _OF_SAMPLING}
        model.generation_config = GenerationConfig.from_dict(values)
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise ValueError(f"{folder}/generation_config.json: eos_token_id is {ends}, expected whole numbers.")
    turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
    model.generation_config.eos_token_id = sorted({*ends, turn_end})
    pad = tokenizer.pad_token_id
    model.generation_config.pad_token_id = turn_end if pad is None else pad


def _resample_positions(
    tensors: dict[str, Tensor], vision: Mapping[str, Any], config: "InternVLConfig", report: ConversionReport
) -> None:
    """Positions for tiles of another size than the vision model has, as the original makes them at every call."""
    name = "model.vision_tower.embeddings.position_embeddings"
    size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    old, new = vision.get("image_size", size) // patch, size // patch
    if old == new or name not in tensors:  # what fits the configuration is checked with all others
        return
    shape, expected = tuple(tensors[name].shape), (1, old**2 + 1, config.vision_config.hidden_size)
    if shape != expected:
        wrong = f"vision_model.embeddings.position_embedding is {shape}, expected {expected}"
        raise refusal(report.source, report.layout, wrong=[wrong])
    first, grid = tensors[name].split((1, old**2), dim=1)
    grid = grid.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, hidden, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    tensors[name] = torch.cat([first, grid.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)
    report.notes.append(f"position embeddings resampled from {old} x {old} to {new} x {new} for tiles of {size} pixels")


def _may_be_tied(config: Mapping[str, Any]) -> bool:
    """What a missing head means: tied in a configuration that says so or says nothing, an error in others."""
    return config["llm_config"].get("tie_word_embeddings", config.get("tie_word_embeddings", True))


def _stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """float32 where there is no language model, which `fill_model` will say with the names there are."""
    found = (tensor.dtype for name, tensor in tensors.items() if name.startswith("language_model."))
    return next(found, torch.float32)


def _split_fused(
    tensors: Mapping[str, Tensor], config: "InternVLConfig", report: ConversionReport
) -> dict[str, Tensor]:
    """Cut the fused projections into q, k and v; the vision model's lie one after the other, InternLM2's in groups."""
    heads = config.vision_config.num_attention_heads
    layouts = {
        "model.vision_tower.": (heads, heads, config.vision_config.hidden_size // heads),
        "model.language_model.": (
            config.text_config.num_attention_heads,
            config.text_config.num_key_value_heads,
            getattr(config.text_config, "head_dim", 0),
        ),
    }
    origin = {new: old for old, new in report.mapped.items()}
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _FUSED not in name:
            split[name] = tensor
            continue
        part = next(part for part in layouts if name.startswith(part))
        queries, keys, width = layouts[part]
        rows = (queries + 2 * keys) * width
        if tensor.shape[0] != rows:
            wrong = f"{origin[name]} has {tensor.shape[0]} rows, expected {rows}"
            raise refusal(report.source, report.layout, wrong=[wrong])
        cut = _cut_in_order if part == "model.vision_tower." else _cut_in_groups
        for letter, piece in zip("qkv", cut(tensor, queries, keys, width), strict=True):
            split[name.replace(_FUSED, f".{letter}_proj.")] = piece
        report.mapped[origin[name]] = name.replace(_FUSED, ".(q|k|v)_proj.")
    return split


def _cut_in_order(fused: Tensor, queries: int, keys: int, width: int) -> tuple[Tensor, ...]:
    """(3 * heads * width, ...) -> q, k, v."""
    return fused.split((queries * width, keys * width, keys * width))


def _cut_in_groups(fused: Tensor, queries: int, keys: int, width: int) -> tuple[Tensor, ...]:
    """InternLM2: for each key head its query heads, then the key, then the value -> q, k, v."""
    groups = fused.unflatten(0, (keys, queries // keys + 2, width))  # (keys, queries per key + 2, width, ...)
    return tuple(part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:]))
