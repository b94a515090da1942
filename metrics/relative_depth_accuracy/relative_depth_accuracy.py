"""HardBLINK's accuracy as an `evaluate` metric: which marked point is the closest, read from the model's words."""

from typing import ClassVar

import datasets
import evaluate

from perceptio_hf.evaluation.metrics.relative_depth import relative_depth_accuracy  # From: perceptio-hf[eval]
from perceptio_hf.evaluation.metrics.scripts import LetteredReferences  # From: perceptio-hf[eval]

_DESCRIPTION = """
How often a model names the nearest of several marked points, overall and by number of points, with Wilson intervals.
Answers are read by rule; those that name no point are wrong, and reported.
"""

_INPUTS = """
Args:
    predictions: the model's texts.
    references: the right points as letters ("B" or "(B)"), or as indices from 0.
    num_points: how many points each picture has (optional).
    confidence: of the intervals (for `compute`; default 0.95).

Returns:
    accuracy, accuracy_interval, samples, unparsable; with num_points also accuracy_3, accuracy_3_interval, samples_3,
    unparsable_3, and so on for every number that occurs.
"""

_CITATION = """
@inproceedings{bigverdi2025perception,
  title = {Perception Tokens Enhance Visual Reasoning in Multimodal Language Models},
  author = {Bigverdi, Mahtab and Luo, Zelun and Hsieh, Cheng-Yu and Shen, Ethan and Chen, Dongping and Shapiro, Linda G.
            and Krishna, Ranjay},
  booktitle = {CVPR},
  year = {2025}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RelativeDepthAccuracy(LetteredReferences, evaluate.Metric):
    optional: ClassVar = {"num_points": 0}

    def _info(self):
        text, number = datasets.Value("string"), datasets.Value("int32")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text, "num_points": number}),
            reference_urls=["https://arxiv.org/abs/2412.03548"],
        )

    def _compute(self, predictions, references, num_points, confidence=0.95):
        points = self.given(num_points, "num_points")
        return relative_depth_accuracy(predictions, references, points, confidence=confidence)
