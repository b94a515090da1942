"""The page of the Space."""

from pathlib import Path

from perceptio_hf.evaluation.metrics.widget import metric_interface

EXAMPLE = {
    "predictions": ["A", "the dog", "B. left"],
    "references": ["A", "A", "A"],
    "choices": [["cat", "dog"], ["dog", "cat"], ["right", "left"]],
    "index": [7, 1000007, 8],
    "category": ["object recognition", "object recognition", "spatial relation"],
}

if __name__ == "__main__":
    metric_interface(Path(__file__).parent, EXAMPLE).launch()
