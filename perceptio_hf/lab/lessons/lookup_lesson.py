"""Looking cells up in a depth span, without a picture: the first lesson of the language model.

Sequences hold a span of true codes and, behind it, chains of cells with their nearness, some with a conclusion about
the nearest. They are short and every word of them says something about the span, so that what takes hours among
pictures takes minutes here. So it is with comparisons of two things by name: the names of a question are to be said
again, each before its cell, and the nearer one once more.
"""

import random
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.tokens import SEG_TOKEN, depth_span
from perceptio_hf.training.losses.labels import IGNORED_LABEL
from perceptio_hf.world.cells import cell_words, nearness_words
from perceptio_hf.world.descriptions import any_name, capitalized
from perceptio_hf.world.parts import pick
from perceptio_hf.world.questions import CLOSER_QUESTIONS

from .answers import LETTERS, compared_in_words

_CHAINS, _CHAIN_CELLS = 6, 8  # chains of cells behind each span, and their length
_CONCLUSIONS = 6
_TRIES = 8  # pairs of cells, of which one is to differ in nearness; where none do, the first is said to be nearer


@dataclass(frozen=True)
class LookupBatch:
    """`prefix_ids` (b, N + 2) the spans; `input_ids`, `labels` (n, L) and `looks` (n, L, N + 2 + L) chains behind them,
    of the span `rows` (n,)."""

    prefix_ids: Tensor
    input_ids: Tensor
    labels: Tensor
    looks: Tensor
    rows: Tensor


@dataclass(frozen=True)
class ComparisonBatch:
    """Whole conversations without a picture: `input_ids`, `labels` (n, L) and `looks` (n, L, L)."""

    input_ids: Tensor
    labels: Tensor
    looks: Tensor


class LookupAsker:
    """Makes batches out of codes for one processor; `nearness` (K,) is the level of each code."""

    def __init__(self, processor: PerceptioProcessor, nearness: Tensor):
        self.nearness, self.tokenizer = nearness.cpu(), processor.tokenizer
        self.num_cells = processor.num_depth_tokens
        to_ids = processor.tokenizer.convert_tokens_to_ids
        ids = processor.spatial_token_ids()
        self.start, self.end = ids["depth_start_token_id"], ids["depth_end_token_id"]
        self.codes = torch.tensor(ids["depth_token_ids"])
        self.cells = to_ids(cell_words(int(self.num_cells**0.5)))
        self.levels = to_ids(nearness_words())
        tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in _letter_texts()]
        self.first_letter, self.letters = tokens[0][0], [row[0] for row in tokens[1:]]
        self.colon, self.stop = tokens[0][1], processor.tokenizer.eos_token_id

    def batch(self, codes: Tensor, generator: torch.Generator) -> LookupBatch:
        """Questions about spans of `codes` (b, N), made on the CPU and put where the codes are."""
        device, codes = codes.device, codes.cpu()
        levels = self.nearness[codes]  # (b, N)
        marker = torch.ones(len(codes), 1, dtype=torch.long)
        prefix = torch.cat([marker * self.start, self.codes[codes], marker * self.end], 1)
        chains = [self._chain(row, generator) for row in levels.tolist() for _ in range(_CHAINS)]
        rows = torch.arange(len(codes)).repeat_interleave(_CHAINS).tolist()
        for row, of in enumerate(levels.tolist()):
            ends = [self._conclusion(of, generator) for _ in range(_CONCLUSIONS)]
            chains += [chain for chain in ends if chain is not None]
            rows += [row] * (len(chains) - len(rows))
        stacked = self._stack(prefix, chains, torch.tensor(rows))
        return LookupBatch(*(getattr(stacked, item.name).to(device) for item in fields(stacked)))

    def comparisons(self, codes: Tensor, generator: torch.Generator) -> ComparisonBatch:
        """Which of two named things is closer, once for each of the spans `codes` (b, N): the cells are given, the
        names, their nearness and the conclusion are learnt."""
        device, codes = codes.device, codes.cpu()
        rows = [self._comparison(row, generator) for row in codes]
        ids = pad_sequence([row for row, _, _ in rows], batch_first=True, padding_value=self.stop)
        labels = pad_sequence([row for _, row, _ in rows], batch_first=True, padding_value=IGNORED_LABEL)
        looks = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)
        for number, (_, _, pairs) in enumerate(rows):
            for query, key in pairs:
                looks[number, query, key] = True
        return ComparisonBatch(ids.to(device), labels.to(device), looks.to(device))

    def _comparison(self, codes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Token ids and labels of one conversation, and (cell's place, its code's place in the span) of its cells."""
        r = random.Random(int(torch.randint(2**62, (), generator=generator)))
        levels = self.nearness[codes].tolist()
        drawn = self._draw(2 * _TRIES, generator).view(_TRIES, 2).tolist()
        cells = next((pair for pair in drawn if levels[pair[0]] != levels[pair[1]]), drawn[0])
        names = [any_name(r), any_name(r)]
        nearer = names[levels[cells[1]] > levels[cells[0]]]
        question = capitalized(pick(r, CLOSER_QUESTIONS).format(x=names[0], y=names[1]))
        masks = SEG_TOKEN * 2 if r.random() < 0.5 else ""
        answer = f"{masks}{depth_span(codes.tolist())}{compared_in_words(names, cells, nearness=True)}: {nearer}"
        asked = self._encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        ids = torch.tensor(asked + self._encode(answer) + [self.stop])
        span = ids.tolist().index(self.start) + 1
        places = torch.isin(ids, torch.tensor(self.cells)).nonzero()[:, 0].tolist()
        for place, cell in zip(places, cells, strict=True):
            ids[place + 1] = self.levels[levels[cell]]
        labels = ids.clone()
        labels[: span + self.num_cells + 1] = labels[places] = IGNORED_LABEL
        return ids, labels, [(place, span + cell) for place, cell in zip(places, cells, strict=True)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.num_cells, generator=generator)[:count]

    def _chain(self, levels: list[int], generator: torch.Generator) -> list[tuple[int, bool, int]]:
        """Tokens of one chain, each with whether it is learnt and the cell it names (-1: none)."""
        cells = self._draw(_CHAIN_CELLS, generator).tolist()
        return [item for cell in cells for item in self._named(cell, levels)]

    def _named(self, cell: int, levels: list[int]) -> list[tuple[int, bool, int]]:
        return [(self.cells[cell], False, cell), (self.levels[levels[cell]], True, -1)]

    def _conclusion(self, levels: list[int], generator: torch.Generator) -> list[tuple[int, bool, int]] | None:
        """A chain with letters and the letter of the nearest cell, None where two are equally near."""
        count = int(torch.randint(2, len(LETTERS) + 1, (), generator=generator))
        cells = self._draw(count, generator).tolist()
        near = [levels[cell] for cell in cells]
        nearest = near.index(max(near))
        if near.count(near[nearest]) > 1:
            return None
        heads = [self.first_letter, *self.letters[1:]]
        tokens: list[tuple[int, bool, int]] = []
        for head, cell in zip(heads, cells, strict=False):
            tokens += [(head, False, -1), *self._named(cell, levels)]
        return [*tokens, (self.colon, False, -1), (self.letters[nearest], True, -1), (self.stop, True, -1)]

    def _stack(self, prefix: Tensor, chains: list[list[tuple[int, bool, int]]], rows: Tensor) -> LookupBatch:
        length = max(map(len, chains))
        padded = torch.tensor([chain + [(self.stop, False, -1)] * (length - len(chain)) for chain in chains])
        ids, learnt, cells = padded.unbind(-1)
        looks = torch.zeros(*ids.shape, prefix.shape[1] + length, dtype=torch.bool)
        index = (cells >= 0).nonzero(as_tuple=True)
        looks[(*index, cells[index] + 1)] = True  # the start marker comes first
        return LookupBatch(prefix, ids, torch.where(learnt.bool(), ids, IGNORED_LABEL), looks, rows)


def _letter_texts() -> list[str]:
    """The first letter as an answer begins with it, before the colon, and every letter behind a space."""
    return [f"{LETTERS[0]}:", *[f" {letter}" for letter in LETTERS]]
