"""AURORA's depth VQ-VAE -> `DepthVQVAE`, beside a formula of that network over the tensors of its file."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_alike
from original_aurora import aurora_tensors
from safetensors.torch import save_file
from torch import Tensor

from perceptio_hf.conversion.aurora import load_aurora
from perceptio_hf.conversion.keys import ConversionReport

Tensors = dict[str, Tensor]


def formula(tensors: Tensors, grey: Tensor) -> tuple[Tensor, Tensor]:
    """Grey levels in -1..1, (B, 1, S, S) -> codes (B, N) and the decoder's output (B, 1, S, S), also about -1..1.

    The layers in the order of the file: strided convolutions with ReLU, residual blocks, a 1x1 convolution; the
    nearest code; and back.
    """

    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], **options)

    def residual(name: str, x: Tensor) -> Tensor:
        y = F.relu(conv(f"{name}.net.0", x, padding=1))
        y = F.relu(conv(f"{name}.net.2", y, padding=1))
        return conv(f"{name}.net.4", y) + x

    hidden, index = grey, 0
    while tensors.get(f"encoder.{index}.weight", torch.empty(1)).shape[-1] == 4:
        hidden, index = F.relu(conv(f"encoder.{index}", hidden, stride=2, padding=1)), index + 2
    while f"encoder.{index}.net.0.weight" in tensors:
        hidden, index = residual(f"encoder.{index}", hidden), index + 1
    latents = conv(f"encoder.{index}", hidden).permute(0, 2, 3, 1)  # (B, g, g, d)
    book = tensors["_vq_vae._embedding"]
    codes = (latents[..., None, :] - book).square().sum(-1).argmin(-1)  # (B, g, g)

    hidden, index = F.relu(conv("decoder.0", book[codes].permute(0, 3, 1, 2))), 2
    while f"decoder.{index}.net.0.weight" in tensors:
        hidden, index = residual(f"decoder.{index}", hidden), index + 1
    while tensors[f"decoder.{index}.weight"].shape[-1] == 4:
        weight, bias = tensors[f"decoder.{index}.weight"], tensors[f"decoder.{index}.bias"]
        hidden, index = F.relu(F.conv_transpose2d(hidden, weight, bias, stride=2, padding=1)), index + 2
    return codes.flatten(1), conv(f"decoder.{index}", hidden)


def depth_maps(count: int, side: int, seed: int = 1) -> Tensor:
    """Smooth random relative inverse depth, (count, side, side) in [0, 1]."""
    coarse = torch.rand(count, 1, 7, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)[:, 0]


def saved(tensors: Tensors, path) -> str:
    torch.save({"weights": tensors}, path)
    return str(path)


@pytest.mark.parametrize(
    ("sizes", "image_size"),
    [
        ({}, 320),  # AURORA's depth of layers
        ({"stages": 5, "blocks": 2, "width": 16, "codes": 128, "length": 512}, 320),  # AURORA's sizes
        ({"stages": 4, "blocks": 1, "codes": 7}, 48),
        ({"stages": 1, "blocks": 0, "width": 3, "length": 5}, 14),
        ({"stages": 3, "blocks": 3}, 40),
    ],
)
@torch.no_grad()
def test_codes_and_depth_are_those_of_the_original(tmp_path, sizes, image_size):
    tensors = aurora_tensors(**sizes)
    codec = load_aurora(saved(tensors, tmp_path / "vae-final.pt"), image_size=image_size)
    depth = depth_maps(3, image_size)
    codes, grey = formula(tensors, 2 * depth[:, None] - 1)
    assert torch.equal(codec.encode(depth), codes)
    assert len(codes.unique()) > 1  # else it would say little
    expected = ((grey[:, 0] + 1) / 2).clamp(0, 1)
    assert (codec.decode(codes) - expected).abs().max() <= 1e-5
    assert codec.config.downsample == 2 ** sizes.get("stages", 5)


@torch.no_grad()
def test_the_range_of_values_can_be_said(tmp_path):
    """MolmoAct encodes grey levels in 0..1."""
    tensors = aurora_tensors()
    codec = load_aurora(saved(tensors, tmp_path / "x.pt"), image_size=64, value_low=0.0)
    depth = depth_maps(2, 64)
    codes, grey = formula(tensors, depth[:, None])
    assert torch.equal(codec.encode(depth), codes)
    assert (codec.decode(codes) - grey[:, 0].clamp(0, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("value_low", [-1.0, 0.0])
def test_the_picture_molmoact_draws(tmp_path, value_low):
    """Its script moves the decoder's output to 0..1 by its own minimum and maximum, and so loses nothing beyond."""
    tensors = aurora_tensors()
    codec = load_aurora(saved(tensors, tmp_path / "vae.pt"), image_size=64, value_low=value_low)
    codes, drawn = formula(tensors, depth_maps(3, 64)[:, None] * 2 - 1)
    low, high = drawn.amin((1, 2, 3), keepdim=True), drawn.amax((1, 2, 3), keepdim=True)
    expected = ((drawn - low) / (high - low))[:, 0]
    assert (codec.decode(codes, stretch=True) - expected).abs().max() <= 1e-5
    assert (codec.decode(codes) - expected).abs().max() > 0.05
    assert (codec.decode(codes[0], stretch=True) - expected[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bare.pt", "module.pt", "wrapped_module.pt", "x.safetensors"])
def test_every_way_to_save_it(tmp_path, kind):
    tensors, path = aurora_tensors(), tmp_path / kind
    module = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if kind == "x.safetensors":
        save_file(tensors, path)
    else:
        torch.save({"bare.pt": tensors, "module.pt": module}.get(kind, {"weights": module}), path)
    codec, plain = load_aurora(path), load_aurora(saved(tensors, tmp_path / "plain.pt"))
    mine, theirs = codec.state_dict(), plain.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert torch.equal(mine["depth_codebook.ema_count"], tensors["_vq_vae._ema_cluster_size"])
    assert torch.equal(mine["depth_codebook.ema_sum"], tensors["_vq_vae._ema_w"])


def test_a_saved_codec_is_the_same(tmp_path):
    from perceptio_hf import DepthVQVAE

    codec = load_aurora(saved(aurora_tensors(), tmp_path / "x.pt"), image_size=64, value_low=0.0)
    codec.save_pretrained(tmp_path / "codec")
    again = DepthVQVAE.from_pretrained(tmp_path / "codec")
    depth = depth_maps(2, 64)
    assert torch.equal(again.encode(depth), codec.encode(depth))
    assert all(torch.equal(value, codec.state_dict()[name]) for name, value in again.state_dict().items())
    assert_alike(again.decode(codec.encode(depth)), codec.decode(codec.encode(depth)), width=1024)


def test_a_codebook_without_moving_averages(tmp_path):
    tensors = aurora_tensors()
    vectors = tensors.pop("_vq_vae._embedding")
    del tensors["_vq_vae._ema_cluster_size"], tensors["_vq_vae._ema_w"]
    report = ConversionReport("x.pt")
    codec = load_aurora(saved({**tensors, "_vq_vae._embedding.weight": vectors}, tmp_path / "x.pt"), report=report)
    assert torch.equal(codec.codebook, vectors)
    assert torch.equal(codec.depth_codebook.ema_sum, vectors) and bool((codec.depth_codebook.ema_count == 1).all())
    assert set(report.added) == {"depth_codebook.ema_count", "depth_codebook.ema_sum"}


def test_the_report(tmp_path):
    report = ConversionReport("x.pt")
    load_aurora(saved(aurora_tensors(), tmp_path / "x.pt"), report=report)
    assert report.num_read == len(report.mapped) == len(aurora_tensors()) and not report.ignored
    assert report.mapped["encoder.11.net.4.bias"] == "depth_encoder.blocks.1.conv3.bias"
    assert "24 codes of 12, 10 x 10" in report.layout


def without(name: str) -> Tensors:
    return {key: tensor for key, tensor in aurora_tensors().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(1)}, r"unexpected a; missing encoder\.0\.weight \(and 2 more\)"),
        (without("decoder.4.bias"), r"missing depth_decoder\.up\.0\.bias"),
        (without("_vq_vae._embedding"), r"missing _vq_vae\._embedding"),
        (without("_vq_vae._ema_w"), r"missing depth_codebook\.ema_sum"),
        ({**aurora_tensors(), "decoder.99.weight": torch.ones(1)}, r"unexpected decoder\.99\.weight"),
        # AiT's other kind of residual block
        (
            {**aurora_tensors(), "encoder.10.net.1.running_mean": torch.ones(64)},
            r"unexpected encoder\.10\.net\.1\.running",
        ),
        (
            {**aurora_tensors(), "decoder.2.net.0.bias": torch.ones(3)},
            r"decoder\.2\.net\.0\.bias is \(3,\), expected \(64,\)",
        ),
        (
            {**aurora_tensors(), "encoder.0.weight": torch.ones(4, 3, 4, 4)},
            r"encoder\.0\.weight is \(4, 3, 4, 4\); depth has",
        ),
        ({**aurora_tensors(), "decoder.0.bias": torch.full((64,), torch.nan)}, r"decoder\.0\.bias holds NaN"),
        (
            {**aurora_tensors(), "_vq_vae._embedding": torch.ones(24)},
            r"_embedding is \(24,\); expected \(codes",
        ),
    ],
)
def test_what_is_no_depth_vqvae_is_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=rf"x\.pt is not a depth VQ-VAE .*{message}"):
        load_aurora(saved(tensors, tmp_path / "x.pt"))


def test_a_side_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`image_size` 100 is not a multiple of `downsample` 32"):
        load_aurora(saved(aurora_tensors(), tmp_path / "x.pt"), image_size=100)
