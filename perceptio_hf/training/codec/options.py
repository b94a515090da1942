"""How a codec is trained, and for how long."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CodebookOptions:
    """How a codec is trained.

    Args:
        batch_size: Maps per step, of all processes together.
        learning_rate: Peak of a one-cycle schedule for AdamW.
        continuous_share: Share of the training without quantisation, before the codebook starts.
        decay: Of the moving averages of the codebook, per step.
        kmeans_start: Start the codebook from k-means over encoder outputs; False leaves it random.
        restart_every: Steps between two moves of unused codes; 0 never moves them.
        settled_share: Share of the training at whose end unused codes are left where they are.
        precision: Of the convolutions: "bfloat16", "float32", or "auto", the former where the processor has it. The
            codebook and the losses are float32 in any case.

    Raises:
        ValueError: A value is out of range.
    """

    batch_size: int = 8
    learning_rate: float = 3e-3
    continuous_share: float = 0.15
    decay: float = 0.99
    kmeans_start: bool = True
    restart_every: int = 20
    settled_share: float = 0.2
    precision: Literal["auto", "bfloat16", "float32"] = "auto"

    def __post_init__(self):
        if self.batch_size < 1 or self.restart_every < 0 or self.learning_rate <= 0.0:
            raise ValueError(f"batch_size >= 1, restart_every >= 0 and learning_rate > 0 are needed, got {self}.")
        for name in ("continuous_share", "decay", "settled_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be in [0, 1).")
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"`precision` is {self.precision!r}; choose auto, bfloat16 or float32.")


class Clock:
    """Counts steps against a limit in steps or in minutes.

    Args:
        now: seconds, from any beginning.

    Raises:
        ValueError: Not exactly one limit, or one that is not above 0, or without end.
    """

    def __init__(self, steps: int | None, minutes: float | None, now: Callable[[], float] = time.monotonic):
        limit = steps if minutes is None else minutes
        if (steps is None) == (minutes is None) or not 0 < limit < math.inf:
            raise ValueError(f"give either `steps` or `minutes`, above 0; got steps={steps}, minutes={minutes}.")
        self.steps, self.minutes = steps, minutes
        self.step, self.now, self.start = 0, now, now()

    @property
    def seconds(self) -> float:
        """How long it has been running, earlier runs that it goes on from included."""
        return self.now() - self.start

    def go_on(self, step: int, seconds: float) -> None:
        """Stand where an earlier run stopped."""
        self.step, self.start = step, self.now() - seconds

    def share(self) -> float:
        """How much of the training is behind, 0 to 1."""
        if self.minutes is None:
            return min(1.0, self.step / self.steps)
        return min(1.0, self.seconds / (60.0 * self.minutes))
