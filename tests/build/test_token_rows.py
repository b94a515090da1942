"""New rows: like those that are there, near one another where codes are, and no thieves of probability."""

import numpy as np
import pytest
import torch
from component_helpers import codec
from helpers import assert_alike
from torch import nn

from perceptio_hf.build.token_rows import (
    EMBEDDING_SPREAD,
    HEAD_SPREAD,
    code_correlation,
    code_depths,
    draw_rows,
    fill_new_rows,
)

CODES, WIDTH, KNOWN = 16, 24, 3000
IDS = list(range(KNOWN + 5, KNOWN + 5 + CODES + 3))
NEW = [*range(KNOWN, KNOWN + 5), *IDS]


def layers(tied: bool) -> tuple[nn.Embedding, nn.Linear]:
    """Rows with a mean, and widths and correlations that differ from one dimension to the next; zeros behind them."""
    generator = torch.Generator().manual_seed(3)
    embedding = nn.Embedding(len(NEW) + KNOWN, WIDTH)
    head = nn.Linear(WIDTH, len(NEW) + KNOWN, bias=False)
    for weight in (embedding.weight, head.weight):
        mixing = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(0.1, 2, WIDTH)
        with torch.no_grad():
            weight[:] = torch.randn(len(weight), WIDTH, generator=generator) @ mixing + torch.linspace(-3, 3, WIDTH)
            weight[KNOWN:] = 0
    if tied:
        head.weight = embedding.weight
    return embedding, head


def filled(tied: bool = False, new_ids=NEW, **options) -> tuple[torch.Tensor, torch.Tensor]:
    embedding, head = layers(tied)
    fill_new_rows(embedding, head, codec(), IDS, new_ids=new_ids, **options)
    return embedding.weight.detach(), head.weight.detach()


@pytest.mark.parametrize("side", [32, 24, 8])
def test_depths_are_what_a_surface_of_one_code_decodes_to(side):
    model = codec(image_size=side)
    cells = model.config.grid_size
    for code, depth in enumerate(code_depths(model)):
        whole = model.decode(torch.full((cells**2,), code))
        first = cells // 2 * 8
        torch.testing.assert_close(depth, whole[first : first + 8, first : first + 8].mean(), atol=1e-5, rtol=0)


def test_codes_are_alike_where_depth_or_vectors_are():
    model = codec()
    with torch.no_grad():
        model.codebook[5] = model.codebook[4]
        correlation = code_correlation(model)
    depths = code_depths(model).double()
    assert torch.linalg.eigvalsh(correlation).min() > 0.1
    torch.testing.assert_close(correlation.diagonal(), torch.ones(CODES, dtype=torch.float64))
    assert 0.79 < correlation[4, 5] < 0.81  # the same depth and vector: all is shared but each one's own part
    gaps = (depths[:, None] - depths).abs()
    pairs = np.triu_indices(CODES, 1)
    order = np.corrcoef(gaps[pairs], correlation[pairs])[0, 1]
    assert order < -0.5 and correlation.min() > 0.19


def test_rows_have_the_mean_and_covariance_of_those_that_are_there():
    embedding, _ = layers(False)
    known = torch.arange(KNOWN)
    draws = [
        draw_rows(embedding.weight, known, torch.eye(40, dtype=torch.float64), spread=1.0, generator=generator)
        for generator in (torch.Generator().manual_seed(seed) for seed in range(150))
    ]
    drawn, there = torch.cat(draws).double(), embedding.weight[:KNOWN].detach().double()
    scale = there.std(0)
    assert ((drawn.mean(0) - there.mean(0)).abs() / scale).max() < 0.06  # 6000 draws: standard error 0.013
    difference = torch.corrcoef(drawn.T) - torch.corrcoef(there.T)
    assert difference.abs().max() < 0.08 and (drawn.std(0) / scale - 1).abs().max() < 0.06


def test_rows_are_as_correlated_as_asked():
    embedding, _ = layers(False)
    wanted = torch.tensor([[1.0, 0.8, 0.2], [0.8, 1.0, 0.0], [0.2, 0.0, 1.0]], dtype=torch.float64)
    mean = embedding.weight[:KNOWN].mean(0)
    seen = torch.zeros(3, 3)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        rows = draw_rows(embedding.weight, torch.arange(KNOWN), wanted, spread=0.5, generator=generator) - mean
        seen += rows @ rows.T
    torch.testing.assert_close(seen / seen[0, 0], wanted.float(), atol=0.08, rtol=0)


def test_every_row_is_new_typical_and_the_same_for_the_same_seed():
    embedding, head = filled()
    there = layers(False)
    for weight, before, spread in zip((embedding, head), there, (EMBEDDING_SPREAD, HEAD_SPREAD), strict=True):
        assert torch.equal(weight[:KNOWN], before.weight[:KNOWN])
        new, mean = weight[NEW], weight[:KNOWN].mean(0)
        assert torch.pdist(new).min() > 0.05 * spread * torch.pdist(weight[:200]).median()
        usual = (weight[:KNOWN] - mean).norm(dim=1)
        assert usual.min() < ((new - mean).norm(dim=1) / spread).min()
        assert usual.max() > ((new - mean).norm(dim=1) / spread).max()
    again, other = filled(), filled(seed=1)
    for one, same, another in zip((embedding, head), again, other, strict=True):
        assert_alike(same, one, depth=2, width=KNOWN)
        assert (another[NEW] - one[NEW]).abs().max() > 0.1 * one[NEW].std()


def test_a_row_does_not_depend_on_which_others_are_new():
    whole, _ = filled(known_ids=range(KNOWN))
    part, _ = filled(new_ids=IDS[3:7], known_ids=range(KNOWN))
    torch.testing.assert_close(part[IDS[3:7]], whole[IDS[3:7]])
    assert not part[IDS[7]].any()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_get_no_more_than_their_share_of_probability(tied):
    """Flat predictions give a new token what an old one gets on average; where the model is sure, nothing is left."""
    embedding, head = filled(tied)
    head = embedding if tied else head
    generator = torch.Generator().manual_seed(0)
    for sharpness, most in ((0.02, 1.2), (0.2, 0.9), (2.0, 0.05)):
        states = sharpness * torch.randn(400, WIDTH, generator=generator)
        shares = (states @ head[: KNOWN + len(NEW)].T).softmax(-1)[:, NEW].sum(-1)
        assert shares.mean() < most * len(NEW) / (KNOWN + len(NEW))


def test_nothing_to_fill_leaves_every_bit():
    embedding, head = layers(False)
    fill_new_rows(embedding, head, codec(), IDS, new_ids=[])
    assert torch.equal(embedding.weight, layers(False)[0].weight)


def test_only_known_rows_are_learnt_from():
    embedding, head = layers(False)
    with torch.no_grad():
        embedding.weight[100:KNOWN] = 1e6
    fill_new_rows(embedding, head, codec(), IDS, new_ids=IDS, known_ids=range(100))
    assert embedding.weight[IDS].abs().max() < 100
