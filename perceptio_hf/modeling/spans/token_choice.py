"""Choosing tokens from scores, greedily or with noise that belongs to a place and not to a moment.

Sampling draws all its randomness before the first token: one number in [0, 1) for every place where a word may come,
and Gumbel noise for every place of every span. The highest of code scores plus noise is a sample (Maddison and
et al., 2014), and it is the same one whenever, however often and beside whichever others it is computed.
"""

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

# These look at one row of scores and at nothing else, and leave what is -inf: within a span they can be shown the K
# codes alone, each place for itself.
_BLIND = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
    )
)


def is_blind(processor) -> bool:
    """Whether a logits processor of transformers' depends on one row of scores only."""
    return type(processor) in _BLIND


class TokenChoice:
    """Greedy or sampled choices for `rows` rows of at most `steps` new tokens and `spans` spans.

    Args:
        warpers: blind processors, applied after the grammar.
        sample: False takes the highest score.
    """

    def __init__(
        self,
        warpers: LogitsProcessorList,
        *,
        sample: bool,
        rows: int,
        steps: int,
        spans: int,
        code_shape: tuple[int, int],
        device: torch.device,
    ):
        self.warpers, self.sample = warpers, sample
        self._row = torch.arange(rows, device=device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)  # whether there was nothing to draw from
        if sample:
            self._uniform = torch.rand(rows, steps, device=device)
            exponential = torch.empty(rows, max(spans, 1), *code_shape, device=device).exponential_()
            self._gumbel = -exponential.log()  # (rows, spans, N, K)

    def warped(self, scores: torch.Tensor) -> torch.Tensor:
        """(..., width) scores after the warpers."""
        if not self.warpers:
            return scores
        flat = scores.reshape(-1, scores.shape[-1])
        return self.warpers(flat.new_zeros(len(flat), 1, dtype=torch.long), flat).view_as(scores)

    def words(self, scores: torch.Tensor, steps: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) warped scores of the token at `steps` (rows,) of the response -> (rows,) tokens.

        `rows` (rows,) bool are those whose tokens matter. Where one of them has scores that are no numbers, `failed` is
        set, and its token is none of the vocabulary.
        """
        if not self.sample:
            return scores.argmax(-1)
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        total = scores.softmax(-1).cumsum(-1, dtype=exact)
        self.failed = self.failed | (total[:, -1].isnan() & rows).any()
        steps = steps.clamp(0, self._uniform.shape[1] - 1)
        below = self._uniform[self._row, steps].to(exact) * total[:, -1]
        below = torch.minimum(below, total[:, -1].nextafter(torch.zeros_like(below)))
        return torch.searchsorted(total, below[:, None], right=True)[:, 0]

    def codes(self, scores: torch.Tensor, span: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Warped scores (rows, q, K) of the codes at `places` (rows, q) of each row's span number `span` (rows,).

        Returns:
            (rows, q) codes.
        """
        if self.sample:
            places, span = places.clamp(0, self._gumbel.shape[2] - 1), span.clamp(0, self._gumbel.shape[1] - 1)
            scores = scores + self._gumbel[self._row[:, None], span[:, None], places]
        return scores.argmax(-1)
