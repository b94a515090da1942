"""Photographs of streets as samples, and the recipes that the comparisons run."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceptio_hf import tiny_checkpoint
from perceptio_hf.data.samples import load_sample
from perceptio_hf.data.sources import load_samples
from perceptio_hf.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def streets():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import streets

        yield streets
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two photographs: sky above road, and in the second one a car, and a tree of one pixel."""
    folder = tmp_path_factory.mktemp("camvid") / "train"
    folder.mkdir()
    for number in range(2):
        labels = np.zeros((30, 40), dtype=np.uint8)
        labels[15:] = 3
        if number:
            labels[20:28, 5:15], labels[0, 0] = 8, 5
        Image.fromarray(labels).save(folder / f"{number}.label.png")
        Image.fromarray(np.full((30, 40, 3), 90 * number, dtype=np.uint8)).save(folder / f"{number}.jpg")
    return folder


def test_each_picture_is_one_conversation_about_its_classes(streets, folder, tmp_path):
    samples = load_samples(streets.write_streets(folder, tmp_path / "samples"))
    assert len(samples) == 2
    texts = [[part["content"][0]["text"] for part in row["messages"]] for row in samples]
    assert sorted(texts[0][::2]) == ["Please segment the road.", "Please segment the sky."]
    assert sorted(texts[1][::2]) == [
        "Please segment the cars.",
        "Please segment the road.",
        "Please segment the sky.",
    ]
    loaded = load_sample(samples[1], num_depth_tokens=64, num_depth_codes=128)
    areas = {"the road": 15 * 40 - 80, "the sky": 15 * 40 - 1, "the cars": 80}
    for question, answer, mask in zip(texts[1][::2], texts[1][1::2], loaded.masks, strict=True):
        name = question.removeprefix("Please segment ").removesuffix(".")
        assert answer in (f"[SEG] Here is {name}.", f"[SEG] Here are {name}.") and mask.sum() == areas[name]


def test_depth_of_streets_is_read_off_their_labels(streets, folder, tmp_path):
    """Road from row 10 to 20, sky above; a building to row 15, a car down to the edge, a tree above the horizon."""
    classes = np.zeros((21, 4), dtype=np.uint8)
    classes[10:] = 3
    classes[2:15, 1], classes[12:, 2], classes[4:8, 3] = 1, 8, 5
    depth = streets.depth_of_labels(classes)
    assert np.allclose(depth[:, 0], [0] * 10 + [step / 10 for step in range(11)])
    assert np.allclose(depth[2:15, 1], 0.5) and np.allclose(depth[12:, 2], 1) and np.allclose(depth[4:8, 3], 0)
    rows = load_samples(streets.write_streets(folder, tmp_path / "samples", depth=True))
    assert len(rows) == 2 and {row["depth_unit"] for row in rows} == {"disparity"}
    for row in rows:
        question, answer = (message["content"][-1]["text"] for message in row["messages"])
        name = question.removeprefix("Please segment ").removesuffix(".")
        is_are = "are" if name.endswith("s") else "is"
        assert answer == f"[SEG]<DEPTH_START><DEPTH_END>Here {is_are} {name}." and len(row["masks"]) == 1


def test_figures_are_means_over_pictures_then_over_classes(streets, folder):
    seen = streets.read_streets(folder)
    right = [dict(street.masks) for street in seen]
    assert streets.mask_figures(right, seen) == {"mean": 1.0, "road": 1.0, "sky": 1.0, "cars": 1.0}
    right[0][3] = ~right[0][3]
    assert streets.mask_figures(right, seen) == {
        "mean": pytest.approx(2.5 / 3, abs=1e-4),
        "road": 0.5,
        "sky": 1,
        "cars": 1,
    }
    usual = streets.usual_places([*seen, seen[0]], (30, 40))
    assert set(usual) == {3, 0, 8} and usual[3].sum() == 15 * 40 and usual[8].sum() == 80


def test_masks_are_asked_for_one_by_one(streets, folder):
    from transformers import AutoModel, AutoProcessor

    model, processor = (
        AutoModel.from_pretrained(tiny_checkpoint()).eval(),
        AutoProcessor.from_pretrained(tiny_checkpoint()),
    )
    seen = streets.read_streets(folder)
    drawn = streets.predict_masks(model, processor, seen, batch=4)
    assert [set(masks) for masks in drawn] == [{3, 0}, {3, 0, 8}]
    assert all(mask.shape == (30, 40) and mask.dtype == bool for masks in drawn for mask in masks.values())
    alone = streets.predict_masks(model, processor, seen[1:], batch=1)[0]
    assert all((alone[number] == mask).mean() > 0.99 for number, mask in drawn[1].items())


@pytest.mark.parametrize("name", ["street_masks", "photographs"])
def test_recipes_can_be_read(name):
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.settings.seg_projector_start and recipe.settings.mask_rates()
