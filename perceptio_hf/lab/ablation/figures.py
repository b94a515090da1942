"""All the figures of one ablated model, on held-out scenes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from perceptio_hf.evaluation.during.broken_spans import sample_spans
from perceptio_hf.lab.closest_points import answer_closest, token_replacement
from perceptio_hf.lab.held_out import Item, answer_items, conclusion, encode_items, held_out_items, score_items
from perceptio_hf.world import HELD_OUT_SEED
from perceptio_hf.world.fair import FairSet, fair_sets

if TYPE_CHECKING:
    from perceptio_hf.lab.lessons.answers import AnswerForm
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor, SpatialAnswer

POINTS = (3, 4, 5)
METRICS = (
    "closest_3",
    "closest_4",
    "closest_5",
    "closest",
    "closest_lowest_rule",
    "object_closer",
    "absrel",
    "delta1",
    "malformed_rate",
    "count_mae",
    "ciou",
    "giou",
    "plain_accuracy",
    "trt_own",
    "trt_oracle",
    "trt_random",
    "trt_other_image",
    "trt_first_repeat",
)
_ITEMS_SEED = HELD_OUT_SEED + 500_000_000  # away from the scenes of the fair sets


def evaluate(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    *,
    form: "AnswerForm",
    closest: int,
    replaced: int,
    scenes: int,
    malformed: int,
) -> dict[str, float]:
    """The metrics of METRICS that the form of the answers allows.

    Args:
        form: what the model was taught to answer with.
        closest, replaced: fair questions for each number of points, and how many of them get their span replaced.
        scenes: held-out scenes for all else.
        malformed: responses that are sampled without the grammar.
    """
    items = held_out_items(scenes, first_seed=_ITEMS_SEED)
    scores = {}
    if form.words:
        scores |= closest_scores(model, processor, closest, replaced, depth=form.depth) | _words(
            model, processor, form, items
        )
    if form.depth:
        scores |= _depth(model, processor, items) | spans_without_grammar(model, processor, items, malformed)
    if form.masks:
        found = score_items(*_answered(model, processor, items, ("refer",), "seg"))
        scores |= {"ciou": found["ciou"], "giou": found["miou"]}
    return scores


def closest_scores(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    count: int,
    replaced: int,
    *,
    depth: bool = True,
) -> dict[str, float]:
    """`closest_3`, `closest_4`, `closest_5`, their mean, the lowest-point rule, and Token Replacement (`trt_...`).

    Args:
        count: fair questions for each number of points.
        replaced: how many of them get their span replaced.
        depth: answer with a span first; without one nothing is replaced.
    """
    scores, rule, replacements = {}, [], []
    for points in POINTS:
        sets: list[FairSet] = fair_sets(points, count)
        answers, codes = answer_closest(model, processor, sets, spatial="depth" if depth else "none")
        right = [answer == item.answer for answer, item in zip(answers, sets, strict=True)]
        scores[f"closest_{points}"] = float(np.mean(right))
        rule.append(np.mean([item.lowest == item.answer for item in sets]))
        if codes is not None:
            whole = replaced // points * points  # the first ones are whole sets too, so that they are as fair as all
            replacements.append(token_replacement(model, processor, sets[:whole], codes[:whole]))
    scores["closest"] = float(np.mean([scores[f"closest_{points}"] for points in POINTS]))
    scores["closest_lowest_rule"] = float(np.mean(rule))
    return scores | {name: float(np.mean([one[name] for one in replacements])) for name in dict(*replacements[:1])}


def _answered(model, processor, items: list[Item], kinds: Sequence[str], spatial: str):
    chosen = [item for item in items if item.question.kind in kinds]
    return chosen, answer_items(model, processor, chosen, batch_size=128, spatial=spatial)


def _words(model, processor, form: "AnswerForm", items: list[Item]) -> dict[str, float]:
    plain, answers = _answered(model, processor, items, ("count", "attribute"), "none")
    pairs, answered = _answered(model, processor, items, ("closer_object",), "depth" if form.depth else "none")
    return {"plain_accuracy": _accuracy(plain, answers), "object_closer": _accuracy(pairs, answered)}


def _accuracy(items: list[Item], answers: "list[SpatialAnswer]") -> float:
    right = [
        conclusion(answer.text).lower() == item.question.answer.lower()
        for item, answer in zip(items, answers, strict=True)
    ]
    return float(np.mean(right))


def _depth(model, processor, items: list[Item]) -> dict[str, float]:
    found = score_items(*_answered(model, processor, items, ("depth",), "depth"))
    return {name: found[name] for name in ("absrel", "delta1")}


@torch.no_grad()
def spans_without_grammar(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    items: list[Item],
    count: int,
    *,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """How well spans hold together by themselves: `count` responses to questions about depth, sampled at temperature 1
    by transformers' own `generate` without our grammar, at most twice as long as a span.

    Returns:
        "malformed_rate": share of responses with a broken span, with several or with none. "count_mae": mean distance
        between the number of codes in a response and that of a span.
    """
    asked = [item for item in items if item.question.kind == "depth"]
    chosen = [asked[index % len(asked)] for index in range(count)]
    encoded = (encode_items(processor, chosen[start : start + batch_size]) for start in range(0, count, batch_size))
    batches = (inputs.to(model.device) for inputs in encoded)
    return sample_spans(model, batches, seed=seed)
