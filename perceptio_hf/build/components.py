"""The stock models a Perceptio is made of, from wherever they are: an InternVL and a SAM2."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Sam2Model

from perceptio_hf.conversion.keys import ConversionReport
from perceptio_hf.conversion.local_copy import local_copy
from perceptio_hf.conversion.opengvlab import load_opengvlab
from perceptio_hf.conversion.opengvlab_config import is_original_layout
from perceptio_hf.conversion.sam2 import load_sam2
from perceptio_hf.conversion.saved_models import WEIGHTS, check_kind, load_strictly
from perceptio_hf.conversion.tensors import read_tensors

_INTERNVL = InternVLConfig.model_type


def load_internvl(
    source: str | os.PathLike | InternVLForConditionalGeneration,
    *,
    dtype: str | torch.dtype = "auto",
    report: ConversionReport | None = None,
) -> InternVLForConditionalGeneration:
    """An InternVL in evaluation mode; a model that is given comes back as it is, or as a copy of another dtype.

    Args:
        source: folder or Hub name, in transformers' layout or the original one of OpenGVLab.
        dtype: of a saved one's weights, a torch dtype or its name; "auto" keeps theirs, or what config.json names.
        report: its notes say what is not as it was read.

    Raises:
        ValueError: it cannot be found or read, is something else, is damaged, or contradicts its own configuration.
    """
    dtype = _as_dtype(dtype)
    if isinstance(source, nn.Module):
        model = source if dtype == "auto" else copy.deepcopy(source).to(dtype)
    else:
        folder = find_internvl(source)
        if is_original_layout(folder):
            return load_opengvlab(folder, dtype=None if dtype == "auto" else dtype, report=report).model
        model = load_strictly(InternVLForConditionalGeneration, folder, "an InternVL", dtype=dtype)
        _check_grid(model.config, folder)
        if report is not None:
            report.notes += _rounding(folder, model.dtype)
    _check_internvl(model)
    return model


def check_parts(mask_decoder: Any, depth_codec: Any, like: Any) -> None:
    """Whether there is one source for SAM2 and codec each: named by themselves, or both of a Perceptio.

    Raises:
        ValueError: there is none, or there are two.
    """
    named = {"mask decoder": mask_decoder, "depth codec": depth_codec}
    given = [name for name, part in named.items() if part is not None]
    if like is not None and given:
        raise ValueError(
            f"Both like and a {' and a '.join(given)} are given; like takes SAM2, depth codec and [SEG] projector from "
            "one Perceptio, where they have learnt to work together. Leave out one or the other."
        )
    if like is None and len(given) < len(named):
        (missing, *_) = (name for name in named if name not in given)
        raise ValueError(f"No {missing} is given; name both of them, or a Perceptio as like.")


def find_internvl(source: str | os.PathLike) -> Path:
    """The folder of an InternVL, fetched from the Hub if that is where it is. Weights are not looked at.

    Raises:
        ValueError: there is none, or config.json says that it is something else.
    """
    folder = local_copy(source, (*WEIGHTS, "*.txt", "*.model", "*.jinja"))
    if not is_original_layout(folder):
        check_kind(folder, (_INTERNVL,), "an InternVL")
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


def _as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype, or "auto"."""
    known = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if known != "auto" and (not isinstance(known, torch.dtype) or not known.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected auto, float32, bfloat16 or float16.")
    return known


def _rounding(folder: Path, dtype: torch.dtype) -> list[str]:
    """What is lost where config.json, or who asks, names a coarser type than the weights are stored in."""
    finer = [
        (name, tensor.dtype)
        for name, tensor in read_tensors(folder).items()
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).eps < torch.finfo(dtype).eps
    ]
    if not finer:
        return []
    name, stored = finer[0]
    return [f"{len(finer)} tensors of the InternVL were rounded from {stored} to {dtype}, the first is {name}."]


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
