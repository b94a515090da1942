"""Parts of a model on disk, in shards, or on another device than the rest."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import chat, encode, picture, random_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from perceptio_hf import PerceptioForConditionalGeneration

PARTS = ("model", "lm_head", "seg_projector", "mask_model", "depth_model")


@pytest.fixture(scope="module")
def inputs(processor):
    return encode(processor, chat(picture(seed=1)), chat(picture(30, 60, seed=2), text="What is red here?"))


@pytest.fixture(scope="module")
def whole(processor):
    return random_model(processor, tie=False)


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("untied")
    whole.save_pretrained(path)
    return path


def same_result(model, whole, inputs):
    options = {"spatial": "seg+depth", "max_new_tokens": 40, "return_dict_in_generate": True}
    out, expected = model.generate(**inputs, **options), whole.generate(**inputs, **options)
    assert torch.equal(out.sequences, expected.sequences)
    for read in (out, model.decode_spatial(out.sequences, **inputs)):
        for name in ("mask_logits", "depth_maps", "depth_confidence"):
            for ours, theirs in zip(getattr(read, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("on_disk", [*PARTS, "model.language_model"])
def test_parts_on_disk(whole, folder, inputs, on_disk, tmp_path):
    parts = [part for part in PARTS if part != "model"]
    parts += ["model"] if on_disk in PARTS else ["model.vision_tower", "model.multi_modal_projector", on_disk]
    places = {part: "disk" if part == on_disk else "cpu" for part in parts}
    model = PerceptioForConditionalGeneration.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    same_result(model.eval(), whole, inputs)


def test_parameters_that_exist_only_in_their_modules_forward(whole, inputs):
    """What ZeRO-3 does, and any engine that gathers shards module by module."""
    model = copy.deepcopy(whole)
    full = {id(parameter): parameter.data.clone() for parameter in model.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = full[id(parameter)]

    def free(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(free)
        free(module)
    same_result(model, whole, inputs)


class _IndexDevices(TorchDispatchMode):
    """What the index kernels of GPUs check and fake tensors do not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = (torch.ops.aten._index_put_impl_.default, torch.ops.aten.index_put_.default)
        if func in (torch.ops.aten.index.Tensor, *writes):
            for index in args[1]:
                if index is not None and index.device != torch.device("cpu") and index.device != args[0].device:
                    raise RuntimeError(f"index on {index.device}, indexed tensor on {args[0].device}")
            if func in writes and args[2].ndim and args[2].device != args[0].device:
                raise RuntimeError(f"values on {args[2].device}, indexed tensor on {args[0].device}")
        return func(*args, **(kwargs or {}))


def _hook_for(device):
    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return [move(item) for item in value] if isinstance(value, list) else value

    def hook(module, args, kwargs):
        return tuple(move(value) for value in args), {key: move(value) for key, value in kwargs.items()}

    return hook


def _place(module, device):
    """Give a model on meta its fake parameters on `device`, and its modules the hooks of accelerate's."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=device))
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
        part.register_forward_pre_hook(_hook_for(device), with_kwargs=True)


@pytest.mark.parametrize("pixels_on", ["cpu", "cpu:0", "cpu:1"])
@pytest.mark.parametrize("masks_on", ["cpu:0", "cpu:1"])
def test_parts_on_several_devices(whole, masks_on, pixels_on):
    """Two devices beside the host; fake tensors know where they are and compute shapes only."""
    config = whole.config
    with torch.device("meta"):
        model = PerceptioForConditionalGeneration(config).eval()
    side = config.mask_config.prompt_encoder_config.image_size
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), _IndexDevices(), torch.no_grad():
        for part in (model.model, model.lm_head, model.seg_projector):
            _place(part, "cpu:0")
        for part in (model.mask_model, model.depth_model):
            _place(part, masks_on)
        states = torch.empty(3, config.text_config.hidden_size, device="cpu:0")
        pixels = torch.empty(2, 3, side, side, device=pixels_on)
        masks, _ = model.predict_masks(states, pixels, [1, 0, 1])
        assert masks.shape == (3, *model.mask_size) and masks.device == torch.device(masks_on)
        assert model.depth_model.device == torch.device(masks_on)
        probabilities = torch.empty(2, config.num_depth_tokens, config.num_depth_codes, device=masks_on)
        depth = model.depth_model.decode_soft(probabilities)
        assert depth.device == torch.device(masks_on)


def test_the_last_layers_on_another_device(whole):
    """As `device_map="auto"` cuts a model: indices come where it begins, and states are where it ends."""
    with torch.device("meta"):
        model = PerceptioForConditionalGeneration(whole.config).eval()
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), _IndexDevices(), torch.no_grad():
        _place(model.model, "cpu:0")
        model.model.language_model.norm._forward_pre_hooks.clear()
        for part in (model.model.language_model.norm, model.lm_head):
            _place(part, "cpu:1")
        ids = torch.zeros(2, 5, dtype=torch.long, device="cpu:0")
        none, places = ids.new_empty(0), ids.new_zeros(2)
        given = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": False}
        codes = model(**given, logits_to_keep=none, code_ids=ids.new_tensor(model.config.depth_token_ids))
        word = model(**given, logits_to_keep=none, word_places=places)
    assert codes.logits.shape[1] == 0 and codes.code_logits.shape[:2] == (2, 5)
    assert word.logits.shape[:2] == (2, 1) and word.logits.device == torch.device("cpu:1")


def test_a_head_in_shards_of_tensor_parallelism(whole, inputs, tmp_path):
    """Its weight is a tensor of another kind, of which rows cannot be taken for a product with plain states."""
    model = copy.deepcopy(whole)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
        assert type(model.lm_head) is torch.nn.Linear and isinstance(model.lm_head.weight.data, DTensor)
        same_result(model, whole, inputs)
    finally:
        dist.destroy_process_group()
