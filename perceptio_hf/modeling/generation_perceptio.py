"""`generate` with spatial tokens: the loops of transformers under the grammar, masks and depth of what they made."""

import copy
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from perceptio_hf.modeling.spans.end_sequences import EndSequences
from perceptio_hf.modeling.spans.spatial_loop import SPATIAL_DECODINGS, SpatialLoop, WholeSpans
from perceptio_hf.modeling.spans.spatial_output import PerceptioGenerateBeamOutput, PerceptioGenerateOutput
from perceptio_hf.modeling.spans.spatial_reading import Prompts, SpatialReadingMixin
from perceptio_hf.modeling.spans.spatial_recorder import StepRecorder
from perceptio_hf.modeling.spans.spatial_request import (
    SpatialRequest,
    check_mode,
    generation_setting,
    keep_own_settings,
)

from .span_grammar import SPATIAL_MODES, SpanGrammar


class SpatialGenerationMixin(SpatialReadingMixin):
    """`generate` and `decode_spatial` of `PerceptioForConditionalGeneration`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        spatial: str | None = None,
        spatial_decoding: str | None = None,
        mask_pixel_values: torch.FloatTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        **kwargs,
    ):
        """transformers' `generate` under the grammar of the spatial tokens, and their masks and depth maps.

        Args:
            inputs, generation_config, logits_processor, kwargs: as in transformers; any decoding strategy. Without any
                length the limit is the spans a row may hold and 128 more tokens. `end_sequences` of a generation
                configuration, lists of token ids, end a response that ends in one of them.
            spatial: "auto" lets the model decide and keeps what it emits well formed; "seg", "depth", "seg+depth"
                force the spans in this order for each picture; "none" forbids them. A row without a picture has
                neither, whatever the mode. Default: `spatial` of the generation configuration, else "auto".
            spatial_decoding: "parallel" guesses a whole span and corrects it in few passes, "sequential" writes code by
                code; the results are the same (docs/generation.md). Default: `spatial_decoding` of the generation
                configuration, else "parallel". Beams, drafted tokens, processors and stopping criteria that read ids,
                and caches that cannot be cut are sequential, and say so once.
            mask_pixel_values: (pictures, 3, S, S) as the processor prepares them for SAM2; needed for masks.
            original_sizes: (pictures, 2) height and width of each picture, carried into the output.

        Returns:
            Token ids; with `return_dict_in_generate=True` a `PerceptioGenerateOutput` (beams:
            `PerceptioGenerateBeamOutput`) whose masks and depth come from the states of this very generation (with
            drafted tokens or a loop of the caller's, from one more pass over the result).

        Raises:
            ValueError: unknown `spatial` or `spatial_decoding`, a forced span without a picture, too few new tokens for
                it, forced masks without `mask_pixel_values`, a prompt that ends in a broken span.
        """

        def setting(name: str):
            given = kwargs.get(name)
            return (
                given if name in kwargs else generation_setting(name, given, generation_config, self.generation_config)
            )

        spatial = generation_setting("spatial", spatial, generation_config, self.generation_config)
        spatial = "auto" if spatial is None else spatial
        check_mode("spatial", spatial, SPATIAL_MODES)
        asked = generation_setting("spatial_decoding", spatial_decoding, generation_config, self.generation_config)
        decoding = "parallel" if asked is None else asked
        check_mode("spatial_decoding", decoding, SPATIAL_DECODINGS)
        # As the assistant of another model it only drafts; that model's grammar is among the processors.
        if setting("is_assistant") or (not self.config.has_spatial_tokens and spatial in ("auto", "none")):
            return super().generate(inputs, generation_config, logits_processor, **kwargs)
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        embeds = kwargs.get("inputs_embeds")
        if prompt is None and embeds is None:
            kwargs["input_ids"] = prompt = self._empty_prompt(setting("bos_token_id"))
        embedded = 0 if embeds is None else embeds.shape[1]
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        request = SpatialRequest.of(self.spatial_vocabulary(), spatial, prompt, embedded, configs, kwargs)
        returns_dict = setting("return_dict_in_generate")
        given = {"mask_pixel_values": mask_pixel_values, "original_sizes": original_sizes}
        request.check(needs_masks=returns_dict and mask_pixel_values is None, **given)
        _check_assistant(kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("max_length", "max_new_tokens")}
        if generation_config is None:
            kwargs["max_new_tokens"] = request.new_tokens
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.max_new_tokens, generation_config.max_length = request.new_tokens, None

        if _keeps_no_cache(self.model.language_model) and setting("use_cache") is not False:
            if generation_config is None or "use_cache" in kwargs:
                kwargs["use_cache"] = False
            else:
                generation_config.use_cache = False
        grammar = request.grammar()
        processors = LogitsProcessorList([*(logits_processor or []), grammar])
        _spare_spans(kwargs, generation_config, self.generation_config, setting, grammar)
        loop = SpatialLoop(
            request,
            decoding,
            insists=asked is not None,
            keeps_states=bool(returns_dict),
            streamer=kwargs.get("streamer"),
        )
        foreign = loop.foreign_loop(setting)
        obstacle = foreign or loop.obstacle(setting)
        if obstacle is None and (is_fsdp_managed_module(self) or is_deepspeed_zero3_enabled()):
            obstacle = "processes that share one model"
        if obstacle is None:
            kwargs["custom_generate"] = loop
        else:
            loop.fall_back(obstacle)
            if foreign is None:  # there a step may read several tokens, and take some back
                kwargs["spatial_recorder"] = loop.recorder()
        out = super().generate(inputs, generation_config, processors, **kwargs)
        if not returns_dict:
            return out
        if prompt is None:
            prompt = out.sequences[:, :0]
        prompts = Prompts(
            prompt, kwargs.get("pixel_values"), kwargs.get("attention_mask"), mask_pixel_values, original_sizes
        )
        beams = out.get("beam_indices")
        if isinstance(loop.states, StepRecorder):
            loop.states.beam_indices = beams
        fields = self._read_spatial(out.sequences, prompts, loop.states)
        return (PerceptioGenerateOutput if beams is None else PerceptioGenerateBeamOutput)(**out, **fields)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers, and the generation configuration keeps `spatial` and our other settings."""
        keep_own_settings(self.generation_config)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _empty_prompt(self, start: int | None) -> torch.Tensor:
        """The prompt transformers begins with where none is given: (1, 1) beginning-of-sequence ids."""
        if start is None:
            raise ValueError(
                "generate got neither input_ids nor inputs_embeds, and the generation configuration has no "
                "bos_token_id to begin with. Pass what the processor returns: model.generate(**inputs)."
            )
        return torch.full((1, 1), start, device=self.device)

    def draft_codes(self, device: torch.device) -> torch.Tensor:
        """(N,) ids of the codes that a span's first pass is read with; any serve, good ones save passes."""
        words = self.spatial_vocabulary()
        return torch.full((words.num_depth_tokens,), words.codes[0], device=device)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, spatial_recorder=None, **kwargs):
        """As transformers', and the recorder notes which tokens the coming step reads; forward never sees it."""
        if spatial_recorder is not None:
            spatial_recorder.note(input_ids)
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        # transformers calls this once after every step, outside of what it compiles.
        recorder = model_kwargs.get("spatial_recorder")
        if recorder is not None:
            recorder.record(outputs.last_hidden_state, outputs.logits)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # transformers < 5.20 repeats tile by tile, which mixes up rows of several tiles: [A, B] -> [A, A, B, B].
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            of_rows = torch.arange(input_ids.shape[0]).repeat_interleave(expand_size)
            expanded = self._pixels_of(of_rows, Prompts(input_ids, pixel_values))
            model_kwargs["pixel_values"] = None
            input_ids, model_kwargs = super()._expand_inputs_for_generation(
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
            return input_ids, model_kwargs | {"pixel_values": expanded}
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )


def _keeps_no_cache(language_model: nn.Module) -> bool:
    """Whether its layers drop the cache, whatever is asked, as checkpointed ones do in training mode."""
    return any(part.training and getattr(part, "gradient_checkpointing", False) for part in language_model.modules())


def _spare_spans(
    kwargs: dict,
    asked: GenerationConfig | None,
    own: GenerationConfig,
    setting: Callable[[str], Any],
    grammar: SpanGrammar,
) -> None:
    """Let no stopping criterion cut a span: those of the call and of the settings are asked again behind it."""
    given, mine = list(kwargs.get("stopping_criteria") or []), {}
    if setting("max_time") is not None:
        mine["max_time"] = MaxTimeCriteria(setting("max_time"))
    if setting("stop_strings") is not None and kwargs.get("tokenizer") is not None:
        mine["stop_strings"] = StopStringCriteria(kwargs["tokenizer"], setting("stop_strings"))
    for name in mine:  # transformers warns of arguments beside a configuration, and fills its gaps with the model's own
        if asked is not None and name not in kwargs and getattr(own, name, None) is None:
            setattr(asked, name, None)
        else:
            kwargs[name] = None
    given += mine.values()
    if setting("end_sequences"):
        given.append(EndSequences(setting("end_sequences"), grammar.prompt_length))
    if given:  # an end token is none within a span, and what is given takes the place of transformers' own
        kwargs["stopping_criteria"] = StoppingCriteriaList(
            [item if type(item) is EosTokenCriteria else WholeSpans(item, grammar) for item in given]
        )


def _check_assistant(kwargs: dict) -> None:
    """Older transformers hands the pictures themselves to the assistant; a text model refuses them in its own words."""
    assistant = kwargs.get("assistant_model")
    if (
        assistant is None
        or kwargs.get("pixel_values") is None
        or hasattr(GenerationMixin, "_expand_multimodal_outputs")
    ):
        return
    if "pixel_values" not in inspect.signature(assistant.forward).parameters:
        raise ValueError(
            f"{type(assistant).__name__} reads no pictures, and this release of transformers can use it as an "
            "assistant only for prompts without pictures. Install a newer transformers, or let a vision-language model "
            "assist."
        )
