"""Depth metrics against formulas written out plainly."""

import math

import numpy as np
import pytest

from perceptio_hf.data.depth_maps import DepthMap, relative_from_metric
from perceptio_hf.evaluation.metrics.depth import (
    align_scale_shift,
    codebook_usage,
    codec_metrics,
    depth_metrics,
    mean_depth_metrics,
)


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(1.0, 6.0, (13, 17)), rng.random((13, 17)) < 0.8


def test_alignment_solves_least_squares(scene):
    depth, valid = scene
    prediction = np.random.default_rng(1).random(depth.shape)
    matrix = np.stack([prediction[valid], np.ones(valid.sum())], 1)
    naive = np.linalg.lstsq(matrix, 1 / depth[valid], rcond=None)[0]
    np.testing.assert_allclose(align_scale_shift(prediction, 1 / depth, valid), naive)


def test_alignment_of_a_constant_prediction_is_the_mean(scene):
    depth, valid = scene
    assert align_scale_shift(np.full(depth.shape, 0.3), depth, valid) == (0.0, pytest.approx(depth[valid].mean()))


def test_any_affine_function_of_inverse_depth_is_perfect(scene):
    depth, valid = scene
    figures = depth_metrics(5.0 - 0.1 + 3.0 / depth, depth, valid)
    assert figures["absrel"] < 1e-9 and figures["delta1"] == 1.0 and figures["rmse"] < 1e-8
    assert depth_metrics(relative_from_metric(depth), depth)["absrel"] < 1e-5


def test_metrics_equal_the_naive_loop(scene):
    depth, valid = scene
    depth[0, 0], depth[0, 1], depth[0, 2] = 0.0, math.nan, math.inf
    prediction = np.clip(relative_from_metric(depth) + np.random.default_rng(2).normal(0, 0.1, depth.shape), 0, 1)
    pairs = []
    for row in range(13):
        for column in range(17):
            z = depth[row, column]
            if valid[row, column] and 0 < z < math.inf:
                pairs.append((prediction[row, column], z))
    x, z = np.array(pairs).T
    scale, shift = np.polyfit(x, 1 / z, 1)
    fitted = 1 / np.clip(scale * x + shift, 1 / z.max(), 1 / z.min())
    expected = {
        "absrel": np.mean([abs(a - b) / b for a, b in zip(fitted, z, strict=True)]),
        "delta1": np.mean([max(a / b, b / a) < 1.25 for a, b in zip(fitted, z, strict=True)]),
        "delta2": np.mean([max(a / b, b / a) < 1.5625 for a, b in zip(fitted, z, strict=True)]),
        "delta3": np.mean([max(a / b, b / a) < 1.953125 for a, b in zip(fitted, z, strict=True)]),
        "rmse": math.sqrt(np.mean((fitted - z) ** 2)),
    }
    assert depth_metrics(prediction, depth, valid) == pytest.approx(expected)
    assert 0 < expected["delta1"] < expected["delta2"] < expected["delta3"] < 1


def test_nothing_to_compare_is_an_error(scene):
    depth, valid = scene
    with pytest.raises(ValueError, match="no pixel is valid"):
        depth_metrics(depth, depth, np.zeros_like(valid))
    with pytest.raises(ValueError, match="one shape"):
        align_scale_shift(depth, depth[:5], valid)
    with pytest.raises(ValueError, match="NaN or infinite"):
        depth_metrics(np.full(depth.shape, math.inf), depth, valid)


def test_hand_computed():
    # 1/z = 1, 0.5, 0.25; the prediction has no slope against it: a = 0, b = their mean 7/12, so z' = 12/7 everywhere
    z = np.array([[1.0, 2.0, 4.0]])
    figures = depth_metrics(np.full(z.shape, 0.3), z)
    errors = np.array([5 / 7, 2 / 7, 16 / 7])
    assert figures["absrel"] == pytest.approx((errors / z).mean())
    assert figures["rmse"] == pytest.approx(math.sqrt((errors**2).mean()))
    assert [figures[f"delta{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 2 / 3])  # ratios 12/7, 7/6, 7/3


def test_means_are_over_pictures(scene):
    depth, valid = scene
    noise = np.random.default_rng(5)
    maps = [(depth, valid), (depth[:5, :3] * 2, None), (depth[::-1], ~valid)]
    predictions = [1 / z + noise.normal(0, 0.1, z.shape) for z, _ in maps]
    expected = [depth_metrics(p, z, mask) for p, (z, mask) in zip(predictions, maps, strict=True)]
    hole = np.zeros((2, 2))
    one = np.array([[0.0, 3.0], [math.nan, math.inf]])
    figures = mean_depth_metrics(
        iter([*predictions, hole, hole]), [z for z, _ in maps] + [hole, one], [mask for _, mask in maps] + [None, None]
    )
    assert figures.pop("images") == 3 and figures.pop("images_left_out") == 2
    assert figures == pytest.approx({key: np.mean([item[key] for item in expected]) for key in expected[0]})


def test_bad_sets_of_pictures(scene):
    depth, valid = scene
    with pytest.raises(ValueError, match="no picture has two valid pixels"):
        mean_depth_metrics([depth], [depth], [np.zeros_like(valid)])
    with pytest.raises(ValueError, match="no picture"):
        mean_depth_metrics([], [])
    with pytest.raises(ValueError, match="zip"):
        mean_depth_metrics([depth, depth], [depth])
    with pytest.raises(ValueError, match="zip"):
        mean_depth_metrics([depth], [depth], [])
    with pytest.raises(ValueError, match=r"picture 1: prediction \(5, 17\)"):
        mean_depth_metrics([depth, depth[:5]], [depth, depth])


def test_codebook_usage():
    assert codebook_usage(np.arange(8), 8) == {"codes_used": 8, "perplexity": pytest.approx(8.0)}
    assert codebook_usage(np.zeros((3, 4), int), 8) == {"codes_used": 1, "perplexity": pytest.approx(1.0)}
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert codebook_usage([0, 0, 0, 5], 8) == {"codes_used": 2, "perplexity": pytest.approx(math.exp(entropy))}
    for codes in ([], [8], [-1]):
        with pytest.raises(ValueError, match="expected codes 0 to 7"):
            codebook_usage(codes, 8)


class Quarters:
    """A codec of 4 x 4 codes that keeps the mean of each cell to two bits."""

    class config:
        num_codes = 4

    def encode(self, depth, valid):
        import torch.nn.functional as F

        return (F.adaptive_avg_pool2d(depth[None], 4)[0] * 3.999).long().flatten()

    def decode(self, codes, size):
        import torch.nn.functional as F

        return F.interpolate(codes.view(1, 1, 4, 4).float() / 3, size)[0, 0]


def test_codec_metrics_of_maps_with_and_without_distances(scene):
    metric = [DepthMap.from_metric(scene[0]), DepthMap.from_metric(scene[0][::-1].copy())]
    figures = codec_metrics(Quarters(), metric)
    assert figures["maps"] == 2 and 0 < figures["absrel"] < 1 and figures["codes_used"] <= 4
    relative = [DepthMap(item.relative, item.valid) for item in metric]
    without = codec_metrics(Quarters(), relative)
    assert without["absrel"] is None and without["relative_mae"] == figures["relative_mae"]
    with pytest.raises(ValueError, match="no depth maps"):
        codec_metrics(Quarters(), [])
