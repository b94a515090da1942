"""Stock formats out: the InternVL inside a Perceptio, spatial vocabulary included, for whatever knows InternVL."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration

from perceptio_hf.files import expanded, new_folder, write_json, write_text
from perceptio_hf.modeling.remote_code import write_code
from perceptio_hf.modeling.spans.spatial_request import keep_own_settings

from .engine_grammars import TOKENS_BEFORE_SPAN, write_grammars
from .saved_models import origin

if TYPE_CHECKING:
    from perceptio_hf.modeling.configuration_perceptio import PerceptioConfig
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

_PROCESSOR_CLASS = "InternVLProcessor"
# What stock InternVL does to the frames of a video; the rest of its settings is that of the pictures.
_VIDEO_SETTINGS = {
    "do_sample_frames": False,
    "initial_shift": True,
    "return_metadata": False,
    "video_processor_type": "InternVLVideoProcessor",
}
_OF_PICTURES_ONLY = ("crop_to_patches", "min_patches", "max_patches", "image_processor_type")


def export_internvl(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    pictures: int = 1,
    tokens_before_span: int = TOKENS_BEFORE_SPAN,
    with_code: bool = False,
) -> list[str]:
    """Save the InternVL inside `model` as a folder of the layout that stock InternVL repositories have.

    transformers' own `InternVLForConditionalGeneration` and `AutoProcessor` load it, without this package. Its logits
    are those of `model`, and `model.decode_spatial` reads masks and depth off what it generates. SAM2, the codec and
    the [SEG] projector stay behind. The folder `grammars` in it keeps spans whole in engines with structured output.

    Args:
        processor: the one `model` was saved with.
        folder: what to write; it appears when it is complete.
        overwrite: replace a folder that is there and not empty; never the one `model` was loaded from.
        pictures: the most pictures of one prompt to write grammars for.
        tokens_before_span: as in `span_grammar_texts`.
        with_code: add Perceptio's processor, code included, for programs that load it with `trust_remote_code=True`:
            it needs no torchvision, and what users type stays text. Others load the stock one as before.

    Returns:
        The names of the files, sorted.

    Raises:
        ValueError: if `model` is no Perceptio, or `folder` is there and may not be replaced.
    """
    with new_folder(folder, overwrite, sources=(origin(model),)) as partial:
        options = {"pictures": pictures, "tokens_before_span": tokens_before_span, "with_code": with_code}
        write_internvl(model, processor, partial, **options)
    return sorted(path.name for path in expanded(folder).iterdir())


def write_internvl(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    folder: str | os.PathLike,
    *,
    pictures: int = 1,
    tokens_before_span: int = TOKENS_BEFORE_SPAN,
    with_code: bool = False,
) -> None:
    """As `export_internvl`, file by file into `folder`.

    Raises:
        ValueError: if `model` is no Perceptio, or for less than one picture or token before a span.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "perceptio" or hasattr(model, "peft_config"):
        raise ValueError(
            f"The export got a {type(model).__name__}; expected a PerceptioForConditionalGeneration (merge adapters "
            "into it first, docs/lora.md)."
        )
    keep_own_settings(model.generation_config)  # for the Perceptio that may be built of it again
    stock_internvl(model).save_pretrained(folder)
    write_stock_processor(processor, folder)
    if with_code:
        add_own_processor(processor, folder)
    if model.config.has_spatial_tokens:
        write_grammars(model, processor, folder, pictures=pictures, tokens_before_span=tokens_before_span)


def stock_config(config: "PerceptioConfig") -> InternVLConfig:
    """The configuration of the InternVL inside a Perceptio."""
    values = config.to_dict()
    of_ours = set(type(config).__dataclass_fields__) - set(InternVLConfig.__dataclass_fields__)
    for name in (*of_ours, "model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(name, None)
    return InternVLConfig(**values)


def stock_internvl(model: "PerceptioForConditionalGeneration") -> InternVLForConditionalGeneration:
    """The InternVL inside `model` as a stock one that shares its modules: nothing is copied."""
    with torch.device("meta"):
        stock = InternVLForConditionalGeneration(stock_config(model.config))
    stock.model, stock.lm_head = model.model, model.lm_head
    stock.generation_config = model.generation_config
    return stock.eval()


def write_stock_processor(processor: "PerceptioProcessor", folder: str | os.PathLike) -> None:
    """Write the files from which `AutoProcessor` makes a stock `InternVLProcessor`.

    They lie in the files of their own that InternVL's repositories have, which older releases of transformers read too.
    No class of transformers can write them where torchvision is missing, because the video processor needs it.
    """
    folder = Path(folder)
    processor.tokenizer.save_pretrained(folder)
    # Saving it as part of a PerceptioProcessor has noted that name.
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["processor_class"] = _PROCESSOR_CLASS
    write_json(folder / "tokenizer_config.json", settings)
    pictures = _picture_settings(processor)
    videos = {name: value for name, value in pictures.items() if name not in _OF_PICTURES_ONLY} | _VIDEO_SETTINGS
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "video_preprocessor_config.json", videos)
    write_json(
        folder / "processor_config.json",
        {"image_seq_length": processor.image_seq_length, "processor_class": _PROCESSOR_CLASS},
    )
    templates = processor.chat_template
    for name, text in (templates if isinstance(templates, dict) else {"default": templates}).items():
        place = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        if text is not None:
            place.parent.mkdir(exist_ok=True)
            write_text(place, text)


def add_own_processor(processor: "PerceptioProcessor", folder: str | os.PathLike) -> None:
    """Add to what `write_stock_processor` wrote the code of `PerceptioProcessor` and its settings, without SAM2's."""
    write_code(processor, folder)
    settings = json.loads((Path(folder) / "processor_config.json").read_text(encoding="utf-8"))
    own = {name: getattr(processor, name) for name in ("num_depth_tokens", "num_depth_codes", "crop_to_patches")}
    settings |= own | {"mask_image_size": None, "auto_map": dict(processor.auto_map)}
    write_json(Path(folder) / "processor_config.json", settings)


def _picture_settings(processor: "PerceptioProcessor") -> dict:
    settings = processor.image_processor.to_dict() | {"processor_class": _PROCESSOR_CLASS}
    if not processor.crop_to_patches:
        # The stock processor asks for tiles whatever its files say; one tile at most is the same as none.
        settings |= {"crop_to_patches": False, "max_patches": 1}
    return settings
