"""Small benchmarks of noise pictures, for tests of what runs over any benchmark."""

import numpy as np
from helpers import picture

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.evaluation.benchmarks import Benchmark, DepthSource, PictureSource, Sample

LETTERS = ["A", "B", "C"]


def source(index: int) -> PictureSource:
    """A picture of its own size and noise."""
    width, height = 40 + 3 * index, 36 + 5 * (index % 3)
    return PictureSource(f"set/{index}.png", lambda: np.asarray(picture(width, height, seed=index)))


def true_depth(index: int) -> DepthMap:
    """A slope that leans another way in every picture."""
    rows, columns = np.mgrid[:20, :24]
    return DepthMap.from_metric(1.0 + rows * (1 + index % 3) / 10 + columns * (index % 5) / 10)


def points(count: int = 7) -> Benchmark:
    """Questions with three choices, of different lengths."""
    samples = [
        Sample(
            f"points {index}",
            source(index),
            f"Which is closer, {'the red ball or ' * (index % 4)}the blue box?",
            {"answer": LETTERS[index % 3], "choices": LETTERS, "points": 3},
            DepthSource(f"{index}", lambda index=index: true_depth(index)),
        )
        for index in range(count)
    ]
    return Benchmark("world-closest", "relative_depth", "depth", "{question}", "all", samples)


def masks(count: int = 5) -> Benchmark:
    """Every picture's upper left quarter; the last expression refers to nothing."""
    samples = []
    for index in range(count):
        size = np.asarray(source(index).open()).shape[:2]
        mask = np.zeros(size, bool)
        mask[: size[0] // 2, : size[1] // 2] = True
        none = index == count - 1
        target = {"masks": [] if none else [encode_mask(mask)], "no_target": none, "size": list(size)}
        samples.append(Sample(f"masks {index}", source(index), f"Segment number {index}.", target))
    return Benchmark("world-refer", "referring_segmentation", "seg", "{question}", "all", samples)


def depths(count: int = 3) -> Benchmark:
    """Pictures with a slope for depth."""
    samples = [
        Sample(
            f"depth {index}",
            source(index),
            "How deep?",
            {"depth": None},
            DepthSource(f"{index}", lambda index=index: true_depth(index)),
        )
        for index in range(count)
    ]
    return Benchmark("world-depth", "depth", "depth", "{question}", "all", samples)


def choices(count: int = 9) -> Benchmark:
    """Three questions, each with its choices in all three rotations."""
    texts = ["red", "green", "blue"]
    samples = []
    for index in range(count):
        turn = index // 3
        target = {
            "answer": LETTERS[(index % 3 - turn) % 3],
            "choices": LETTERS,
            "texts": texts[turn:] + texts[:turn],
            "category": "colour",
            "l2_category": "attributes",
            "index": index % 3 + 1_000_000 * turn,
            "group": index % 3,
        }
        samples.append(Sample(f"choices {index}", source(index), "Which colour?", target))
    return Benchmark("mmbench", "multiple_choice", "none", "{question}", "all", samples)
