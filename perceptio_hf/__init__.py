"""Perceptio: a vision-language model that writes masks and depth down before it answers.

Importing the package registers it with transformers' Auto classes; the classes load when they are first used.
"""

import importlib
from pathlib import Path

from .extras import missing
from .registration import register

__version__ = "0.1.0"

_EXPORTS = {
    "DepthVQVAE": "modeling.modeling_depth_vqvae",
    "DepthVQVAEConfig": "modeling.configuration_depth_vqvae",
    "PerceptioConfig": "modeling.configuration_perceptio",
    "PerceptioForConditionalGeneration": "modeling.modeling_perceptio",
    "PerceptioDataCollator": "training.collator",
    "PerceptioProcessor": "processing.processing_perceptio",
    "PerceptioSFTConfig": "training.config",
    "PerceptioSFTTrainer": "training.trainer",
    "SpatialAnswer": "processing.processing_perceptio",
    "SpatialStreamer": "processing.streaming",
}
__all__ = ["__version__", "tiny_checkpoint", *sorted(_EXPORTS)]


def tiny_checkpoint() -> str:
    """The path of the embedded tiny checkpoint: an ordinary saved folder, trained on rendered scenes only.

    Raises:
        FileNotFoundError: where the package was installed without it.
    """
    folder = Path(__file__).parent / "tiny"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"This installation has no tiny checkpoint in {folder}; install perceptio-hf again.")
    return str(folder)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    except ModuleNotFoundError as error:  # of an extra
        raise missing(error, name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))


register()
