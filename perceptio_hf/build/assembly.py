"""Joining a stock InternVL, a SAM2 and a depth codec into a Perceptio, without a second copy of the weights."""

import copy
import os
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Sam2Config, Sam2Model

from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.configuration_perceptio import PerceptioConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.tokens import spatial_tokens

from .components import check_parts, load_internvl, load_mask_model, tokens_per_tile
from .predecessor import Predecessor, load_predecessor
from .token_rows import fill_new_rows

_Module = TypeVar("_Module", bound=nn.Module)
_OWN_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version")  # each configuration has its own


def from_components(
    model_class: type[PerceptioForConditionalGeneration],
    internvl: Any,
    sam2: Any = None,
    depth_codec: Any = None,
    *,
    like: Any = None,
    processor: PerceptioProcessor | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> PerceptioForConditionalGeneration:
    """`PerceptioForConditionalGeneration.from_components`, which says all about it, for `model_class`."""
    check_parts(sam2, depth_codec, like)
    old = None if like is None else load_predecessor(like)
    mask_model, codec = (old.mask_model, old.codec) if old else (load_mask_model(sam2), load_depth_codec(depth_codec))
    source = internvl if isinstance(internvl, (str, os.PathLike)) else _origin(internvl)
    if processor is None and source is not None:
        processor = PerceptioProcessor.from_components(source, mask_model, codec)
    return assemble(
        load_internvl(internvl, dtype=dtype),
        mask_model,
        codec,
        processor,
        like=old,
        seed=seed,
        model_class=model_class,
    )


def assemble(
    internvl: InternVLForConditionalGeneration,
    mask_model: Sam2Model,
    codec: DepthVQVAE,
    processor: PerceptioProcessor | None,
    *,
    like: Predecessor | None = None,
    seed: int = 0,
    model_class: type[PerceptioForConditionalGeneration] = PerceptioForConditionalGeneration,
) -> PerceptioForConditionalGeneration:
    """Loaded models -> a Perceptio in evaluation mode; it shares their weights, and they stay as they are.

    Args:
        processor: whose tokenizer has the spatial tokens; None puts them behind all rows of the vocabulary.
        like: where `mask_model` and `codec` come from, whose [SEG] projector, settings and ids are taken over; none of
            the tokens may be new then.
        seed: of the new tokens' rows and of the [SEG] projector.

    Raises:
        ValueError: if the processor is one of other models, or `like` one of another InternVL.
    """
    if processor is not None:
        check_processor(processor, internvl.config, mask_model.config, codec.config)
    if like is not None:
        like.check_internvl(internvl.config, processor)
    internvl, mask_model, codec = (share_weights(part) for part in (internvl, mask_model, codec))
    ids = like.spatial_ids if like else _spatial_ids(internvl, codec, processor)
    _add_rows(internvl, codec, ids, processor, seed)
    marks = like.config.picture_mark_token_ids if like else None
    marks = marks if processor is None else processor.picture_mark_token_ids()
    settings = like.settings if like else {}
    config = _configuration(internvl.config, mask_model.config, codec.config, ids, marks, settings)
    with torch.device("meta"):  # takes no memory: every part of it gets replaced
        model = model_class(copy.deepcopy(config))  # a new model chooses an attention; the parts keep theirs
    model.model, model.lm_head = internvl.model, internvl.lm_head
    model.config = model.model.config = config
    model.mask_model, model.depth_model = mask_model.float(), codec.float()
    if like is None:
        _start_projector(model.seg_projector, mask_model.device, seed)
    else:
        model.seg_projector = share_weights(like.projector).float()
    model.generation_config = internvl.generation_config
    model.tie_weights()
    model.freeze()
    return model.eval()


def share_weights(module: _Module) -> _Module:
    """A copy of `module` with parameters and buffers of its own that lie in the same memory."""
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def _origin(internvl: Any) -> str | None:
    """The folder or Hub name a model was loaded from, if a tokenizer is there."""
    name = getattr(internvl, "name_or_path", "")
    if os.path.isdir(name):
        return name if os.path.isfile(os.path.join(name, "tokenizer_config.json")) else None
    return name if name.count("/") == 1 and all(name.split("/")) else None


def _spatial_ids(internvl: nn.Module, codec: DepthVQVAE, processor: PerceptioProcessor | None) -> list[int]:
    """Ids of the spatial tokens in the order of `spatial_tokens`."""
    tokens = spatial_tokens(codec.config.num_codes)
    if processor is None:
        rows = internvl.get_input_embeddings().weight.shape[0]
        return list(range(rows, rows + len(tokens)))
    return processor.tokenizer.convert_tokens_to_ids(tokens)


def _add_rows(
    internvl: InternVLForConditionalGeneration,
    codec: DepthVQVAE,
    ids: list[int],
    processor: PerceptioProcessor | None,
    seed: int,
) -> None:
    """Make embedding and head, which become `internvl`'s own, hold every token; rows nobody uses are taken first."""
    embedding, head = internvl.get_input_embeddings(), internvl.get_output_embeddings()
    before = embedding.weight.shape[0]
    known = None if processor is None else set(processor.tokenizer.get_vocab().values())
    rows = max(before, max(known or ids) + 1)
    tied = head.weight is embedding.weight
    embedding.weight = _with_rows(embedding.weight, rows)
    head.weight = embedding.weight if tied else _with_rows(head.weight, rows)
    embedding.num_embeddings = head.out_features = rows
    internvl.config.text_config.vocab_size = internvl.model.language_model.vocab_size = rows
    new = sorted(set(range(before, rows)) | set(processor.added_token_ids if processor else ()))
    fill_new_rows(embedding, head, codec, ids, new_ids=new, known_ids=known and sorted(known), seed=seed)


def _with_rows(weight: nn.Parameter, rows: int) -> nn.Parameter:
    """A copy of a (V, d) matrix with zeros behind it."""
    longer = weight.new_zeros(rows, weight.shape[1])
    with torch.no_grad():
        longer[: len(weight)] = weight
    return nn.Parameter(longer, requires_grad=weight.requires_grad)


def _configuration(
    internvl: InternVLConfig,
    mask_config: Sam2Config,
    depth_config: DepthVQVAEConfig,
    ids: list[int],
    marks: dict[str, list[int]] | None,
    settings: dict[str, Any],
) -> PerceptioConfig:
    """The configuration of the whole, with `settings` of its own; the parts' are part of it, not copies."""
    parts = {"vision_config": internvl.vision_config, "text_config": internvl.text_config}
    values = {name: value for name, value in internvl.to_dict().items() if name not in (*_OWN_FIELDS, *parts)}
    seg, start, *codes, end = ids
    own = settings | {
        "mask_config": mask_config,
        "depth_config": depth_config,
        "seg_token_id": seg,
        "depth_start_token_id": start,
        "depth_end_token_id": end,
        "depth_token_ids": codes,
        "picture_mark_token_ids": marks,
        "attn_implementation": {"": internvl._attn_implementation},  # a name, or none, would be forced on all parts
    }
    return PerceptioConfig.from_dict({**values, **parts, **own})  # which leaves out what others wrote into InternVL's


def check_processor(
    processor: PerceptioProcessor, internvl: InternVLConfig, mask_config: Sam2Config, depth_config: DepthVQVAEConfig
) -> None:
    """Whether a processor is the one of these models.

    Raises:
        ValueError: names what differs.
    """
    expected = {
        "num_depth_tokens": depth_config.num_tokens,
        "num_depth_codes": depth_config.num_codes,
        "mask_image_size": mask_config.prompt_encoder_config.image_size,
        "image_token_id": internvl.image_token_id,
        "image_seq_length": tokens_per_tile(internvl),
    }
    side, tile = processor.image_processor.size, list(internvl.vision_config.image_size)
    if [side["height"], side["width"]] != tile:
        raise ValueError(
            f"The picture processor makes tiles of {side['height']} x {side['width']} pixels, but the vision tower "
            f"takes {tile[0]} x {tile[1]}: are preprocessor_config.json and config.json of the same InternVL?"
        )
    for name, value in expected.items():
        if getattr(processor, name) != value:
            raise ValueError(
                f"The processor has {name} = {getattr(processor, name)}, but the models need {value}: do tokenizer and "
                "configuration come from the same InternVL? PerceptioProcessor.from_components makes the processor of "
                "three parts."
            )


def _start_projector(projector: nn.Module, device: torch.device, seed: int) -> None:
    """Random weights as torch gives new layers, in float32, without a trace in torch's own generator."""
    projector.to_empty(device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in (projector.linear_in, projector.linear_out):
            layer.cpu().reset_parameters()
    projector.to(device)
