"""Which loop makes the tokens: our own, which owns the spans, or one of transformers' under the grammar."""

from collections.abc import Callable
from contextlib import nullcontext
from time import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import stopping_criteria as criteria_of_transformers
from transformers.utils import logging

from perceptio_hf.modeling.span_grammar import SpanGrammar

from .end_sequences import EndSequences
from .score_trace import ScoreTrace
from .span_cache import CACHE, can_shrink
from .span_decoding import SpanDecoder
from .spatial_recorder import SpanStates, StateReader, StepRecorder
from .spatial_request import SpatialRequest
from .token_choice import TokenChoice, is_blind

logger = logging.get_logger(__name__)

SPATIAL_DECODINGS = ("parallel", "sequential")

# Places of all rows that one pass may guess. A GPU reads the weights once for all of them and has arithmetic to spare;
# on a CPU every place costs (docs/generation.md has the measurements).
_PLACES = {"cpu": 24}
_PLACES_ELSEWHERE = 4096

# Settings of transformers that choose another strategy than greedy or sampling, and what that is called.
_OTHER_STRATEGIES = {
    "output_attentions": "output_attentions",
    "output_hidden_states": "output_hidden_states",
    "synced_gpus": "processes that share one model",
}

# Settings that bring a loop which is not transformers' own, and may read tokens as it likes.
_OTHER_LOOPS = {
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "constraints": "constraints",
    "force_words_ids": "forced words",
    "custom_generate": "custom_generate",
}
# Settings that let something else draft tokens, which the model then checks several at a time.
_DRAFTERS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class WholeSpans(StoppingCriteria):
    """A stopping criterion that is not heard within a depth span: there is a whole span or none."""

    def __init__(self, criterion: Callable, grammar: SpanGrammar):
        self.criterion, self.grammar = criterion, grammar

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        """input_ids: (rows, length) -> (rows,) bool."""
        words, response = self.grammar.vocabulary, input_ids[:, self.grammar.prompt_length :]
        opened = self.grammar.open_codes.to(input_ids.device) >= 0  # where the grammar has it already
        opened = opened.repeat_interleave(len(input_ids) // len(opened))
        open_now = (response == words.depth_start).sum(1) + opened > (response == words.depth_end).sum(1)
        done = self.criterion(input_ids, scores, **kwargs)
        return torch.as_tensor(done, device=input_ids.device).bool() & ~open_now


class SpatialLoop:
    """Makes the tokens of one request; given to transformers as `custom_generate`, after all of its preparation.

    Args:
        request: what is asked.
        decoding: one of `SPATIAL_DECODINGS`.
        insists: whether the caller asked for it, so that a fallback is worth a warning.
        keeps_states: whether masks and depth are to be made of the result.
        streamer: as in transformers.

    Attributes:
        states: after the call, if `keeps_states`.
    """

    def __init__(self, request: SpatialRequest, decoding: str, *, insists: bool, keeps_states: bool, streamer=None):
        self.request, self.decoding, self.insists = request, decoding, insists
        self.keeps_states, self.streamer = keeps_states, streamer
        self.states: StateReader | None = None
        self.passes = 0

    def obstacle(self, setting: Callable[[str], Any]) -> str | None:
        """What, among the settings of a call, only a loop of transformers' can do; None if nothing."""
        if (setting("num_beams") or 1) > 1:
            return "beams"
        if setting("use_cache") is False:
            return "use_cache=False"
        if setting("cache_implementation") not in (None, "dynamic", "static"):
            return f"cache_implementation={setting('cache_implementation')!r}"
        return next((called for name, called in _OTHER_STRATEGIES.items() if setting(name)), None)

    def foreign_loop(self, setting: Callable[[str], Any]) -> str | None:
        """Which loop will run that need not read one token of each row in a step, by the settings; None if none."""
        if any(setting(name) for name in _DRAFTERS):
            return "drafted tokens"
        return next((called for name, called in _OTHER_LOOPS.items() if setting(name)), None)

    def fall_back(self, obstacle: str) -> None:
        """Say, once, that codes are written one by one."""
        if self.decoding == "parallel":
            say = logger.warning_once if self.insists else logger.info_once
            say(f"spatial_decoding='parallel' does not go with {obstacle}: depth codes are written one by one.")

    def recorder(self) -> StepRecorder | None:
        """What a loop of transformers' is given to keep the states."""
        if self.keeps_states:
            self.states = StepRecorder(self.request.words, self.request.prompt_length)
        return self.states

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """What transformers' decoding methods take and return."""
        grammars = [number for number, item in enumerate(logits_processor) if isinstance(item, SpanGrammar)]
        before, warpers = logits_processor[: grammars[-1]], logits_processor[grammars[-1] + 1 :]
        foreign = [*before, *(item for item in warpers if not is_blind(item))]
        foreign = foreign or [item for item in stopping_criteria if not _is_known(item)]
        streams_rows = self.streamer is not None and len(input_ids) > 1  # which takes a token of each row at a time
        if foreign or streams_rows:
            self.fall_back(_name(foreign[0]) if foreign else "a stream of several rows")
            model_kwargs["spatial_recorder"] = self.recorder()
            return model._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer=self.streamer,
                **model_kwargs,
            )
        return self._own(
            model, input_ids, LogitsProcessorList(warpers), stopping_criteria, generation_config, model_kwargs
        )

    def _own(self, model, input_ids, warpers, stopping_criteria, config, model_kwargs):
        request, cache = self.request, model_kwargs.get(CACHE)
        compiles = model._valid_auto_compile_criteria(model_kwargs, config)
        forward = model.get_compiled_call(config.compile_config) if compiles else model.__call__
        outputs = model._prefill(input_ids, config, model_kwargs)
        device = outputs.logits.device
        grammar = request.state(len(input_ids), device)
        choice = TokenChoice(
            warpers,
            sample=bool(config.do_sample),
            rows=len(input_ids),
            steps=request.new_tokens,
            spans=max(request.spans_allowed, default=0) + 1,
            code_shape=(request.words.num_depth_tokens, len(request.words.codes)),
            device=device,
        )
        pad = config._pad_token_tensor
        ends = [
            item.eos_token_id for item in stopping_criteria if type(item) is criteria_of_transformers.EosTokenCriteria
        ]
        trace = None
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            wanted = {"scores": bool(config.output_scores), "logits": bool(config.output_logits)}
            trace = ScoreTrace(grammar, choice, pad=0 if pad is None else int(pad), **wanted)
        is_static = cache is not None and cache.is_compileable
        decoder = SpanDecoder(
            model,
            forward=forward,
            grammar=grammar,
            choice=choice,
            ids=input_ids,
            new_tokens=request.new_tokens,
            end_ids=torch.cat(ends).to(device) if ends else None,
            end_sequences=_asked(stopping_criteria, EndSequences),
            pad=0 if pad is None else int(pad),
            span_ends=request.span_ends(len(input_ids)),
            width=self._width(len(input_ids), device, cache, is_static),
            fixed=is_static,
            keeps_states=self.keeps_states,
            trace=trace,
            out_of_time=_clock(stopping_criteria),
            on_tokens=self._stream if self.streamer is not None else None,
        )
        with getattr(model, "_optimize_model_for_decode", nullcontext)():
            model_kwargs = decoder.run(outputs, model_kwargs)
        self.passes = decoder.passes
        if self.streamer is not None:
            self.streamer.end()
        if self.keeps_states:
            self.states = SpanStates(decoder.states, decoder.state_places, decoder.odds)
        ids = decoder.ids.to(input_ids.device)
        if not config.return_dict_in_generate:
            return ids
        kept = {} if trace is None else trace.results()
        return GenerateDecoderOnlyOutput(sequences=ids, **kept, **{CACHE: model_kwargs[CACHE]})

    def _width(self, rows: int, device: torch.device, cache, is_static: bool) -> int:
        """Places of one row that a pass within a span reads."""
        if self.decoding == "sequential":
            return 1
        if not can_shrink(cache):
            self.fall_back(f"a {type(cache).__name__} of layers that cannot be cut")
            return 1
        if is_static and rows > 1:
            self.fall_back("a static cache of several rows")
            return 1
        longest = min(self.request.words.span_length, max(self.request.new_tokens - 1, 1))
        return max(min(_PLACES.get(device.type, _PLACES_ELSEWHERE) // rows, longest), 1)

    def _stream(self, tokens: torch.Tensor) -> None:
        for token in tokens.cpu():
            self.streamer.put(token[None])


def _name(item) -> str:
    """What a message calls a logits processor or a stopping criterion: its class, or the function that it is."""
    item = getattr(item, "criterion", item)
    return getattr(item, "__name__", type(item).__name__)


def _is_known(criterion) -> bool:
    """Whether our own loop does by itself what a stopping criterion asks for."""
    if isinstance(criterion, WholeSpans):
        return type(criterion.criterion) in (criteria_of_transformers.MaxTimeCriteria, EndSequences)
    return type(criterion) in (criteria_of_transformers.MaxLengthCriteria, criteria_of_transformers.EosTokenCriteria)


def _asked(criteria: StoppingCriteriaList, kind: type[StoppingCriteria]) -> StoppingCriteria | None:
    """The last of `criteria` of that kind, which are all heard outside of spans only."""
    found = [item.criterion for item in criteria if isinstance(item, WholeSpans) and type(item.criterion) is kind]
    return found[-1] if found else None


def _clock(criteria: StoppingCriteriaList) -> Callable[[], bool] | None:
    limits = [item.criterion for item in criteria if isinstance(item, WholeSpans)]
    limits = [limit for limit in limits if type(limit) is criteria_of_transformers.MaxTimeCriteria]
    if not limits:
        return None
    return lambda: any(time() - limit.initial_timestamp > limit.max_time for limit in limits)
