"""The depth VQ-VAE of AiT, AURORA and MolmoAct, vae-final.pt -> `DepthVQVAE`.

modeling_depth_vqvae.py shows their layers beside ours. Sizes are read off the tensors; two things are not in them:

- The side of the picture: 320 in AURORA and MolmoAct, 480 in AiT.
- What the network calls far and near. AURORA, whose recipe MolmoAct's file was trained with, reads 8-bit grey levels of
  Depth Anything's inverse depth scaled to -1..1, white is near. MolmoAct writes its language model's training data
  with 0..1, so that to repeat its tokens takes `value_low=0`. AiT's own file for NYU holds metres, far is large: the
  codec has no such reading.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .keys import ConversionReport, KeyMap, fill_model, require
from .tensors import WRAPPERS, read_tensors

if TYPE_CHECKING:
    from perceptio_hf import DepthVQVAE, DepthVQVAEConfig

_KIND = "a depth VQ-VAE of AiT, AURORA or MolmoAct"
_NEEDED = ("encoder.0.weight", "decoder.0.weight")
_VECTORS = ("_vq_vae._embedding", "_vq_vae._embedding.weight")  # kept by moving averages, or trained by gradients


def load_aurora(
    path: str | os.PathLike,
    *,
    image_size: int = 320,
    value_low: float = -1.0,
    value_high: float = 1.0,
    report: ConversionReport | None = None,
) -> "DepthVQVAE":
    """The depth codec in a file of AURORA's layout, in float32 and evaluation mode.

    On depth of the codec's own side its codes are those of the original, and its depth is the original's output with
    `value_low`..`value_high` moved to 0..1 and cut off there. Other sides are resampled smoothly; the original takes
    the nearest pixel.

    Args:
        path: vae-final.pt, bare, as {"weights": ...}, with or without the `module.` of distributed training; or the
            same tensors in a .safetensors.
        image_size: Side of the picture in pixels, a multiple of the downsampling (32).
        value_low, value_high: What the network reads for relative inverse depth 0 (farthest) and 1 (nearest).
        report: Learns what became of each tensor.

    Raises:
        ValueError: Nothing is there, or it is another network, incomplete or damaged; names the first unexpected and
            the first missing tensor.
    """
    from perceptio_hf import DepthVQVAE

    report = report if report is not None else ConversionReport(str(path))
    tensors = read_tensors(path, wrappers=WRAPPERS, prefix="module.")
    stages, blocks = _depths(tensors)
    renamed = _key_map(stages, blocks).apply(tensors, report)
    vectors = next((name for name in _VECTORS if name in tensors), _VECTORS[0])
    require(tensors, (*_NEEDED, vectors), report, _KIND)
    sizes = {"image_size": image_size, "downsample": 2**stages, "num_residual_blocks": blocks}
    values = {"value_low": value_low, "value_high": value_high}
    codec = DepthVQVAE(_config(tensors, vectors, report.source, {**sizes, **values}))
    fill_model(codec, {**renamed, **_averages(renamed, report)}, report, _KIND)
    report.layout = (
        f"depth VQ-VAE of AURORA's layout, {codec.config.num_codes} codes of {codec.config.code_dim}, "
        f"{codec.config.grid_size} x {codec.config.grid_size} of them for {image_size} x {image_size} pixels"
    )
    return codec.eval()


def _depths(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Halvings of the resolution, and residual blocks, counted along the encoder."""
    stages = 0
    while (kernel := tensors.get(f"encoder.{2 * stages}.weight")) is not None and kernel.shape[2:] == (4, 4):
        stages += 1
    blocks = 0
    while f"encoder.{2 * stages + blocks}.net.0.weight" in tensors:
        blocks += 1
    return stages, blocks


def _key_map(stages: int, blocks: int) -> KeyMap:
    layers = {2 * i: f"depth_encoder.down.{i}" for i in range(stages)}
    layers[2 * stages + blocks] = "depth_encoder.project"
    encoder = [(rf"encoder\.{i}\.(weight|bias)", rf"{name}.\1") for i, name in layers.items()]
    layers = {2 + blocks + 2 * i: f"depth_decoder.up.{i}" for i in range(stages)}
    layers |= {0: "depth_decoder.project", 2 + blocks + 2 * stages: "depth_decoder.out"}
    decoder = [(rf"decoder\.{i}\.(weight|bias)", rf"{name}.\1") for i, name in layers.items()]
    residual = [
        (rf"{side}\.{first + j}\.net\.{2 * k}\.(weight|bias)", rf"depth_{side}.blocks.{j}.conv{k + 1}.\1")
        for side, first in (("encoder", 2 * stages), ("decoder", 2))
        for j in range(blocks)
        for k in range(3)
    ]
    codebook = [
        (r"_vq_vae\._embedding(\.weight)?", "depth_codebook.vectors"),
        (r"_vq_vae\._ema_cluster_size", "depth_codebook.ema_count"),
        (r"_vq_vae\._ema_w", "depth_codebook.ema_sum"),
    ]
    return KeyMap([*encoder, *decoder, *residual, *codebook])


def _config(tensors: Mapping[str, Tensor], vectors: str, source: str, fields: dict) -> "DepthVQVAEConfig":
    """The config whose sizes are those of the tensors."""
    from perceptio_hf import DepthVQVAEConfig

    channels, book = tensors["encoder.0.weight"].shape, tensors[vectors].shape
    if len(channels) != 4 or channels[1] != 1:
        raise ValueError(f"{source} is not {_KIND}: encoder.0.weight is {tuple(channels)}; depth has one channel.")
    if len(book) != 2:
        raise ValueError(f"{source} is not {_KIND}: {vectors} is {tuple(book)}; expected (codes, length).")
    return DepthVQVAEConfig(num_codes=book[0], code_dim=book[1], base_channels=channels[0], **fields)


def _averages(renamed: Mapping[str, Tensor], report: ConversionReport) -> dict[str, Tensor]:
    """A codebook trained by gradients has no moving averages: each code counts as met once, where it is."""
    count, total = "depth_codebook.ema_count", "depth_codebook.ema_sum"
    if count in renamed or total in renamed or "depth_codebook.vectors" not in renamed:
        return {}
    vectors = renamed["depth_codebook.vectors"]
    report.added |= {count: "ones: the source keeps no moving averages", total: "the code vectors"}
    return {count: torch.ones(len(vectors)), total: vectors}
