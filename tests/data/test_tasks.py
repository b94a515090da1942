"""The tasks of a recipe: their sources, and which part of them is taken."""

from pathlib import Path

import numpy as np
import pytest
from helpers import picture

from perceptio_hf.data.tasks import load_tasks


@pytest.fixture
def rooms(tmp_path) -> Path:
    """A folder of ten pictures with depth in millimetres."""
    folder = tmp_path / "rooms"
    folder.mkdir()
    for number in range(10):
        picture(seed=number).save(folder / f"{number}.color.jpg")
        depth = np.random.default_rng(number).integers(500, 4000, (40, 48)).astype(np.uint16)
        np.save(folder / f"{number}.depth.npy", depth)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"take_every": 11}, r"Task 1 \(rooms\): take_every is 11; expected a whole number from 2 to 10"),
        (
            {"take_every": 5, "leave_out_every": 5},
            r"Task 1 \(rooms\): take_every and leave_out_every are for one of two",
        ),
        ({"variants": 0}, r"Task 1 \(rooms\): variants is 0; expected a whole number of 1 or more"),
        ({"take_evry": 5}, r"Task 1 \(rooms\): unknown key 'take_evry'; did you mean take_every"),
    ],
)
def test_a_part_or_variants_that_cannot_be_are_said(rooms, changes, message):
    task = {"depth_folder": str(rooms), "unit": "mm", "depths": "*.depth.npy"}
    with pytest.raises(ValueError, match=message):
        load_tasks([task | changes])


def test_parts_are_taken_before_variants_are_made(rooms):
    task = {"depth_folder": "rooms", "unit": "mm", "depths": "*.depth.npy", "take_every": 5, "variants": 3}
    datasets, _ = load_tasks([task], str(rooms.parent))
    assert [name.partition(",")[0] for name in datasets["rooms"]["id"]] == ["4", "9", "4", "4", "4", "9", "9", "9"]
