"""The grammar of spatial tokens that every generated row obeys."""

import torch
from transformers import LogitsProcessor

from perceptio_hf.tokens import SpatialVocabulary

SPATIAL_MODES = ("auto", "none", "seg", "depth", "seg+depth")


def required_new_tokens(spatial: str, num_pictures: int, span_length: int) -> int:
    """The least number of new tokens that `spatial` needs for one row with `num_pictures` pictures."""
    if spatial == "seg":
        return min(num_pictures, 1)
    spans = num_pictures * span_length
    return {"depth": spans, "seg+depth": spans + num_pictures}.get(spatial, 0)


def code_columns(words: SpatialVocabulary, device: torch.device) -> slice | torch.Tensor:
    """The columns of the depth codes among the logits: a slice where their ids follow one another, else the ids."""
    first, last = words.codes[0], words.codes[-1]
    if words.codes == tuple(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(words.codes, device=device)


class SpanGrammar(LogitsProcessor):
    """Allows only well formed spatial tokens: inside a depth span exactly N codes, nowhere else any code.

    The state of a row (in a span or not, codes so far, spans closed) is read off its own ids at every step, so that
    beams, which trade places, need no bookkeeping. A span is only begun where it fits into what is left. A row without
    a picture has neither [SEG] nor spans, whatever the mode.

    Args:
        vocabulary: the token ids.
        spatial: one of `SPATIAL_MODES`. A forced mode allows exactly the spans it names, in the paper's order: for
            each picture ``[SEG]`` tokens (at least one, the model decides when to stop), then one depth span.
        prompt_length: tokens before the response.
        max_length: the length, prompt included, at which generation ends.
        num_pictures: (prompts,) pictures the response of each row speaks about, i.e. depth spans it may hold.
        open_codes: (prompts,) codes in the span a prompt left open, -1 where there is none.
    """

    def __init__(
        self,
        vocabulary: SpatialVocabulary,
        *,
        spatial: str,
        prompt_length: int,
        max_length: int,
        num_pictures: torch.Tensor,
        open_codes: torch.Tensor,
    ):
        self.vocabulary, self.spatial = vocabulary, spatial
        self.prompt_length, self.max_length = prompt_length, max_length
        self.num_pictures, self.open_codes = num_pictures, open_codes

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids: (rows, length), scores: (rows, vocabulary) -> scores with -inf where the grammar says no."""
        words = self.vocabulary
        closed, in_span, codes, segs, pictures = self.read(input_ids, scores.device)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        code_ids = torch.tensor(words.codes, device=scores.device)
        for token in (words.depth_end, words.image):
            allowed[:, token] = False
        allowed[:, code_ids] = False
        seg, start, only = self._outside(closed, segs, pictures, room=self.max_length - input_ids.shape[1])
        allowed &= ~only[:, None]
        allowed[:, words.seg], allowed[:, words.depth_start] = seg, start
        allowed &= ~in_span[:, None]
        full = codes >= words.num_depth_tokens
        allowed[:, code_ids] |= (in_span & ~full)[:, None]
        allowed[:, words.depth_end] |= in_span & full
        return _mask_scores(scores, allowed)

    def read(self, input_ids: torch.LongTensor, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Spans closed, whether one is open, codes in it, [SEG] since the last, pictures: (rows,) each."""
        words = self.vocabulary
        expand = input_ids.shape[0] // self.num_pictures.shape[0]  # beams or returned sequences of each prompt
        # They stay there: a copy at every step would be waited for.
        self.num_pictures, self.open_codes = self.num_pictures.to(device), self.open_codes.to(device)
        pictures, opened = (of_prompt.repeat_interleave(expand) for of_prompt in (self.num_pictures, self.open_codes))
        response = input_ids[:, self.prompt_length :].to(device)
        starts, ends = response == words.depth_start, response == words.depth_end
        closed = ends.sum(1)
        in_span = starts.sum(1) + (opened >= 0) > closed
        codes = _tokens_since_last(starts, otherwise=opened.clamp(min=0))
        return closed, in_span, codes, _count_since_last(response == words.seg, ends), pictures

    def _outside(
        self, closed: torch.Tensor, segs: torch.Tensor, pictures: torch.Tensor, room: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For rows outside a span: may [SEG] come, may a span begin, and may nothing else come? Each (rows,) bool."""
        span = self.vocabulary.span_length
        left = pictures - closed  # spans this response may still hold
        never, always = torch.zeros_like(closed, dtype=torch.bool), torch.ones_like(closed, dtype=torch.bool)
        # A [SEG] needs one more step after it: only then its hidden state exists.
        room_for_seg = (pictures > 0) & (always if room >= 2 else never)
        if self.spatial == "auto":
            return room_for_seg, (left > 0) & (room >= span), never
        if self.spatial == "seg":
            first = (pictures > 0) & (closed == 0) & (segs == 0)
            return first | room_for_seg, never, first
        if self.spatial == "depth":
            return never, left > 0, left > 0
        if self.spatial == "seg+depth":
            needed = left * span + (left - 1)  # what must still follow once this picture has its [SEG]
            return (left > 0) & ((segs == 0) | (room > needed)), (left > 0) & (segs > 0), left > 0
        return never, never, never


def _tokens_since_last(marks: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """marks: (rows, length) -> (rows,) tokens after the last mark; `otherwise` + length in a row without one."""
    length = marks.shape[1]
    positions = torch.arange(1, length + 1, device=marks.device)
    last = (marks * positions).amax(1) if length else torch.zeros_like(otherwise)
    return torch.where(last > 0, length - last, otherwise + length)


def _count_since_last(counted: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """(rows, length) twice -> (rows,) how many `counted` stand after the last mark."""
    after = marks.flip(1).cumsum(1).flip(1) == 0
    return (counted & after).sum(1)


def _mask_scores(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    masked = scores.masked_fill(~allowed, float("-inf"))
    # Other processors (no_repeat_ngram_size, say) may have forbidden all that the grammar allows: the grammar wins.
    dead = masked.isneginf().all(-1, keepdim=True)
    return torch.where(dead & allowed, torch.zeros_like(scores), masked)
