"""The sheet of best, worst and random cases."""

import benchmark_helpers
import numpy as np
import pytest

from perceptio_hf.evaluation.report.case_sheet import choose_cases, draw_cases
from perceptio_hf.evaluation.run.runner import RunSettings, run_benchmark


def records(scores) -> list[dict]:
    return [{"id": str(index), "score": score} for index, score in enumerate(scores)]


def test_groups_are_best_worst_and_others_and_share_nobody():
    cases = choose_cases(records(np.linspace(0, 1, 20)), 4)
    ids = {name: [int(record["id"]) for record in group] for name, group in cases.items()}
    assert ids["best"] == [19, 18, 17, 16] and ids["worst"] == [0, 1, 2, 3]
    assert len(ids["random"]) == 4 and not set(ids["random"]) & {*ids["best"], *ids["worst"]}
    assert choose_cases(records(np.linspace(0, 1, 20)), 4) == cases, "the same records give the same sheet"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_few_records_are_shared_out(count):
    cases = choose_cases(records([0.5] * count), 4)
    ids = [record["id"] for group in cases.values() for record in group]
    assert len(ids) == len(set(ids)) <= count and cases["best"]
    assert len(cases["best"]) >= len(cases["worst"]) >= len(cases["random"]) >= (count == 3)


@pytest.mark.parametrize("kind", ["points", "masks", "depths", "choices"])
def test_every_kind_of_benchmark_can_be_drawn(model, processor, tmp_path, kind):
    benchmark = getattr(benchmark_helpers, kind)()
    settings = RunSettings(benchmark.spatial, 24)
    run = run_benchmark(model, processor, benchmark, tmp_path, settings, weights="w")
    samples = {sample.id: sample for sample in benchmark.samples}
    cases = choose_cases(run.records, 1)
    drawn = draw_cases(benchmark.task, cases, samples, model.depth_model)
    assert drawn.mode == "RGB" and drawn.width > 3 * 700
    pixels = np.asarray(drawn)
    third = drawn.width // 3
    for column in range(3):  # a picture stands in every column
        part = pixels[60:260, column * third + 20 : (column + 1) * third - 20]
        assert part.std() > 20
    best = draw_cases(benchmark.task, {"best": cases["best"], "worst": []}, samples, model.depth_model)
    assert best.width < drawn.width / 2


def test_the_models_mask_and_the_true_one_are_in_their_panels(model, processor, tmp_path):
    """The true mask is the upper left quarter: only there does the last panel differ from the picture."""
    benchmark = benchmark_helpers.masks(2)
    run = run_benchmark(model, processor, benchmark, tmp_path, RunSettings("seg", 24), weights="w")
    record = run.records[0]
    samples = {sample.id: sample for sample in benchmark.samples}
    drawn = np.asarray(draw_cases("referring_segmentation", {"best": [record]}, samples, model.depth_model)).astype(int)
    picture, found, true = (drawn[80:200, left : left + 165] for left in (32, 387, 742))  # upper left quarters
    assert np.abs(true - picture).mean() > 15, "tinted all over"
    assert (np.abs(found - picture).max(-1) > 15).any(), "the model's own mask is somewhere"
