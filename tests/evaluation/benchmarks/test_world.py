"""Rendered benchmarks: answers are checked against the scenes themselves."""

import re

import numpy as np
import pytest

from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.evaluation.benchmarks import open_benchmark
from perceptio_hf.evaluation.metrics.answer_parsing import answer_choice
from perceptio_hf.world import HELD_OUT_SEED, render_scene


def scene_of(sample):
    scene = render_scene(int(re.match(r"scene (\d+)", sample.id)[1]))
    assert scene.seed >= HELD_OUT_SEED
    return scene


def test_referring():
    samples = open_benchmark("world-refer", limit=12).samples
    assert len(samples) == 12
    for sample in samples:
        scene = scene_of(sample)
        (mask,) = map(decode_mask, sample.target["masks"])
        (instance,) = np.unique(scene.instances[mask])
        assert instance > 0 and (mask == (scene.instances == instance)).all()
        assert (np.asarray(sample.picture.open()) == scene.image).all() and sample.target["size"] == [128, 128]


@pytest.mark.slow
def test_closest_points():
    samples = open_benchmark("world-closest", limit=11).samples
    assert [sample.target["points"] for sample in samples] == [3, 4, 5] * 3 + [3, 4]
    for sample in samples:
        scene, picture = scene_of(sample), np.asarray(sample.picture.open())
        marks = dict(re.findall(r"([A-E]) (\d+,\d+)", sample.picture.name))
        depths = {letter: scene.depth[tuple(map(int, place.split(",")))[::-1]] for letter, place in marks.items()}
        assert list(depths) == sample.target["choices"] and len(depths) == sample.target["points"]
        assert sample.target["answer"] == min(depths, key=depths.get)
        assert (picture != scene.image).any()
        assert all(letter in sample.question for letter in depths)


def test_plain_questions():
    samples = open_benchmark("world-plain", limit=20).samples
    assert {sample.target["category"] for sample in samples} == {"count", "attribute"}
    for sample in samples:
        target = sample.target
        right = target["texts"][target["choices"].index(target["answer"])]
        assert answer_choice(f"{right}.", target["texts"]) == target["answer"]
        scene = scene_of(sample)
        if sample.question == "How many things are there?":
            assert int(right) == len(scene.objects)
        if re.fullmatch(r"What color is the (\w+)\?", sample.question):
            assert right in {thing.color for thing in scene.objects if thing.shape in sample.question}


def test_depth():
    samples = open_benchmark("world-depth", limit=3).samples
    for sample in samples:
        assert np.abs(sample.depth.open().metric - scene_of(sample).depth).max() < 1e-5
        assert sample.target == {"depth": None}


def test_how_many():
    assert len(open_benchmark("world-depth").samples) == 200
    few, more = open_benchmark("world-refer", limit=3), open_benchmark("world-refer", limit=5)
    assert [sample.id for sample in few.samples] == [sample.id for sample in more.samples[:3]]
