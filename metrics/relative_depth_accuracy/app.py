"""The page of the Space."""

from pathlib import Path

from perceptio_hf.evaluation.metrics.widget import metric_interface

EXAMPLE = {
    "predictions": ["(B)", "Point A is closest.", "I cannot tell."],
    "references": ["(B)", "(C)", "(A)"],
    "num_points": [3, 3, 4],
}

if __name__ == "__main__":
    metric_interface(Path(__file__).parent, EXAMPLE).launch()
