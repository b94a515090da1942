"""Random files of AURORA's depth VQ-VAE, under the names that AiT's code gives their tensors."""

import torch
from torch import Tensor


def aurora_tensors(
    stages: int = 5, blocks: int = 2, width: int = 4, codes: int = 24, length: int = 12, seed: int = 0
) -> dict[str, Tensor]:
    """A bare state dict whose values are large enough for different codes everywhere."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def layer(name: str, *shape: int, transposed: bool = False) -> None:
        inputs = shape[0] if transposed else shape[1]
        gain = 8.0 if transposed else 2.0
        std = (gain / (inputs * shape[2] * shape[3])) ** 0.5
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * std
        tensors[f"{name}.bias"] = torch.randn(shape[1 if transposed else 0], generator=generator) * 0.1

    def residual(name: str, channels: int) -> None:
        for place, kernel in ((0, 3), (2, 3), (4, 1)):
            layer(f"{name}.net.{place}", channels, channels, kernel, kernel)

    widths = [1] + [width * 2**i for i in range(stages)]
    top = widths[-1]
    for i in range(stages):
        layer(f"encoder.{2 * i}", widths[i + 1], widths[i], 4, 4)
    for j in range(blocks):
        residual(f"encoder.{2 * stages + j}", top)
        residual(f"decoder.{2 + j}", top)
    layer(f"encoder.{2 * stages + blocks}", length, top, 1, 1)
    layer("decoder.0", top, length, 1, 1)
    ups = [top] + [top // 2**i for i in range(stages)]
    for i in range(stages):
        layer(f"decoder.{2 + blocks + 2 * i}", ups[i], ups[i + 1], 4, 4, transposed=True)
    layer(f"decoder.{2 + blocks + 2 * stages}", 1, ups[-1], 1, 1)
    tensors["_vq_vae._embedding"] = torch.randn(codes, length, generator=generator)
    tensors["_vq_vae._ema_cluster_size"] = torch.rand(codes, generator=generator)
    tensors["_vq_vae._ema_w"] = torch.randn(codes, length, generator=generator)
    return tensors
