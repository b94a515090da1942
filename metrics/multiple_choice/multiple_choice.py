"""Multiple choice as an `evaluate` metric: plain and circular accuracy, by category, as MMBench reports them."""

from typing import ClassVar

import datasets
import evaluate

from perceptio_hf.evaluation.metrics.multiple_choice import multiple_choice_accuracy  # From: perceptio-hf[eval]
from perceptio_hf.evaluation.metrics.scripts import LetteredReferences  # From: perceptio-hf[eval]

_DESCRIPTION = """
Accuracy on multiple-choice questions: plain (every row for itself) and circular (a question counts if the answers to
all its rotations are right), overall, by category and by L2 category. Answers are read by rule: a letter, or the text
of exactly one choice. Answers that cannot be read are wrong, and reported.
"""

_INPUTS = """
Args:
    predictions: the model's texts.
    references: the right choices as letters ("B" or "(B)"), or as indices from 0.
    choices: the texts of the choices A, B, ... of each row (optional).
    index: MMBench's index of each row; rows with one index modulo 1 000 000 are one question (optional).
    category, l2_category: the ability that each row tests, and its coarser class (optional).

Returns:
    accuracy, circular_accuracy, samples, questions, incomplete_questions, unparsable; and by_category, by_l2_category:
    the same figures for every name.
"""

_CITATION = """
@inproceedings{liu2024mmbench,
  title = {{MMBench}: Is Your Multi-modal Model an All-around Player?},
  author = {Liu, Yuan and Duan, Haodong and Zhang, Yuanhan and Li, Bo and Zhang, Songyang and Zhao, Wangbo and
            Yuan, Yike and Wang, Jiaqi and He, Conghui and Liu, Ziwei and Chen, Kai and Lin, Dahua},
  booktitle = {ECCV},
  year = {2024}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MultipleChoice(LetteredReferences, evaluate.Metric):
    optional: ClassVar = {"choices": [], "index": -1, "category": "", "l2_category": ""}

    def _info(self):
        text, number = datasets.Value("string"), datasets.Value("int64")
        others = {"choices": datasets.Sequence(text), "index": number, "category": text, "l2_category": text}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text, **others}),
            reference_urls=["https://arxiv.org/abs/2307.06281"],
        )

    def _compute(self, predictions, references, **columns):
        given = {name: self.given(values, name) for name, values in columns.items()}
        return multiple_choice_accuracy(predictions, references, **given)
