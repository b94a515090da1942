"""What every part needs: its record on disk, clocks, counters, and random models made where they are used."""

import gc
import json
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from large import WORDS, internvl_config, sam2_config
from transformers import InternVLConfig, Sam2Config

from perceptio_hf import DepthVQVAEConfig, PerceptioConfig, PerceptioForConditionalGeneration


class Record:
    """The figures of one part, written anew after each of its cases, so that what stops a part leaves the rest."""

    def __init__(self, path: Path):
        self.path, self.values = path, {}

    def add(self, case: str, /, **figures) -> None:  # a figure may be called anything
        self.values[case] = figures
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text(json.dumps(self.values, default=str))
        os.replace(fresh, self.path)

    @contextmanager
    def case(self, name: str) -> Iterator[dict]:
        """A dict to fill; an exception becomes a figure, and the next case goes on."""
        figures, start = {}, time.perf_counter()
        try:
            yield figures
        except Exception as error:
            lines = traceback.format_exc().strip().splitlines()
            figures["error"], figures["traceback"] = f"{type(error).__name__}: {error}"[:1500], lines[-12:]
        figures["case_seconds"] = round(time.perf_counter() - start, 2)
        self.add(name, **figures)
        release()


@dataclass(frozen=True)
class Setup:
    """Where a part runs, and whether only to see that it runs."""

    device: torch.device
    quick: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full, quick):
        return quick if self.quick else full

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Part:
    """A part by its name: what it takes on an H100 by estimate (seconds), the function, and whether it needs no GPU."""

    seconds: float
    run: Callable[[Setup, Record], None]
    on_host: bool = False


PARTS: dict[str, Part] = {}


def part(seconds: float, *, on_host: bool = False) -> Callable:
    def register(function: Callable[[Setup, Record], None]) -> Callable:
        PARTS[function.__name__] = Part(seconds, function, on_host)
        return function

    return register


def release() -> None:
    """Give back the memory of what is gone."""
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # after an error of the device every call fails; the next case says so
            return


def seconds_of(setup: Setup, run: Callable[[], object], *, repeats: int = 1, warm: int = 0) -> float:
    """Median seconds of a call, from its start to the end of all it asked of the device."""
    for _ in range(warm):
        run()
    spent = []
    for _ in range(repeats):
        setup.wait()
        start = time.perf_counter()
        run()
        setup.wait()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def device_ms(setup: Setup, run: Callable[[], object], *, repeats: int = 20, warm: int = 3) -> float:
    """Milliseconds of a call within a row of calls: by events on a GPU, which leaves out what the host waits for."""
    for _ in range(warm):
        run()
    if not setup.is_cuda:
        return 1000 * seconds_of(setup, run, repeats=min(repeats, 3))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def synchronisations(setup: Setup, run: Callable[[], object]) -> int | None:
    """How often the host waits for the device, as torch's own debug mode notices it; None without a GPU."""
    if not setup.is_cuda:
        run()
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(item.message) for item in caught)


def profiled(setup: Setup, run: Callable[[], object]) -> dict:
    """Calls of the driver in one run by torch's profiler: kernels, copies, graphs, and waiting for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if setup.is_cuda else []
    with torch.profiler.profile(activities=activities) as profile:
        run()
        setup.wait()
    names = ("cudaLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize")
    counts = dict.fromkeys(names, 0)
    for event in profile.key_averages():
        for name in names:
            if event.key.startswith(name):
                counts[name] += event.count
    return counts


@contextmanager
def peak_memory(setup: Setup) -> Iterator[dict]:
    """A dict with the most bytes that were allocated on the device within the block (0 without a GPU)."""
    found = {"allocated": 0, "reserved": 0}
    if setup.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if setup.is_cuda:
        torch.cuda.synchronize()
        found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def perceptio_config(setup: Setup, *, layers: int | None = None, side: int | None = None) -> PerceptioConfig:
    """InternVL's 1B shape, SAM2.1-large and the codec of real checkpoints; in a quick run all of it tiny.

    Args:
        layers: of the language model, where fewer are to do.
        side: of SAM2's pictures in pixels, where they are to be smaller, and SAM2 is the smallest one then.
    """
    internvl, masks, depth = internvl_config(), sam2_config(), DepthVQVAEConfig()
    if setup.quick:
        internvl, masks, depth = _quick_internvl(), _quick_sam2(), _quick_codec()
    elif side:
        masks = _sized(Sam2Config(), side)
    text = internvl.text_config
    if layers and not setup.quick:
        text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
    codes = depth.num_codes
    first = text.vocab_size - codes - 3
    values = internvl.to_dict() | {"image_token_id": first - 1}
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(name, None)
    return PerceptioConfig(
        **values,
        mask_config=masks.to_dict(),
        depth_config=depth.to_dict(),
        seg_token_id=first,
        depth_start_token_id=first + 1,
        depth_token_ids=list(range(first + 2, first + 2 + codes)),
        depth_end_token_id=first + 2 + codes,
    )


def _quick_internvl() -> InternVLConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True}
    text = {"model_type": "qwen2", "vocab_size": 800, "hidden_size": 64, "intermediate_size": 96}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=1, image_seq_length=4, tie_word_embeddings=False
    )


def _quick_sam2() -> Sam2Config:
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1}
    backbone |= {"blocks_per_stage": [1, 2, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64]}
    backbone |= {"num_attention_heads_per_stage": [1, 2, 4, 8], "global_attention_blocks": [4]}
    backbone |= {"window_size_per_stage": [8, 4, 4, 2]}
    vision = {"model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8]}
    return _sized(Sam2Config(vision_config=vision), 64)


def _quick_codec() -> DepthVQVAEConfig:
    return DepthVQVAEConfig(image_size=32, downsample=8, num_codes=16, code_dim=8, base_channels=4)


def _sized(config: Sam2Config, side: int) -> Sam2Config:
    config.vision_config.backbone_config.image_size = [side, side]
    config.vision_config.backbone_feature_sizes = [[side // step, side // step] for step in (4, 8, 16)]
    config.prompt_encoder_config.image_size = side
    return config


def random_model(setup: Setup, config: PerceptioConfig, dtype: torch.dtype | None = None):
    """A Perceptio of random weights, made on the device; parts that stay float32 do so."""
    torch.manual_seed(0)
    try:
        with torch.device(setup.device):
            model = PerceptioForConditionalGeneration(config)
    except (RuntimeError, TypeError, NotImplementedError):  # where something has to be made on the host
        model = PerceptioForConditionalGeneration(config)
    model = model.eval().to(setup.device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    return model if dtype is None else model.to(dtype)


def question(setup: Setup, config: PerceptioConfig, rows: int, dtype: torch.dtype, *, masks: bool = False) -> dict:
    """`rows` times one question of 16 words about one picture of one tile."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.full((config.image_seq_length,), config.image_token_id)
    ids = torch.cat([picture, torch.randint(2, config.seg_token_id - 8, (16,), generator=generator)])
    ids = ids.expand(rows, -1).contiguous().to(setup.device)
    side = config.vision_config.image_size[0]
    pixels = torch.randn(1, 3, side, side, generator=generator).expand(rows, -1, -1, -1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["pixel_values"] = pixels.contiguous().to(setup.device, dtype)
    if masks:
        side = config.mask_config.prompt_encoder_config.image_size
        pixels = torch.randn(1, 3, side, side, generator=generator).expand(rows, -1, -1, -1)
        given["mask_pixel_values"] = pixels.contiguous().to(setup.device)
    return given


__all__ = [
    "PARTS",
    "WORDS",
    "Part",
    "Record",
    "Setup",
    "device_ms",
    "part",
    "peak_memory",
    "perceptio_config",
    "profiled",
    "question",
    "random_model",
    "release",
    "seconds_of",
    "synchronisations",
]
