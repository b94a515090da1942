"""What has to be float32 is: under casts of the whole model, and whatever torch's settings allow for products."""

import copy
import threading

import pytest
import torch
from helpers import chat, encode, picture

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.modeling.placement import full_precision, multiplies_bfloat16

SMALL = {"image_size": 32, "downsample": 8, "num_codes": 16, "code_dim": 8, "base_channels": 4}
OURS = ("mask_model.", "depth_model.", "seg_projector.")
CASTS = {
    "to a dtype": lambda model: model.to(torch.bfloat16),
    "to a device and a dtype": lambda model: model.to("cpu", torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("name", CASTS)
def test_casting_a_model_leaves_the_spatial_parts_as_they_are(model, name):
    before = {key: value for key, value in model.state_dict().items() if key.startswith(OURS)}
    cast = CASTS[name](copy.deepcopy(model))
    after = cast.state_dict()
    assert len(before) > 100 and all(after[key].dtype == torch.float32 for key in before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    rest = {value.dtype for key, value in after.items() if key not in before}
    assert rest == {cast.dtype} and cast.dtype in (torch.float16, torch.bfloat16)


def test_a_cast_model_answers_with_masks_and_depth(model, processor):
    cast = copy.deepcopy(model).to(torch.bfloat16)
    inputs = encode(processor, chat(picture()))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    out = cast.generate(**inputs, spatial="seg+depth", max_new_tokens=40, return_dict_in_generate=True)
    assert out.mask_logits[0].dtype == out.depth_maps[0].dtype == torch.float32
    assert torch.equal(out.depth_maps[0], model.depth_model.decode(out.depth_codes[0]))


@pytest.mark.parametrize("name", CASTS)
def test_casting_a_codec_changes_no_code(name):
    torch.manual_seed(0)
    codec = DepthVQVAE(DepthVQVAEConfig(**SMALL)).eval()
    depth = torch.rand(8, 32, 32)
    codes = codec.encode(depth)
    cast = CASTS[name](copy.deepcopy(codec))
    assert torch.equal(cast.encode(depth), codes) and torch.equal(cast.decode(codes), codec.decode(codes))
    finer = copy.deepcopy(codec).double()
    assert finer.dtype == torch.float64 and CASTS[name](finer).dtype == torch.float32


def test_gradients_and_moves_go_with_the_parts(model):
    moved = copy.deepcopy(model)
    moved.seg_projector.linear_in.weight.grad = torch.ones_like(moved.seg_projector.linear_in.weight)
    moved.lm_head.weight.grad = torch.ones_like(moved.lm_head.weight)
    moved.to(torch.bfloat16)
    assert moved.seg_projector.linear_in.weight.grad.dtype == torch.float32
    assert moved.lm_head.weight.grad.dtype == torch.bfloat16
    assert moved.lm_head.weight is moved.get_input_embeddings().weight  # still tied
    moved.to("meta")
    assert {value.device.type for value in moved.state_dict().values()} == {"meta"}


BACKENDS = torch.backends


def products() -> list[str]:
    """What torch would do with float32 at this moment."""
    places = (BACKENDS.cudnn.conv, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul)
    return [place.fp32_precision for place in places]


@pytest.fixture
def settings():
    """Puts back what a test sets."""
    found = products()
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    places = (BACKENDS.cudnn.conv, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul)
    for place, value in zip(places, found, strict=True):
        place.fp32_precision = value
    assert products() == found


def all_tf32() -> None:
    BACKENDS.fp32_precision = "tf32"


def legacy_matmul() -> None:
    torch.set_float32_matmul_precision("medium")


def legacy_flags() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True
    BACKENDS.cudnn.allow_tf32 = True


def one_by_one() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"


@pytest.mark.parametrize("choose", [lambda: None, all_tf32, legacy_matmul, legacy_flags, one_by_one])
def test_the_codec_computes_in_float32_whatever_the_settings(settings, choose):
    choose()
    before, seen = products(), []
    codec = DepthVQVAE(DepthVQVAEConfig(**SMALL)).eval()

    def look(*_):
        # torch refuses this question, and products on a GPU, where its two ways of setting them disagree.
        assert not BACKENDS.cuda.matmul.allow_tf32
        seen.append(products())

    for layer in (codec.depth_encoder.project, codec.depth_decoder.project):
        layer.register_forward_hook(look)
    codes = codec.encode(torch.rand(1, 32, 32))
    codec.decode(codes)
    codec.decode_soft(torch.full((1, 16, 16), 1 / 16))
    assert len(seen) == 3 and {value for values in seen for value in values} <= {"ieee", "none"}
    assert products() == before


def test_what_is_inherited_stays_so(settings):
    BACKENDS.fp32_precision = "tf32"
    with full_precision(torch.device("cpu")):
        assert BACKENDS.mkldnn.conv.fp32_precision == "ieee"
    assert BACKENDS.mkldnn.conv.fp32_precision == "tf32"
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.mkldnn.conv.fp32_precision == "ieee"


def test_the_last_of_several_threads_puts_the_settings_back(settings):
    before = products()
    assert before[0] == "tf32"  # torch's default for convolutions on a GPU
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision(torch.device("cpu")):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with full_precision(torch.device("cpu")):
        pass
    assert products()[0] == "ieee"  # the other one still computes
    leave.set()
    thread.join()
    assert products() == before


def test_settings_come_back_after_an_error(settings):
    before = products()
    with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
        raise ZeroDivisionError
    assert products() == before


@pytest.mark.parametrize(
    ("known", "mkldnn", "expected"),
    [
        ({"avx2": True, "avx512_f": False, "avx512_bf16": False}, True, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True, False),
        ({"avx512_f": True, "avx512_bf16": True}, True, True),
        ({"amx_bf16": True}, True, True),
        ({"neon": True, "bf16": True}, True, True),
        ({"neon": True, "bf16": True}, False, False),
        ({"neon": True}, True, False),
    ],
)
def test_a_processor_has_bfloat16_where_it_says_so_and_torch_makes_use_of_it(monkeypatch, known, mkldnn, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(BACKENDS.mkldnn, "is_available", lambda: mkldnn)
    assert multiplies_bfloat16(torch.device("cpu")) is expected


def test_a_gpu_that_emulates_bfloat16_does_not_have_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_bfloat16(torch.device("cuda"))
    assert not multiplies_bfloat16(torch.device("mps"))
