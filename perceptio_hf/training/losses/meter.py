"""Means of the parts of the loss for the logs."""

from collections import Counter
from collections.abc import Callable, Iterable

from .labels import LossCounts
from .parts import LoggedPart


class PartMeter:
    """Means of the parts of the loss over all items they were measured on."""

    def __init__(self, parts: Iterable[LoggedPart]):
        self.count_of = {part.name: part.items for part in parts}
        self.sums: Counter[str] = Counter()
        self.items: Counter[str] = Counter()

    def add(self, parts: dict[str, float], counts: LossCounts, share: float) -> None:
        """Add parts that are sums over items divided by `counts`, of which `share` belongs to them."""
        for name, value in parts.items():
            count = getattr(counts, self.count_of[name])
            self.sums[name] += value * count
            self.items[name] += share * count

    def means(self, reduced: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """The means of those parts that had any item, and a new start. `reduced` sums numbers over processes."""
        totals = reduced([table[name] for table in (self.sums, self.items) for name in self.count_of])
        self.sums.clear()
        self.items.clear()
        sums, items = totals[: len(self.count_of)], totals[len(self.count_of) :]
        return {name: total / count for name, total, count in zip(self.count_of, sums, items, strict=True) if count > 0}
