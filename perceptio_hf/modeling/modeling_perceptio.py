"""Perceptio: InternVL whose language model also writes masks ([SEG]) and depth (a span of codes)."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import Cache
from transformers.models.internvl.modeling_internvl import (
    InternVLCausalLMOutputWithPast,
    InternVLForConditionalGeneration,
)
from transformers.models.sam2.modeling_sam2 import Sam2Model

from perceptio_hf.modeling.spans.span_cache import CACHE
from perceptio_hf.modeling.spans.spatial_reading import count_pictures
from perceptio_hf.modeling.spans.spatial_request import keep_own_settings
from perceptio_hf.tokens import SpatialVocabulary, read_sequence

from .attachments import attached, needed
from .configuration_perceptio import PerceptioConfig, attention_of_internvl
from .generation_perceptio import SpatialGenerationMixin
from .mask_prediction import MaskPredictionMixin, SegProjector
from .modeling_depth_vqvae import DepthVQVAE
from .placement import is_here, without_casts_down
from .shards import check_shards


@dataclass
class PerceptioCausalLMOutputWithPast(InternVLCausalLMOutputWithPast):
    """InternVL's output, with the fields it has in the installed transformers, and:

    Args:
        last_hidden_state: (batch, sequence, hidden) states after the final norm.
        mask_logits: (n, h, w) float32, one per [SEG] of the batch in reading order, if `mask_pixel_values` were given.
        mask_scores: (n,) SAM2's predicted IoU of each mask.
        loss_parts: scalars by name, if a `criterion` was given.
        code_logits: (batch, sequence, K) logits of the depth codes, if asked for.
    """

    last_hidden_state: torch.FloatTensor | None = None
    mask_logits: torch.FloatTensor | None = None
    mask_scores: torch.FloatTensor | None = None
    loss_parts: dict[str, torch.Tensor] | None = None
    code_logits: torch.FloatTensor | None = None


_OUTPUT_FIELDS = frozenset(field.name for field in fields(PerceptioCausalLMOutputWithPast))

# The names of the linear layers that PEFT adapts without further thought.
LANGUAGE_MODEL_LAYERS = r"model\.language_model\.layers\..*_proj"

# (hidden_states (batch, sequence, hidden), lm_head, the output so far) -> (loss, its parts by name)
Criterion = Callable[
    [torch.Tensor, nn.Module, PerceptioCausalLMOutputWithPast], tuple[torch.Tensor, dict[str, torch.Tensor]]
]


class PerceptioForConditionalGeneration(SpatialGenerationMixin, MaskPredictionMixin, InternVLForConditionalGeneration):
    """InternVL with a [SEG] projector, SAM2 and a depth codec.

    SAM2's image encoder and the codec are frozen; SAM2, codec and projector stay float32 when the model is loaded in
    another dtype. Without spatial tokens the logits are those of the InternVL it extends.
    """

    config: PerceptioConfig
    config_class = PerceptioConfig
    _keep_in_fp32_modules_strict: ClassVar = ["mask_model", "depth_model", "seg_projector"]
    # What quantisation leaves alone is read from here; transformers wants no name in both lists.
    _keep_in_fp32_modules: ClassVar = [
        *(
            f"mask_model.{name}"
            for name in ("shared_image_embedding", "vision_encoder", "prompt_encoder", "mask_decoder")
        ),
        *(f"depth_model.{name}" for name in ("depth_encoder", "depth_codebook", "depth_decoder")),
        *(f"seg_projector.{name}" for name in ("linear_in", "linear_out")),
    ]
    _no_split_modules: ClassVar = [*(InternVLForConditionalGeneration._no_split_modules or []), "Sam2MultiScaleBlock"]
    # A full SAM2 checkpoint also holds its video memory, which still pictures do not use.
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        rf"mask_model\.{name}"
        for name in ("memory_", "mask_downsample", "object_pointer_proj", "temporal_positional_encoding_projection")
    ]

    def __init__(self, config: PerceptioConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.seg_projector = SegProjector(hidden_size, config.mask_config.mask_decoder_config.hidden_size)
        self.mask_model = Sam2Model(config.mask_config)
        self.depth_model = DepthVQVAE(config.depth_config)
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """Take the parts that never learn, SAM2's image encoder and the depth codec, away from optimizers."""
        self.mask_model.vision_encoder.requires_grad_(False)
        self.depth_model.requires_grad_(False)

    def _apply(self, fn, recurse: bool = True):
        """What `to`, `half` and `bfloat16` do to every tensor; the parts that stay float32 are moved, not cast."""
        if recurse:
            for name, part in self.named_children():
                part._apply(without_casts_down(fn) if name in self._keep_in_fp32_modules_strict else fn)
        return super()._apply(fn, recurse=False)

    def __setattr__(self, name: str, value) -> None:
        """As ever; PEFT leaves `peft_config` here when it has put adapters in.

        Raises:
            ValueError: if adapters that are to be trained sit in a part that never learns. `"all-linear"` reaches into
                SAM2's image encoder, which runs without gradients.
        """
        super().__setattr__(name, value)
        if name == "peft_config":
            self._check_adapters()

    def _check_adapters(self) -> None:
        frozen = {"mask_model.vision_encoder": self.mask_model.vision_encoder, "depth_model": self.depth_model}
        reached = [f"{part}.{name}" for part, module in frozen.items() for name in _trained(module)]
        if reached:
            raise ValueError(
                f"There are {len(reached)} adapters or copies in parts that never learn, the first is {reached[0]}: "
                "the target_modules of this PEFT configuration reach into SAM2's image encoder or the depth codec. "
                "Load the model again and use perceptio_hf.training.lora.lora_config(model), or in a configuration of "
                f'your own target_modules=r"{LANGUAGE_MODEL_LAYERS}".'
            )

    def train(self, mode: bool = True):
        """As ever, but the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.mask_model.vision_encoder.eval()
        self.depth_model.eval()
        return self

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As transformers'; flash and flex attention are for the vision tower and the language model only."""
        if attention_of_internvl(attn_implementation) == attn_implementation:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
            return
        for part in (self.model.vision_tower, self.model.language_model):
            part.set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config._attn_implementation = attn_implementation

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As transformers'.

        Raises:
            ValueError: if rows of spatial tokens would be cut off.
        """
        if new_num_tokens is not None and self.config.has_spatial_tokens:
            config = self.config
            last = max(config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id)
            last = max(last, *config.depth_token_ids)
            if new_num_tokens <= last:
                raise ValueError(
                    f"resize_token_embeddings({new_num_tokens}) would cut off spatial tokens, whose ids go up to "
                    f"{last}. Keep at least {last + 1} rows; the tokenizer has as many."
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a Perceptio checkpoint; all arguments are transformers'.

        Raises:
            ValueError: where weights and configuration contradict one another (transformers would fill the gaps with
                random numbers), unless `ignore_mismatched_sizes=True` asks for that; where an index of weights names
                files outside its folder.
        """
        if pretrained_model_name_or_path is not None:
            check_shards(pretrained_model_name_or_path, kwargs.get("subfolder"))
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        # PEFT saves what two tensors of an adapter share once, and transformers calls the other one missing.
        info["missing_keys"] = _without_shared(model, info["missing_keys"])
        if not kwargs.get("ignore_mismatched_sizes"):
            check_loaded(pretrained_model_name_or_path, info, adapted=getattr(model, "_hf_peft_config_loaded", False))
        keep_own_settings(model.generation_config)  # also where the configuration is saved without the model
        return (model, info) if wants_info else model

    @classmethod
    def from_components(
        cls,
        internvl,
        sam2=None,
        depth_codec=None,
        *,
        like=None,
        processor=None,
        dtype: str | torch.dtype = "auto",
        seed: int = 0,
    ) -> "PerceptioForConditionalGeneration":
        """A fresh Perceptio out of a stock InternVL, a stock SAM2 and a depth codec.

        It has the InternVL's weights, bit for bit, and without spatial tokens computes what the InternVL computes. The
        spatial tokens have ids of rows that no token uses, or of rows that are added; the new rows resemble those that
        are there (how, and why, says `perceptio_hf.build.token_rows`). The [SEG] projector starts at random.
        All of this is to be trained before masks and depth mean anything.

        Models that are given share the memory of their weights with the result, embedding and head apart, and are
        otherwise left as they are. From folders, no more than about one copy of the weights is ever in memory.

        Args:
            internvl: folder or Hub name of an InternVL, in transformers' layout or OpenGVLab's, or an
                `InternVLForConditionalGeneration`.
            sam2: folder or Hub name of a SAM2 in transformers' layout, one of Meta's files, or a `Sam2Model`.
            depth_codec: folder of a `DepthVQVAE` or of a Perceptio, a `vae-final.pt` of AURORA, or a `DepthVQVAE`.
            like: in place of these two, folder or Hub name of a Perceptio, or one that is loaded, for an InternVL that
                was exported from it and trained further: SAM2, codec, [SEG] projector and mask settings are taken over.
            processor: `PerceptioProcessor.from_components` of the same three, which knows the ids. Default: made from
                `internvl` where that is, or was loaded from, a folder or Hub name; otherwise the spatial tokens come
                behind all rows of the vocabulary, where a tokenizer without unused rows has them too.
            dtype: of the InternVL part; "auto" keeps it. SAM2, codec and projector are float32.
            seed: of the new rows and the projector.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: a part that cannot be read, is of another kind, damaged or incomplete, or parts that do not fit.
            ImportError: where only a copy of this file is at hand and not the package.
        """
        from_components = needed("from_components", "from_components")
        return from_components(cls, internvl, sam2, depth_codec, like=like, processor=processor, dtype=dtype, seed=seed)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        """The last step before an upload; a card that says nothing gives way to ours.

        transformers has no public place for this. Should it rename the method, uploads go on with its own card.
        """
        replace_default_card = attached("replace_default_card")
        if replace_default_card is not None:
            replace_default_card(Path(working_dir, "README.md"), self, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def spatial_vocabulary(self) -> SpatialVocabulary:
        """The ids of the spatial tokens.

        Raises:
            ValueError: if the model's vocabulary has none.
        """
        if not self.config.has_spatial_tokens:
            raise ValueError(
                "This model's vocabulary has no spatial tokens (config.seg_token_id is None): use spatial='none', or a "
                "checkpoint that has them."
            )
        eos = self.generation_config.eos_token_id
        return self.config.spatial_vocabulary(self.config.text_config.eos_token_id if eos is None else eos)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        cache: Cache | None = None,
        mask_pixel_values: torch.FloatTensor | None = None,
        mask_pixel_pictures: torch.LongTensor | None = None,
        criterion: Criterion | None = None,
        word_places: torch.LongTensor | None = None,
        code_ids: slice | torch.LongTensor | None = None,
        **kwargs,
    ) -> PerceptioCausalLMOutputWithPast:
        """InternVL's forward and the masks.

        The steps are those of `InternVLForConditionalGeneration.forward`. `generate` asks this signature which inputs
        it may send, so they are named; which of them InternVL's body knows differs between versions of transformers,
        so only those that came are handed on, and what the body returns is handed back under its names.

        Args:
            past_key_values, cache: two names of one argument; either works with every version of transformers.
            mask_pixel_values: (pictures, 3, S, S) as the processor prepares them for SAM2, or bytes (uint8), which are
                normalised here. If given, every [SEG] in `input_ids` becomes a mask, with gradients through projector
                and mask decoder.
            mask_pixel_pictures: (n,) which of the batch's pictures, counted from 0, these are; None: all of them.
            criterion: computes `loss` and `loss_parts` from the hidden states, the head and the output so far (masks
                included, `logits` None: it calls the head where it needs to). It runs in here so that wrappers which
                shard or replicate the model see every use of its parameters.
            word_places: (batch,) the one step of each row whose state passes the head, instead of `logits_to_keep`.
            code_ids: the ids of the depth codes, if their logits are wanted (`code_logits`, for all steps).

        Raises:
            ValueError: if both `labels` and `criterion` are given, or `mask_pixel_values` without `input_ids`.
        """
        if mask_pixel_values is not None and input_ids is None:
            raise ValueError(
                "mask_pixel_values came without input_ids, in which each [SEG] is looked for: pass the ids, or leave "
                "mask_pixel_values out where inputs_embeds are all there is."
            )
        if criterion is not None and labels is not None:
            raise ValueError(
                "Both `labels` and `criterion` came; a criterion brings its own labels, leave out `labels`."
            )
        given = kwargs.get("depth_given_as_codes")  # of PerceptioDataCollator
        if labels is not None and given is not None and (len(kwargs["mask_targets"]) or not bool(given.all())):
            raise ValueError(
                "A batch of PerceptioDataCollator came with labels in which depth maps are not codes yet, and masks "
                "that no loss here knows: train it with PerceptioSFTTrainer."
            )
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "The model was put into nn.DataParallel, which cuts a batch of pictures and rows in the wrong places. "
                "Use one process per GPU, `torchrun --nproc-per-node 2 ...` or `accelerate launch ...`, or show one "
                "GPU only: CUDA_VISIBLE_DEVICES=0."
            )
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: past_key_values if cache is None else cache,
            "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        shared = criterion is not None and _shards(self)
        if shared and pixel_values is None:
            given["inputs_embeds"] = self._no_pictures_used(given.pop("input_ids"))
        outputs = self.model(**given, return_dict=True, **kwargs)
        hidden = outputs.last_hidden_state
        logits = None
        if criterion is None:
            if word_places is not None:
                rows = torch.arange(len(hidden), device=hidden.device)
                kept = hidden[rows, word_places.to(hidden.device)][:, None]
            elif isinstance(logits_to_keep, int):
                kept = hidden[:, slice(-logits_to_keep, None)]
            else:  # the last layers may lie on another device than the one that indices come on
                kept = hidden[:, logits_to_keep.to(hidden.device)]
            if kept.shape[1]:
                logits = self.lm_head(kept)
            else:  # not every kind of head takes nothing
                logits = kept.new_zeros(*kept.shape[:2], self.config.text_config.vocab_size)
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        mask_logits, mask_scores = None, None
        if (mask_pixel_values is not None and self.config.has_spatial_tokens) or criterion is not None:
            mask_logits, mask_scores = self._masks_of_batch(
                input_ids, hidden, mask_pixel_values, mask_pixel_pictures, always=shared
            )
        result = PerceptioCausalLMOutputWithPast(
            **{name: value for name, value in outputs.items() if name in _OUTPUT_FIELDS},
            loss=loss,
            logits=logits,
            mask_logits=mask_logits,
            mask_scores=mask_scores,
        )
        if code_ids is not None:
            result.code_logits = self._code_logits(hidden, code_ids)
        if criterion is not None:
            loss, parts = criterion(hidden, self.lm_head, result)
            result = replace(result, loss=loss, loss_parts=parts)
        return result.to_tuple() if return_dict is False else result

    def _code_logits(self, hidden: torch.Tensor, code_ids: slice | torch.LongTensor) -> torch.Tensor:
        """(batch, sequence, hidden) -> (batch, sequence, K): by the head's rows of the codes, if they are here."""
        head = self.lm_head
        columns = code_ids if isinstance(code_ids, slice) else code_ids.to(hidden.device)
        # Rows of quantised weights and of shards cannot be taken out; the head itself knows how to use them.
        plain = type(head) is nn.Linear and type(head.weight.data) is torch.Tensor and is_here(head.weight)
        plain = plain and head.weight.device == hidden.device
        if not plain:
            return head(hidden)[..., columns]
        return nn.functional.linear(hidden, head.weight[columns], None if head.bias is None else head.bias[columns])

    def _masks_of_batch(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        mask_pixel_values: torch.Tensor | None,
        held: torch.Tensor | None,
        *,
        always: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of all [SEG] tokens, None where they have no picture; `held` are the pictures whose pixels came. With
        `always`, SAM2 and the projector run even where there is no mask."""
        words = self.spatial_vocabulary()
        counts = count_pictures(input_ids, words.image)
        first_picture = (counts.cumsum(0) - counts).tolist()
        states, pictures = [], []
        for row, ids in enumerate(input_ids.tolist()):
            for seg in read_sequence(ids, words).segs:
                states.append(hidden[row, seg.position])
                pictures.append(first_picture[row] + seg.picture)
        if not states:
            return self._no_masks_used(hidden) if always else self._no_masks(hidden.device)
        if mask_pixel_values is None:
            return None, None
        if held is not None:
            places = {picture: place for place, picture in enumerate(held.tolist())}
            pictures = [_place_of(picture, places) for picture in pictures]
        return self.predict_masks(torch.stack(states), mask_pixel_values, pictures)

    def _no_pictures_used(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of words (batch, sequence, hidden), with no share of how InternVL sees a blank picture; why, says
        `_no_masks_used`. The order of the modules is that of InternVL."""
        words = self.get_input_embeddings()(input_ids)
        blank = torch.zeros(1, 3, *self.config.vision_config.image_size, device=words.device)
        seen = self.model.get_image_features(blank, return_dict=True).pooler_output
        return words + seen[:0].sum().to(words)

    def _no_masks_used(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_no_masks`, but as an empty share of a blank picture's mask, so that parameters get a gradient of zero.

        Processes that share parameters exchange them module by module: one that leaves a module out would keep the
        others waiting.
        """
        side = self.config.mask_config.prompt_encoder_config.image_size
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=hidden.device)
        logits, scores = self.predict_masks(hidden.new_zeros(1, hidden.shape[-1]), blank, [0])
        return logits[:0], scores[:0]

    def _no_masks(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(0, *self.mask_size, device=device), torch.zeros(0, device=device)


def picture_features(outputs) -> torch.Tensor | None:
    """(tiles, places, hidden) of the pictures as the language model reads them; None where there is none.

    Args:
        outputs: of `forward`, InternVL's or its body's, with whatever version of transformers.
    """
    if "image_outputs" in type(outputs).__dataclass_fields__:
        return None if outputs.image_outputs is None else outputs.image_outputs.pooler_output  # transformers >= 5.24
    return outputs.image_hidden_states


def _trained(module: nn.Module) -> list[str]:
    """The names of the parameters that would learn."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _shards(model: nn.Module) -> bool:
    """Whether processes hold shards of this model's parameters, as FSDP2 and DeepSpeed's ZeRO-3 have it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or hasattr(next(model.parameters()), "ds_id")


def _place_of(picture: int, places: dict[int, int]) -> int:
    if picture not in places:
        raise ValueError(
            f"A [SEG] speaks of picture {picture} of the batch, counted from 0, but `mask_pixel_values` holds only "
            f"{sorted(places)} (mask_pixel_pictures); give the pixels of every picture that a [SEG] speaks of."
        )
    return places[picture]


def _without_shared(model: nn.Module, missing: Collection[str]) -> set[str]:
    """Those of the `missing` names whose parameter has no other name that was loaded."""
    if not missing:
        return set()
    loaded = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name not in missing}
    everything = dict(model.named_parameters(remove_duplicate=False))
    return {name for name in missing if name not in everything or id(everything[name]) not in loaded}


def check_loaded(source, info: dict, adapted: bool = False) -> None:
    """Raise a ValueError where transformers' loading `info` tells of weights that are missing, left over or misfit: of
    an adapter, where one has been loaded onto those of `source`."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(_with_shapes(key) for key in info.get(kind) or ())
        if keys and adapted:
            raise ValueError(
                f"The adapter does not fit its base, {source}: {len(keys)} {kind.replace('_', ' ')}, the first is "
                f"{keys[0]}. Is it whole, and of this base? Then this transformers cannot read it (5.17 reads neither "
                "modules_to_save nor rows of tokens): give base and folder to peft.PeftModel.from_pretrained."
            )
        if keys:
            raise ValueError(
                f"The weights in {source} contradict its configuration: {len(keys)} {kind.replace('_', ' ')}, the "
                f"first is {keys[0]}. Is config.json the one these weights were saved with?"
            )


def _with_shapes(key: str | tuple) -> str:
    """A key as transformers reports it: a name, or (name, shape in the file, shape in the model)."""
    return key if isinstance(key, str) else f"{key[0]} ({tuple(key[1])} instead of {tuple(key[2])})"
