"""Training the depth codec: a codebook kept by moving averages that does not collapse.

A plain VQ-VAE ends with a handful of its codes in use. Three things prevent it: the encoder and decoder first learn
without quantisation, the codebook then starts from k-means over encoder outputs, and codes that stay unused move to
encoder outputs that are served badly. At the end the codes are numbered by the depth they stand for, farthest first.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthCodebook, DepthVQVAE, DepthVQVAEOutput, prepare_depth


@dataclass
class DepthBank:
    """Depth maps in memory, at one size.

    Args:
        relative: (M, S, S) float32 relative inverse depth in [0, 1], holes filled.
        weight: (M, S, S) float32 in [0, 1], share of valid readings behind each pixel.
    """

    relative: Tensor
    weight: Tensor

    @classmethod
    def gather(cls, maps: Iterable[DepthMap], config: DepthVQVAEConfig) -> "DepthBank":
        """Resample depth maps to the size of a codec and keep them.

        Raises:
            ValueError: There are none.
        """
        size = config.image_size
        pairs = [prepare_depth(torch.from_numpy(m.relative), torch.from_numpy(m.valid), size) for m in maps]
        if not pairs:
            raise ValueError("there are no depth maps to train on.")
        return cls(*(torch.cat(parts)[:, 0] for parts in zip(*pairs, strict=True)))

    def head(self, count: int) -> Iterator[DepthMap]:
        """The first maps of the bank, at its size."""
        for relative, weight in zip(self.relative[:count], self.weight[:count], strict=True):
            yield DepthMap(relative.numpy(), weight.numpy() >= 0.5)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch, (size, S, S) twice, each map mirrored left to right half of the time."""
        rows = torch.randint(len(self.relative), (size,), generator=generator)
        mirror = torch.rand(size, 1, 1, generator=generator) < 0.5
        pair = (self.relative[rows], self.weight[rows])
        return tuple(torch.where(mirror, x.flip(-1), x) for x in pair)


@dataclass(frozen=True)
class CodebookOptions:
    """How a codec is trained.

    Args:
        batch_size: Maps per step.
        learning_rate: Peak of a one-cycle schedule for AdamW.
        continuous_share: Share of the training without quantisation, before the codebook starts.
        decay: Of the moving averages of the codebook, per step.
        kmeans_start: Start the codebook from k-means over encoder outputs; False leaves it random.
        restart_every: Steps between two moves of unused codes; 0 never moves them.
        settled_share: Share of the training at whose end unused codes are left where they are.

    Raises:
        ValueError: A value is out of range.
    """

    batch_size: int = 8
    learning_rate: float = 3e-3
    continuous_share: float = 0.15
    decay: float = 0.99
    kmeans_start: bool = True
    restart_every: int = 20
    settled_share: float = 0.2

    def __post_init__(self):
        if self.batch_size < 1 or self.restart_every < 0 or self.learning_rate <= 0.0:
            raise ValueError(f"batch_size >= 1, restart_every >= 0 and learning_rate > 0 are needed, got {self}.")
        for name in ("continuous_share", "decay", "settled_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in [0, 1).")


def train_codebook(
    config: DepthVQVAEConfig,
    bank: DepthBank,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    options: CodebookOptions = CodebookOptions(),
    progress: Callable[[float, float], None] | None = None,
) -> DepthVQVAE:
    """Train a depth codec from scratch, on the processor.

    Args:
        config: The codec to make.
        bank: Depth maps at the codec's size.
        steps, minutes: When to stop: give exactly one. Only `steps` makes two runs alike.
        seed: Of weights, batches and restarts. The caller's random state is left as it was.
        options: The rest.
        progress: Called now and then with the share of the training done and the reconstruction loss.

    Returns:
        The codec in evaluation mode, codes numbered by mean depth: 0 farthest, K - 1 nearest.

    Raises:
        ValueError: Not exactly one of `steps` and `minutes`.
        RuntimeError: The loss is no longer finite.
    """
    clock = _Clock(steps, minutes)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DepthVQVAE(config).train().to(memory_format=torch.channels_last)  # twice as fast here
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    quantise = False
    while (share := clock.share()) < 1.0:
        if not quantise and share >= options.continuous_share:
            if options.kmeans_start:
                start_codebook_(model, bank, generator=generator)
            quantise = True
        optimizer.param_groups[0]["lr"] = options.learning_rate * _one_cycle(share)
        output = _step(model, optimizer, bank.draw(options.batch_size, generator), quantise)
        if quantise:
            _move_codes_(model.depth_codebook, output, clock, options, generator)
        clock.step += 1
        if progress is not None and clock.step % 10 == 0:
            progress(share, output.reconstruction_loss.item())
    model = model.eval().to(memory_format=torch.contiguous_format)
    reorder_codes_(model, code_depths(model, bank).argsort())
    return model


def _step(
    model: DepthVQVAE, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], quantise: bool
) -> DepthVQVAEOutput:
    filled, weight = (x[:, None].to(memory_format=torch.channels_last) for x in batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # 1.5 times as fast, with the same result
        output = model.losses(filled, weight, quantise=quantise)
    if not bool(output.loss.isfinite()):
        raise RuntimeError(f"The loss is {output.loss.item()}; lower the learning rate.")
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return output


def _move_codes_(
    book: DepthCodebook,
    output: DepthVQVAEOutput,
    clock: "_Clock",
    options: CodebookOptions,
    generator: torch.Generator,
) -> None:
    update_codebook_(book, output.latents, output.codes, decay=options.decay)
    settled = clock.share() > 1.0 - options.settled_share
    if options.restart_every and clock.step % options.restart_every == 0 and not settled:
        restart_unused_(book, output.latents, output.codes, generator=generator)


@torch.no_grad()
def start_codebook_(model: DepthVQVAE, bank: DepthBank, *, generator: torch.Generator, samples: int = 16384) -> None:
    """Start the codebook from k-means over the encoder outputs of random maps of the bank."""
    maps = max(1, samples // model.num_tokens)
    latents = [
        model.encode_latents(bank.draw(min(64, maps), generator)[0][:, None]).flatten(0, 1)
        for _ in range(-(-maps // 64))
    ]
    vectors, counts = kmeans(torch.cat(latents), model.config.num_codes, generator=generator)
    book = model.depth_codebook
    book.vectors.copy_(vectors)
    book.ema_count.copy_(counts * (model.config.num_codes / counts.sum()))
    book.ema_sum.copy_(vectors * book.ema_count[:, None])


def kmeans(points: Tensor, k: int, *, generator: torch.Generator, iterations: int = 12) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ seeds; an empty cluster restarts at the point served worst.

    Args:
        points: (P, d), P >= 1.

    Returns:
        (k, d) centres and (k,) how many points each has, in the dtype of the points.
    """
    centres = _spread_points(points, k, generator)
    for _ in range(iterations):
        distance, nearest = torch.cdist(points, centres).min(1)
        counts = torch.bincount(nearest, minlength=k).to(points.dtype)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1.0), centres)
        empty = (counts == 0).nonzero()[:, 0]
        worst = distance.topk(min(len(empty), len(points))).indices
        centres[empty[: len(worst)]] = points[worst]
    nearest = torch.cdist(points, centres).argmin(1)
    return centres, torch.bincount(nearest, minlength=k).to(points.dtype)


def _spread_points(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the points, each drawn by its squared distance to those before (Arthur and Vassilvitskii 2007)."""
    chosen = [points[torch.randint(len(points), (1,), generator=generator)]]
    distance = torch.full((len(points),), torch.inf, dtype=points.dtype)
    for _ in range(k - 1):
        distance = torch.minimum(distance, (points - chosen[-1]).square().sum(1))
        chosen.append(points[torch.multinomial(distance + 1e-12, 1, generator=generator)])
    return torch.cat(chosen)


@torch.no_grad()
def update_codebook_(book: DepthCodebook, latents: Tensor, codes: Tensor, *, decay: float) -> None:
    """One step of the moving averages: codes drift to the mean of the latents they serve.

    Args:
        book: Changed in place. A code that served nothing keeps its vector.
        latents: (..., d). codes: (...) int64.
        decay: Of the averages, in [0, 1).
    """
    latents, codes = latents.reshape(-1, latents.shape[-1]).to(book.vectors.dtype), codes.reshape(-1)
    k = len(book.vectors)
    counts = torch.bincount(codes, minlength=k).to(latents.dtype) * (k / len(codes))  # 1 = as often as the average code
    sums = torch.zeros_like(book.ema_sum).index_add_(0, codes, latents) * (k / len(codes))
    book.ema_count.mul_(decay).add_(counts, alpha=1.0 - decay)
    book.ema_sum.mul_(decay).add_(sums, alpha=1.0 - decay)
    book.vectors.copy_(torch.where(counts[:, None] > 0, book.ema_sum / book.ema_count[:, None], book.vectors))


@torch.no_grad()
def restart_unused_(
    book: DepthCodebook, latents: Tensor, codes: Tensor, *, generator: torch.Generator, below: float = 0.05
) -> int:
    """Move codes used less than `below` times the average to latents drawn by how badly they are served.

    Returns:
        How many codes moved.
    """
    latents, codes = latents.reshape(-1, latents.shape[-1]).to(book.vectors.dtype), codes.reshape(-1)
    unused = (book.ema_count < below).nonzero()[:, 0][: len(latents)]
    if len(unused) == 0:
        return 0
    error = (latents - book.vectors[codes]).square().sum(-1) + 1e-12
    chosen = latents[torch.multinomial(error, len(unused), generator=generator)]
    book.vectors[unused] = chosen
    book.ema_count[unused] = 2.0 * below
    book.ema_sum[unused] = chosen * (2.0 * below)
    return len(unused)


@torch.no_grad()
def code_depths(model: DepthVQVAE, bank: DepthBank, *, maps: int = 512) -> Tensor:
    """Mean decoded depth in the cells that hold each code, (K,); a code that never occurs is decoded alone."""
    k, cell = model.config.num_codes, model.config.downsample
    total, count = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for relative in bank.relative[:maps].split(64):
        codes = model.encode(relative)
        cells = F.avg_pool2d(model.decode(codes)[:, None], cell).flatten().double()
        total.index_add_(0, codes.flatten(), cells)
        count.index_add_(0, codes.flatten(), torch.ones_like(cells))
    alone = torch.arange(k)[:, None].expand(k, model.num_tokens)
    alone = torch.cat([model.decode(part).mean((1, 2)) for part in alone.split(64)]).double()
    return torch.where(count > 0, total / count.clamp_min(1.0), alone)


@torch.no_grad()
def reorder_codes_(model: DepthVQVAE, order: Tensor) -> None:
    """Renumber the codes in place: code k becomes what code order[k] was. Decoded depth does not change.

    Raises:
        ValueError: `order` is not a permutation of 0..K-1.
    """
    k = model.config.num_codes
    if order.shape != (k,) or not torch.equal(order.sort().values, torch.arange(k)):
        raise ValueError(f"`order` must be a permutation of 0..{k - 1}.")
    for buffer in model.depth_codebook.buffers():
        buffer.copy_(buffer[order])


def _one_cycle(share: float, warmup: float = 0.05) -> float:
    """Learning rate factor: linear rise over `warmup`, cosine fall to 1 % at the end."""
    if share < warmup:
        return share / warmup
    return 0.01 + 0.99 * 0.5 * (1.0 + np.cos(np.pi * (share - warmup) / (1.0 - warmup)))


class _Clock:
    """Counts steps against a limit in steps or in minutes."""

    def __init__(self, steps: int | None, minutes: float | None):
        limit = steps if minutes is None else minutes
        if (steps is None) == (minutes is None) or limit <= 0:
            raise ValueError(f"give either `steps` or `minutes`, above 0; got steps={steps}, minutes={minutes}.")
        self.steps, self.minutes = steps, minutes
        self.step, self.start = 0, time.monotonic()

    def share(self) -> float:
        """How much of the training is behind, 0 to 1."""
        if self.minutes is None:
            return min(1.0, self.step / self.steps)
        return min(1.0, (time.monotonic() - self.start) / (60.0 * self.minutes))
