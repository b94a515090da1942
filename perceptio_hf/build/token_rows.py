"""Rows for spatial tokens in the embedding and the head of a language model that has never seen them.

A new row is a random draw that looks like the rows which are there: it has their mean and their covariance (it is their
mean plus a random mixture of their differences from it). So its norm is typical, and for whatever hidden state its
logit is distributed like those of ordinary tokens. Draws are correlated between codes: codes whose depth, or whose
vectors in the codebook, are near start near one another; no two are equal. `[SEG]` and the markers are independent.

A head of its own (untied) gets rows much nearer to the mean, since nothing has to tell them apart there before they are
learnt: a token whose logit is the average logit takes at most 1/V of the probability (the exponential is convex), far
less where the model is sure of something. With tied embeddings one row does both: its logits have the spread of
ordinary tokens', and 131 draws take about 131/V where the model knows nothing, again far less where it is sure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

EMBEDDING_SPREAD, HEAD_SPREAD = 1.0, 0.25  # of new rows around the mean, in units of the rows that are there
# What two codes have in common: being codes at all, their depth, their vectors; the rest is each one's own.
_SHARED, _DEPTH, _VECTORS = 0.2, 0.4, 0.2
_DEPTH_REACH = 0.1  # depths (0..1) so far apart have exp(-1/2) of their common part
_SAMPLE = 8192  # rows that stand for all: enough for mean and covariance, and little memory


def code_depths(codec: DepthVQVAE) -> Tensor:
    """(K,) the relative inverse depth in [0, 1] that a surface of nothing but one code decodes to, at its middle."""
    config = codec.config
    side = min(config.grid_size, 5)  # what lies farther away hardly matters, and a whole grid is four times the work
    vectors = codec.codebook.float()[:, :, None, None].expand(-1, -1, side, side)
    with torch.no_grad():
        values = torch.cat([codec.depth_decoder(part)[:, 0] for part in vectors.split(16)])  # (K, pixels, pixels)
    middle = slice(side // 2 * config.downsample, (side // 2 + 1) * config.downsample)
    depth = (values[:, middle, middle] - config.value_low) / (config.value_high - config.value_low)
    return depth.clamp(0, 1).mean((1, 2))


def code_correlation(codec: DepthVQVAE) -> Tensor:
    """(K, K) float64, positive definite with ones on the diagonal: how alike new rows of two codes are."""
    depths = code_depths(codec).double().cpu()[:, None]
    vectors = codec.codebook.double().cpu()
    distances = torch.cdist(vectors, vectors)
    reach = distances[distances > 0].median() if bool((distances > 0).any()) else 1.0
    own = 1.0 - _SHARED - _DEPTH - _VECTORS
    return (
        _SHARED
        + _DEPTH * torch.exp(-0.5 * (torch.cdist(depths, depths) / _DEPTH_REACH) ** 2)
        + _VECTORS * torch.exp(-0.5 * (distances / reach) ** 2)
        + own * torch.eye(len(vectors), dtype=torch.float64)
    )


def draw_rows(
    weight: Tensor, known: Tensor, correlation: Tensor, *, spread: float, generator: torch.Generator
) -> Tensor:
    """Draw rows with the mean of ordinary rows and `spread` times their deviations from it.

    Args:
        weight: (V, d).
        known: (n,) which of its rows are ordinary.
        correlation: (m, m) float64, of the new rows' deviations.
        generator: of the CPU; it alone decides what is drawn.

    Returns:
        (m, d) float32 on the CPU.
    """
    chosen = known[torch.randperm(len(known), generator=generator)[:_SAMPLE]]
    sample = weight[chosen.to(weight.device)].float().cpu()
    mean = sample.mean(0)
    mixture = torch.randn(len(correlation), len(sample), generator=generator, dtype=torch.float64)
    mixture = torch.linalg.cholesky(correlation) @ mixture / len(sample) ** 0.5
    return mean + spread * (mixture.float() @ (sample - mean))


@torch.no_grad()
def fill_new_rows(
    embedding: nn.Embedding,
    head: nn.Linear,
    codec: DepthVQVAE,
    spatial_ids: Sequence[int],
    *,
    new_ids: Sequence[int],
    known_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Write the rows of new tokens in place; every other row keeps its bits.

    Args:
        embedding, head: with (V, d) weights, which may be one and the same.
        spatial_ids: ids of [SEG], the start marker, the K codes in order, and the end marker.
        new_ids: the rows to fill: some or all of these, or others.
        known_ids: tokens whose rows say what a row looks like; default: all that are not new. For the same known ones
            a spatial token gets the same row, whichever others are filled.
        seed: of the draws; equal seeds give equal rows, but for rounding.
    """
    if not len(new_ids):
        return
    order = [*spatial_ids, *sorted(set(new_ids) - set(spatial_ids))]
    correlation = torch.eye(len(order), dtype=torch.float64)
    codes = slice(2, len(spatial_ids) - 1)
    correlation[codes, codes] = code_correlation(codec)
    known = _known_rows(embedding.weight.shape[0], new_ids, known_ids)
    layers = [(embedding.weight, EMBEDDING_SPREAD)]
    if head.weight is not embedding.weight:
        layers.append((head.weight, HEAD_SPREAD))
    chosen = [order.index(token) for token in new_ids]
    for index, (weight, spread) in enumerate(layers):
        generator = torch.Generator().manual_seed(2 * seed + index)
        rows = draw_rows(weight, known, correlation, spread=spread, generator=generator)
        weight[list(new_ids)] = rows[chosen].to(weight)


def _known_rows(count: int, new_ids: Sequence[int], known_ids: Sequence[int] | None) -> Tensor:
    """(n,) the rows to learn from, without the new ones."""
    is_known = torch.full((count,), known_ids is None)
    if known_ids is not None:
        is_known[list(known_ids)] = True
    is_known[list(new_ids)] = False
    return is_known.nonzero()[:, 0]
