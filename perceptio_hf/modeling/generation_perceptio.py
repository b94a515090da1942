"""Generation with spatial tokens: the states kept of every step, and the masks and depth maps made from them."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from perceptio_hf.tokens import DepthSpan, SpatialSequence, SpatialVocabulary, read_sequence

from .span_grammar import SPATIAL_MODES, SpanGrammar, required_new_tokens

logger = logging.get_logger(__name__)

# New tokens beyond the spans, where the caller sets no limit: transformers' default of 20 would fit no span at all.
_DEFAULT_ANSWER_TOKENS = 128


@dataclass
class SpatialOutput(ModelOutput):
    """Masks and depth of a batch of token sequences; `processor.post_process_spatial` turns it into answers.

    Lists have one entry per row of `sequences`. Spans that are broken have no depth map; see `well_formed`.

    Args:
        sequences: (rows, length) token ids, prompt and response.
        prompt_length: where the responses begin.
        mask_logits: per row (n, h, w) float32 at the mask decoder's resolution, one per [SEG].
        mask_scores: per row (n,) IoU with the true mask as SAM2 predicts it.
        mask_pictures: per row n indices: the picture of the row each mask lies on.
        depth_maps: per row (m, S, S) relative inverse depth in [0, 1], 1 = nearest, one per depth span.
        depth_codes: per row (m, N) codes 0..K-1.
        depth_confidence: per row (m, g, g) probability of each chosen code among all codes; None where unknown.
        depth_pictures: per row m picture indices.
        well_formed: per row, False where a span is broken.
        picture_sizes: per row the (height, width) of each of its pictures in pixels; None if they were not given.
    """

    sequences: torch.LongTensor | None = None
    prompt_length: int | None = None
    mask_logits: list[torch.Tensor] | None = None
    mask_scores: list[torch.Tensor] | None = None
    mask_pictures: list[list[int]] | None = None
    depth_maps: list[torch.Tensor] | None = None
    depth_codes: list[torch.Tensor] | None = None
    depth_confidence: list[torch.Tensor] | None = None
    depth_pictures: list[list[int]] | None = None
    well_formed: list[bool] | None = None
    picture_sizes: list[list[tuple[int, int]]] | None = None


@dataclass
class PerceptioGenerateOutput(SpatialOutput, GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns: transformers' fields and those of `SpatialOutput`."""


@dataclass
class PerceptioGenerateBeamOutput(SpatialOutput, GenerateBeamDecoderOnlyOutput):
    """The same for beam search."""


@dataclass
class SpatialRecorder:
    """Keeps, while tokens are generated, the hidden state of every [SEG] and the odds of every depth code.

    Keys are (position, slot): the token's position in the sequence and the row of the batch it stood in at that step
    (with beams, a slot may hold another hypothesis one step later).
    """

    vocabulary: SpatialVocabulary
    prompt_length: int
    seg_states: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # -> (hidden,)
    code_odds: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # -> (K,), odds of the next code

    def record_states(self, input_ids: torch.Tensor, end: int, hidden: torch.Tensor) -> None:
        """input_ids: (rows, steps), the last one at position `end - 1`; hidden: (rows, steps, d)."""
        first = end - input_ids.shape[1]
        for slot, step in (input_ids == self.vocabulary.seg).nonzero().tolist():
            if first + step >= self.prompt_length:
                self.seg_states[first + step, slot] = hidden[slot, step]

    def record_odds(self, input_ids: torch.Tensor, end: int, logits: torch.Tensor) -> None:
        """input_ids: (rows, steps) as above; logits: (rows, kept, vocabulary) of the last `kept` steps."""
        input_ids = input_ids[:, -logits.shape[1] :]
        places = self.before_code(input_ids)
        where = places.nonzero().tolist()
        if where:
            self._keep_odds(where, end - input_ids.shape[1], logits[places])

    def before_code(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where a depth code may come next: after the start marker and after every code."""
        codes = torch.tensor(self.vocabulary.codes, device=input_ids.device)
        return (input_ids == self.vocabulary.depth_start) | torch.isin(input_ids, codes)

    def _keep_odds(self, where: list[list[int]], first: int, logits: torch.Tensor) -> None:
        codes = torch.tensor(self.vocabulary.codes, device=logits.device)
        for (slot, step), odds in zip(where, logits[:, codes].float().softmax(-1), strict=True):
            self.code_odds[first + step, slot] = odds


@dataclass
class _Request:
    """One batch of prompts: what is needed to make masks and depth of their responses."""

    prompt: torch.Tensor  # (batch, length)
    pixel_values: torch.Tensor | None
    attention_mask: torch.Tensor | None
    mask_pixel_values: torch.Tensor | None
    original_sizes: torch.Tensor | None


def count_pictures(input_ids: torch.Tensor, image_token: int) -> torch.Tensor:
    """(rows, length) -> (rows,) pictures of each row: a picture is a run of placeholder tokens."""
    is_image = input_ids == image_token
    return (is_image & ~F.pad(is_image, (1, 0))[:, :-1]).sum(1)


class SpatialGenerationMixin:
    """`generate` and `decode_spatial` of `PerceptioForConditionalGeneration`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        spatial: str = "auto",
        mask_pixel_values: torch.FloatTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        **kwargs,
    ):
        """transformers' `generate` under the grammar of the spatial tokens, and their masks and depth maps.

        Args:
            inputs, generation_config, logits_processor, kwargs: as in transformers; any decoding strategy. Without any
                length the limit is the spans a row may hold and 128 more tokens.
            spatial: "auto" lets the model decide and keeps what it emits well formed; "seg", "depth", "seg+depth"
                force the spans in this order for each picture; "none" forbids them.
            mask_pixel_values: (pictures, 3, S, S) as the processor prepares them for SAM2; needed for masks.
            original_sizes: (pictures, 2) height and width of each picture, carried into the output.

        Returns:
            Token ids; with `return_dict_in_generate=True` a `PerceptioGenerateOutput` (beams:
            `PerceptioGenerateBeamOutput`) whose masks and depth come from the states of this very generation.

        Raises:
            ValueError: unknown `spatial`, a forced span without a picture, too few new tokens for it, forced masks
                without `mask_pixel_values`, a prompt that ends in a broken span.
        """
        if spatial not in SPATIAL_MODES:
            raise ValueError(f"spatial={spatial!r} is unknown; use one of {', '.join(map(repr, SPATIAL_MODES))}.")
        if not self.config.has_spatial_tokens and spatial in ("auto", "none"):
            return super().generate(inputs, generation_config, logits_processor, **kwargs)
        words = self.spatial_vocabulary()
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is None:
            raise ValueError("generate needs input_ids: from inputs_embeds alone the spans in the prompt are unknown.")
        state = [read_sequence(ids, words, prompt.shape[1]) for ids in prompt.tolist()]
        config = self.generation_config if generation_config is None else generation_config
        new_tokens = _new_token_limit(prompt, config, kwargs, state, words)
        returns_dict = kwargs.get("return_dict_in_generate", config.return_dict_in_generate)
        _check_request(state, words, spatial, new_tokens, needs_masks=returns_dict and mask_pixel_values is None)
        grammar = SpanGrammar(
            words,
            spatial=spatial,
            prompt_length=prompt.shape[1],
            max_length=prompt.shape[1] + new_tokens,
            # Forced spans go through the pictures shown last; a free response may speak of any of the conversation's.
            num_pictures=torch.tensor([row.pictures_shown if spatial == "auto" else row.num_pictures for row in state]),
            open_codes=torch.tensor([-1 if row.open_codes is None else row.open_codes for row in state]),
        )
        processors = LogitsProcessorList([*(logits_processor or []), grammar])
        kwargs = {key: value for key, value in kwargs.items() if key not in ("max_length", "max_new_tokens")}
        if not returns_dict:
            return super().generate(inputs, generation_config, processors, max_new_tokens=new_tokens, **kwargs)
        recorder = SpatialRecorder(words, prompt.shape[1])
        out = super().generate(
            inputs, generation_config, processors, max_new_tokens=new_tokens, spatial_recorder=recorder, **kwargs
        )
        request = _Request(
            prompt, kwargs.get("pixel_values"), kwargs.get("attention_mask"), mask_pixel_values, original_sizes
        )
        beams = out.get("beam_indices")
        fields = self._read_spatial(out.sequences, request, recorder, beams)
        return (PerceptioGenerateOutput if beams is None else PerceptioGenerateBeamOutput)(**out, **fields)

    @torch.no_grad()
    def decode_spatial(
        self,
        sequences: torch.LongTensor,
        *,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        mask_pixel_values: torch.FloatTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
    ) -> SpatialOutput:
        """The masks and depth maps of sequences that another engine generated, by one forward pass over them.

        Args:
            sequences: (rows, length) prompt and response, right-padded; rows may be a multiple of the prompts.
            input_ids, pixel_values, attention_mask, mask_pixel_values, original_sizes: the processor's output for the
                prompts.

        Raises:
            ValueError: if `sequences` do not begin with `input_ids`, or hold a [SEG] without `mask_pixel_values`.
        """
        sequences = sequences.to(input_ids.device)
        batch, length = input_ids.shape
        rows = sequences.shape[0]
        if rows % batch or not torch.equal(sequences[:, :length], input_ids.repeat_interleave(rows // batch, dim=0)):
            raise ValueError(
                f"decode_spatial got sequences of shape {tuple(sequences.shape)} which do not begin with input_ids of "
                f"shape {tuple(input_ids.shape)}. Pass prompt and response: torch.cat([input_ids, response], 1)."
            )
        request = _Request(input_ids, pixel_values, attention_mask, mask_pixel_values, original_sizes)
        return SpatialOutput(sequences=sequences, **self._read_spatial(sequences, request, None, None))

    def _read_spatial(
        self,
        sequences: torch.Tensor,
        request: _Request,
        recorder: SpatialRecorder | None,
        beam_indices: torch.Tensor | None,
    ) -> dict:
        """Fields of `SpatialOutput`; without a recorder the states come from a forward pass over the sequences."""
        words = self.spatial_vocabulary()
        prompt_length = request.prompt.shape[1]
        parsed = [read_sequence(ids, words, prompt_length) for ids in sequences.tolist()]
        if recorder is None:
            busy = [row for row, line in enumerate(parsed) if line.segs or line.spans]
            recorder = self._replay(sequences, busy, request)
        counts = count_pictures(request.prompt, words.image).tolist()
        copies = sequences.shape[0] // len(counts)
        first_picture = [sum(counts[: row // copies]) for row in range(sequences.shape[0])]
        slots = _Slots(prompt_length, beam_indices)
        fields = self._read_masks(sequences, parsed, request, recorder, slots, first_picture)
        fields |= self._read_depth(parsed, recorder, slots)
        fields |= {"prompt_length": prompt_length, "well_formed": [line.well_formed for line in parsed]}
        if request.original_sizes is not None:
            sizes = [tuple(size) for size in request.original_sizes.tolist()]
            fields["picture_sizes"] = [
                sizes[first : first + counts[row // copies]] for row, first in enumerate(first_picture)
            ]
        return fields

    def _read_masks(self, sequences, parsed, request, recorder, slots, first_picture) -> dict:
        segs = [(row, seg) for row, line in enumerate(parsed) for seg in line.segs]
        fields = {"mask_pictures": [[seg.picture for seg in line.segs] for line in parsed]}
        if request.mask_pixel_values is None:
            if segs:
                logger.warning_once("[SEG] was generated, but without mask_pixel_values there are no masks.")
            return fields
        keys = [slots.key(row, seg.position) for row, seg in segs]
        lost = sorted({row for (row, _), key in zip(segs, keys, strict=True) if key not in recorder.seg_states})
        if lost:  # generation was stopped right after a [SEG], before its state existed
            replayed = self._replay(sequences, lost, request).seg_states
            found = [
                replayed[seg.position, row] if row in lost else recorder.seg_states[key]
                for (row, seg), key in zip(segs, keys, strict=True)
            ]
        else:
            found = [recorder.seg_states[key] for key in keys]
        masks, scores = self._no_masks(request.mask_pixel_values.device)
        if found:
            pictures = torch.tensor([first_picture[row] + seg.picture for row, seg in segs])
            masks, scores = self.predict_masks(torch.stack(found), request.mask_pixel_values, pictures)
        counts = [len(line.segs) for line in parsed]
        return fields | {"mask_logits": list(masks.split(counts)), "mask_scores": list(scores.split(counts))}

    def _read_depth(self, parsed: list[SpatialSequence], recorder: SpatialRecorder, slots: "_Slots") -> dict:
        device = self.depth_model.device
        counts = [len(line.spans) for line in parsed]
        codes = [span.codes for line in parsed for span in line.spans]
        codes = torch.tensor(codes, device=device).reshape(-1, self.config.num_depth_tokens)
        size, grid = self.config.depth_config.image_size, self.config.depth_config.grid_size
        maps = self.depth_model.decode(codes) if len(codes) else torch.zeros(0, size, size, device=device)
        confidence = [
            torch.tensor([_code_odds(span, row, recorder, slots) for span in line.spans]).reshape(-1, grid, grid)
            for row, line in enumerate(parsed)
        ]
        return {
            "depth_maps": list(maps.split(counts)),
            "depth_codes": list(codes.split(counts)),
            "depth_confidence": confidence,
            "depth_pictures": [[span.picture for span in line.spans] for line in parsed],
        }

    def _replay(self, sequences: torch.Tensor, rows: list[int], request: _Request) -> SpatialRecorder:
        """Record the states of `rows` from one forward pass over the finished sequences."""
        words, length = self.spatial_vocabulary(), request.prompt.shape[1]
        recorder = SpatialRecorder(words, length)
        if not rows:
            return recorder
        copies = sequences.shape[0] // request.prompt.shape[0]
        prompts = torch.tensor([row // copies for row in rows], device=request.prompt.device)
        ids = sequences[rows]
        mask = torch.ones_like(ids)
        if request.attention_mask is not None:
            mask[:, :length] = request.attention_mask[prompts].to(mask)
        hidden = self.model(
            input_ids=ids.to(self.device),
            pixel_values=self._pixels_of(prompts, request),
            attention_mask=mask.to(self.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(self.device),
            use_cache=False,
        ).last_hidden_state
        local = SpatialRecorder(words, length)
        local.record_states(ids, ids.shape[1], hidden)
        for row, places in enumerate(local.before_code(ids)):
            where = [[row, step] for step in places.nonzero()[:, 0].tolist()]
            if where:  # only these positions pass the output head: a full vocabulary everywhere would be gigabytes
                local._keep_odds(where, 0, self.lm_head(hidden[row, places.to(hidden.device)]))
        recorder.seg_states = {(position, rows[row]): value for (position, row), value in local.seg_states.items()}
        recorder.code_odds = {(position, rows[row]): value for (position, row), value in local.code_odds.items()}
        return recorder

    def _pixels_of(self, prompts: torch.Tensor, request: _Request) -> torch.Tensor | None:
        """The picture tiles of the prompts listed (with repeats), in their order."""
        if request.pixel_values is None:
            return None
        per_tile = self.config.image_seq_length
        tiles = (request.prompt == self.config.image_token_id).sum(1) // per_tile
        groups = request.pixel_values.split(tiles.tolist())
        return torch.cat([groups[prompt] for prompt in prompts.tolist()]).to(self.device)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # transformers < 5.20 repeats tile by tile, which mixes up rows of several tiles: [A, B] -> [A, A, B, B].
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            prompts = torch.arange(input_ids.shape[0]).repeat_interleave(expand_size)
            request = _Request(input_ids, pixel_values, None, None, None)
            model_kwargs["pixel_values"] = None
            expanded = self._pixels_of(prompts, request)
            input_ids, model_kwargs = super()._expand_inputs_for_generation(
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
            return input_ids, model_kwargs | {"pixel_values": expanded}
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )


@dataclass
class _Slots:
    """Which row of the batch held a returned sequence's token while it was generated."""

    prompt_length: int
    beam_indices: torch.Tensor | None

    def key(self, row: int, position: int) -> tuple[int, int]:
        if self.beam_indices is None:
            return position, row
        # A token's state is computed one step later, in the slot from which the next token was chosen.
        step = position - self.prompt_length + 1
        inside = 0 <= step < self.beam_indices.shape[1]
        return position, int(self.beam_indices[row, step]) if inside else -1


def _code_odds(span: DepthSpan, row: int, recorder: SpatialRecorder, slots: _Slots) -> list[float]:
    """Probability of each code of a span; NaN for codes that were given in the prompt."""
    odds = []
    for offset, code in enumerate(span.codes):
        found = recorder.code_odds.get(slots.key(row, span.position + offset))
        odds.append(float("nan") if found is None else float(found[code]))
    return odds


def _new_token_limit(
    prompt: torch.Tensor,
    config: GenerationConfig,
    kwargs: dict,
    state: list[SpatialSequence],
    words: SpatialVocabulary,
) -> int:
    """How many tokens `generate` may add, by transformers' order of precedence."""
    new_tokens = kwargs.get("max_new_tokens")
    if new_tokens is not None:
        return new_tokens
    length = kwargs.get("max_length")
    if length is None and config.max_new_tokens is not None:
        return config.max_new_tokens
    length = config.max_length if length is None else length
    if length is None or (length == 20 and kwargs.get("max_length") is None):  # 20: the default of older versions
        return max(row.pictures_shown for row in state) * (words.span_length + 1) + _DEFAULT_ANSWER_TOKENS
    return length - prompt.shape[1]


def _check_request(
    state: list[SpatialSequence], words: SpatialVocabulary, spatial: str, new_tokens: int, needs_masks: bool
) -> None:
    for row, line in enumerate(state):
        if line.open_codes is not None and line.open_codes > words.num_depth_tokens:
            raise ValueError(
                f"The prompt of row {row} ends in a depth span of {line.open_codes} codes; a span has "
                f"{words.num_depth_tokens}."
            )
        if spatial in ("seg", "depth", "seg+depth") and line.num_pictures == 0:
            raise ValueError(f"spatial={spatial!r} needs a picture, but the prompt of row {row} has none.")
        needed = required_new_tokens(spatial, line.num_pictures, words.span_length)
        if line.open_codes is not None:
            needed = max(needed, words.num_depth_tokens - line.open_codes + 1)
        if new_tokens < needed:
            raise ValueError(
                f"Row {row} may add {new_tokens} tokens, but spatial={spatial!r} with {line.num_pictures} picture(s) "
                f"needs {needed} for its spans alone. Pass max_new_tokens={needed + _DEFAULT_ANSWER_TOKENS} or so."
            )
    if spatial in ("seg", "seg+depth") and needs_masks:
        raise ValueError(
            f"spatial={spatial!r} with return_dict_in_generate=True makes masks and needs mask_pixel_values: pass "
            "everything the processor returns, model.generate(**inputs)."
        )
