"""Relative depth as an `evaluate` metric: AbsRel, RMSE and the delta accuracies after alignment in inverse depth."""

import io
from typing import ClassVar

import datasets
import evaluate
import numpy as np

from perceptio_hf.evaluation.metrics.depth import mean_depth_metrics  # From: perceptio-hf[eval]
from perceptio_hf.evaluation.metrics.scripts import FlexibleInputs  # From: perceptio-hf[eval]

_DESCRIPTION = """
Errors of relative depth against measured distances: AbsRel, RMSE in metres and delta accuracies, after scale and shift
were fitted in inverse depth by least squares, over valid pixels, averaged over pictures.
"""

_INPUTS = """
Args:
    predictions: (height, width) relative inverse depth of each picture, larger is nearer, any scale and shift.
    references: (height, width) distances in metres; 0, negative, NaN and infinite ones are left out.
    valid: (height, width) booleans; False leaves further pixels out (optional).

Returns:
    absrel, rmse, delta1, delta2, delta3: means over pictures; images, images_left_out: how many.
"""

_CITATION = """
@article{ranftl2020towards,
  title = {Towards Robust Monocular Depth Estimation: Mixing Datasets for Zero-shot Cross-dataset Transfer},
  author = {Ranftl, Ren{\\'e} and Lasinger, Katrin and Hafner, David and Schindler, Konrad and Koltun, Vladlen},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year = {2020}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class DepthEstimation(FlexibleInputs, evaluate.Metric):
    optional: ClassVar = {"valid": b""}

    def _info(self):
        picture = datasets.Value("binary")  # see `convert`
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": picture, "references": picture, "valid": picture}),
            reference_urls=["https://arxiv.org/abs/1907.01341"],
        )

    def convert(self, name, values):
        """Arrays or nested lists as .npy bytes: as Arrow's nested lists, a pixel would take 60 bytes, not 4."""
        kind = bool if name == "valid" else np.float32
        return [None if value is None else _pack(np.asarray(value, dtype=kind)) for value in values]

    def _compute(self, predictions, references, valid):
        masks = (_unpack(value) if value else None for value in valid)
        return mean_depth_metrics(map(_unpack, predictions), map(_unpack, references), masks)


def _pack(array):
    if array.ndim != 2:
        raise ValueError(f"a depth map is (height, width), not {array.shape}; give a list of them.")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _unpack(data):
    return np.load(io.BytesIO(data), allow_pickle=False)
