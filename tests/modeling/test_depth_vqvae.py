"""The depth codec as a model: the contract of encode, decode and decode_soft, holes, saving, and what stays frozen."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_alike
from torch import nn

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import fill_holes

SMALL = {"image_size": 32, "downsample": 8, "num_codes": 16, "code_dim": 8, "base_channels": 4}


@pytest.fixture(scope="module")
def codec() -> DepthVQVAE:
    torch.manual_seed(0)
    model = DepthVQVAE(DepthVQVAEConfig(**SMALL)).eval()
    model.codebook.mul_(0.3)  # near the latents, so that many codes occur
    return model


@pytest.fixture
def depth() -> torch.Tensor:
    return torch.rand(3, 45, 37, generator=torch.Generator().manual_seed(1))


def holes_like(depth: torch.Tensor) -> torch.Tensor:
    return torch.rand(depth.shape, generator=torch.Generator().manual_seed(2)) < 0.7


def test_defaults_are_the_published_vqvae():
    config = DepthVQVAEConfig()
    assert (config.image_size, config.downsample, config.num_codes, config.code_dim) == (320, 32, 128, 512)
    assert (config.grid_size, config.num_tokens) == (10, 100)
    assert (config.value_low, config.value_high, config.activation) == (-1.0, 1.0, "relu")


def test_layers_compute_what_the_published_layout_does():
    """The table of the module docstring, checked by running its right-hand column."""
    config = DepthVQVAEConfig(**SMALL)
    model = DepthVQVAE(config).eval()
    n, r, channels = 3, config.num_residual_blocks, [4, 8, 16]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Conv2d(16, 16, 1))

        def forward(self, x):
            return self.net(x) + x

    encoder, width = [], 1
    for wider in channels:
        encoder += [nn.Conv2d(width, wider, 4, 2, 1), nn.ReLU()]
        width = wider
    encoder = nn.Sequential(*encoder, *[Block() for _ in range(r)], nn.Conv2d(16, 8, 1))
    decoder = [nn.Conv2d(8, 16, 1), nn.ReLU(), *[Block() for _ in range(r)]]
    for wide, narrow in ((16, 16), (16, 8), (8, 4)):
        decoder += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.ReLU()]
    decoder = nn.Sequential(*decoder, nn.Conv2d(4, 1, 1))

    ours = model.state_dict()

    def rename(key: str, here: str, pairs: dict[str, str]) -> str:
        head, rest = key.split(".", 1)
        if rest.startswith("net."):
            layer, name = rest[4:].split(".")
            rest = f"conv{int(layer) // 2 + 1}.{name}"
        return f"{here}.{pairs[head]}.{rest}"

    down = {str(2 * i): f"down.{i}" for i in range(n)} | {str(2 * n + j): f"blocks.{j}" for j in range(r)}
    up = {"0": "project"} | {str(2 + j): f"blocks.{j}" for j in range(r)}
    up |= {str(2 + r + 2 * i): f"up.{i}" for i in range(n)} | {str(2 + r + 2 * n): "out"}
    down |= {str(2 * n + r): "project"}
    encoder.load_state_dict({k: ours[rename(k, "depth_encoder", down)] for k in encoder.state_dict()})
    decoder.load_state_dict({k: ours[rename(k, "depth_decoder", up)] for k in decoder.state_dict()})
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        latents = encoder(grey * 2 - 1).permute(0, 2, 3, 1).reshape(-1, 8)
        distance = latents.square().sum(1, True) + model.codebook.square().sum(1) - 2 * latents @ model.codebook.T
        codes = distance.argmin(1).view(2, 16)
        decoded = decoder(model.codebook[codes].view(2, 4, 4, 8).permute(0, 3, 1, 2))[:, 0]
    assert torch.equal(model.encode(grey), codes)
    torch.testing.assert_close(model.decode(codes), (decoded * 0.5 + 0.5).clamp(0, 1))


def test_shapes_and_types(codec, depth):
    codes = codec.encode(depth)
    assert codes.shape == (3, 16) and codes.dtype == torch.int64
    assert torch.equal(codec.encode(depth[:, None]), codes)
    assert torch.equal(codec.encode(depth[0]), codes[0])
    decoded = codec.decode(codes)
    assert decoded.shape == (3, 32, 32) and decoded.dtype == torch.float32
    assert decoded.min() >= 0 and decoded.max() <= 1
    assert codec.decode(codes[0]).shape == (32, 32)
    assert codec.decode(codes, size=(45, 37)).shape == (3, 45, 37)
    assert codec.decode(codes[0], size=(7, 90)).shape == (7, 90)
    assert len(codes.unique()) > 4


def test_a_batch_equals_its_maps_one_by_one(codec, depth):
    valid = holes_like(depth)
    valid[1] = True
    together = codec.encode(depth, valid)
    assert torch.equal(together, torch.stack([codec.encode(d, v) for d, v in zip(depth, valid, strict=True)]))
    torch.testing.assert_close(codec.decode(together), torch.stack([codec.decode(row) for row in together]))


def test_soft_decoding_of_one_hot_rows_is_decoding(codec, depth):
    codes = codec.encode(depth)
    one_hot = F.one_hot(codes, 16).float()
    assert_alike(codec.decode_soft(one_hot), codec.decode(codes))
    assert_alike(codec.decode_soft(one_hot[0], size=(9, 9)), codec.decode(codes[0], size=(9, 9)))


def test_soft_decoding_is_differentiable(codec):
    logits = torch.randn(2, 16, 16, requires_grad=True)
    codec.decode_soft(logits.softmax(-1)).mean().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_what_is_under_holes_does_not_matter(codec, depth):
    valid = holes_like(depth)
    codes = codec.encode(depth, valid)
    for value in (0.0, 1.0, -5.0, 1e30, math.nan, math.inf):
        assert torch.equal(codec.encode(torch.where(valid, depth, value), valid), codes)


def test_holes_are_filled_from_their_surroundings(codec):
    depth = torch.linspace(0.2, 0.8, 64).expand(64, 64).clone()
    valid = torch.ones(64, 64, dtype=torch.bool)
    valid[20:44, 20:44] = False
    filled, weight = codec.prepare(depth, valid)
    whole, _ = codec.prepare(depth)
    assert filled.shape == weight.shape == (1, 1, 32, 32)
    assert (filled - whole).abs().max() < 0.15
    assert weight.min() == 0 and weight.max() == 1
    # A constant map with holes stays constant, whatever size it comes in.
    for size in ((64, 64), (31, 50), (7, 5), (32, 32)):
        flat, holes = torch.full(size, 0.25), torch.rand(size) < 0.3
        holes[0, 0] = True
        torch.testing.assert_close(codec.prepare(flat, holes)[0], torch.full((1, 1, 32, 32), 0.25))


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (17, 32)])
def test_filling_from_a_single_pixel(size):
    weight = torch.zeros(1, 1, *size)
    weight[..., -1, 0] = 1.0
    torch.testing.assert_close(fill_holes(weight * 0.7, weight), torch.full((1, 1, *size), 0.7))


def test_saved_equals_loaded(codec, depth, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = DepthVQVAE.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == codec.config.to_diff_dict() | loaded.config.to_diff_dict()
    assert loaded.state_dict().keys() == codec.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in codec.state_dict().items())
    assert torch.equal(loaded.encode(depth), codec.encode(depth))


def test_loading_in_half_precision_keeps_float32(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = DepthVQVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}


def test_buffers_missing_from_a_checkpoint_are_initialised(codec, tmp_path):
    state = {k: v for k, v in codec.state_dict().items() if "ema" not in k}
    codec.save_pretrained(tmp_path, state_dict=state)
    book = DepthVQVAE.from_pretrained(tmp_path).depth_codebook
    assert torch.equal(book.ema_count, torch.ones(16)) and torch.equal(book.ema_sum, codec.codebook)


def test_half_precision_input_and_autocast_do_not_change_codes(codec, depth):
    codes = codec.encode(depth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(depth), codes)
        inside = codec.decode(codes)
    assert_alike(inside, codec.decode(codes))  # which also says float32
    assert codec.decode_soft(F.one_hot(codes, 16).bfloat16()).dtype == torch.float32
    assert torch.equal(codec.encode(depth.double()), codes)


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_never_changes_buffers(codec, depth, training):
    before = {k: v.clone() for k, v in codec.state_dict().items()}
    codec.train(training)
    codec(depth).loss.backward()
    codec.eval()
    codec.zero_grad()
    assert all(torch.equal(before[k], v) for k, v in codec.state_dict().items())


def test_forward_gives_losses_over_valid_pixels_and_gradients_everywhere(codec, depth):
    depth = F.interpolate(depth[:, None], (32, 32))[:, 0]
    valid = holes_like(depth)
    codec.zero_grad()
    output = codec(depth, valid)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())
    codec.zero_grad()
    assert output.reconstruction.shape == (3, 32, 32) and output.latents.shape == (3, 16, 8)
    assert torch.equal(output.codes, codec.encode(depth, valid))
    # naive: the unclamped reconstruction, pixel by pixel
    vectors = codec.codebook[output.codes].transpose(1, 2).reshape(3, 8, 4, 4)
    raw = (codec.depth_decoder(vectors)[:, 0] + 1) / 2
    naive = (raw - depth)[valid].abs().mean()
    torch.testing.assert_close(output.reconstruction_loss, naive, rtol=1e-4, atol=1e-6)
    parts = output.reconstruction_loss + 0.5 * output.gradient_loss + 0.25 * output.commitment_loss
    torch.testing.assert_close(output.loss, parts)


def bad_depth(value: float) -> torch.Tensor:
    depth = torch.full((2, 8, 8), 0.5)
    depth[1, 3, 3] = value
    return depth


@pytest.mark.parametrize(
    ("depth", "valid", "message"),
    [
        (bad_depth(math.nan), None, "Depth map 1 holds nan"),
        (bad_depth(math.inf), None, "Depth map 1 holds inf"),
        (bad_depth(3.5), None, r"holds 3.5 .* \[0, 1\]"),
        (torch.rand(2, 8, 8), torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), "Depth map 1 has no valid pixel"),
        (torch.rand(2, 8, 8), torch.ones(2, 8, 9), "the same shape"),
        (torch.rand(8), None, "expected"),
        (torch.rand(2, 3, 8, 8), None, "expected"),
        (torch.rand(2, 0, 8), None, "expected"),
        (torch.ones(2, 8, 8, dtype=torch.int64), None, "floating point"),
        ([[0.1]], None, "torch tensor"),
    ],
)
def test_bad_depth_is_refused(codec, depth, valid, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(depth, valid)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 15, dtype=torch.int64), r"expected \(batch, 16\)"),
        (torch.zeros(1, 2, 16, dtype=torch.int64), r"expected \(batch, 16\)"),
        (torch.tensor([[0] * 16, [0] * 15 + [16]]), "Row 1 of `codes` holds 16"),
        (torch.tensor([-1] + [0] * 15), "Row 0 of `codes` holds -1"),
        (torch.zeros(16), "expected integers"),
    ],
)
def test_bad_codes_are_refused(codec, codes, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(codes)


@pytest.mark.parametrize("shape", [(2, 16, 15), (2, 15, 16), (16,), (1, 2, 16, 16)])
def test_bad_probabilities_are_refused(codec, shape):
    with pytest.raises(ValueError, match="`probabilities` has shape"):
        codec.decode_soft(torch.zeros(shape))


@pytest.mark.parametrize(
    "fields",
    [
        {"downsample": 12},
        {"downsample": 1},
        {"image_size": 100},
        {"num_codes": 0},
        {"num_residual_blocks": -1},
        {"value_low": 1.0},
        {"depth_ratio": 0.5},
        {"value_high": math.inf},
        {"commitment_weight": math.nan},
        {"gradient_weight": -1.0},
    ],
)
def test_bad_configs_are_refused(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}`"):
        DepthVQVAEConfig(**fields)
