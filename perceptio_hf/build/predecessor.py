"""What a Perceptio hands on to one that is built like it: everything that a stock InternVL has no place for.

An exported InternVL (`perceptio export`) that was trained further knows the spatial tokens, but neither the [SEG]
projector, SAM2 and codec that its states and codes were learnt with, nor the settings of its masks.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, Sam2Model

from perceptio_hf.conversion.local_copy import local_copy
from perceptio_hf.conversion.saved_models import WEIGHTS, check_kind, load_strictly
from perceptio_hf.modeling.configuration_perceptio import PerceptioConfig
from perceptio_hf.modeling.mask_prediction import SegProjector
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

_FILES = (*WEIGHTS, "*.jinja", "*.txt", "*.model")
_KIND = PerceptioConfig.model_type
_IDS = ("seg_token_id", "depth_start_token_id", "depth_end_token_id", "depth_token_ids")
# What the parts themselves decide; all other fields of Perceptio's own are settings.
_OF_THE_PARTS = {*_IDS, "mask_config", "depth_config", "picture_mark_token_ids", "num_depth_tokens", "num_depth_codes"}
_PROCESSOR_SIZES = ("num_depth_tokens", "num_depth_codes", "mask_image_size")
_PROCESSOR_SETTINGS = ("mask_threshold", "mask_resample", "response_end")


@dataclass(frozen=True)
class Predecessor:
    """The parts of a Perceptio beside its InternVL.

    Args:
        name: what to call it in an error.
        config: of the whole.
        mask_model: its SAM2.
        codec: its depth codec.
        projector: of its [SEG] states.
    """

    name: str
    config: PerceptioConfig
    mask_model: Sam2Model
    codec: DepthVQVAE
    projector: SegProjector

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `PerceptioConfig` that no part decides, such as `mask_multimask_output`."""
        own = PerceptioConfig.__dataclass_fields__.keys() - InternVLConfig.__dataclass_fields__.keys()
        return {name: getattr(self.config, name) for name in sorted(own - _OF_THE_PARTS)}

    @property
    def spatial_ids(self) -> list[int]:
        """Ids of the spatial tokens in the order of `spatial_tokens`."""
        seg, start, end, codes = (getattr(self.config, name) for name in _IDS)
        return [seg, start, *codes, end]

    def check_internvl(self, config: InternVLConfig, processor: PerceptioProcessor | None) -> None:
        """Whether the projector reads this InternVL's states, and the spatial tokens have the same ids and rows.

        Raises:
            ValueError: it does not.
        """
        expected, found = self.projector.linear_in.in_features, config.text_config.hidden_size
        if found != expected:
            raise ValueError(
                f"The InternVL has hidden_size = {found}, but the [SEG] projector of {self.name} reads states of "
                f"{expected}: the InternVL must be one that was exported from it, trained further or not."
            )
        if processor is not None:
            check_same_ids(processor, {name: getattr(self.config, name) for name in _IDS}, self.name)
        rows, largest = config.text_config.vocab_size, max(self.spatial_ids)
        if rows <= largest:
            raise ValueError(
                f"The InternVL has rows for {rows} tokens, but {self.name} has spatial tokens up to id {largest}: the "
                "InternVL must be one that was exported from it, trained further or not."
            )


def load_predecessor(source: str | os.PathLike | PerceptioForConditionalGeneration) -> Predecessor:
    """A Perceptio's parts beside its InternVL, whose weights are let go; a model that is given stays as it is.

    Raises:
        ValueError: it cannot be found or read, is something else, is damaged, or has no spatial tokens.
    """
    if isinstance(source, (str, os.PathLike)):
        name, model = (
            str(source),
            load_strictly(PerceptioForConditionalGeneration, find_perceptio(source), "a Perceptio"),
        )
    else:
        name, model = f"the {type(source).__name__} given as like", source
        if getattr(getattr(model, "config", None), "model_type", None) != _KIND or hasattr(model, "peft_config"):
            raise ValueError(
                f"like is a {type(source).__name__}; expected a PerceptioForConditionalGeneration (merge adapters into "
                "it first: merge_and_unload), or where one is saved."
            )
    if not model.config.has_spatial_tokens:
        raise ValueError(f"{name} has no spatial tokens, and so nothing to hand on; name another Perceptio.")
    return Predecessor(name, model.config, model.mask_model, model.depth_model, model.seg_projector)


def find_perceptio(source: str | os.PathLike) -> Path:
    """The folder of a Perceptio, fetched from the Hub if that is where it is. Weights are not looked at.

    Raises:
        ValueError: there is none, or config.json says that it is something else.
    """
    folder = local_copy(source, _FILES)
    check_kind(folder, (_KIND,), "a Perceptio")
    return folder


def load_processor_like(source: str | os.PathLike | PerceptioProcessor) -> PerceptioProcessor:
    """The processor of a Perceptio.

    Raises:
        ValueError: there is none, or something else is given.
    """
    if isinstance(source, PerceptioProcessor):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"like is a {type(source).__name__}; expected a PerceptioProcessor, or where one is saved.")
    folder = find_perceptio(source)
    try:
        return PerceptioProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever json, tokenizers or transformers raise: the user named a wrong folder
        raise ValueError(f"{folder} has no processor of a Perceptio: {error}") from error


def processor_settings(processor: PerceptioProcessor) -> dict[str, Any]:
    """What a processor takes over from one it is built like: sizes of the parts, and how responses are read."""
    return {name: getattr(processor, name) for name in (*_PROCESSOR_SIZES, *_PROCESSOR_SETTINGS)}


def check_same_ids(processor: PerceptioProcessor, expected: dict[str, Any], name: str) -> None:
    """Whether a tokenizer of an InternVL has had the spatial tokens all along, under the ids of a Perceptio.

    Args:
        processor: of the InternVL.
        expected: `_IDS` of the Perceptio, by name.
        name: of the Perceptio, for the error.

    Raises:
        ValueError: it has not.
    """
    if processor.added_token_ids:
        raise ValueError(
            f"The InternVL's tokenizer lacks {len(processor.added_token_ids)} of the spatial tokens of {name}, so it "
            "was not exported from it. Name an export, trained further or not; or leave out like and name SAM2 and "
            "depth codec, for a [SEG] projector and rows that are new."
        )
    found = processor.spatial_token_ids()
    for field in _IDS:
        if found[field] != expected[field]:
            raise ValueError(
                f"The InternVL's tokenizer has {field} = {_short(found[field])}, but {name} has "
                f"{_short(expected[field])}: the InternVL must be one that was exported from it."
            )


def _short(ids: int | list[int]) -> str:
    return str(ids) if isinstance(ids, int) else f"{ids[0]} to {ids[-1]}"
