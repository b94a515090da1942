"""The span grammar as state on the device: a few numbers a row, advanced by what is written, never read off the ids.

`SpanGrammar` says the same from the ids alone; tests hold the two against one another.
"""

import torch

from perceptio_hf.modeling.span_grammar import SpanGrammar, code_columns
from perceptio_hf.tokens import SpatialVocabulary


class GrammarState:
    """Where each row of a batch stands in the grammar of `SpanGrammar`.

    Args:
        words: the token ids.
        spatial: one of `SPATIAL_MODES`.
        pictures: (rows,) pictures a response may speak about, i.e. depth spans it may hold.
        in_span: (rows,) whether the prompt left a span open.
    """

    def __init__(self, words: SpatialVocabulary, spatial: str, pictures: torch.Tensor, in_span: torch.Tensor):
        self.words, self.spatial, self.pictures, self.in_span = words, spatial, pictures, in_span
        self.closed = torch.zeros_like(pictures)  # spans that ended in the response
        self.segs = torch.zeros_like(pictures)  # [SEG] since the last of them
        self.codes = code_columns(words, pictures.device)

    def close(self, rows: torch.Tensor) -> None:
        """The spans of `rows` (rows,) bool have ended."""
        self.closed = self.closed + rows
        self.segs = self.segs.masked_fill(rows, 0)
        self.in_span = self.in_span & ~rows

    def write(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`rows` (rows,) bool wrote `tokens` (rows,) outside a span -> (rows,) bool, where a span has begun."""
        self.segs = self.segs + (rows & (tokens == self.words.seg))
        begun = rows & (tokens == self.words.depth_start)
        self.in_span = self.in_span | begun
        return begun

    def outside(self, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For rows outside a span with `room` (rows,) tokens left: may [SEG] come, a span, and nothing else?"""
        left, span = self.pictures - self.closed, self.words.span_length
        shown, open_spans = self.pictures > 0, left > 0
        never = torch.zeros_like(shown)
        if self.spatial == "auto":  # a [SEG] needs one more step after it: only then its state exists
            return shown & (room >= 2), open_spans & (room >= span), never
        if self.spatial == "seg":
            first = shown & (self.closed == 0) & (self.segs == 0)
            return first | (shown & (room >= 2)), never, first
        if self.spatial == "depth":
            return never, open_spans, open_spans
        if self.spatial == "seg+depth":
            needed = left * span + (left - 1)  # what must still follow once this picture has its [SEG]
            wants_seg = open_spans & ((self.segs == 0) | (room > needed))
            return wants_seg, open_spans & (self.segs > 0), open_spans
        return never, never, never

    def must_be_spatial(self) -> torch.Tensor:
        """(rows,) bool: whether the next token outside a span may be nothing but [SEG] or a start marker.

        For rows within a span: whether that may be so after it.
        """
        if self.spatial == "seg":
            return (self.pictures > 0) & (self.segs == 0)
        if self.spatial in ("depth", "seg+depth"):
            return self.pictures > self.closed + self.in_span
        return torch.zeros_like(self.in_span)

    def restrict(self, scores: torch.Tensor, room: torch.Tensor, *, only: bool) -> torch.Tensor:
        """Write -inf, in place, where a row outside a span may not go on.

        Args:
            scores: (rows, vocabulary), rows within a span hold nothing of interest.
            room: (rows,) tokens left.
            only: whether any row may have to write nothing but spatial tokens; the one write over the vocabulary.
        """
        words, impossible = self.words, float("-inf")
        seg, start, nothing_else = self.outside(room)
        kept = torch.stack([scores[:, words.seg], scores[:, words.depth_start]]) if only else None
        if only:
            scores.masked_fill_(nothing_else[:, None], impossible)
            scores[:, words.seg], scores[:, words.depth_start] = kept
        scores[:, self.codes] = impossible
        for token in (words.depth_end, words.image):
            scores[:, token] = impossible
        scores[:, words.seg].masked_fill_(~seg, impossible)
        scores[:, words.depth_start].masked_fill_(~start, impossible)
        return scores


class LoopGrammar(SpanGrammar):
    """`SpanGrammar` for the loops of transformers: the same from the ids, with one write over the vocabulary.

    Beams trade places, so that a state which is advanced would have to move with them; ids cost little to read. Scores
    are the scores of few columns and of closed rows only.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids: (rows, length), scores: (rows, vocabulary) -> scores with -inf where the grammar says no."""
        words, codes = self.vocabulary, code_columns(self.vocabulary, scores.device)
        closed, in_span, count, segs, pictures = self.read(input_ids, scores.device)
        seg, start, only = self._outside(closed, segs, pictures, room=self.max_length - input_ids.shape[1])
        full = count >= words.num_depth_tokens
        columns = {  # which rows may write it
            words.depth_end: in_span & full,
            words.image: torch.zeros_like(in_span),
            words.seg: seg & ~in_span,
            words.depth_start: start & ~in_span,
        }
        impossible, shut = float("-inf"), only | in_span  # shut: rows that may write nothing but spatial tokens

        def write_columns(masked: torch.Tensor, dead: torch.Tensor) -> None:
            chosen = scores[:, codes].masked_fill(dead[:, None], 0.0)
            masked[:, codes] = chosen.masked_fill(~(in_span & ~full)[:, None], impossible)
            for column, rows in columns.items():
                masked[:, column] = scores[:, column].masked_fill(dead, 0.0).masked_fill(~rows, impossible)

        masked = scores.masked_fill(shut[:, None], impossible)
        write_columns(masked, torch.zeros_like(shut))
        # Other processors may have forbidden all that the grammar allows: the grammar wins.
        dead = masked.amax(-1).isneginf()
        masked.masked_fill_((dead & ~shut)[:, None], 0.0)
        write_columns(masked, dead)
        return masked
