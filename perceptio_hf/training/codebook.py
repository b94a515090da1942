"""Training the depth codec: a codebook kept by moving averages that does not collapse.

A plain VQ-VAE ends with a handful of its codes in use. Three things prevent it: the encoder and decoder first learn
without quantisation, the codebook then starts from k-means over encoder outputs, and codes that stay unused move to
encoder outputs that are served badly. At the end the codes are numbered by the depth they stand for, farthest first.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthCodebook, DepthVQVAE, DepthVQVAEOutput

TRAIN_SEED = 0
HELD_OUT_SEED = 1_000_000_000  # rendered scenes from here on are for evaluation


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
    def gather(cls, maps: Iterator[DepthMap], config: DepthVQVAEConfig) -> "DepthBank":
        """Resample depth maps to the size of a codec and keep them.

        Raises:
            ValueError: There are none.
        """
        codec = DepthVQVAE(config)
        pairs = [codec.prepare(torch.from_numpy(m.relative), torch.from_numpy(m.valid)) for m in maps]
        if not pairs:
            raise ValueError("there are no depth maps to train on.")
        return cls(*(torch.cat(parts)[:, 0] for parts in zip(*pairs, strict=True)))

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch, (size, S, S) twice, each map mirrored left to right half of the time."""
        rows = torch.randint(len(self.relative), (size,), generator=generator)
        mirror = torch.rand(size, 1, 1, generator=generator) < 0.5
        pair = (self.relative[rows], self.weight[rows])
        return tuple(torch.where(mirror, x.flip(-1), x) for x in pair)


def train_codebook(
    config: DepthVQVAEConfig,
    bank: DepthBank,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    continuous_share: float = 0.15,
    decay: float = 0.99,
    kmeans_start: bool = True,
    restart_every: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> DepthVQVAE:
    """Train a depth codec from scratch.

    Args:
        config: The codec to make.
        bank: Depth maps at the codec's size.
        steps, minutes: When to stop: give exactly one. Only `steps` makes two runs equal.
        batch_size: Maps per step.
        learning_rate: Peak of a one-cycle schedule for AdamW.
        continuous_share: Share of the training without quantisation, before the codebook starts.
        decay: Of the moving averages of the codebook, per step.
        kmeans_start: Start the codebook from k-means over encoder outputs rather than from noise.
        restart_every: Steps between two moves of unused codes; 0 never moves them.
        seed: Of weights, batches and restarts. The caller's random state is left as it was.
        progress: Show a progress bar.

    Returns:
        The codec in evaluation mode, codes numbered by mean depth: 0 farthest, K - 1 nearest.

    Raises:
        ValueError: Not exactly one of `steps` and `minutes`, or an option out of range.
        RuntimeError: The loss is no longer finite.
    """
    clock = _Clock(steps, minutes)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DepthVQVAE(config).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    quantised = False
    with clock.bar(progress) as bar:
        while clock.running():
            share = clock.share()
            if not quantised and share >= continuous_share:
                if kmeans_start:
                    start_codebook_(model, bank, generator=generator)
                quantised = True
            optimizer.param_groups[0]["lr"] = learning_rate * _one_cycle(share)
            relative, weight = bank.draw(batch_size, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model.losses(relative[:, None], weight[:, None], quantise=quantised)
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if quantised:
                update_codebook_(model.depth_codebook, output.latents, output.codes, decay=decay)
                if restart_every and clock.step % restart_every == 0 and share < 0.8:
                    restart_unused_(model.depth_codebook, output.latents, output.codes, generator=generator)
            clock.advance(bar, output)
    model = model.eval().to(memory_format=torch.contiguous_format)
    reorder_codes_(model, code_depths(model, bank).argsort())
    return model


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
    """Lloyd's algorithm from random points; an empty cluster restarts at the point served worst.

    Args:
        points: (P, d), P >= 1.

    Returns:
        (k, d) centres and (k,) how many points each has, in the dtype of the points.
    """
    centres = points[torch.randint(len(points), (k,), generator=generator)]
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
        if (steps is None) == (minutes is None):
            raise ValueError("say when training stops: give either `steps` or `minutes`.")
        if (steps if minutes is None else minutes) <= 0:
            raise ValueError(f"training must last; got steps={steps}, minutes={minutes}.")
        self.steps, self.seconds = steps, None if minutes is None else 60.0 * minutes
        self.step, self.start = 0, time.monotonic()

    def share(self) -> float:
        """How much of the training is behind, 0 to 1."""
        spent = self.step / self.steps if self.seconds is None else (time.monotonic() - self.start) / self.seconds
        return min(1.0, spent)

    def running(self) -> bool:
        return self.share() < 1.0

    def bar(self, show: bool) -> tqdm:
        return tqdm(total=self.steps, disable=not show, desc="codebook", unit="step")

    def advance(self, bar: tqdm, output: DepthVQVAEOutput) -> None:
        self.step += 1
        if self.step % 10 == 0 or self.step == 1:
            loss = output.loss.item()
            if not np.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {self.step}; lower the learning rate.")
            bar.set_postfix(error=f"{output.reconstruction_loss.item():.4f}")
        bar.update()
