"""Meta's SAM2 and SAM2.1 checkpoints -> transformers' `Sam2Model`, the model of single pictures.

Which of the four published sizes a file holds is read off its tensors. Tensors do not tell two things: how the image
encoder attends (heads, windows, global blocks), which a table here says for the published sizes; and the side of the
picture, 1024 in everything published, because the positional embedding is a small tile stretched to any side.
"""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .keys import ConversionReport, KeyMap, fill_model, require
from .local_copy import local_copy
from .tensors import WRAPPERS, read_json, read_tensors

if TYPE_CHECKING:
    from transformers import Sam2Config, Sam2Model

IMAGE_SIZE = 1024  # of all published checkpoints
_STRIDE = 32  # pixels of the picture to one of the coarsest stage
_KIND = "a SAM2 checkpoint"
_TRUNK = "image_encoder.trunk."
_ONLY_VIDEO = "memory of a video's earlier frames, which a single picture has no use for"
_SUB_CONFIGS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


@dataclass(frozen=True)
class _Trunk:
    """How a published image encoder attends. Heads are those of the first stage; they double with the channels."""

    name: str
    heads: int
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...] = (8, 4, 14, 7)


# (channels of the first stage, blocks per stage) -> the rest
_TRUNKS = {
    (96, (1, 2, 7, 2)): _Trunk("tiny", 1, (5, 7, 9)),
    (96, (1, 2, 11, 2)): _Trunk("small", 1, (7, 10, 13)),
    (112, (2, 3, 16, 3)): _Trunk("base-plus", 2, (12, 16, 20)),
    (144, (2, 6, 36, 4)): _Trunk("large", 2, (23, 33, 43), (8, 4, 16, 8)),
}


def _mlp(source: str, target: str, layers: int) -> list[tuple[str, str]]:
    """Meta counts the layers of a perceptron; transformers names the first and the last and counts those between."""
    names = ["proj_in", *(f"layers.{i}" for i in range(layers - 2)), "proj_out"]
    return [(rf"{source}\.layers\.{i}\.(?P<end>.+)", rf"{target}.{name}.\g<end>") for i, name in enumerate(names)]


_DECODER, _PROMPT = r"sam_mask_decoder", r"sam_prompt_encoder"
_META_TO_TRANSFORMERS = KeyMap(
    [
        (r"image_encoder\.trunk\.(pos_embed|pos_embed_window)", r"vision_encoder.backbone.\1"),
        (r"image_encoder\.trunk\.patch_embed\.proj\.(.+)", r"vision_encoder.backbone.patch_embed.projection.\1"),
        (r"image_encoder\.trunk\.(blocks\.\d+)\.norm([12]\..+)", r"vision_encoder.backbone.\1.layer_norm\2"),
        (r"image_encoder\.trunk\.(blocks\.\d+\.(?:attn\.qkv|attn\.proj|proj)\..+)", r"vision_encoder.backbone.\1"),
        *_mlp(r"image_encoder\.trunk\.(blocks\.\d+)\.mlp", r"vision_encoder.backbone.\1.mlp", 2),
        (r"image_encoder\.neck\.convs\.(\d+)\.conv\.(.+)", r"vision_encoder.neck.convs.\1.\2"),
        (
            rf"{_PROMPT}\.pe_layer\.positional_encoding_gaussian_matrix",
            r"prompt_encoder.shared_embedding.positional_embedding",
        ),
        (rf"{_PROMPT}\.point_embeddings\.(\d+)\.weight", r"prompt_encoder.point_embed.\1"),
        (rf"{_PROMPT}\.(not_a_point_embed|no_mask_embed)\.weight", r"prompt_encoder.\1.weight"),
        *(
            (rf"{_PROMPT}\.mask_downscaling\.{i}\.(.+)", rf"prompt_encoder.mask_embed.{name}.\1")
            for i, name in {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}.items()
        ),
        (rf"{_DECODER}\.(transformer\..+)\.out_proj\.(.+)", r"mask_decoder.\1.o_proj.\2"),
        (rf"{_DECODER}\.(transformer\..+\.[qkv]_proj\..+)", r"mask_decoder.\1"),
        (rf"{_DECODER}\.(transformer\.layers\.\d+)\.norm([1-4]\..+)", r"mask_decoder.\1.layer_norm\2"),
        (rf"{_DECODER}\.transformer\.norm_final_attn\.(.+)", r"mask_decoder.transformer.layer_norm_final_attn.\1"),
        *_mlp(rf"{_DECODER}\.(transformer\.layers\.\d+)\.mlp", r"mask_decoder.\1.mlp", 2),
        (rf"{_DECODER}\.((?:iou_token|mask_tokens|obj_score_token)\.weight)", r"mask_decoder.\1"),
        (rf"{_DECODER}\.(conv_s[01]\..+)", r"mask_decoder.\1"),
        *(
            (rf"{_DECODER}\.output_upscaling\.{i}\.(.+)", rf"mask_decoder.upscale_{name}.\1")
            for i, name in {0: "conv1", 1: "layer_norm", 3: "conv2"}.items()
        ),
        *_mlp(rf"{_DECODER}\.(output_hypernetworks_mlps\.\d+)", r"mask_decoder.\1", 3),
        *_mlp(rf"{_DECODER}\.(iou_prediction_head|pred_obj_score_head)", r"mask_decoder.\1", 3),
        (r"no_mem_embed", r"no_memory_embedding"),
    ],
    ignored={
        r"(memory_attention|memory_encoder|mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj)\..+": _ONLY_VIDEO,
        r"maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial": _ONLY_VIDEO,
    },
)
# The same tensors in a folder that transformers wrote for its video model.
_SAVED = KeyMap(
    [(r".+", r"\g<0>")],
    ignored={
        r"(memory_attention|memory_encoder|mask_downsample|object_pointer_proj)\..+": _ONLY_VIDEO,
        r"temporal_positional_encoding_projection_layer\..+|memory_temporal_positional_encoding": _ONLY_VIDEO,
        r"no_memory_positional_encoding|no_object_pointer|occlusion_spatial_embedding_parameter": _ONLY_VIDEO,
    },
)


def load_sam2(
    path: str | os.PathLike,
    *,
    image_size: int | None = None,
    config: "Sam2Config | None" = None,
    report: ConversionReport | None = None,
) -> "Sam2Model":
    """SAM2 or SAM2.1, whoever saved it, in float32 and evaluation mode.

    Args:
        path: Meta's .pt, or the same tensors in a .safetensors; a folder, or the Hub name of one, that transformers
            wrote for its picture or video model.
        image_size: Side of the picture in pixels, a multiple of 32, of a fine-tune of Meta's with another side than
            1024. A folder says it itself.
        config: The whole architecture, for a file of none of the published sizes.
        report: Learns what became of each tensor.

    Raises:
        ValueError: Nothing is there, or it is no SAM2, incomplete or damaged; names the first unexpected and the first
            missing tensor.
    """
    report = report if report is not None else ConversionReport(str(path))
    place = local_copy(path)
    if place.is_dir():
        if image_size is not None or config is not None:
            raise ValueError(f"{path} is a folder, whose config.json says its architecture; leave the options away.")
        return _load_folder(place, report)
    tensors = read_tensors(place, wrappers=WRAPPERS, prefix="module.")
    return sam2_from_tensors(tensors, image_size=image_size, config=config, report=report)


def sam2_from_tensors(
    tensors: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    config: "Sam2Config | None" = None,
    report: ConversionReport,
) -> "Sam2Model":
    """`load_sam2` for tensors that are already read, under Meta's names.

    Args and errors as there.
    """
    renamed = _META_TO_TRANSFORMERS.apply(tensors, report)
    needed = ("pos_embed", "pos_embed_window", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    require(tensors, [*(_TRUNK + name for name in needed), "sam_mask_decoder.conv_s0.weight"], report, _KIND)
    size = "of the given architecture"
    if config is None:
        config, size = infer_config(tensors, image_size or IMAGE_SIZE, report.source)
    report.layout = f"{_version(tensors)} {size}, Meta's layout"
    return _filled(config, _merge_points(renamed, report), report)


def _load_folder(folder: Path, report: ConversionReport) -> "Sam2Model":
    from transformers import Sam2Config

    fields = read_json(folder / "config.json")
    kind = fields.get("model_type")
    if kind not in ("sam2", "sam2_video"):
        raise ValueError(f"{folder} is not {_KIND}: its config.json says {kind!r}.")
    try:
        config = Sam2Config(**{name: fields[name] for name in _SUB_CONFIGS if name in fields})
    except Exception as error:  # whatever transformers' own checks raise
        raise ValueError(f"{folder / 'config.json'} is not the config of a SAM2: {error}") from None
    report.layout = f"SAM2, transformers' layout ({kind})"
    return _filled(config, _SAVED.apply(read_tensors(folder), report), report)


def _filled(config: "Sam2Config", tensors: dict[str, Tensor], report: ConversionReport) -> "Sam2Model":
    from transformers import Sam2Model
    from transformers.initialization import no_init_weights

    with no_init_weights():  # every tensor is filled or refused below
        model = Sam2Model(config)
    shared, prompt = (
        "shared_image_embedding.positional_embedding",
        "prompt_encoder.shared_embedding.positional_embedding",
    )
    if shared not in tensors and prompt in tensors:
        tensors = {**tensors, shared: tensors[prompt]}
        report.added[shared] = f"a copy of {prompt}"
    fill_model(model, tensors, report, _KIND)
    return model.eval()


def infer_config(tensors: Mapping[str, Tensor], image_size: int, source: str) -> "tuple[Sam2Config, str]":
    """The config of a published size, with the size's name."""
    from transformers import Sam2Config

    if image_size < _STRIDE or image_size % _STRIDE:
        raise ValueError(f"The side of the picture is {image_size}; it must be a multiple of {_STRIDE}, e.g. 1024.")
    channels = tensors[f"{_TRUNK}patch_embed.proj.weight"].shape[0]
    blocks = _blocks_per_stage(tensors)
    trunk = _TRUNKS.get((channels, blocks))
    if trunk is None:
        known = "; ".join(f"{trunk.name} {width} and {depths}" for (width, depths), trunk in _TRUNKS.items())
        raise ValueError(
            f"{source} is no published size of SAM2: its image encoder has {channels} channels and {blocks} blocks "
            f"per stage, known are {known}. For another one, load_sam2 needs its `config`."
        )
    widths = [channels * 2**i for i in range(len(blocks))]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": channels,
        "image_size": [image_size, image_size],
        "window_positional_embedding_background_size": list(tensors[f"{_TRUNK}pos_embed"].shape[-2:]),
        "blocks_per_stage": list(blocks),
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [trunk.heads * 2**i for i in range(len(blocks))],
        "window_size_per_stage": list(trunk.windows),
        "global_attention_blocks": list(trunk.global_blocks),
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": widths[::-1],
        "backbone_feature_sizes": [[image_size // stride] * 2 for stride in (4, 8, 16)],
    }
    config = Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": image_size})
    return config, trunk.name


def _blocks_per_stage(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """A stage begins where a block has a projection to more channels."""
    count = 0
    while f"{_TRUNK}blocks.{count}.attn.qkv.weight" in tensors:
        count += 1
    starts = [0, *(i for i in range(1, count) if f"{_TRUNK}blocks.{i}.proj.weight" in tensors), count]
    return tuple(end - start for start, end in itertools.pairwise(starts))


def _merge_points(tensors: dict[str, Tensor], report: ConversionReport) -> dict[str, Tensor]:
    """Meta has a tensor for each of the four kinds of points, transformers one with four rows."""
    target = "prompt_encoder.point_embed"
    rows = sorted(
        (name for name in tensors if name.startswith(f"{target}.")), key=lambda name: int(name.split(".")[-1])
    )
    if not rows:
        return tensors
    merged = {name: tensor for name, tensor in tensors.items() if name not in rows}
    merged[f"{target}.weight"] = torch.cat([tensors[name] for name in rows])
    report.mapped.update((old, f"{target}.weight") for old, new in list(report.mapped.items()) if new in rows)
    return merged


def _version(tensors: Mapping[str, Tensor]) -> str:
    """Both have the same picture model; 2.1 has more for videos."""
    if "no_obj_embed_spatial" in tensors or any(name.startswith("obj_ptr_tpos_proj.") for name in tensors):
        return "SAM2.1"
    return "SAM2" if "maskmem_tpos_enc" in tensors else "SAM2 or SAM2.1 (no video part)"
