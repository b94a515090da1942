"""The page of the Space."""

from pathlib import Path

from perceptio_hf.evaluation.metrics.widget import metric_interface

EXAMPLE = {
    "predictions": [{"size": [4, 4], "counts": [4, 8, 4]}, {"size": [4, 4], "counts": "`0"}],
    "references": [{"size": [4, 4], "counts": [4, 4, 8]}, {"size": [4, 4], "counts": "`0"}],
}

if __name__ == "__main__":
    metric_interface(Path(__file__).parent, EXAMPLE).launch()
