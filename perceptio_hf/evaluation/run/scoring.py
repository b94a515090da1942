"""What an answer to a benchmark's question is worth, one by one and all together.

One by one: a record, which JSON can hold, with a `score` in [0, 1]. All together: the metrics of `metrics/`, computed
from records alone, and what chance and the most frequent answer would score.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from perceptio_hf.data.run_length import RunLengths, decode_mask, encode_mask
from perceptio_hf.evaluation.benchmarks.registration import SCORINGS, Scoring
from perceptio_hf.evaluation.benchmarks.sample import Sample, Task
from perceptio_hf.evaluation.metrics.answer_parsing import answer_choice, answer_letter
from perceptio_hf.evaluation.metrics.depth import align_scale_shift, depth_metrics
from perceptio_hf.evaluation.metrics.multiple_choice import multiple_choice_accuracy
from perceptio_hf.evaluation.metrics.relative_depth import relative_depth_accuracy
from perceptio_hf.evaluation.metrics.segmentation import MaskAreas, mask_areas, segmentation_scores

if TYPE_CHECKING:
    from perceptio_hf.data.depth_maps import DepthMap
    from perceptio_hf.processing.processing_perceptio import SpatialAnswer

Record = dict[str, Any]
Scores = dict[str, Any]


def score_answer(task: Task, sample: Sample, answer: "SpatialAnswer") -> Record:
    """The part of a record that is about the answer.

    Returns:
        "answer": its words; "well_formed"; "depth_codes": those of its span, or None; "score": 0 to 1, larger is
        better. Besides, by task: "mask" (all its masks as one, run lengths) and "pixels" (common, predicted, referred);
        "read" (the letter it takes, or None); "metrics" (of its depth, see `depth_figures`).

    Raises:
        ValueError: where the target cannot be read or belongs to another picture; the sample is named.
    """
    common = {
        "answer": answer.text,
        "well_formed": answer.well_formed,
        "depth_codes": answer.depth_codes,
    }
    try:
        return common | SCORINGS[task].score(sample, answer)
    except ValueError as error:
        raise ValueError(f"{sample.id}: {error}") from None


def score_text(task: Task, target: Mapping[str, Any], text: str) -> Record:
    """ "read" and "score" of words that answer a question with choices."""
    letter = read_choice(task, target, text)
    return {"read": letter, "score": float(letter == target["answer"])}


def read_choice(task: Task, target: Mapping[str, Any], text: str) -> str | None:
    """The letter that an answer takes."""
    if task == "multiple_choice":
        return answer_choice(text, target["texts"])
    return answer_letter(text, len(target["choices"]))


def total_scores(task: Task, records: Sequence[Record]) -> Scores:
    """The benchmark's metrics over records, which have their "target" with them.

    Returns:
        referring_segmentation, relative_depth, multiple_choice: as the functions of these names; depth: means of
        `depth_figures`, "without_depth" (answers without a span) and "samples". For all "well_formed", the share of
        answers without a broken span.

    Raises:
        ValueError: without records.
    """
    if not records:
        raise ValueError("there are no answers to score.")
    return SCORINGS[task].total(records) | {
        "well_formed": float(np.mean([record["well_formed"] for record in records]))
    }


def headline(task: Task, scores: Scores) -> str:
    """The name of the one metric that stands for the benchmark."""
    return next(name for name in SCORINGS[task].headline if scores.get(name) is not None)


def baselines(task: Task, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """What needs no model: {"chance": ..., "majority": ...}, each {metric: value}; empty for tasks without choices.

    chance picks any choice; majority always gives the letter that is right most often among questions with as many
    choices, which it could only know from the answers.
    """
    if not SCORINGS[task].choices:
        return {}
    groups: dict[int, list[str]] = defaultdict(list)
    for record in records:
        groups[len(record["target"]["choices"])].append(record["target"]["answer"])
    most = {count: max(Counter(answers).values()) for count, answers in groups.items()}
    chance = {"accuracy": sum(len(answers) / count for count, answers in groups.items()) / len(records)}
    majority = {"accuracy": sum(most.values()) / len(records)}
    if task == "relative_depth":
        chance |= {f"accuracy_{count}": 1 / count for count in sorted(groups)}
        majority |= {f"accuracy_{count}": most[count] / len(groups[count]) for count in sorted(groups)}
    return {"chance": chance, "majority": majority}


def merged_mask(masks: Sequence[np.ndarray], size: Sequence[int]) -> RunLengths:
    """Masks (height, width) bool as one; none at all give an empty one of `size`."""
    merged = np.zeros(tuple(size), dtype=bool)
    for mask in masks:
        if mask.shape != merged.shape:
            raise ValueError(f"a mask is {mask.shape}, its picture {merged.shape} (height, width).")
        merged |= mask
    return encode_mask(merged)


def referred_mask(target: Mapping[str, Any]) -> RunLengths:
    """All that an expression refers to, as one mask."""
    return merged_mask([decode_mask(mask) for mask in target["masks"]], target["size"])


def depth_figures(answer_depth: np.ndarray | None, truth: "DepthMap") -> dict[str, float]:
    """How good a relative depth map is.

    Args:
        answer_depth: (H, W) relative inverse depth, resized where the truth has another size; None, no depth at all,
            counts as the same depth everywhere.
        truth: with distances or without.

    Returns:
        "relative_mae": mean absolute error of relative inverse depth over valid pixels after scale and shift. Where
        distances are known, all of `depth_metrics` too.
    """
    shape = truth.relative.shape
    predicted = np.zeros(shape, np.float32) if answer_depth is None else _resized(answer_depth, shape)
    scale, shift = align_scale_shift(predicted, truth.relative, truth.valid)
    fitted = np.clip(scale * predicted + shift, 0.0, 1.0)
    figures = {"relative_mae": float(np.abs(fitted - truth.relative)[truth.valid].mean())}
    return figures if truth.metric is None else figures | depth_metrics(predicted, truth.metric, truth.valid)


def _resized(depth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if depth.shape == shape:
        return depth
    from PIL import Image

    return np.asarray(Image.fromarray(depth.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR))


def _score_masks(sample: Sample, answer: "SpatialAnswer") -> Record:
    predicted = merged_mask(answer.masks, answer.masks.shape[1:])
    areas = mask_areas([predicted], [referred_mask(sample.target)])
    pixels = [int(areas.common[0]), int(areas.predicted[0]), int(areas.referred[0])]
    return {"mask": predicted, "pixels": pixels, "score": float(areas.iou[0])}


def _score_depth(sample: Sample, answer: "SpatialAnswer") -> Record:
    if sample.depth is None:
        raise ValueError("the sample has no depth to compare with.")
    truth = sample.depth.open()
    if answer.depth is not None:
        truth.check_orientation(answer.depth.shape[::-1])  # an answer has the size of its picture, shown upright
    figures = depth_figures(answer.depth, truth)
    return {"metrics": figures, "score": figures.get("delta1", 1.0 - figures["relative_mae"])}


def _total_masks(records: Sequence[Record]) -> Scores:
    return segmentation_scores(MaskAreas(*np.array([record["pixels"] for record in records], dtype=np.int64).T))


def _total_points(records: Sequence[Record]) -> Scores:
    targets = [record["target"] for record in records]
    return relative_depth_accuracy(
        [record["answer"] for record in records],
        [target["answer"] for target in targets],
        [len(target["choices"]) for target in targets],
    )


def _total_choices(records: Sequence[Record]) -> Scores:
    targets = [record["target"] for record in records]
    names = ("index", "category", "l2_category")
    return multiple_choice_accuracy(
        [record["answer"] for record in records],
        [target["answer"] for target in targets],
        choices=[target["texts"] for target in targets],
        **{name: [target.get(name) for target in targets] for name in names},
    )


def _total_depth(records: Sequence[Record]) -> Scores:
    figures = [record["metrics"] for record in records]
    shared = [name for name in figures[0] if all(name in item for item in figures)]
    return {name: float(np.mean([item[name] for item in figures])) for name in shared} | {
        "samples": len(records),
        "without_depth": sum(record["depth_codes"] is None for record in records),
    }


_ACCURACIES = {
    "accuracy": "accuracy",
    "accuracy_3": "accuracy, 3 points",
    "accuracy_4": "accuracy, 4 points",
    "accuracy_5": "accuracy, 5 points",
}
SCORINGS |= {
    "referring_segmentation": Scoring(
        running="mean IoU",
        score=_score_masks,
        total=_total_masks,
        headline=("ciou",),
        hub_task="image-segmentation",
        metrics={"ciou": "cIoU", "giou": "gIoU", "no_target_accuracy": "accuracy without target"},
    ),
    "relative_depth": Scoring(
        running="accuracy",
        score=lambda sample, answer: score_text("relative_depth", sample.target, answer.text),
        total=_total_points,
        headline=("accuracy",),
        hub_task="visual-question-answering",
        metrics=_ACCURACIES,
        choices=True,
    ),
    "multiple_choice": Scoring(
        running="accuracy",
        score=lambda sample, answer: score_text("multiple_choice", sample.target, answer.text),
        total=_total_choices,
        headline=("circular_accuracy", "accuracy"),
        hub_task="visual-question-answering",
        metrics={"accuracy": "accuracy", "circular_accuracy": "circular accuracy"},
        shown=("circular_accuracy", "accuracy"),
        choices=True,
    ),
    "depth": Scoring(
        running="delta1",
        score=_score_depth,
        total=_total_depth,
        headline=("delta1", "relative_mae"),
        hub_task="depth-estimation",
        metrics={
            "absrel": "AbsRel",
            "delta1": "delta < 1.25",
            "rmse": "RMSE in metres",
            "relative_mae": "mean error of relative depth",
        },
        shown=("absrel", "delta1", "relative_mae"),
    ),
}
