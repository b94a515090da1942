"""How well a model answers about rendered scenes that no training saw."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perceptio_hf.evaluation.metrics.depth import depth_metrics
from perceptio_hf.evaluation.run.answering import encode_questions
from perceptio_hf.training.rewards.texts import conclusion
from perceptio_hf.world import HELD_OUT_SEED, Question, Scene, ask, draw_points, render_scene

if TYPE_CHECKING:
    from transformers import BatchFeature

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor, SpatialAnswer

_PER_SCENE = {"refer": 2, "count": 1, "attribute": 2, "closer_object": 1, "closest_point": 1, "depth": 1}


@dataclass
class Item:
    """One question about one scene; the picture has the question's points drawn in, if it has any."""

    scene: Scene
    question: Question
    picture: np.ndarray


def held_out_items(scenes: int, first_seed: int = HELD_OUT_SEED, size: int = 128) -> list[Item]:
    """Questions of every kind about `scenes` held-out scenes, at most two of a kind about each."""
    items = []
    for seed in range(first_seed, first_seed + scenes):
        scene = render_scene(seed, size=size)
        taken: Counter[str] = Counter()
        for question in ask(scene, np.random.default_rng([seed, 1])):
            taken[question.kind] += 1
            if taken[question.kind] <= _PER_SCENE[question.kind]:
                drawn = question.points
                picture = draw_points(scene.image, drawn, question.letters) if drawn else scene.image
                items.append(Item(scene, question, picture))
    return items


def answer_items(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    items: Sequence[Item],
    *,
    batch_size: int = 32,
    progress: Callable[[Iterable], Iterable] = iter,
    **generate: object,
) -> "list[SpatialAnswer]":
    """Greedy answers, in the order of `items`; `generate` goes to `model.generate` (spatial, say)."""
    answers = []
    for start in progress(range(0, len(items), batch_size)):
        inputs = encode_items(processor, items[start : start + batch_size]).to(model.device)
        out = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **generate)
        answers += processor.post_process_spatial(out)
    return answers


def encode_items(processor: "PerceptioProcessor", items: Sequence[Item]) -> "BatchFeature":
    """The questions with their pictures as inputs of `model.generate`."""
    from PIL import Image

    pictures = [Image.fromarray(item.picture) for item in items]
    return encode_questions(processor, pictures, [item.question.text for item in items])


def score_items(items: Sequence[Item], answers: "Sequence[SpatialAnswer]") -> dict[str, float]:
    """Scores of all kinds of questions.

    Returns:
        absrel, delta1: of generated depth against the scene's distances (see `depth_metrics`), means over questions
            of kind "depth"; an answer without depth counts as AbsRel 1 and delta 0.
        miou, ciou: of the first mask of referring questions, mean of IoU and summed intersection over summed union.
        KIND, KIND_majority, KIND_n: share of right answers in words, what always giving the most frequent answer to
            questions with the same choices would score, and the number of questions.
        lowest_rule: on closest_point, what "the lowest point is the nearest" scores; closest_point_chance: 1 / points.
        well_formed: share of answers without a broken span.
    """
    by_kind: dict[str, list[tuple[Item, SpatialAnswer]]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        by_kind[item.question.kind].append((item, answer))
    scores = {"well_formed": float(np.mean([answer.well_formed for answer in answers]))}
    scores |= _score_depth(by_kind["depth"]) | _score_masks(by_kind["refer"])
    for kind in ("count", "attribute", "closer_object", "closest_point"):
        scores |= _score_words(kind, by_kind[kind])
    points = [item.question for item, _ in by_kind["closest_point"]]
    if points:
        lowest = [question.letters[int(np.argmax([y for _, y in question.points]))] for question in points]
        scores["lowest_rule"] = float(np.mean([low == q.answer for low, q in zip(lowest, points, strict=True)]))
        scores["closest_point_chance"] = float(np.mean([1 / len(question.points) for question in points]))
    return scores


def _score_depth(pairs: "list[tuple[Item, SpatialAnswer]]") -> dict[str, float]:
    if not pairs:
        return {}
    missing = {"absrel": 1.0, "delta1": 0.0}
    figures = [
        missing if answer.depth is None else depth_metrics(answer.depth, item.scene.depth) for item, answer in pairs
    ]
    return {name: float(np.mean([figure[name] for figure in figures])) for name in missing} | {"depth_n": len(pairs)}


def _score_masks(pairs: "list[tuple[Item, SpatialAnswer]]") -> dict[str, float]:
    if not pairs:
        return {}
    overlaps, unions = [], []
    for item, answer in pairs:
        true = item.scene.instances == item.question.targets[0]
        mask = answer.masks[0] if len(answer.masks) else np.zeros_like(true)
        overlaps.append(int((mask & true).sum()))
        unions.append(int((mask | true).sum()))
    ious = np.array(overlaps) / np.array(unions)
    return {"miou": float(ious.mean()), "ciou": sum(overlaps) / sum(unions), "refer_n": len(pairs)}


def _score_words(kind: str, pairs: "list[tuple[Item, SpatialAnswer]]") -> dict[str, float]:
    if not pairs:
        return {}
    right = [conclusion(answer.text).lower() == item.question.answer.lower() for item, answer in pairs]
    groups: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for question in (item.question for item, _ in pairs):
        if kind == "closer_object":  # its choices are the phrases of the question: what may be frequent is their place
            groups[()][str(question.choices.index(question.answer))] += 1
        else:
            groups[question.choices][question.answer] += 1
    majority = sum(max(counts.values()) for counts in groups.values()) / len(pairs)
    return {kind: float(np.mean(right)), f"{kind}_majority": majority, f"{kind}_n": len(pairs)}
