"""Means of the parts of the loss for the logs."""

from collections import Counter
from collections.abc import Callable

from .labels import LossCounts

_COUNT_OF = {
    "text": "text",
    "marker": "markers",
    "token": "codes",
    "count": "responses",
    "reconstruction": "spans",
    "mask_bce": "masks",
    "mask_dice": "masks",
    "mask_score": "masks",
    "look_write": "codes",
    "look_segment": "masks",
}


class PartMeter:
    """Means of the parts of the loss over all items they were measured on."""

    def __init__(self):
        self.sums: Counter[str] = Counter()
        self.items: Counter[str] = Counter()

    def add(self, parts: dict[str, float], counts: LossCounts, share: float) -> None:
        """Add parts that are sums over items divided by `counts`, of which `share` belongs to them."""
        for name, value in parts.items():
            count = getattr(counts, _COUNT_OF[name])
            self.sums[name] += value * count
            self.items[name] += share * count

    def means(self, reduced: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """The means of those parts that had any item, and a new start. `reduced` sums numbers over processes."""
        totals = reduced([table[name] for table in (self.sums, self.items) for name in _COUNT_OF])
        self.sums.clear()
        self.items.clear()
        sums, items = totals[: len(_COUNT_OF)], totals[len(_COUNT_OF) :]
        return {name: total / count for name, total, count in zip(_COUNT_OF, sums, items, strict=True) if count > 0}
