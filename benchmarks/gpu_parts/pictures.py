"""Pictures in and out: SAM2 and its decoder, the depth codec and its training, labels from a depth teacher."""

import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig

from .tools import device_ms, part, peak_memory, perceptio_config, random_model, seconds_of


@part(seconds=12)
def masks(setup, record):
    """SAM2.1-large at 1024 pixels beside the 1B shape: encoder, and k masks of one picture."""
    config = perceptio_config(setup, layers=1)
    model = random_model(setup, config, torch.bfloat16)
    side = config.mask_config.prompt_encoder_config.image_size
    states = torch.randn(8, config.text_config.hidden_size, device=setup.device)
    for pictures in setup.size((1, 8), (1,)):
        pixels = torch.randn(pictures, 3, side, side, device=setup.device)
        for half in (False, True):
            name = f"encoder, {pictures} pictures, {'bfloat16 autocast' if half else 'float32'}"
            with record.case(name) as figures, torch.no_grad():
                with peak_memory(setup) as memory, torch.autocast(setup.device.type, torch.bfloat16, enabled=half):
                    figures["ms"] = device_ms(setup, lambda pixels=pixels: model.encode_mask_pixels(pixels), repeats=5)
                figures["memory_gib"] = memory["allocated"] / 2**30
    pixels = torch.randn(1, 3, side, side, device=setup.device)
    with torch.no_grad(), model.keep_mask_features(1):
        for count in (1, 2, 8):
            with record.case(f"decoder, {count} masks of a known picture") as figures:
                run = lambda count=count: model.predict_masks(states[:count], pixels, [0] * count)  # noqa: E731
                figures["ms"] = 1000 * seconds_of(setup, run, repeats=setup.size(10, 1), warm=2)
    with torch.no_grad():
        for count in (1, 8):
            with record.case(f"whole, {count} masks") as figures:
                run = lambda count=count: model.predict_masks(states[:count], pixels, [0] * count)  # noqa: E731
                figures["ms"] = 1000 * seconds_of(setup, run, repeats=setup.size(5, 1), warm=2)


@part(seconds=8)
def codec(setup, record):
    """The codec of real checkpoints: encode, decode, and steps of its training a second."""
    config = perceptio_config(setup).depth_config
    model = DepthVQVAE(config).eval().to(setup.device)
    for batch in setup.size((1, 8, 64), (2,)):
        depth = torch.rand(batch, config.image_size, config.image_size, device=setup.device)
        with record.case(f"batch {batch}") as figures:
            codes = model.encode(depth)
            figures["encode_ms"] = 1000 * seconds_of(setup, lambda d=depth: model.encode(d), repeats=5, warm=2)
            figures["decode_ms"] = 1000 * seconds_of(setup, lambda c=codes: model.decode(c), repeats=5, warm=2)
            figures["maps_per_second"] = 1000 * batch / figures["encode_ms"]
    for batch in setup.size((8, 32, 128), (2,)):
        for name, dtype in (("float32", None), ("bfloat16 autocast", torch.bfloat16)):
            with record.case(f"training, batch {batch}, {name}") as figures:
                with peak_memory(setup) as memory:
                    step = _codec_step(setup, config, batch, dtype)
                    figures["steps_per_second"] = 1 / seconds_of(setup, step, repeats=setup.size(10, 1), warm=3)
                figures["maps_per_second"] = batch * figures["steps_per_second"]
                figures["memory_gib"] = memory["allocated"] / 2**30
    with record.case("train_codebook, batch 32, with its order, k-means and moves") as figures:
        measure_codebook(setup, figures, config)


def measure_codebook(setup, figures: dict, config: DepthVQVAEConfig) -> None:
    """The loop of `perceptio codebook train`: 60 steps, maps in memory."""
    from accelerate import Accelerator

    from perceptio_hf.data.depth_maps import DepthMap
    from perceptio_hf.training.codec import CodebookOptions, DepthBank, train_codebook

    rows, columns = np.mgrid[: config.image_size, : config.image_size] / config.image_size
    maps = [DepthMap.from_metric(1 + rows * (1 + k % 3) + columns * (k % 5)) for k in range(setup.size(256, 4))]
    bank = DepthBank.gather(maps, config)
    options = CodebookOptions(batch_size=setup.size(32, 2))
    accelerator, steps = Accelerator(cpu=not setup.is_cuda), setup.size(60, 4)
    run = lambda: train_codebook(config, bank, steps=steps, options=options, accelerator=accelerator)  # noqa: E731
    figures["seconds_with_start_and_end"] = seconds_of(setup, run)
    figures["steps"] = steps


def _codec_step(setup, config: DepthVQVAEConfig, batch: int, dtype: torch.dtype | None):
    """A step as `perceptio_hf.training.codec` takes it on the processor."""
    model = DepthVQVAE(config).train().to(setup.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    depth = torch.rand(batch, 1, config.image_size, config.image_size, device=setup.device)
    depth = depth.to(memory_format=torch.channels_last)
    weight = torch.ones_like(depth)

    def step() -> None:
        with torch.autocast(setup.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = model.losses(depth, weight, quantise=True)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _teacher(setup) -> DepthAnythingForDepthEstimation:
    """Depth Anything V2 small; in a quick run a tiny one."""
    if setup.quick:
        backbone = Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
        )
        more = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 8}
    else:
        backbone = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
        more = {"neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "head_hidden_size": 32}
    layers = backbone.num_hidden_layers
    backbone.patch_size, backbone.apply_layernorm, backbone.reshape_hidden_states = 14, True, False
    backbone._out_features = [f"stage{layers * (k + 1) // 4}" for k in range(4)]
    backbone._out_indices = [layers * (k + 1) // 4 for k in range(4)]
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=backbone.hidden_size, **more)
    model = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 / parameter[0].numel() ** 0.5)
        # Some weights give nothing above the ReLU that ends it: a map without depth, of which there are no codes.
        model.head.conv3.weight.abs_()
    return model.to(setup.device)


@part(seconds=10)
def labels(setup, record):
    """From pictures on the host to depth codes on the host: teacher, relative depth, codec."""
    teacher = _teacher(setup)
    codec = DepthVQVAE(perceptio_config(setup).depth_config).eval().to(setup.device)
    side = setup.size(518, 28)
    for dtype in (torch.float32, torch.bfloat16):
        teacher = teacher.to(dtype)
        for batch in setup.size((1, 16, 64), (2,)):
            pictures = np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), dtype=np.uint8)
            with record.case(f"{str(dtype).removeprefix('torch.')}, batch {batch}") as figures, torch.inference_mode():
                measure_labels(setup, figures, teacher, codec, torch.from_numpy(pictures), dtype)
    with record.case("perceptio label's worker, photographs of 640 x 480") as figures:
        measure_worker(setup, figures, teacher.float(), codec)


def measure_worker(setup, figures: dict, teacher, codec: DepthVQVAE) -> None:
    """A batch from JPEG files to codes as `perceptio label` does it: reading, which several threads share, and work."""
    from transformers import DPTImageProcessor

    from perceptio_hf.bulk.item import Item
    from perceptio_hf.labelling.teacher import Teacher, teacher_info
    from perceptio_hf.labelling.worker import Labeller

    with tempfile.TemporaryDirectory() as folder:
        side, rows = setup.size(518, 28), setup.size(32, 2)
        teacher.save_pretrained(folder)
        resize = {"size": {"height": side, "width": side}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
        DPTImageProcessor(**resize).save_pretrained(folder)
        generator, items = np.random.default_rng(0), []
        for number in range(rows):
            path = f"{folder}/{number}.jpg"
            noise = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            noise.resize((640, 480)).save(path)
            items.append(Item(number, str(number), path, path))
        labeller = Labeller(Teacher(teacher_info(folder), str(setup.device)), codec, maps=False)
        read = labeller.read(items)
        figures["pictures"] = rows
        figures["read_seconds"] = seconds_of(setup, lambda: labeller.read(items))
        figures["work_seconds"] = seconds_of(setup, lambda: labeller.work(items, read), repeats=2, warm=1)
        figures["pictures_per_second_of_work"] = rows / figures["work_seconds"]
        failed = [result.record for result in labeller.work(items, read) if not result.record.get("codes")]
        assert not failed, failed


def measure_labels(setup, figures: dict, teacher, codec: DepthVQVAE, pictures: torch.Tensor, dtype) -> None:
    """pictures: (batch, 3, S, S) uint8 on the host."""
    size, repeats = codec.config.image_size, setup.size(5, 1)

    def label() -> torch.Tensor:
        depth = teacher(pictures.to(setup.device).to(dtype).div_(127.5).sub_(1.0)).predicted_depth.float()
        low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
        depth = (depth - low) / (high - low).clamp_min(1e-6)
        depth = F.interpolate(depth[:, None], size=(size, size), mode="area")[:, 0]
        return codec.encode(depth.clamp(0, 1)).cpu()

    with peak_memory(setup) as memory:
        seconds = seconds_of(setup, label, repeats=repeats, warm=2)
    figures["pictures_per_second"], figures["memory_gib"] = len(pictures) / seconds, memory["allocated"] / 2**30
    pixels = pictures.to(setup.device).to(dtype)
    figures["teacher_ms"] = 1000 * seconds_of(setup, lambda: teacher(pixels), repeats=repeats, warm=1)
