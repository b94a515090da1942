"""Settings of the depth codec, a VQ-VAE that writes a depth map as a short sequence of codes."""

import os

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DepthVQVAEConfig(PreTrainedConfig):
    """Settings of `DepthVQVAE`. The defaults are those of the VQ-VAE used by AiT, AURORA and MolmoAct.

    Args:
        image_size: Side of the square the codec works on, in pixels. Depth of any other size is resampled to it.
        downsample: Pixels per code along each side, a power of two. The grid is `image_size // downsample` wide.
        num_codes: Entries K of the codebook.
        code_dim: Length d of a codebook entry.
        base_channels: Channels of the finest layer. They double with every halving of the resolution.
        num_residual_blocks: Residual blocks at the coarsest resolution, in the encoder and in the decoder each.
        activation: Non-linearity after every layer, a name of transformers' `ACT2FN`.
        value_low, value_high: What relative inverse depth 0 (farthest) and 1 (nearest) are inside the network. The
            published VQ-VAE reads grey levels scaled to -1..1.
        commitment_weight: Weight of the commitment loss.
        gradient_weight: Weight of the loss on differences between neighbouring pixels.
        depth_ratio: Ratio farthest / nearest distance at which the reconstruction loss becomes an error relative to
            the distance, so that far surfaces, squeezed into a small part of 0..1, are not neglected. 1.0 is plain L1.
        initializer_range: Standard deviation of a freshly initialised codebook.

    Raises:
        ValueError: A field is out of range or contradicts another one.
    """

    model_type = "perceptio_depth_vqvae"

    image_size: int = 320
    downsample: int = 32
    num_codes: int = 128
    code_dim: int = 512
    base_channels: int = 16
    num_residual_blocks: int = 2
    activation: str = "relu"
    value_low: float = -1.0
    value_high: float = 1.0
    commitment_weight: float = 0.25
    gradient_weight: float = 0.5
    depth_ratio: float = 1.0
    initializer_range: float = 1.0

    def __post_init__(self, **kwargs):
        self._check_sizes()
        self._check_ranges()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in ("image_size", "num_codes", "code_dim", "base_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.num_residual_blocks < 0:
            raise ValueError(f"`num_residual_blocks` is {self.num_residual_blocks}; it must be 0 or more.")
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ValueError(f"`downsample` is {self.downsample}; it must be a power of two, at least 2.")
        if self.image_size % self.downsample:
            raise ValueError(
                f"`image_size` {self.image_size} is not a multiple of `downsample` {self.downsample}; "
                f"use {max(1, self.image_size // self.downsample) * self.downsample} or another `downsample`."
            )

    def _check_ranges(self) -> None:
        if not self.value_low < self.value_high:
            raise ValueError(f"`value_low` {self.value_low} must be smaller than `value_high` {self.value_high}.")
        if self.depth_ratio < 1.0:
            raise ValueError(f"`depth_ratio` is {self.depth_ratio}; farthest / nearest distance is at least 1.0.")
        for name in ("commitment_weight", "gradient_weight", "initializer_range"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must not be negative.")

    @property
    def grid_size(self) -> int:
        """Codes along one side, g."""
        return self.image_size // self.downsample

    @property
    def num_tokens(self) -> int:
        """Codes of one depth map, N = g * g."""
        return self.grid_size**2

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save the configuration and, beside it, the code that `trust_remote_code=True` loads elsewhere."""
        from .remote_code import write_code  # here, because a copy outside the package has no use for it

        write_code(self, save_directory)
        super().save_pretrained(save_directory, **kwargs)


__all__ = ["DepthVQVAEConfig"]
