"""Referring segmentation as an `evaluate` metric: cIoU, gIoU, precision, and expressions without a target."""

import datasets
import evaluate

from perceptio_hf.data.run_length import compress_counts  # From: perceptio-hf[eval]
from perceptio_hf.evaluation.metrics.scripts import FlexibleInputs  # From: perceptio-hf[eval]
from perceptio_hf.evaluation.metrics.segmentation import referring_segmentation  # From: perceptio-hf[eval]

_DESCRIPTION = """
How well masks fit what expressions refer to: cIoU (all common pixels over all pixels of the unions), gIoU (mean IoU),
precision at IoU 0.5 to 0.9, and for gRefCOCO the share of expressions without a target that got an empty mask.
"""

_INPUTS = """
Args:
    predictions, references: one COCO run-length dictionary {"size": [height, width], "counts": ...} per expression;
        counts compressed (text or bytes) or as a list of numbers. An empty reference means that there is no target.
    min_pixels: a prediction with fewer pixels counts as empty (for `compute`; default 0).

Returns:
    ciou, giou, precision@0.5 .. precision@0.9, no_target_accuracy, target_accuracy, samples, no_target_samples.
"""

_CITATION = """
@inproceedings{liu2023gres,
  title = {{GRES}: Generalized Referring Expression Segmentation},
  author = {Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle = {CVPR},
  year = {2023}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ReferringSegmentation(FlexibleInputs, evaluate.Metric):
    def _info(self):
        mask = {"size": datasets.Sequence(datasets.Value("int32")), "counts": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
            reference_urls=["https://arxiv.org/abs/2306.00968"],
        )

    def convert(self, name, values):
        """All masks in COCO's compressed text, so that every kind may come, and kinds may be mixed."""
        return [_as_text(mask) for mask in values]

    def _compute(self, predictions, references, min_pixels=0):
        return referring_segmentation(predictions, references, min_pixels=min_pixels)


def _as_text(mask):
    try:
        size, counts = [int(side) for side in mask["size"]], mask["counts"]
        if isinstance(counts, bytes):
            counts = counts.decode("ascii", "replace")
        elif not isinstance(counts, str):
            counts = compress_counts([int(count) for count in counts])
    except (KeyError, TypeError):
        raise ValueError(f"a mask is {{'size': [height, width], 'counts': ...}}, not {mask!r:.80}.") from None
    return {"size": size, "counts": counts}
