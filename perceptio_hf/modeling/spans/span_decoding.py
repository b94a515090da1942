"""The decoding loop that owns the spans: one token a pass outside of them, many guessed codes a pass inside.

Jacobi decoding: all codes of a span are guessed; one pass with the cache predicts every place from the guesses before
it; the longest run of right guesses, and the prediction behind it, are final, the other predictions are the next
guesses. A place whose inputs are right is predicted as it is when codes are written one by one, so the span that
results is that of sequential decoding (Santilli et al., 2023; Song et al., 2021). A width of one place a pass *is*
sequential decoding.

Rows need not keep step. Each has its own length, a token stands in the cache at the column of its position, and what a
pass appends is moved there and cut off behind the last right token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .end_sequences import EndSequences
from .grammar_state import GrammarState
from .score_trace import ScoreTrace
from .span_cache import CACHE, can_shrink, drop_last, move_last
from .token_choice import TokenChoice


@dataclass
class Status:
    """What the host has to know of all rows before the next pass: the one thing it waits for."""

    active: int  # rows that go on
    remaining: int  # the most tokens, end marker included, that are missing in any open span
    nearest: int  # the fewest
    in_words: int  # rows that go on outside of spans
    must: int  # rows that may have to write spatial tokens only
    longest: int
    shortest: int  # of the rows that go on
    segs: int  # the most [SEG] of any row
    failed: int  # whether a token could not be drawn


class SpanDecoder:
    """One batch while it is generated; `run` is the loop.

    Args:
        model: the Perceptio.
        forward: `model` or a compiled version of it.
        grammar, choice: what may come, and what is taken.
        ids: (rows, length) prompts.
        new_tokens: the most that may be added.
        end_ids: (e,) tokens that end a response; `pad` fills rows behind theirs.
        end_sequences: ends that are several tokens long.
        span_ends: (rows,) position of the end marker of a span the prompt left open.
        width: the most places of one row in a pass; 1 is sequential.
        fixed: every pass within a span is `width` wide, so that a compiled forward sees few shapes.
        trace: keeps scores or logits of all steps, if they were asked for.
        out_of_time: says whether the time that was given is over; open spans are finished even so.
        on_tokens: is called with the tokens of a pass (n,), for a single row.
    """

    def __init__(
        self,
        model,
        *,
        forward: Callable,
        grammar: GrammarState,
        choice: TokenChoice,
        ids: torch.Tensor,
        new_tokens: int,
        end_ids: torch.Tensor | None,
        end_sequences: EndSequences | None = None,
        pad: int,
        span_ends: torch.Tensor,
        width: int,
        fixed: bool,
        keeps_states: bool,
        trace: ScoreTrace | None = None,
        out_of_time: Callable[[], bool] | None = None,
        on_tokens: Callable[[torch.Tensor], None] | None = None,
    ):
        self.model, self.forward, self.grammar, self.choice = model, forward, grammar, choice
        self.words, self.trace = grammar.words, trace
        self.width, self.fixed, self.out_of_time, self.on_tokens = width, fixed, out_of_time, on_tokens
        rows, self.prompt_length = ids.shape
        device = grammar.pictures.device
        self.limit = self.prompt_length + new_tokens
        # One column more than there may be tokens: what is to be written nowhere goes there.
        self.ids = torch.full((rows, self.limit + 1), pad, dtype=torch.long, device=device)
        self.ids[:, : self.prompt_length] = ids.to(device)
        self.length = torch.full((rows,), self.prompt_length, device=device)
        self.span_end = span_ends.to(device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.end_ids, self.end_sequences = end_ids, end_sequences
        marker = torch.full((), self.words.depth_end, device=device)
        self.marker_ends = None if end_ids is None else torch.isin(marker, end_ids)  # () bool
        sequences = [] if end_sequences is None else end_sequences.sequences
        self.sequences_end_in_marker = any(ids[-1] == self.words.depth_end for ids in sequences)
        self.row = torch.arange(rows, device=device)
        draft = model.draft_codes(device)
        self.guess = torch.cat([draft, draft.new_tensor([self.words.depth_end])])  # (N + 1,) ids of a whole span
        self.places = torch.arange(self.words.num_depth_tokens + 1, device=device)
        self._begin(grammar.in_span)  # guesses of what an open prompt still lacks
        self.odds = torch.full(self.ids.shape, float("nan"), device=device) if keeps_states else None
        self.states: torch.Tensor | None = None  # (rows, capacity + 1, hidden)
        self.state_places: torch.Tensor | None = None  # (rows, capacity + 1) positions of the [SEG] kept
        self.counts = torch.zeros(rows, dtype=torch.long, device=device)
        self.passes, self.expired = 0, False

    def run(self, outputs, model_kwargs: dict) -> dict:
        """Go on from the prompts' `outputs`, until every row has ended -> the keyword arguments with the last cache."""
        self.cache = outputs[CACHE]
        self.columns = int(self.cache.get_seq_length())  # tokens in the cache; all rows have as many columns
        self.shift = self.columns - self.prompt_length  # column of a token less its position
        self._first_positions(model_kwargs)
        # Of a 2D mask transformers makes such a mask itself, and waits for the device to ask whether it hides anything.
        attention = self.model.config.text_config._attn_implementation
        self.shrinks = not self.fixed and can_shrink(self.cache)
        self.whole_masks = attention == "sdpa" and self.shrinks
        logits = outputs.logits[:, -1:]
        codes = logits[..., self.grammar.codes]
        status = self._advance(outputs.last_hidden_state[:, -1:], logits, codes, self.length - 1, None)
        while status.active:
            status = self._pass(status)
        self._read_last()
        self.ids = self.ids[:, : status.longest]
        return model_kwargs | {CACHE: self.cache}

    def _first_positions(self, model_kwargs: dict) -> None:
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        self.prompt_mask = None if mask is None else mask.to(self.ids.device).bool()
        # transformers waits for the device in every pass to ask whether a mask hides anything; here it is asked once.
        # A static cache needs its mask, which hides the columns that are still empty.
        if mask is not None and not self.fixed and bool(self.prompt_mask.all()):
            self.prompt_mask = None
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        last = self.columns - 1 if positions is None else positions[:, -1].to(self.ids.device)
        self.offset = torch.zeros_like(self.length) + last - (self.prompt_length - 1)  # rotary position less position

    def _pass(self, status: Status) -> Status:
        """Read the next tokens of every row, known and guessed, and take what follows from them."""
        width, behind = self._width(status), self.columns - self.shift
        back = 0
        if self.fixed and width > 1:  # near the end of the cache the block begins with tokens that were read before
            back = max(self.columns + width - (self.limit - 1 + self.shift), 0)
            drop_last(self.cache, back)
            self.columns -= back
        # Where all rows are equally long the block stands where it belongs; a row that has ended reads anything.
        start = torch.where(self.active, self.length - 1, behind) - back
        in_spans, whole = bool(status.remaining), self.trace is not None
        reaches_words = bool(status.in_words) or status.nearest + back < width
        word_places = torch.where(self.grammar.in_span, self.span_end - start, self.length - 1 - start)
        outputs = self._read(
            start,
            width,
            status.shortest == status.longest,
            word_places=None if whole or not reaches_words else word_places.clamp(0, width - 1),
            code_ids=self.grammar.codes if in_spans and not whole else None,
            logits_to_keep=0 if whole else self._nothing(),
        )
        logits = outputs.logits
        codes = logits[..., self.grammar.codes] if whole else outputs.code_logits
        ragged = status.shortest < status.longest or (width > 1 and len(self.row) > 1)
        if ragged:
            columns = (start + self.shift)[:, None] + torch.arange(width, device=start.device)
            move_last(self.cache, width, columns.clamp(max=self.columns + width - 1))
        status = self._advance(outputs.last_hidden_state, logits, codes if in_spans else None, start, status)
        kept = status.longest - 1 + self.shift
        drop_last(self.cache, self.columns + width - kept)
        self.columns = kept
        return status

    def _read(self, start: torch.Tensor, width: int, even: bool, **wanted):
        """The model's outputs for the tokens at `start` (rows,) and `width` - 1 behind; `even`: rows are of one length.

        The cache then ends in them, at whichever columns.
        """
        places = start[:, None] + torch.arange(width, device=start.device)  # (rows, width) positions that are read
        inputs = self.model.prepare_inputs_for_generation(
            self.ids.gather(1, places.clamp(max=self.limit)),
            attention_mask=self._mask(start, width, even),
            position_ids=(places + self.offset[:, None]).clamp(min=0),
            use_cache=True,
            is_first_iteration=False,
            **{CACHE: self.cache},
        )
        outputs = self.forward(**inputs, return_dict=True, **wanted)
        self.cache = outputs[CACHE]
        self.passes += 1
        return outputs

    def _read_last(self) -> None:
        """The last tokens of rows, which no pass has read: the states of [SEG], and, where rows did not keep step, keys
        and values of those that ended before others. A cache that cannot be cut stays as it is; its rows kept step."""
        if not self.shrinks:
            return
        last = self.ids.gather(1, self.length[:, None] - 1)[:, 0]
        self.active = (last == self.words.seg) & (self.length > self.prompt_length) & (self.odds is not None)
        short = (self.length < self.length.amax()) & (self.width > 1)
        if not bool((self.active | short).any()):
            return
        start = self.length - 1
        self._keep_segs(self._read(start, 1, False, logits_to_keep=self._nothing()).last_hidden_state, start)
        move_last(self.cache, 1, (start + self.shift)[:, None])
        drop_last(self.cache, 1)

    def _nothing(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.long, device=self.ids.device)

    def _width(self, status: Status) -> int:
        if not status.remaining or self.width == 1:
            return 1
        return self.width if self.fixed else min(self.width, status.remaining + 1)

    def _mask(self, start: torch.Tensor, width: int, even: bool) -> torch.Tensor | None:
        """What may be seen, the row's own tokens and the block as far as causality lets: (rows, columns + width), or
        (rows, 1, width, columns + width) with causality, as scaled dot product attention takes it; None: all of it."""
        if even and self.prompt_mask is None:
            return None
        columns = self.columns + width
        seen = torch.arange(columns, device=start.device) < (start + self.shift)[:, None]
        seen[:, self.columns :] = True
        if self.prompt_mask is not None:
            seen[:, : self.prompt_mask.shape[1]] &= self.prompt_mask
        if not self.whole_masks:
            return seen.long()
        causal = torch.ones(width, columns, dtype=torch.bool, device=start.device).tril(self.columns)
        return seen[:, None, None] & causal

    def _advance(self, hidden, logits, code_logits, start: torch.Tensor, status: Status | None) -> Status:
        """Take what a pass predicted.

        Args:
            hidden: (rows, width, d) states of the tokens read.
            logits: (rows, 1 or width, vocabulary) for words; (rows, 0, ...) where no row can reach any.
            code_logits: (rows, width, K), None where no row is in a span.
            start: (rows,) position of the first token read.
            status: before the pass; None for the prompt's.
        """
        self._keep_segs(hidden, start)
        ended, writes_word = torch.zeros_like(self.active), self.active & ~self.grammar.in_span
        if code_logits is not None:
            ended, reached = self._read_codes(code_logits, logits, start)
            self._stop_behind(ended)
            writes_word = (writes_word | reached) & self.active
        self.grammar.close(ended)
        writes_word = writes_word & (self.length < self.limit)
        if logits.shape[1] and not self.expired:
            self._write_words(logits, start, writes_word, status)
        self.active = self.active & (self.length < self.limit)
        self.expired = self.expired or (self.out_of_time is not None and self.out_of_time())
        if self.expired:
            self.active = self.active & self.grammar.in_span
        told, status = self.prompt_length if status is None else status.longest, self._status()
        if self.on_tokens is not None:
            self.on_tokens(self.ids[0, told : status.longest])
        return status

    def _read_codes(self, code_logits, logits, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of one pass -> (rows,) bool: whose span has ended, and who has even reached the word behind it."""
        state, words, width = self.grammar, self.words, code_logits.shape[1]
        target = start[:, None] + torch.arange(1, width + 1, device=start.device)  # position that each output predicts
        end = self.span_end[:, None]
        rows = (state.in_span & self.active)[:, None]
        place = target - (end - words.num_depth_tokens)  # which code of the span
        codes = self.choice.codes(self.choice.warped(code_logits.float()), state.closed, place)
        guess = self.ids.gather(1, target.clamp(max=self.limit))
        known, inside = target < self.length[:, None], rows & (target <= end)
        predicted = torch.where(target == end, words.depth_end, self._code_ids(codes))
        predicted = torch.where(known, guess, predicted)
        right = inside & (predicted == guess)
        run = right[:, : width - 1].long().cumprod(1).sum(1)  # outputs whose prediction was read, and was right
        length = torch.minimum(start + run + 2, self.span_end + 1)
        length = torch.where(rows[:, 0], length, self.length)
        new = inside & ~known
        self.ids.scatter_(1, torch.where(new, target, self.limit), predicted)
        if self.odds is not None:
            odds = code_logits.float().softmax(-1).gather(2, codes[..., None])[..., 0]
            self.odds.scatter_(1, torch.where(new & (target < end), target, self.limit), odds)
        if self.trace is not None:
            step = torch.where(new & (target < length[:, None]), target - self.prompt_length, -1)
            self.trace.write_span(logits, step, target == end)
        ended = rows[:, 0] & (length > self.span_end)
        self.length = length
        return ended, ended & (start + run >= self.span_end)

    def _code_ids(self, codes: torch.Tensor) -> torch.Tensor:
        columns = self.grammar.codes
        return codes + columns.start if isinstance(columns, slice) else columns[codes]

    def _write_words(self, logits, start: torch.Tensor, rows: torch.Tensor, status: Status | None) -> None:
        """`rows` (rows,) bool each take one token outside a span."""
        if logits.shape[1] > 1:  # of a whole block
            place = torch.where(self.length - 1 >= start, self.length - 1 - start, 0).clamp(max=logits.shape[1] - 1)
            logits = logits[self.row, place][:, None]
        scores = logits[:, -1].to(torch.float32, copy=True)
        if self.trace is not None:
            self.trace.write_logits(scores, torch.where(rows, self.length - self.prompt_length, -1))
        only = True if status is None else bool(status.must)
        scores = self.choice.warped(self.grammar.restrict(scores, self.limit - self.length, only=only))
        step = self.length - self.prompt_length
        if self.trace is not None:
            self.trace.write_scores(scores, torch.where(rows, step, -1))
        tokens = self.choice.words(scores, step, rows)
        self.ids.scatter_(1, torch.where(rows, self.length, self.limit)[:, None], tokens[:, None])
        self.length = self.length + rows
        begun = self.grammar.write(tokens, rows)
        self.span_end = torch.where(begun, self.length + self.words.num_depth_tokens, self.span_end)
        self._begin(begun)
        if self.end_ids is not None:
            self.active = self.active & ~(rows & torch.isin(tokens, self.end_ids))
        if self.end_sequences is not None:
            self.active = self.active & ~(rows & self.end_sequences.ends(self.ids, self.length))

    def _stop_behind(self, ended: torch.Tensor) -> None:
        """Of the rows `ended` (rows,) bool, whose spans have ended, stop those whose response ends in the marker."""
        if self.marker_ends is not None:
            self.active = self.active & ~(ended & self.marker_ends)
        if self.sequences_end_in_marker:
            self.active = self.active & ~(ended & self.end_sequences.ends(self.ids, self.length))

    def _begin(self, rows: torch.Tensor) -> None:
        """Guess the codes that are missing in the spans of `rows` (rows,) bool; their end markers are certain."""
        position = self.span_end[:, None] - self.words.num_depth_tokens + self.places
        free = rows[:, None] & (position >= self.length[:, None])
        self.ids.scatter_(1, torch.where(free, position, self.limit), self.guess.expand(len(rows), -1))

    def _keep_segs(self, hidden: torch.Tensor, start: torch.Tensor) -> None:
        """States of [SEG], of which a pass reads at most one in a row: the row's last token outside a span."""
        if self.odds is None:
            return
        if self.states is None:
            self.states = hidden.new_zeros(len(hidden), 9, hidden.shape[-1])
            self.state_places = torch.full((len(hidden), 9), -1, device=self.ids.device)
        position = self.length - 1
        place = (position - start).clamp(0, hidden.shape[1] - 1)
        token = self.ids.gather(1, position.clamp(min=0)[:, None])[:, 0]
        is_seg = self.active & ~self.grammar.in_span & (token == self.words.seg) & (position >= self.prompt_length)
        line = torch.where(is_seg, self.counts, self.states.shape[1] - 1)
        self.states[self.row, line] = hidden[self.row, place]
        self.state_places[self.row, line] = position
        self.counts = self.counts + is_seg

    def _grow(self, segs: int) -> None:
        if self.states is not None and segs + 1 >= self.states.shape[1] - 1:
            more = self.states.shape[1]
            self.states = torch.nn.functional.pad(self.states[:, :-1], (0, 0, 0, more + 1))
            self.state_places = torch.nn.functional.pad(self.state_places[:, :-1], (0, more + 1), value=-1)

    def _status(self) -> Status:
        """The one place where the host waits for the device."""
        open_rows, missing = self.active & self.grammar.in_span, self.span_end - self.length + 1
        values = torch.stack(
            [
                self.active.sum(),
                torch.where(open_rows, missing, 0).amax(),
                torch.where(open_rows, missing, self.limit).amin(),
                (self.active & ~self.grammar.in_span).sum(),
                (self.active & self.grammar.must_be_spatial()).sum(),
                self.length.amax(),
                torch.where(self.active, self.length, self.limit + 1).amin(),
                self.counts.amax(),
                self.choice.failed.long(),
            ]
        )
        status = Status(*values.tolist())
        if status.failed:  # its id is beyond the embedding, where a GPU ends the whole process
            raise ValueError(
                "No token can be drawn: the model's scores are infinite or no numbers. Is the temperature next to 0 "
                "(use do_sample=False), or does the model overflow in float16 (use bfloat16 or float32)?"
            )
        self._grow(status.segs)
        return status
