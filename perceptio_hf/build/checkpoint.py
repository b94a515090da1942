"""A fresh Perceptio as a saved folder, out of a stock InternVL, a stock SAM2 and a depth codec."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from perceptio_hf.conversion.keys import ConversionReport
from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.files import check_new_folder, new_folder
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

from .assembly import assemble, check_processor
from .components import check_parts, find_internvl, load_internvl, load_mask_model
from .predecessor import load_predecessor
from .processors import load_tokenizer
from .verification import Check, added_digests, check_against, check_tokens, take_reference

Source = str | os.PathLike
_SIZE = re.compile(r"\d+\s*[KMGT]B", re.IGNORECASE)
# What `build` does, in this order, and whether it does so only to verify.
STEPS = {
    "Reading SAM2": False,
    "Reading the depth codec": False,
    "Reading the tokenizer": False,
    "Reading InternVL": False,
    "Asking InternVL": True,
    "Joining": False,
    "Writing": False,
    "Verifying": True,
}


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Args:
        folder: where it lies.
        parameters: of the whole.
        dtype: of the InternVL part; the others are float32.
        text_model: transformers' name of the language model's architecture.
        tied: whether embedding and head are one matrix.
        rows_before: rows of the InternVL's embedding.
        rows: rows of the result's.
        new_tokens: how many tokens the tokenizer got.
        first_new_id: the smallest of their ids, None if there are none.
        mask_image_size: side of SAM2's picture in pixels.
        depth_grid: codes along one side of a depth span's grid.
        depth_codes: entries of the codebook.
        like: the Perceptio that SAM2, codec, [SEG] projector and mask settings are from, None if there is none.
        notes: what of the InternVL is not as it was read.
        check: what the verification saw, None if it was left out.
    """

    folder: str
    parameters: int
    dtype: str
    text_model: str
    tied: bool
    rows_before: int
    rows: int
    new_tokens: int
    first_new_id: int | None
    mask_image_size: int
    depth_grid: int
    depth_codes: int
    like: str | None = None
    notes: tuple[str, ...] = ()
    check: Check | None = None

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def build(
    internvl: Source,
    mask_decoder: Source | None,
    depth_codec: Source | None,
    out: Source,
    *,
    like: Source | None = None,
    dtype: str | torch.dtype = "auto",
    verify: bool = True,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda step: None,
) -> BuildReport:
    """Build a Perceptio (see `PerceptioForConditionalGeneration.from_components`) and its processor into `out`.

    `out` appears when everything is written and verified; whatever goes wrong leaves it as it was. About one copy of
    the weights is in memory at any time, also while verifying: digests of the weights and what the InternVL answers are
    noted first, and compared with the folder once it is loaded again.

    Args:
        internvl, mask_decoder, depth_codec: folder, file or Hub name of each part.
        like: folder or Hub name of a Perceptio whose SAM2, depth codec, [SEG] projector and mask settings are taken,
            for an InternVL that was exported from it; the other two are None then.
        dtype: of the InternVL part; "auto" keeps it.
        verify: check that every weight is the parts', bit for bit, and that the logits of all old tokens are, within
            rounding, those of the InternVL.
        max_shard_size: of one file of weights, such as "5GB".
        overwrite: replace a saved model that is in `out`, unless it is, or holds, a part to read.
        seed: of the new tokens' rows and of the [SEG] projector.
        on_step: is called with each of `STEPS` as it begins.

    Raises:
        ValueError: a part is not to be had, damaged, or does not fit; `out` may not be replaced; no size is given as
            `max_shard_size`; verification failed.
        OSError: `out` could not be written, for want of space for instance.
    """
    check_new_folder(out, overwrite, sources := (internvl, mask_decoder, depth_codec, like))
    check_parts(mask_decoder, depth_codec, like)
    if not _SIZE.fullmatch(max_shard_size):  # huggingface_hub would say so after all the work
        raise ValueError(f"max_shard_size is {max_shard_size!r}; expected a number and a unit, such as 500MB or 5GB.")
    internvl = find_internvl(internvl)
    on_step("Reading SAM2")
    old = None if like is None else load_predecessor(like)
    mask_model = old.mask_model if old else load_mask_model(mask_decoder)
    on_step("Reading the depth codec")
    codec = old.codec if old else load_depth_codec(depth_codec)
    on_step("Reading the tokenizer")
    parts = {"like": like} if old else {"sam2": mask_model, "depth_codec": codec}
    processor = PerceptioProcessor.from_components(internvl, **parts)
    check_tokens(load_tokenizer(internvl), processor.tokenizer)
    on_step("Reading InternVL")
    read = ConversionReport(str(internvl))
    stock = load_internvl(internvl, dtype=dtype, report=read)
    rows_before = stock.get_input_embeddings().num_embeddings
    check_processor(processor, stock.config, mask_model.config, codec.config)
    reference = None
    if verify:  # before anything could touch the weights
        on_step("Asking InternVL")
        reference = take_reference(stock, mask_model, codec, processor, old)
    on_step("Joining")
    model = assemble(stock, mask_model, codec, processor, like=old, seed=seed)
    added = added_digests(reference, model) if reference else {}
    del stock, mask_model, codec, old
    report = _report(model, processor, out, rows_before)
    report = replace(report, like=None if like is None else str(like), notes=tuple(read.notes))
    with new_folder(out, overwrite, sources) as partial:
        on_step("Writing")
        _save(model, processor, partial, max_shard_size)
        del model
        if reference is None:
            return report
        on_step("Verifying")
        saved = PerceptioForConditionalGeneration.from_pretrained(partial, dtype="auto")
        check = check_against(reference, saved, added)
    return replace(report, check=check)


def _save(
    model: PerceptioForConditionalGeneration, processor: PerceptioProcessor, folder: Path, max_shard_size: str
) -> None:
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
    except SafetensorError as error:  # what its writer makes of a full disk
        raise OSError(f"The weights could not be written: {error}") from error


def _report(
    model: PerceptioForConditionalGeneration, processor: PerceptioProcessor, out: Source, rows_before: int
) -> BuildReport:
    config, new = model.config, processor.added_token_ids
    return BuildReport(
        folder=str(out),
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        text_model=config.text_config.model_type,
        tied=model.lm_head.weight is model.get_input_embeddings().weight,
        rows_before=rows_before,
        rows=config.text_config.vocab_size,
        new_tokens=len(new),
        first_new_id=min(new, default=None),
        mask_image_size=processor.mask_image_size,
        depth_grid=config.depth_config.grid_size,
        depth_codes=config.num_depth_codes,
    )
