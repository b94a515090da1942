"""Sa2VA checkpoints on InternVL (ByteDance's layout) -> Perceptio.

Sa2VA has everything of Perceptio but depth: the language model's [SEG] states prompt SAM2 through `text_hidden_fcs`.
Depth tokens and a depth codec are added. The code beside the weights is never run.

Sa2VA-4B's first generation was trained with Phi-3's chat format (`template` phi3_chat), although its language model is
Qwen2.5: `<|user|>`, `<|assistant|>` and `<|end|>` are no tokens of its tokenizer but words, and an answer ends when the
words `<|end|>` have been written.
"""

import os
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perceptio_hf.files import check_new_folder, new_folder
from perceptio_hf.tokens import SEG_TOKEN

from .keys import ConversionReport, KeyMap, fill_model
from .local_copy import local_copy
from .opengvlab import FILES, internvl_from_tensors, set_generation
from .opengvlab_config import read_original_config, text_architecture
from .opengvlab_processor import PHI3_END, ProcessorParts, chatml, phi3_chat, processor_parts
from .sam2 import sam2_from_tensors
from .saved_models import load_depth_codec, origin
from .tensors import read_json, read_tensors
from .written import Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Sam2Config

    from perceptio_hf import DepthVQVAE, PerceptioForConditionalGeneration, PerceptioProcessor

ARCHITECTURES = {"Sa2VAChatModel": "Sa2VA on InternVL"}
_SAM, _PROJECTOR = "grounding_encoder.sam2_model.", "text_hidden_fcs."
_PROJECTOR_NAMES = KeyMap([(r"0\.(weight|bias)", r"linear_in.\1"), (r"2\.(weight|bias)", r"linear_out.\1")])
# Sa2VA's prompt templates, and whether they are ChatML; it never says a system message.
_TEMPLATES = {"internlm2_chat": True, "qwen_chat": True, "phi3_chat": False}
# What may stand before the end of an answer: the tokenizer joins its first letters with it.
_BEFORE_END = ("x", "1", ".", ". ", "!", ")", "]", '"', ":", "\n", "。", SEG_TOKEN)
# What preparing_for_generation sets, whatever config.json says.
_PICTURE_SETTINGS = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
_FRESH_CODEC = "a new codec, not trained: its depth means nothing before `perceptio codebook` and a training"


def load_sa2va(
    source: str | os.PathLike,
    *,
    depth_codec: "str | os.PathLike | DepthVQVAE | None" = None,
    mask_config: "Sam2Config | None" = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    report: ConversionReport | None = None,
) -> "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]":
    """Read a Sa2VA: its answers and masks, as a Perceptio with depth tokens it has yet to learn.

    Prompt, tiling and SAM2's picture (bicubic) are Sa2VA's, kept in the processor. Generate with `spatial="auto"`:
    Sa2VA answers "Sure, [SEG].", with the token inside the sentence. Takes memory for one copy of the weights; SAM2,
    stored in bfloat16, becomes float32.

    Args:
        source: folder or Hub name, e.g. a download of ByteDance/Sa2VA-4B.
        depth_codec: of the depth tokens that are added; default: a new one of `DepthVQVAEConfig`'s sizes.
        mask_config: of a SAM2 that has none of the published sizes.
        dtype: of the language and vision model; default: the one they are stored in.
        seed: of the new tokens' rows, and of a new codec.
        report: filled in with what was read, mapped, ignored and added.

    Raises:
        ValueError: a folder that is no such checkpoint, is damaged, or uses what Perceptio does not have; names the
            field, or the first unexpected and missing tensors.
    """
    from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor

    folder = local_copy(source, FILES)
    _check_base(folder)
    config = read_original_config(folder, ARCHITECTURES)
    report = ConversionReport(str(source)) if report is None else report
    report.layout = f"Sa2VA on InternVL ({text_architecture(config)})"
    parts, end = _processor_parts(folder, config)
    codec = _depth_codec(depth_codec, seed, report)
    tensors = read_tensors(folder)
    sam2 = _mask_model(tensors, mask_config, report)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith((_SAM, _PROJECTOR))}
    internvl = internvl_from_tensors(rest, config, parts.tokenizer, dtype=dtype, report=report)
    set_generation(internvl, parts.tokenizer, folder)
    if end is not None:
        internvl.generation_config.end_sequences = [end_ids(parts.tokenizer, end)]
        report.notes.append(f"Answers end with the words {end}: generation_config.end_sequences has their ids.")
    processor = PerceptioProcessor.from_components(parts, sam2, codec)
    processor.mask_resample, processor.response_end = "bicubic", end
    model = PerceptioForConditionalGeneration.from_components(internvl, sam2, codec, processor=processor, seed=seed)
    _fill_projector(model, tensors, report)
    report.added["model.language_model.embed_tokens.weight"] = "rows of the depth tokens are new; [SEG] is Sa2VA's"
    return model, processor


def convert_sa2va(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    depth_codec: "str | os.PathLike | DepthVQVAE | None" = None,
    mask_config: "Sam2Config | None" = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_size: str = "5GB",
) -> ConversionReport:
    """`load_sa2va`, saved to the folder `out`: model, processor, and the code `trust_remote_code` loads.

    Args:
        out: is there complete or not at all.
        overwrite: replace a saved model that lies there; never one that is read.
        verify: read the folder again and compare every weight, bit for bit, and setting, before it appears.
        max_shard_size: of a weight file.

    Returns:
        What was read, mapped, ignored and added.

    Raises:
        ValueError: as `load_sa2va`; `out` may not be written; verification failed.
    """
    check_new_folder(out, overwrite, sources := (source, origin(depth_codec)))
    report = ConversionReport(str(source))
    model, processor = load_sa2va(
        source, depth_codec=depth_codec, mask_config=mask_config, dtype=dtype, seed=seed, report=report
    )
    with new_folder(out, overwrite, sources) as folder:
        written = Written.of(model) if verify else None
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        del model  # there is memory for one
        if written is not None:
            written.check(folder)
    return report


def end_ids(tokenizer: "PreTrainedTokenizerBase", end: str) -> list[int]:
    """The token ids that every response which ends with the words `end` ends in, as far as it does not matter what
    stands before them.

    Raises:
        ValueError: the tokenizer joins all of `end` with what stands before it.
    """
    rows = tokenizer([before + end for before in _BEFORE_END], add_special_tokens=False)["input_ids"]
    backwards = zip(*(reversed(row) for row in rows), strict=False)
    common = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, backwards)][::-1]
    if not any(letter.isalpha() for letter in tokenizer.decode(common)):
        raise ValueError(f"This tokenizer has no tokens of its own for {end}, with which Sa2VA's answers end.")
    return common


def _check_base(folder: Path) -> None:
    """Raises a ValueError for the generations of Sa2VA that are built on Qwen's own vision-language models."""
    config = read_json(folder / "config.json")
    (architecture, *_) = config.get("architectures") or [None]
    if "Qwen" not in str(architecture):
        return
    vision = str((config.get("vision_config") or {}).get("model_type", "")).replace("_", "-")
    base = {"qwen2-5-vl": "Qwen2.5-VL", "qwen3-vl": "Qwen3-VL"}.get(vision, "Qwen-VL")
    raise ValueError(
        f"{folder} is a Sa2VA on {base} (architectures is {architecture!r}): its vision tower, positions and picture "
        "tokens are Qwen's, and Perceptio is built on InternVL. Sa2VA-1B, -4B, -8B, -26B and Sa2VA-InternVL3-2B, -8B, "
        "-14B can be converted."
    )


def _processor_parts(folder: Path, config: Mapping[str, Any]) -> tuple[ProcessorParts, str | None]:
    """What the processor is made of, and the words with which answers end where no token says so."""
    template = str(config.get("template")).replace("-", "_")
    if template not in _TEMPLATES:
        raise ValueError(f"template in config.json is {template!r}; known are {', '.join(_TEMPLATES)}.")
    is_chatml = _TEMPLATES[template]
    prompt = chatml() if is_chatml else phi3_chat()
    parts = processor_parts(folder, config, prompt=prompt, **_PICTURE_SETTINGS)
    if SEG_TOKEN not in parts.tokenizer.get_vocab():
        raise ValueError(f"{folder}: the tokenizer has no token {SEG_TOKEN}, so it is not Sa2VA's.")
    return parts, None if is_chatml else PHI3_END


def _depth_codec(source: "str | os.PathLike | DepthVQVAE | None", seed: int, report: ConversionReport) -> "DepthVQVAE":
    from perceptio_hf import DepthVQVAE, DepthVQVAEConfig

    if source is not None:
        report.added["depth_model"] = "the depth codec that was given"
        return load_depth_codec(source)
    report.added["depth_model"] = _FRESH_CODEC
    report.notes.append(f"Sa2VA has no depth: {_FRESH_CODEC}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DepthVQVAE(DepthVQVAEConfig()).eval()


def _mask_model(tensors: Mapping[str, Tensor], config: "Sam2Config | None", report: ConversionReport):
    part = ConversionReport(f"SAM2 in {report.source}")
    model = sam2_from_tensors(_under(tensors, _SAM), config=config, report=part)
    report.merge(part, _SAM, "mask_model.")
    return model


def _fill_projector(
    model: "PerceptioForConditionalGeneration", tensors: Mapping[str, Tensor], report: ConversionReport
) -> None:
    part = ConversionReport(f"{_PROJECTOR}* in {report.source}")
    renamed = _PROJECTOR_NAMES.apply(_under(tensors, _PROJECTOR), part)
    fill_model(model.seg_projector, renamed, part, "Sa2VA's projector of [SEG] states")
    report.merge(part, _PROJECTOR, "seg_projector.")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
