"""What is kept of every step while tokens are generated: the state of each [SEG] and the odds of each depth code.

Nothing here waits for the device while tokens are made: values are written by index, and read once when all is done.
"""

from collections.abc import Sequence

import torch

from perceptio_hf.modeling.span_grammar import code_columns
from perceptio_hf.tokens import SpatialVocabulary

_CHECK_EVERY = 16  # steps; the buffer of [SEG] states has room for one in each of them


class StateReader:
    """What both kinds of recorder answer when generation is over."""

    def seg_states(self, rows: Sequence[int], positions: Sequence[int]) -> tuple[torch.Tensor, list[bool]]:
        """States of the [SEG] tokens at these places: (n, hidden), and which of them are known."""
        raise NotImplementedError

    def code_odds(self, rows: Sequence[int], positions: Sequence[int], codes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Odds of the chosen codes of spans whose start markers stand at these places: (n, N) float32, NaN = unknown.

        A chosen code's odds are its probability among all codes, before any temperature.
        """
        raise NotImplementedError


class StepRecorder(StateReader):
    """Records a loop of transformers', which makes one token per row and step.

    With beams a row of the batch may hold another hypothesis one step later; `beam_indices`, known at the end, says
    in which row each token of a returned sequence was computed.
    """

    def __init__(self, vocabulary: SpatialVocabulary, prompt_length: int):
        self.vocabulary, self.prompt_length = vocabulary, prompt_length
        self._codes: slice | torch.Tensor | None = None
        self.beam_indices: torch.Tensor | None = None  # (returned sequences, steps)
        self._states: torch.Tensor | None = None  # (capacity + 1, rows, hidden); the last line takes what is no [SEG]
        self._counts: torch.Tensor | None = None  # (rows,) [SEG] so far
        self._places: list[torch.Tensor] = []  # per step (rows,): line of `_states`, -1 = no [SEG]
        self._odds: list[torch.Tensor] = []  # per step (rows, K)
        self._last: torch.Tensor | None = None

    def note(self, input_ids: torch.Tensor) -> None:
        """input_ids: (rows, length) before the next step; its last tokens are those the step computes states of."""
        self._last = input_ids[:, -1] if input_ids.shape[1] else None

    def record(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep what one step computed: (rows, steps, hidden) and (rows, kept, vocabulary), the newest token last."""
        if self._codes is None:
            self._codes = code_columns(self.vocabulary, logits.device)
        self._odds.append(logits[:, -1, self._codes].float().softmax(-1))
        hidden = hidden[:, -1]
        if self._states is None:
            self._counts = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
            self._states = hidden.new_zeros(_CHECK_EVERY + 1, *hidden.shape)
        elif len(self._places) % _CHECK_EVERY == 0:
            self._grow()
        if self._last is None:
            self._places.append(torch.full_like(self._counts, -1))
            return
        is_seg = self._last.to(hidden.device) == self.vocabulary.seg
        line = torch.where(is_seg, self._counts, len(self._states) - 1)
        self._states[line, torch.arange(len(hidden), device=hidden.device)] = hidden
        self._places.append(torch.where(is_seg, self._counts, -1))
        self._counts += is_seg

    def _grow(self) -> None:
        needed = int(self._counts.max()) + _CHECK_EVERY + 1
        if needed > len(self._states):
            more = self._states.new_zeros(needed - len(self._states), *self._states.shape[1:])
            self._states = torch.cat([self._states[:-1], more, self._states[-1:]])

    def _step(self, row: int, position: int) -> tuple[int, int]:
        """The step that computed the state of a returned sequence's token, and the batch row it stood in then."""
        step = position - self.prompt_length + 1
        if not 0 <= step < len(self._places):
            return -1, -1
        if self.beam_indices is None:
            return step, row
        # The state is computed in the row from which the next token was chosen.
        inside = step < self.beam_indices.shape[1]
        return step, int(self.beam_indices[row, step]) if inside else -1

    def seg_states(self, rows: Sequence[int], positions: Sequence[int]) -> tuple[torch.Tensor, list[bool]]:
        where = [self._step(row, position) for row, position in zip(rows, positions, strict=True)]
        places = torch.stack(self._places).cpu()
        lines = [int(places[step, row]) if row >= 0 else -1 for step, row in where]
        index = torch.tensor([[max(line, 0), max(row, 0)] for line, (_, row) in zip(lines, where, strict=True)])
        index = index.to(self._states.device)
        return self._states[index[:, 0], index[:, 1]], [line >= 0 for line in lines]

    def code_odds(self, rows: Sequence[int], positions: Sequence[int], codes: Sequence[Sequence[int]]) -> torch.Tensor:
        index = []
        for row, start, chosen in zip(rows, positions, codes, strict=True):
            steps = [self._step(row, start + offset) for offset in range(len(chosen))]
            index.append([(*step, code) for step, code in zip(steps, chosen, strict=True)])
        index = torch.tensor(index)  # (n, N, 3): step, row, code
        known = index[..., 1] >= 0
        step, row, code = index.clamp(min=0).to(self._odds[0].device).unbind(-1)
        odds = torch.stack(self._odds)[step, row, code].cpu()
        return torch.where(known, odds, float("nan"))


class ReplayedStates(StateReader):
    """The same answers from one pass over finished sequences, for what another engine generated."""

    def __init__(self, vocabulary: SpatialVocabulary, prompt_length: int, rows: list[int], hidden: torch.Tensor, head):
        """hidden: (len(rows), length, d) of the sequences numbered `rows`; head: (n, d) -> (n, vocabulary) logits."""
        self.vocabulary, self.prompt_length, self.hidden, self.head = vocabulary, prompt_length, hidden, head
        self._line = {row: line for line, row in enumerate(rows)}

    def seg_states(self, rows: Sequence[int], positions: Sequence[int]) -> tuple[torch.Tensor, list[bool]]:
        index = torch.tensor([[self._line[row], place] for row, place in zip(rows, positions, strict=True)])
        index = index.to(self.hidden.device)
        return self.hidden[index[:, 0], index[:, 1]], [True] * len(rows)

    def code_odds(self, rows: Sequence[int], positions: Sequence[int], codes: Sequence[Sequence[int]]) -> torch.Tensor:
        odds = []
        for row, start, chosen in zip(rows, positions, codes, strict=True):
            # Only these positions pass the output head: a full vocabulary everywhere would be gigabytes.
            logits = self.head(self.hidden[self._line[row], start : start + len(chosen)])
            columns = code_columns(self.vocabulary, logits.device)
            index = torch.tensor(chosen, device=logits.device)[:, None]
            found = logits[:, columns].float().softmax(-1).gather(1, index)[:, 0].cpu()
            found[: max(self.prompt_length - 1 - start, 0)] = float("nan")  # given in the prompt: nobody chose these
            odds.append(found)
        return torch.stack(odds)


class SpanStates(StateReader):
    """The same answers from what `SpanDecoder` kept.

    Args:
        states, places: (rows, capacity, hidden) states of [SEG] tokens and (rows, capacity) their positions, -1 = none.
        odds: (rows, length) odds of the code at each position, NaN elsewhere.
    """

    def __init__(self, states: torch.Tensor, places: torch.Tensor, odds: torch.Tensor):
        self.states, self.places, self.odds = states, places, odds

    def seg_states(self, rows: Sequence[int], positions: Sequence[int]) -> tuple[torch.Tensor, list[bool]]:
        lines = [
            {position: line for line, position in enumerate(places) if position >= 0}
            for places in self.places[:, :-1].tolist()
        ]
        found = [lines[row].get(position, -1) for row, position in zip(rows, positions, strict=True)]
        index = torch.tensor([list(rows), [max(line, 0) for line in found]], device=self.states.device)
        return self.states[index[0], index[1]], [line >= 0 for line in found]

    def code_odds(self, rows: Sequence[int], positions: Sequence[int], codes: Sequence[Sequence[int]]) -> torch.Tensor:
        odds = self.odds.cpu()
        spans = zip(rows, positions, codes, strict=True)
        return torch.stack([odds[row, start + 1 : start + 1 + len(chosen)] for row, start, chosen in spans])
