"""Models that transformers saved, loaded strictly: a whole model that fits its configuration, or a clear error."""

import os
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration, check_loaded
from perceptio_hf.modeling.shards import check_shards

from .aurora import load_aurora
from .local_copy import local_copy
from .tensors import read_json, read_tensors

WEIGHTS = ("*.json", "*.safetensors", "*.bin")
_PERCEPTIO, _CODEC = PerceptioForConditionalGeneration.config_class.model_type, DepthVQVAE.config_class.model_type
_Model = TypeVar("_Model", bound=PreTrainedModel)


def load_depth_codec(source: str | os.PathLike | DepthVQVAE, *, revision: str | None = None) -> DepthVQVAE:
    """A depth codec in evaluation mode: given, saved alone or as part of a Perceptio, or a file of AURORA's.

    Args:
        revision: branch, tag or commit, where `source` is a repository of the Hub.

    Raises:
        ValueError: it cannot be found or read, is something else, is damaged, or contradicts its own configuration.
    """
    if isinstance(source, nn.Module):
        if getattr(getattr(source, "config", None), "model_type", None) != _CODEC:
            raise ValueError(f"The depth codec is a {type(source).__name__}; expected a DepthVQVAE.")
        return source
    place = local_copy(source, WEIGHTS, revision=revision)
    if place.is_file():
        return load_aurora(place)
    if check_kind(place, (_CODEC, _PERCEPTIO), "a depth codec") == _PERCEPTIO:
        return _codec_of_perceptio(place)
    return load_strictly(DepthVQVAE, place, "a depth codec")


def _codec_of_perceptio(folder: Path) -> DepthVQVAE:
    """The codec alone: of a checkpoint of many gigabytes nothing else is read."""
    own, prefix = PerceptioForConditionalGeneration.config_class.from_pretrained(folder), "depth_model."
    tensors = {name[len(prefix) :]: value for name, value in read_tensors(folder).items() if name.startswith(prefix)}
    codec = DepthVQVAE(own.depth_config)
    try:
        codec.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder}: its depth codec cannot be loaded: {' '.join(str(error).split())}") from error
    _check_finite(folder, codec)
    return codec.eval()


def origin(part: str | os.PathLike | nn.Module | None) -> str | os.PathLike | None:
    """Where a part is read from, or a model that is given was: what `new_folder` must not replace."""
    return getattr(getattr(part, "config", None), "name_or_path", None) if isinstance(part, nn.Module) else part


def check_kind(folder: Path, expected: tuple[str, ...], what: str) -> str:
    """The model type in config.json, which must be among `expected`."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in expected:
        known = " or ".join(map(repr, expected))
        raise ValueError(f"{folder} is not {what}: model_type in config.json is {kind!r}, expected {known}.")
    return kind


def load_strictly(model_class: type[_Model], folder: Path, what: str, *, dtype: str | torch.dtype = "auto") -> _Model:
    """`from_pretrained`, strictly: transformers would fill gaps with random numbers, and take NaN for weights."""
    if (folder / "adapter_config.json").is_file():  # transformers would apply it, and say nothing
        raise ValueError(f"{folder} holds an adapter beside its weights: merge it into its base first (docs/lora.md).")
    if (folder / "generation_config.json").is_file():  # transformers takes a damaged one for none
        read_json(folder / "generation_config.json")
    strictly = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # so that `check_loaded` names the tensor
    try:
        check_shards(folder)
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **strictly
        )
        check_loaded(folder, info)
    except SafetensorError as error:
        raise ValueError(
            f"{folder} cannot be loaded as {what}: a file of its weights is truncated or damaged ({error}); copy or "
            "download it again."
        ) from error
    except Exception as error:  # whatever json or transformers raise: the user named a wrong folder
        raise ValueError(f"{folder} cannot be loaded as {what}: {error}") from error
    _check_finite(folder, model)
    return model.eval()


def _check_finite(folder: Path, model: nn.Module) -> None:
    damaged = [name for name, value in model.state_dict().items() if not _is_finite(value)]
    if damaged:
        raise ValueError(f"{folder} is damaged: {damaged[0]} holds NaN or infinity ({len(damaged)} tensors do).")


def _is_finite(values: torch.Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
