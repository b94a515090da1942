"""Shared pieces: no network, a tokenizer made on the spot, and a small random Perceptio."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import depth_config, random_model
from PIL import ImageFile

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor

SHARED = Path(__file__).parents[2] / "shared"
TEXTS = ["Which is closer, the red ball or the blue box?", "Segment the red ball.", "Here is the depth map."]


def begin_again() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What is drawn at random without a seed is the same whichever tests, and however many, a process ran before."""
    begin_again()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """The same after fixtures, which the first of the tests that share them makes."""
    begin_again()


@pytest.fixture(autouse=True)
def cut_files_are_refused(monkeypatch):
    """Importing gradio, as some tests do, lets Pillow fill up files that were cut off, in the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real pictures, which only some checkouts have."""
    if not SHARED.is_dir():
        pytest.skip("../shared with the real pictures is not here")
    return SHARED


@pytest.fixture(scope="session")
def processor() -> PerceptioProcessor:
    from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer

    return tiny_processor(tiny_tokenizer(TEXTS, vocab_size=320), depth_config())


@pytest.fixture(scope="session")
def model(processor) -> PerceptioForConditionalGeneration:
    return random_model(processor)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, model, processor) -> Path:
    """A saved checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("perceptio") / "random"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
