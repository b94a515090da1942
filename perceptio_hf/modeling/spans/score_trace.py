"""Scores and logits of every step, where a caller asks `generate` for them."""

import torch

from .grammar_state import GrammarState
from .token_choice import TokenChoice


class ScoreTrace:
    """Keeps what transformers returns as `scores` (after all processors) and `logits` (before): one table a step.

    Rows write at their own steps. Behind its end a row's scores are 0 for `pad` and -inf for all else, its logits 0.
    """

    def __init__(self, grammar: GrammarState, choice: TokenChoice, *, pad: int, scores: bool, logits: bool):
        self.grammar, self.choice, self.pad = grammar, choice, pad
        self._scores = [] if scores else None  # per step (rows, vocabulary)
        self._logits = [] if logits else None

    def write_logits(self, logits: torch.Tensor, step: torch.Tensor) -> None:
        """logits: (rows, vocabulary); step: (rows,), -1 = nothing to keep."""
        self._write(self._logits, logits, step[:, None])

    def write_scores(self, scores: torch.Tensor, step: torch.Tensor) -> None:
        """As `write_logits`."""
        self._write(self._scores, scores, step[:, None])

    def write_span(self, logits: torch.Tensor, step: torch.Tensor, is_end: torch.Tensor) -> None:
        """logits: (rows, width, vocabulary) within spans; step, is_end: (rows, width)."""
        logits = logits.float()
        self._write(self._logits, logits, step)
        if self._scores is None:
            return
        scores = torch.full_like(logits, float("-inf"))
        codes, end = self.grammar.codes, self.grammar.words.depth_end
        scores[..., codes] = logits[..., codes].masked_fill(is_end[..., None], float("-inf"))
        scores[..., end] = logits[..., end].masked_fill(~is_end, float("-inf"))
        self._write(self._scores, self.choice.warped(scores), step)

    def _write(self, table: list | None, values: torch.Tensor, step: torch.Tensor) -> None:
        if table is None:
            return
        values = values.view(*step.shape, -1)
        rows, columns = (step >= 0).nonzero(as_tuple=True)
        steps = step[rows, columns].tolist()
        while len(table) <= max(steps, default=-1):
            table.append(self._empty(values, is_scores=table is self._scores))
        for number, row, column in zip(steps, rows.tolist(), columns.tolist(), strict=True):
            table[number][row] = values[row, column]

    def _empty(self, values: torch.Tensor, *, is_scores: bool) -> torch.Tensor:
        empty = torch.zeros(len(values), values.shape[-1], device=values.device)
        if is_scores:
            empty.fill_(float("-inf"))
            empty[:, self.pad] = 0.0
        return empty

    def results(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """`scores` and `logits` as transformers' outputs have them, as far as they were asked for."""
        tables = {"scores": self._scores, "logits": self._logits}
        return {name: tuple(table) for name, table in tables.items() if table is not None}
