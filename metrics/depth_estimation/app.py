"""The page of the Space."""

from pathlib import Path

from perceptio_hf.evaluation.metrics.widget import metric_interface

EXAMPLE = {
    "predictions": [[[1.0, 0.5], [0.25, 0.1]]],
    "references": [[[1.0, 2.0], [4.0, 8.0]]],
}

if __name__ == "__main__":
    metric_interface(Path(__file__).parent, EXAMPLE).launch()
