"""The codebook's own steps: its start from k-means, moving averages, moves of unused codes, and the final numbering.

No optimizer touches it. With several processes every step is taken over the latents of all of them, so that their
codebooks stay equal.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from perceptio_hf.modeling.modeling_depth_vqvae import DepthCodebook, DepthVQVAE

from .maps import DepthSource, some_maps

Total = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes
_SHOWN = 64  # maps through the encoder at once


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def start_codebook_(
    model: DepthVQVAE, source: DepthSource, *, generator: torch.Generator, samples: int = 16384, workers: int = 0
) -> None:
    """Start the codebook from k-means over encoder outputs of maps spread over the source, computed on the CPU."""
    maps = max(1, samples // model.num_tokens)
    pairs = some_maps(source, maps, workers=workers, batch_size=_SHOWN)
    latents = [model.encode_latents(filled[:, None].to(model.device)).flatten(0, 1).cpu() for filled, _ in pairs]
    vectors, counts = kmeans(torch.cat(latents), model.config.num_codes, generator=generator)
    counts = counts * (model.config.num_codes / counts.sum())
    book = model.depth_codebook
    for buffer, value in ((book.vectors, vectors), (book.ema_count, counts), (book.ema_sum, vectors * counts[:, None])):
        buffer.copy_(value)


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
def update_codebook_(
    book: DepthCodebook, latents: Tensor, codes: Tensor, *, decay: float, total: Total = _alone
) -> None:
    """One step of the moving averages: codes drift to the mean of the latents they serve.

    Args:
        book: Changed in place. A code that served nothing keeps its vector.
        latents: (..., d). codes: (...) int64.
        decay: Of the averages, in [0, 1).
        total: Adds up over processes.
    """
    latents, codes = latents.reshape(-1, latents.shape[-1]).to(book.vectors.dtype), codes.reshape(-1)
    sums = torch.zeros_like(book.ema_sum).index_add_(0, codes, latents)
    counts = torch.zeros_like(book.ema_count).index_add_(0, codes, torch.ones_like(latents[:, 0]))
    sums, counts = total(torch.cat((sums, counts[:, None]), 1)).split((sums.shape[1], 1), 1)
    scale = len(book.vectors) / counts.sum()  # 1 = as often as the average code
    sums, counts = sums * scale, counts[:, 0] * scale
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
    drawn = torch.multinomial(error.cpu(), len(unused), generator=generator)  # the generator is the CPU's
    chosen = latents[drawn.to(latents.device)]
    book.vectors[unused] = chosen
    book.ema_count[unused] = 2.0 * below
    book.ema_sum[unused] = chosen * (2.0 * below)
    return len(unused)


@torch.no_grad()
def code_depths(model: DepthVQVAE, source: DepthSource, *, maps: int = 512, workers: int = 0) -> Tensor:
    """Mean decoded depth in the cells that hold each code, (K,), over maps spread over the source; a code that never
    occurs is decoded alone."""
    k, cell = model.config.num_codes, model.config.downsample
    total, count = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for relative, _ in some_maps(source, maps, workers=workers, batch_size=_SHOWN):
        codes = model.encode(relative.to(model.device))
        cells = F.avg_pool2d(model.decode(codes)[:, None], cell).flatten().double().cpu()
        total.index_add_(0, codes.flatten().cpu(), cells)
        count.index_add_(0, codes.flatten().cpu(), torch.ones_like(cells))
    alone = torch.arange(k)[:, None].expand(k, model.num_tokens)
    alone = torch.cat([model.decode(part).mean((1, 2)).cpu() for part in alone.split(_SHOWN)]).double()
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
        buffer.copy_(buffer[order.to(buffer.device)])
