"""Small pieces the tests are built from; see conftest.py for fixtures."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from perceptio_hf import DepthVQVAEConfig, PerceptioConfig, PerceptioForConditionalGeneration, PerceptioProcessor


def depth_config() -> DepthVQVAEConfig:
    """A 4 x 4 grid of 16 codes: large enough to have structure, small enough for thousands of sequences."""
    return DepthVQVAEConfig(image_size=32, downsample=8, num_codes=16, code_dim=8, base_channels=4)


def small_config(processor: PerceptioProcessor, tie: bool = True) -> PerceptioConfig:
    """The tiny model's configuration with even smaller parts."""
    from perceptio_hf.lab.lessons.model import tiny_config

    config = tiny_config(processor, depth_config())
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tie
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 96
    config.vision_config.num_hidden_layers = 1
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 64, 96
    return config


def random_model(processor: PerceptioProcessor, tie: bool = True, seed: int = 0) -> PerceptioForConditionalGeneration:
    """Random weights, large enough that masks and logits differ visibly from one token to the next."""
    torch.manual_seed(seed)
    model = PerceptioForConditionalGeneration(small_config(processor, tie)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("depth_model"):
                parameter.normal_(std=0.15)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def cached_repository(cache: Path, name: str, revisions: Mapping[str, Path]) -> Path:
    """A cache of the Hub's client that holds these folders as branches of a repository; returns `cache`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for number, (branch, folder) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / branch).write_text(commit)
    return cache


def assert_alike(found: torch.Tensor, expected: torch.Tensor, *, depth: int = 12, width: int = 256) -> None:
    """Equal but for rounding: what two programs, batches, threads or processors make of the same weights.

    In which order a product is summed, and so its last bits, depends on the kernel, which depends on shapes, on the
    processor, and with some libraries on where operands lie in memory. The bound is that of
    `perceptio_hf.build.verification.rounding_bound`.

    Args:
        depth: layers that were gone through, one after another; no small model of the tests has more.
        width: the longest sum in one of them.
    """
    assert found.dtype == expected.dtype
    epsilon, single = torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    bound = 8 * scale * math.sqrt(depth) * (epsilon + min(epsilon, single) * math.sqrt(width))
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def assert_trained_alike(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Weights by name after the same training. Steps must be in proportion to gradients, as SGD's are, or Adam's whose
    epsilon is not small against them: Adam alone makes whole steps of the rounding in gradients that are nearly zero.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                found[name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert torch.equal(found[name], value), name


def picture(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """A picture of coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(*pictures: Image.Image, text: str = "Where is the red ball?") -> list[dict]:
    """One user's turn."""
    images = [{"type": "image", "image": item} for item in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def encode(processor: PerceptioProcessor, *chats: list[dict]):
    """A batch of prompts."""
    return processor.apply_chat_template(
        list(chats), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
