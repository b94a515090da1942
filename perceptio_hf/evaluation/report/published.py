"""Figures that others published, to stand beside ours. Nothing here was measured with this package."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedModel:
    """Percentages of one model, {(benchmark, split, metric): value}; split None where the source names none."""

    name: str
    source: str
    figures: dict[tuple[str, str | None, str], float] = field(hash=False)

    def find(self, benchmark: str, split: str | None, metric: str) -> float | None:
        """The figure of a benchmark's split, or the one that is published for the benchmark as a whole."""
        return self.figures.get((benchmark, split, metric), self.figures.get((benchmark, None, metric)))

    def metrics(self, benchmark: str, split: str | None) -> set[str]:
        """What is published for a benchmark's split."""
        return {metric for name, part, metric in self.figures if (name, part) == (benchmark, split)}


def _segmentation(refcoco: float, plus: float, g: float) -> dict[tuple[str, str | None, str], float]:
    values = zip(("refcoco", "refcoco+", "refcocog"), (refcoco, plus, g), strict=True)
    return {(name, "val", "ciou"): value for name, value in values}


def _hardblink(*points: float) -> dict[tuple[str, str | None, str], float]:
    """Accuracy with 3, 4 and 5 points, and the mean of the three sets, which are equally large."""
    by_points = {("hardblink", "all", f"accuracy_{3 + i}"): value for i, value in enumerate(points)}
    by_points |= {("hardblink", str(3 + i), "accuracy"): value for i, value in enumerate(points)}
    return by_points | {("hardblink", "all", "accuracy"): round(sum(points) / len(points), 1)}


PUBLISHED = (
    PublishedModel(
        "Perceptio-8B",
        "Li et al. 2026, arXiv 2603.18795",
        _segmentation(82.7, 77.9, 80.0) | {("mmbench", None, "circular_accuracy"): 83.4},
    ),
    PublishedModel(
        "Sa2VA-8B",
        "Yuan et al. 2025, arXiv 2501.04001 (first version), and the model card of ByteDance/Sa2VA-8B",
        _segmentation(81.6, 76.2, 78.7) | {("mmbench", None, "circular_accuracy"): 81.6},
    ),
    PublishedModel(
        "LLaVA-AURORA (13B)",
        "Bigverdi et al. 2024, arXiv 2412.03548, relative depth",
        _hardblink(66.9, 60.5, 54.8) | {("blink-depth", None, "accuracy"): 64.5},
    ),
    PublishedModel(
        "LLaVA 1.5 13B, fine-tuned on labels only",
        "Bigverdi et al. 2024, arXiv 2412.03548, relative depth",
        _hardblink(58.9, 52.4, 41.1) | {("blink-depth", None, "accuracy"): 68.5},
    ),
)

REPLACEMENT_SOURCE = (
    'Zhang, Bigverdi, Krishna, "Ablate-to-Validate: Are Vision-Language Models Really Using Continuous Thought '
    'Tokens?", table 4: HardBLINK, mean of 3, 4 and 5 points, 100 discrete depth tokens'
)
# Percentages right with the span's tokens replaced; "constant" is their constant / zero.
PUBLISHED_REPLACEMENTS = {
    "Qwen2.5-VL-3B": {"identity": 71.2, "oracle": 80.6, "random": 51.3, "constant": 58.9},
    "LLaVA-13B": {"identity": 77.7, "oracle": 78.8, "random": 68.8, "constant": 73.7},
}
