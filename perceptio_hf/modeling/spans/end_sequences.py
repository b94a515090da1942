"""Ends of a response that are several tokens long, as of checkpoints whose chat format ends a turn with words."""

from collections.abc import Sequence

import torch
from transformers import StoppingCriteria


class EndSequences(StoppingCriteria):
    """Ends a response once it holds one of some sequences of token ids.

    Args:
        sequences: `end_sequences` of a generation configuration; transformers' `stop_strings` needs the tokenizer at
            every call instead, which a model does not have.
        prompt_length: ids before the response.

    Raises:
        ValueError: for anything but lists of ids.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], prompt_length: int):
        if not sequences or not all(
            isinstance(ids, (list, tuple)) and ids and all(type(token) is int for token in ids) for ids in sequences
        ):
            raise ValueError(
                f"end_sequences of the generation configuration is {sequences!r}; expected a list of lists of token "
                "ids, such as [[91, 408, 91, 29]]."
            )
        self.sequences, self.prompt_length = [list(ids) for ids in sequences], prompt_length
        self._known: list[torch.Tensor] = []  # the sequences where the ids are: a copy a step would be waited for

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        """input_ids: (rows, length) -> (rows,) bool. A step may have added several tokens, such as drafted ones."""
        response = input_ids[:, self.prompt_length :]
        found = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for ids in self._on(input_ids.device):
            if response.shape[1] >= len(ids):
                windows = response.unfold(1, len(ids), 1)  # (rows, places, len(ids))
                found |= (windows == ids).all(2).any(1)
        return found

    def ends(self, input_ids: torch.LongTensor, length: torch.LongTensor) -> torch.BoolTensor:
        """(rows, capacity) ids of which each row has `length` (rows,) -> (rows,) bool: whose response ends in one."""
        found = torch.zeros_like(length, dtype=torch.bool)
        for ids in self._on(input_ids.device):
            first = length - len(ids)
            places = first.clamp(min=0)[:, None] + torch.arange(len(ids), device=length.device)
            same = (input_ids.gather(1, places) == ids).all(1)
            found |= same & (first >= self.prompt_length)
        return found

    def _on(self, device: torch.device) -> list[torch.Tensor]:
        if not self._known or self._known[0].device != device:
            self._known = [torch.tensor(ids, device=device) for ids in self.sequences]
        return self._known
