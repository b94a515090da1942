"""Fair questions: the answer is the nearest point by a margin, and no rule on places finds it."""

import numpy as np
import pytest

from perceptio_hf.world import HELD_OUT_SEED, render_scene
from perceptio_hf.world.cells import cell_at, cell_word, cell_words, nearness_words
from perceptio_hf.world.fair import FAIR_RATIO, fair_sets


@pytest.fixture(scope="module")
def sets():
    return fair_sets(3, 60, scenes=400)


def test_the_answer_is_the_nearest_by_a_margin(sets):
    assert len(sets) >= 60 and len({item.seed for item in sets}) == len(sets)
    for item in sets[:30]:
        assert item.seed >= HELD_OUT_SEED and item.letters == ("A", "B", "C")
        depth = render_scene(item.seed).depth
        near = dict(zip(item.letters, [float(depth[y, x]) for x, y in item.points], strict=True))
        best, second, _ = sorted(near.values())
        assert near[item.answer] == best and second >= FAIR_RATIO * best
        rows = {y // 16 for _, y in item.points}
        assert max(rows) - min(rows) <= 2


def test_given_the_places_every_answer_is_equally_frequent(sets):
    by_places: dict[frozenset, list] = {}
    for item in sets:
        by_places.setdefault(frozenset(item.points), []).append(item)
    for places, items in by_places.items():
        right = [dict(zip(item.letters, item.points, strict=True))[item.answer] for item in items]
        counts = [right.count(place) for place in places]
        assert len(set(counts)) == 1, counts


def test_rules_on_places_score_chance(sets):
    central = [
        item.letters[int(np.argmin([abs(x - 64) + abs(y - 64) + 1e-3 * x for x, y in item.points]))] for item in sets
    ]
    assert np.mean([guess == item.answer for guess, item in zip(central, sets, strict=True)]) == pytest.approx(1 / 3)


def test_the_same_seeds_give_the_same_sets(sets):
    assert fair_sets(3, 60, scenes=400) == sets


def test_too_few_scenes_are_said():
    with pytest.raises(ValueError, match="give more scenes"):
        fair_sets(5, 200, scenes=60)


def test_words_of_cells():
    assert cell_word(7) == "p07" and len(set(cell_words(10))) == 100 and len(set(nearness_words())) == 32
    with pytest.raises(ValueError, match="outside"):
        cell_at((128, 3), (128, 128), 8)
