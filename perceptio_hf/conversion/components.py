"""The models a Perceptio is made of, from wherever they are: a stock InternVL, a SAM2 and a depth codec."""

import copy
import os
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedModel, Sam2Model

from ..modeling.modeling_depth_vqvae import DepthVQVAE
from ..modeling.modeling_perceptio import PerceptioForConditionalGeneration, check_loaded
from .aurora import load_aurora
from .opengvlab import load_opengvlab
from .opengvlab_config import is_original_layout
from .sam2 import load_sam2
from .sources import local_copy
from .tensors import read_json

_WEIGHTS = ("*.json", "*.safetensors", "*.bin")
_PERCEPTIO, _CODEC = PerceptioForConditionalGeneration.config_class.model_type, DepthVQVAE.config_class.model_type
_INTERNVL = InternVLConfig.model_type
_Model = TypeVar("_Model", bound=PreTrainedModel)


def load_internvl(
    source: str | os.PathLike | InternVLForConditionalGeneration, *, dtype: str | torch.dtype = "auto"
) -> InternVLForConditionalGeneration:
    """An InternVL in evaluation mode; a model that is given comes back as it is, or as a copy of another dtype.

    Args:
        source: folder or Hub name, in transformers' layout or the original one of OpenGVLab.
        dtype: of a saved one's weights, a torch dtype or its name; "auto" keeps theirs.

    Raises:
        ValueError: it cannot be found or read, is something else, is damaged, or contradicts its own configuration.
    """
    dtype = _as_dtype(dtype)
    if isinstance(source, nn.Module):
        model = source if dtype == "auto" else copy.deepcopy(source).to(dtype)
    else:
        folder = find_internvl(source)
        if is_original_layout(folder):
            return load_opengvlab(folder, dtype=None if dtype == "auto" else dtype).model
        model = _load(InternVLForConditionalGeneration, folder, "an InternVL", dtype=dtype)
        _check_grid(model.config, folder)
    _check_internvl(model)
    return model


def find_internvl(source: str | os.PathLike) -> Path:
    """The folder of an InternVL, fetched from the Hub if that is where it is. Weights are not looked at.

    Raises:
        ValueError: there is none, or config.json says that it is something else.
    """
    folder = local_copy(source, (*_WEIGHTS, "*.txt", "*.model", "*.jinja"))
    if not is_original_layout(folder):
        _check_kind(folder, (_INTERNVL,), "an InternVL")
    return folder


def tokens_per_tile(config: InternVLConfig) -> int:
    """How many language tokens one tile of a picture becomes."""
    vision = config.vision_config
    sides = zip(vision.image_size, vision.patch_size, strict=True)
    height, width = (int(side // patch * config.downsample_ratio) for side, patch in sides)
    return height * width


def load_mask_model(source: str | os.PathLike | Sam2Model) -> Sam2Model:
    """A SAM2: one that is given comes back as it is, anything else goes through `load_sam2`.

    Raises:
        ValueError: as `load_sam2`; another model is given.
    """
    if not isinstance(source, nn.Module):
        return load_sam2(source)
    if not isinstance(source, Sam2Model):
        raise ValueError(f"The mask decoder is a {type(source).__name__}; expected a Sam2Model, or where one is saved.")
    return source


def load_depth_codec(source: str | os.PathLike | DepthVQVAE) -> DepthVQVAE:
    """A depth codec in evaluation mode: given, saved alone or as part of a Perceptio, or a file of AURORA's.

    Raises:
        ValueError: it cannot be found or read, is something else, is damaged, or contradicts its own configuration.
    """
    if isinstance(source, nn.Module):
        if getattr(getattr(source, "config", None), "model_type", None) != _CODEC:
            raise ValueError(f"The depth codec is a {type(source).__name__}; expected a DepthVQVAE.")
        return source
    place = local_copy(source, _WEIGHTS)
    if place.is_file():
        return load_aurora(place)
    if _check_kind(place, (_CODEC, _PERCEPTIO), "a depth codec") == _PERCEPTIO:
        return _load(PerceptioForConditionalGeneration, place, "a Perceptio").depth_model
    return _load(DepthVQVAE, place, "a depth codec")


def _as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype, or "auto"."""
    known = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if known != "auto" and (not isinstance(known, torch.dtype) or not known.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected auto, float32, bfloat16 or float16.")
    return known


def _check_kind(folder: Path, expected: tuple[str, ...], what: str) -> str:
    """The model type in config.json, which must be among `expected`."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in expected:
        known = " or ".join(map(repr, expected))
        raise ValueError(f"{folder} is not {what}: model_type in config.json is {kind!r}, expected {known}.")
    return kind


def _load(model_class: type[_Model], folder: Path, what: str, *, dtype: str | torch.dtype = "auto") -> _Model:
    """`from_pretrained`, strictly: transformers would fill gaps with random numbers, and take NaN for weights."""
    strictly = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # so that `check_loaded` names the tensor
    try:
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
    damaged = [name for name, value in model.state_dict().items() if not _is_finite(value)]
    if damaged:
        raise ValueError(f"{folder} is damaged: {damaged[0]} holds NaN or infinity ({len(damaged)} tensors do).")
    return model.eval()


def _is_finite(values: torch.Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def _check_internvl(model: nn.Module) -> None:
    """A stock InternVL with weights that can be taken over."""
    if not isinstance(model, InternVLForConditionalGeneration) or model.config.model_type != _INTERNVL:
        raise ValueError(f"InternVL is a {type(model).__name__}; expected a stock InternVLForConditionalGeneration.")
    if getattr(model, "hf_quantizer", None) is not None or model.device.type == "meta":
        raise ValueError("InternVL's weights are quantised or not in memory: load it without quantising or offloading.")


def _check_grid(config: InternVLConfig, folder: Path) -> None:
    expected = tokens_per_tile(config)
    if config.image_seq_length != expected:
        vision = config.vision_config
        raise ValueError(
            f"{folder}: image_seq_length in config.json is {config.image_seq_length}, but a tile of "
            f"{vision.image_size} pixels in patches of {vision.patch_size} makes {expected} tokens. Is config.json "
            "the one of these weights?"
        )
