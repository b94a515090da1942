"""`PerceptioProcessor`s out of the processors of stock InternVLs."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from perceptio_hf.conversion.local_copy import local_copy
from perceptio_hf.conversion.opengvlab import load_opengvlab_processor
from perceptio_hf.conversion.opengvlab_config import is_original_layout
from perceptio_hf.conversion.opengvlab_processor import load_tokenizer as load_original_tokenizer
from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.tokens import spatial_tokens

from .components import check_parts, load_mask_model
from .predecessor import check_same_ids, load_processor_like, processor_settings

_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def processor_from_components(
    processor_class: type[PerceptioProcessor],
    internvl: Any,
    sam2: Any = None,
    depth_codec: Any = None,
    like: Any = None,
) -> PerceptioProcessor:
    """`PerceptioProcessor.from_components`, which says all about it, for `processor_class`."""
    check_parts(sam2, depth_codec, like)
    old = None if like is None else load_processor_like(like)
    settings = processor_settings(old) if old else _sizes(sam2, depth_codec)
    if isinstance(internvl, (str, os.PathLike)):
        folder = local_copy(internvl, _FILES)
        internvl = load_opengvlab_processor(folder) if is_original_layout(folder) else folder
    if isinstance(internvl, Path):
        processor = _read(processor_class, internvl, settings)
    else:
        processor = processor_class(
            image_processor=internvl.image_processor,
            tokenizer=copy.deepcopy(internvl.tokenizer),  # the one that is given gets no new tokens
            image_seq_length=internvl.image_seq_length,
            chat_template=internvl.chat_template,
            crop_to_patches=getattr(internvl, "crop_to_patches", True),  # as stock InternVLProcessor does
            **settings,
        )
    _check_spatial_tokens(processor)
    if old is not None:
        check_same_ids(
            processor, old.spatial_token_ids(), str(like) if isinstance(like, (str, os.PathLike)) else "like"
        )
    return processor


def _sizes(sam2: Any, depth_codec: Any) -> dict[str, int]:
    mask_config, depth_config = _config(sam2, load_mask_model), _config(depth_codec, load_depth_codec)
    return {
        "num_depth_tokens": depth_config.num_tokens,
        "num_depth_codes": depth_config.num_codes,
        "mask_image_size": mask_config.prompt_encoder_config.image_size,
    }


def _config(part: Any, load: Callable[[Any], PreTrainedModel]) -> Any:
    """The configuration of a part that is saved, loaded, or given as its configuration."""
    part = load(part) if isinstance(part, (str, os.PathLike)) else part
    return getattr(part, "config", part)


def load_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of an InternVL's folder or Hub repository as it is, without spatial tokens.

    Raises:
        ValueError: there is none.
    """
    folder = local_copy(source, _FILES)
    if is_original_layout(folder):
        return load_original_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever json, tokenizers or transformers raise: the user named a wrong folder
        raise ValueError(f"{folder} has no tokenizer of an InternVL: {error}") from error


def _read(processor_class: type[PerceptioProcessor], folder: Path, settings: dict[str, Any]) -> PerceptioProcessor:
    try:
        return processor_class.from_pretrained(folder, local_files_only=True, **settings)
    except ValueError as error:  # one of ours says what is wrong with the tokenizer
        raise ValueError(f"{folder}: {error}") from error
    except Exception as error:  # whatever json, tokenizers or transformers raise: the user named a wrong folder
        raise ValueError(f"{folder} has no processor of an InternVL: {error}") from error


def _check_spatial_tokens(processor: PerceptioProcessor) -> None:
    tokenizer = processor.tokenizer
    for token in spatial_tokens(processor.num_depth_codes):
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [tokenizer.convert_tokens_to_ids(token)]:
            raise ValueError(f"The tokenizer has {token}, but takes it apart into {len(ids)} tokens where text has it.")
