"""The depth codec: a depth map becomes N codes in raster order, and codes become a depth map.

Depth outside this file is always relative inverse depth in [0, 1], 1 = nearest, float32, (height, width).

Layers, beside the names in a checkpoint of the AiT / AURORA / MolmoAct VQ-VAE (n = log2(downsample) stride-2
convolutions, R residual blocks, i and j counted from 0), so that its weights fit one to one:

    here                                    there
    depth_encoder.down.{i}                  encoder.{2i}                 4x4 stride 2, ReLU
    depth_encoder.blocks.{j}.conv1/2/3      encoder.{2n + j}.net.0/2/4   3x3, ReLU, 3x3, ReLU, 1x1, added to the input
    depth_encoder.project                   encoder.{2n + R}             1x1 to code_dim
    depth_codebook.vectors                  _vq_vae._embedding           (K, d), nearest in squared distance
    depth_codebook.ema_count / ema_sum      _vq_vae._ema_cluster_size / _vq_vae._ema_w
    depth_decoder.project                   decoder.0                    1x1 from code_dim, ReLU
    depth_decoder.blocks.{j}.conv1/2/3      decoder.{2 + j}.net.0/2/4
    depth_decoder.up.{i}                    decoder.{2 + R + 2i}         transposed 4x4 stride 2, ReLU
    depth_decoder.out                       decoder.{2 + R + 2n}         1x1 to one channel

That network reads and writes grey levels scaled to -1..1; `config.value_low` and `config.value_high` say so.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .configuration_depth_vqvae import DepthVQVAEConfig
from .placement import device_of, full_precision, is_traced, without_casts_down

_SLACK = 1e-3  # by which depth may leave [0, 1]: resampling and half precision round


@dataclass
class DepthVQVAEOutput(ModelOutput):
    """One pass through the codec. S = image_size, N = number of codes, d = code_dim.

    Args:
        loss: Weighted sum of the three parts below, a scalar.
        reconstruction_loss: Mean absolute error over valid pixels, each weighted as `config.depth_ratio` says.
        gradient_loss: The same for differences between neighbours, over pairs that are both valid.
        commitment_loss: Mean squared distance of the latents to their code vectors.
        reconstruction: (B, S, S) relative inverse depth in [0, 1].
        codes: (B, N) int64.
        latents: (B, N, d), what was quantised; training moves the codebook towards them.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    gradient_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None
    latents: Tensor | None = None


def _activation(name: str) -> nn.Module:
    """By its name in `ACT2FN`.

    It only ever follows a convolution, whose gradient does not need what comes out of it, so that ReLU may overwrite
    that: fresh memory costs more time than the comparison.
    """
    return nn.ReLU(inplace=True) if name == "relu" else ACT2FN[name]


class DepthResidualBlock(nn.Module):
    """Convolutions 3x3, 3x3 and 1x1, added to the input."""

    def __init__(self, channels: int, activation: str):
        super().__init__()
        self.activation = _activation(activation)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, C, h, w) -> the same
        return hidden + self.conv3(self.activation(self.conv2(self.activation(self.conv1(hidden)))))


def _residual_blocks(channels: int, config: DepthVQVAEConfig) -> nn.ModuleList:
    return nn.ModuleList(DepthResidualBlock(channels, config.activation) for _ in range(config.num_residual_blocks))


class DepthEncoder(nn.Module):
    """(B, 1, S, S) scaled depth -> (B, d, g, g) latents."""

    def __init__(self, config: DepthVQVAEConfig):
        super().__init__()
        self.activation = _activation(config.activation)
        stages = config.downsample.bit_length() - 1
        widths = [1] + [config.base_channels * 2**i for i in range(stages)]
        self.down = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1) for i in range(stages))
        self.blocks = _residual_blocks(widths[-1], config)
        self.project = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, depth: Tensor) -> Tensor:
        hidden = depth
        for layer in self.down:
            hidden = self.activation(layer(hidden))
        for block in self.blocks:
            hidden = block(hidden)
        return self.project(hidden)


class DepthDecoder(nn.Module):
    """(B, d, g, g) code vectors -> (B, 1, S, S) scaled depth, not clamped."""

    def __init__(self, config: DepthVQVAEConfig):
        super().__init__()
        self.activation = _activation(config.activation)
        stages = config.downsample.bit_length() - 1
        top = config.base_channels * 2 ** (stages - 1)
        widths = [top] + [top // 2**i for i in range(stages)]
        self.project = nn.Conv2d(config.code_dim, top, 1)
        self.blocks = _residual_blocks(top, config)
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[i], widths[i + 1], 4, 2, 1) for i in range(stages))
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.activation(self.project(vectors))
        for block in self.blocks:
            hidden = block(hidden)
        for layer in self.up:
            hidden = self.activation(layer(hidden))
        return self.out(hidden)


class DepthCodebook(nn.Module):
    """K code vectors of length d, with the moving averages that training keeps of them.

    All three are persistent buffers, so they are saved, no optimizer touches them and `forward` never changes them.
    """

    def __init__(self, config: DepthVQVAEConfig):
        super().__init__()
        self.initializer_range = config.initializer_range
        vectors = self.first_vectors(config.num_codes, config.code_dim)
        self.register_buffer("vectors", vectors)
        self.register_buffer("ema_count", torch.ones(config.num_codes))
        self.register_buffer("ema_sum", vectors.clone())

    def first_vectors(self, count: int, length: int) -> Tensor:
        """(count, length) normal numbers, always the same ones.

        transformers takes a buffer for something that needs no luck: what `__init__` makes and what `_init_weights`
        puts where a checkpoint lacks it have to be equal.
        """
        if torch.get_default_device().type == "meta":
            return torch.empty(count, length)
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(count, length, generator=generator, device="cpu", dtype=torch.float32)
        return torch.empty(count, length).copy_(numbers * self.initializer_range)

    def nearest(self, latents: Tensor) -> Tensor:
        """(..., d) -> (...) int64: the code at the smallest squared distance."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.to(self.vectors.dtype)
            # |x|^2 is the same for every code and would only cost precision.
            return (self.vectors.square().sum(-1) - 2.0 * (latents @ self.vectors.T)).argmin(-1)

    def mix(self, probabilities: Tensor) -> Tensor:
        """(..., K) -> (..., d): the expected code vector; exact for one-hot rows."""
        return probabilities @ self.vectors


class DepthVQVAE(PreTrainedModel):
    """VQ-VAE for relative inverse depth in [0, 1], 1 = nearest.

    `encode`, `decode` and `decode_soft` take one map or a batch and compute in float32, whatever autocast and
    `torch.backends` say; `to(torch.bfloat16)` and the like move the codec without casting it, since other codes would
    come out. In a traced graph (torch.export, ONNX) no value is checked.

    Nothing here changes the codebook, not even in training mode: that is left to the explicit steps of codebook
    training (perceptio_hf.training.codec).
    """

    config_class = DepthVQVAEConfig
    base_model_prefix = "depth_codec"
    main_input_name = "depth"
    # It has no attention, so that every implementation a surrounding model asks for is fine.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # Half precision moves latents across cell borders: other codes would come out.
    _keep_in_fp32_modules_strict = ["depth_encoder", "depth_decoder", "depth_codebook"]  # noqa: RUF012

    def __init__(self, config: DepthVQVAEConfig):
        super().__init__(config)
        self.depth_encoder = DepthEncoder(config)
        self.depth_codebook = DepthCodebook(config)
        self.depth_decoder = DepthDecoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # `init` skips what a checkpoint has filled. Standard deviations keep the variance through ReLU; a transposed
        # stride-2 4x4 kernel meets 4 of its 16 taps at each pixel.
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            taps = math.prod(module.kernel_size) / (4 if isinstance(module, nn.ConvTranspose2d) else 1)
            init.normal_(module.weight, std=math.sqrt(2.0 / (module.in_channels * taps)))
            init.zeros_(module.bias)
        elif isinstance(module, DepthResidualBlock):
            init.normal_(module.conv3.weight, std=0.1 * math.sqrt(1.0 / module.conv3.in_channels))
        elif isinstance(module, DepthCodebook):
            init.copy_(module.vectors, module.first_vectors(*module.vectors.shape))
            init.ones_(module.ema_count)
            init.copy_(module.ema_sum, module.vectors)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(without_casts_down(fn), recurse)

    @property
    def device(self) -> torch.device:
        """Where the codec computes, also while its parameters are kept elsewhere and come only when they are used."""
        return device_of(self) or super().device

    @property
    def grid_size(self) -> int:
        """Codes along one side, g."""
        return self.config.grid_size

    @property
    def num_tokens(self) -> int:
        """Codes of one depth map, N = g * g."""
        return self.config.num_tokens

    @property
    def codebook(self) -> Tensor:
        """The code vectors C, (K, d)."""
        return self.depth_codebook.vectors

    @torch.no_grad()
    def encode(self, depth: Tensor, valid: Tensor | None = None) -> Tensor:
        """Write depth maps as codes.

        Args:
            depth: (B, H, W), (H, W) or (B, 1, H, W) relative inverse depth in [0, 1], any H and W.
            valid: Boolean of the same shape, False at holes, whose values are never looked at. None: no holes.

        Returns:
            (B, N) int64 codes in raster order, or (N,) for one map.

        Raises:
            ValueError: A map has no valid pixel, or a valid pixel is not finite or outside [0, 1], or shapes differ.
        """
        filled, _ = self.prepare(depth, valid)
        with full_precision(filled.device):
            codes = self.depth_codebook.nearest(self.encode_latents(filled))
        return codes[0] if depth.ndim == 2 else codes

    def decode(self, codes: Tensor, *, size: tuple[int, int] | None = None, stretch: bool = False) -> Tensor:
        """Turn codes into depth.

        Args:
            codes: (B, N) or (N,) integers in [0, K).
            size: (height, width) to resample to; None keeps (image_size, image_size).
            stretch: move the farthest point of each map to 0 and the nearest to 1, before resampling and in place of
                cutting off what lies outside, as MolmoAct draws its maps: good to look at, but maps can no longer be
                compared with one another, nor encoded again.

        Returns:
            (B, height, width) float32 in [0, 1], or (height, width) for one sequence.

        Raises:
            ValueError: A row has another number of codes than N, or a code outside [0, K).
        """
        vectors = self.codebook[self._checked_codes(codes)]
        depth = self._depth_of(vectors.reshape(-1, *vectors.shape[-2:]), size, stretch)
        return depth[0] if codes.ndim == 1 else depth

    def decode_soft(self, probabilities: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Turn a distribution over codes at each place into depth, differentiably.

        Args:
            probabilities: (B, N, K) or (N, K), rows that sum to 1.
            size: (height, width) to resample to; None keeps (image_size, image_size).

        Returns:
            As `decode`, and the same for one-hot rows.

        Raises:
            ValueError: The shape is not (..., N, K).
        """
        expected = (self.num_tokens, self.config.num_codes)
        if probabilities.ndim not in (2, 3) or tuple(probabilities.shape[-2:]) != expected:
            raise ValueError(
                f"`probabilities` has shape {tuple(probabilities.shape)}; expected (batch, *{expected}) "
                f"or {expected}: one distribution over the {expected[1]} codes at each of the {expected[0]} places."
            )
        batch = probabilities.to(self.dtype).reshape(-1, *expected)
        with full_precision(batch.device):
            vectors = self.depth_codebook.mix(batch)
        depth = self._depth_of(vectors, size)
        return depth[0] if probabilities.ndim == 2 else depth

    def _depth_of(self, vectors: Tensor, size: tuple[int, int] | None, stretch: bool = False) -> Tensor:
        """(B, N, d) code vectors -> (B, height, width) float32 in [0, 1]."""
        with full_precision(vectors.device):
            depth = self._reconstruct(vectors)
        if stretch:
            low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
            depth = (depth - low) / (high - low).clamp(min=1e-8)  # a flat map is far everywhere
        depth = depth.clamp(0.0, 1.0)
        if size is not None:
            depth = F.interpolate(depth, size=size, mode="bilinear", antialias=True)
        return depth[:, 0].float()

    def forward(
        self, depth: Tensor, valid: Tensor | None = None, return_dict: bool | None = None
    ) -> DepthVQVAEOutput | tuple[Tensor, ...]:
        """Encode and decode, with the losses. Gradients pass the quantiser straight through.

        Args:
            depth, valid: as `encode`.
            return_dict: False for a plain tuple; None takes the configuration's.
        """
        output = self.losses(*self.prepare(depth, valid))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def losses(self, filled: Tensor, weight: Tensor, *, quantise: bool = True) -> DepthVQVAEOutput:
        """One pass over prepared depth.

        Args:
            filled, weight: What `prepare` gives, (B, 1, S, S) each.
            quantise: False lets the latents through as they are, for the first part of training.
        """
        latents = self.encode_latents(filled)  # (B, N, d)
        codes = self.depth_codebook.nearest(latents.detach())
        vectors = self.codebook[codes]
        passed = latents + (vectors - latents).detach() if quantise else latents
        reconstruction = self._reconstruct(passed)  # (B, 1, S, S), not clamped
        pixel, gradient = self._reconstruction_losses(reconstruction, filled, weight)
        commitment = F.mse_loss(latents, vectors) if quantise else pixel.new_zeros(())
        return DepthVQVAEOutput(
            loss=pixel + self.config.gradient_weight * gradient + self.config.commitment_weight * commitment,
            reconstruction_loss=pixel,
            gradient_loss=gradient,
            commitment_loss=commitment,
            reconstruction=reconstruction[:, 0].clamp(0.0, 1.0),
            codes=codes,
            latents=latents,
        )

    def prepare(self, depth: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`prepare_depth` at this codec's size, precision and device."""
        filled, weight = prepare_depth(depth, valid, self.config.image_size)
        return filled.to(self.device, self.dtype), weight.to(self.device, self.dtype)

    def encode_latents(self, filled: Tensor) -> Tensor:
        """(B, 1, S, S) depth without holes, as `prepare` gives it -> (B, N, d), what is quantised."""
        low, high = self.config.value_low, self.config.value_high
        return self.depth_encoder(low + (high - low) * filled).flatten(2).transpose(1, 2).to(self.dtype)

    def _reconstruct(self, vectors: Tensor) -> Tensor:  # (B, N, d) -> (B, 1, S, S), about [0, 1] but not clamped
        low, high = self.config.value_low, self.config.value_high
        grid = vectors.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        return (self.depth_decoder(grid).float() - low) / (high - low)

    def _reconstruction_losses(self, prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # d(distance)/distance = d(inverse)/inverse, and inverse depth runs from 1 / ratio to 1 in units of the nearest.
        span = 1.0 - 1.0 / self.config.depth_ratio
        weight = weight / (1.0 - span * (1.0 - target))
        error = prediction - target  # (B, 1, S, S)
        pixel = (weight * error.abs()).sum() / weight.sum()
        total, pairs = error.new_zeros(()), error.new_zeros(())
        for axis in (2, 3):
            pairs_along = weight.shape[axis] - 1
            both = torch.minimum(weight.narrow(axis, 0, pairs_along), weight.narrow(axis, 1, pairs_along))
            total, pairs = total + (both * error.diff(dim=axis).abs()).sum(), pairs + both.sum()
        return pixel, total / pairs.clamp_min(1e-6)

    def _checked_codes(self, codes: Tensor) -> Tensor:
        if codes.ndim not in (1, 2) or codes.shape[-1] != self.num_tokens:
            raise ValueError(
                f"`codes` has shape {tuple(codes.shape)}; expected (batch, {self.num_tokens}) or ({self.num_tokens},): "
                f"this codec writes {self.num_tokens} codes per depth map."
            )
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"`codes` are {codes.dtype}; expected integers.")
        codes = codes.to(self.device, torch.int64)
        if is_traced():
            return codes
        wrong = (codes < 0) | (codes >= self.config.num_codes)
        if bool(wrong.any()):
            row = int(wrong.reshape(-1, self.num_tokens).any(1).nonzero()[0])
            value = int(codes[wrong][0])
            raise ValueError(f"Row {row} of `codes` holds {value}; codes are 0 to {self.config.num_codes - 1}.")
        return codes


def prepare_depth(depth: Tensor, valid: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Check depth, resample it to a square and fill its holes from their surroundings.

    Args and errors as `DepthVQVAE.encode`; `size` is the side S of the square.

    Returns:
        (B, 1, S, S) float32 relative inverse depth without holes, and the share of valid pixels behind each of its
        pixels, (B, 1, S, S) in [0, 1].
    """
    depth = _as_batch(depth, "depth")
    valid = None if valid is None else _as_batch(valid, "valid").bool().to(depth.device)
    if not is_traced():
        valid = _check_depth(depth, valid)
    if valid is None:
        values = _resampled(depth.float().clamp(0.0, 1.0), size)
        return values, torch.ones_like(values)
    weight = _resampled(valid.float(), size)
    return fill_holes(_resampled(torch.where(valid, depth, 0.0).float().clamp(0.0, 1.0), size), weight), weight


def _resampled(picture: Tensor, size: int) -> Tensor:  # (B, 1, H, W) -> (B, 1, S, S)
    if picture.shape[-2:] == (size, size):
        return picture
    return F.interpolate(picture, (size, size), mode="bilinear", antialias=True)


def fill_holes(values: Tensor, weight: Tensor, tiny: float = 1e-8) -> Tensor:
    """Fill what has no weight from what has, by normalised averages over a pyramid.

    Args:
        values: (B, 1, H, W) depth times its weight.
        weight: (B, 1, H, W) in [0, 1], 0 in holes, positive somewhere in every map.
        tiny: Weight below which a pixel counts as a hole.

    Returns:
        (B, 1, H, W): values / weight where there is weight, else the same ratio from coarser and coarser levels.
    """
    known = weight > tiny
    ratio = values / weight.clamp_min(tiny)
    if weight.shape[-2:] == (1, 1) or (not is_traced() and bool(known.all())):
        return ratio
    # Average pooling divides both by the same count, so the ratio stays a weighted mean of known pixels. Odd edges are
    # padded with zero weight; rescaling keeps small weights of large holes above `tiny`.
    pad = (0, weight.shape[-1] % 2, 0, weight.shape[-2] % 2)
    pooled_values, pooled_weight = (F.avg_pool2d(F.pad(x, pad), 2) for x in (values, weight))
    scale = pooled_weight.clamp(tiny, 0.25) * 4.0
    coarse = fill_holes(pooled_values / scale, pooled_weight / scale, tiny)
    coarse = F.interpolate(coarse, scale_factor=2.0, mode="bilinear")[..., : weight.shape[-2], : weight.shape[-1]]
    return torch.where(known, ratio, coarse)


def _as_batch(picture: Tensor, name: str) -> Tensor:
    """(H, W), (B, H, W) or (B, 1, H, W) -> (B, 1, H, W)."""
    if not isinstance(picture, Tensor):
        raise ValueError(f"`{name}` is a {type(picture).__name__}; expected a torch tensor.")
    if picture.ndim == 2:
        picture = picture[None]
    if picture.ndim == 3:
        picture = picture[:, None]
    if picture.ndim != 4 or picture.shape[1] != 1 or 0 in picture.shape:
        raise ValueError(f"`{name}` has shape {tuple(picture.shape)}; expected (H, W), (B, H, W) or (B, 1, H, W).")
    return picture


def _check_depth(depth: Tensor, valid: Tensor | None) -> Tensor | None:
    """`valid`, or None where it says of every pixel that it is; ValueError as `DepthVQVAE.encode` says."""
    if valid is not None and valid.shape != depth.shape:
        raise ValueError(f"`valid` is {tuple(valid.shape)}, `depth` {tuple(depth.shape)}; give both the same shape.")
    if not depth.is_floating_point():
        raise ValueError(f"`depth` is {depth.dtype}; expected floating point relative inverse depth in [0, 1].")
    if valid is None or bool(valid.all()):
        lowest, highest = depth.aminmax()  # NaN where a pixel is
        if bool((lowest >= -_SLACK) & (highest <= 1.0 + _SLACK)):
            return None
    _check_pixels(depth, torch.ones_like(depth, dtype=torch.bool) if valid is None else valid)
    return valid


def _check_pixels(depth: Tensor, valid: Tensor) -> None:
    empty = ~valid.flatten(1).any(1)
    if bool(empty.any()):
        raise ValueError(f"Depth map {int(empty.nonzero()[0])} has no valid pixel.")
    good = depth.isfinite() & (depth >= -_SLACK) & (depth <= 1.0 + _SLACK)
    wrong = (valid & ~good).flatten(1).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        value = float(depth[row][valid[row] & ~good[row]][0])
        raise ValueError(
            f"Depth map {row} holds {value:g} at a valid pixel; expected relative inverse depth in [0, 1]. "
            "Convert distances first, and mark holes in `valid`."
        )


__all__ = ["DepthVQVAE", "DepthVQVAEOutput", "fill_holes", "prepare_depth"]
