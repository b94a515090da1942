"""The codec as a graph: torch.export, torch.compile and ONNX give what the model gives, and users keep their checks."""

import pytest
import torch
from torch import Tensor, nn

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAEOutput

SMALL = {"image_size": 32, "downsample": 8, "num_codes": 16, "code_dim": 8, "base_channels": 4}


class Encode(nn.Module):
    def __init__(self, codec: DepthVQVAE):
        super().__init__()
        self.codec = codec

    def forward(self, depth: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.codec.encode(depth, valid)


class Decode(Encode):
    def forward(self, codes: Tensor) -> Tensor:
        return self.codec.decode(codes)


class DecodeSoft(Encode):
    def forward(self, probabilities: Tensor) -> Tensor:
        return self.codec.decode_soft(probabilities)


@pytest.fixture(scope="module")
def codec() -> DepthVQVAE:
    torch.manual_seed(0)
    model = DepthVQVAE(DepthVQVAEConfig(**SMALL)).eval()
    model.codebook.mul_(0.3)
    return model


def cases(codec: DepthVQVAE) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Every way in and out, with three maps of another size than the codec's."""
    generator = torch.Generator().manual_seed(1)
    depth, valid = torch.rand(3, 45, 37, generator=generator), torch.rand(3, 45, 37, generator=generator) < 0.6
    valid[:, :20] = False  # larger than what one step of filling reaches
    probabilities = torch.rand(3, 16, 16, generator=generator).softmax(-1)
    return {
        "encode": (Encode(codec), (depth,)),
        "encode with holes": (Encode(codec), (depth, valid)),
        "decode": (Decode(codec), (codec.encode(depth),)),
        "decode_soft": (DecodeSoft(codec), (probabilities,)),
    }


CASES = ("encode", "encode with holes", "decode", "decode_soft")


def same(found: Tensor, wanted: Tensor) -> None:
    """Codes are the same ones; depth differs by rounding of a few layers."""
    if wanted.is_floating_point():
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_export_with_any_batch_size(codec, name, strict):
    module, inputs = cases(codec)[name]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=strict)
    same(program.module()(*inputs), module(*inputs))
    one = tuple(value[1:2] for value in inputs)
    same(program.module()(*one), module(*one))


@pytest.mark.parametrize("name", CASES)
def test_compile_in_one_graph(codec, name):
    module, inputs = cases(codec)[name]
    torch._dynamo.reset()
    same(torch.compile(module, fullgraph=True, backend="eager")(*inputs), module(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_onnx(codec, name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, inputs = cases(codec)[name]
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in inputs)
    torch.onnx.export(module, inputs, tmp_path / "codec.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(tmp_path / "codec.onnx")
    for given in (inputs, tuple(value[1:2] for value in inputs)):
        feed = {place.name: value.numpy() for place, value in zip(session.get_inputs(), given, strict=True)}
        same(torch.from_numpy(session.run(None, feed)[0]), module(*given))


def test_a_whole_pass_can_be_exported(codec):
    depth = torch.rand(2, 32, 32)
    found = torch.export.export(codec, (depth,)).module()(depth)
    assert isinstance(found, DepthVQVAEOutput) and torch.equal(found.codes, codec.encode(depth))


def test_a_plain_tuple_by_argument_and_by_configuration(codec):
    depth = torch.rand(2, 32, 32)
    whole = codec(depth)
    found = codec(depth, return_dict=False)
    assert type(found) is tuple and len(found) == len(whole.to_tuple())
    torch.testing.assert_close(found, whole.to_tuple())
    quiet = DepthVQVAE(DepthVQVAEConfig(**SMALL, return_dict=False)).eval()
    assert type(quiet(depth)) is tuple and isinstance(quiet(depth, return_dict=True), DepthVQVAEOutput)
