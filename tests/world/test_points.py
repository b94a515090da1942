"""Marked points are drawn inside the picture, where they belong, and leave the picture they are drawn on alone."""

import numpy as np
import pytest

from perceptio_hf.world import ask, draw_points, render_scene

GREY = np.full((128, 128, 3), 90, np.uint8)


def test_input_is_not_altered():
    scene = render_scene(4)
    before = scene.image.copy()
    picture = draw_points(scene.image, [(40, 60), (90, 20)], "AB")
    assert np.array_equal(scene.image, before)
    assert picture.shape == before.shape and picture.dtype == np.uint8
    assert (picture != before).any()


def test_circles_are_red_and_open_and_labels_stand_beside():
    points = [(30, 40), (100, 90), (64, 20)]
    picture = draw_points(GREY, points, "ABC")
    for x, y in points:
        assert (picture[y, x] == 90).all()  # the pixel in question can still be seen
        assert (picture[y, x - 3] == (255, 0, 0)).all() and (picture[y + 3, x] == (255, 0, 0)).all()
        near = picture[max(y - 16, 0) : y + 17, max(x - 16, 0) : x + 17]
        assert (near == 255).all(-1).any() and (near == 0).all(-1).any()
    assert (picture != GREY).any(-1).mean() < 0.03


def test_letters_look_different():
    pictures = [draw_points(GREY, [(64, 64)], letter) for letter in "ABCDEFGH"]
    assert len({picture.tobytes() for picture in pictures}) == 8


@pytest.mark.parametrize("point", [(0, 0), (127, 0), (0, 127), (127, 127), (64, 3)])
def test_border_points_are_drawn_whole_enough(point):
    picture = draw_points(GREY, [point], "E")
    assert (picture == (255, 0, 0)).all(-1).any()
    assert (picture == 0).all(-1).sum() >= 30  # the label was moved inside


@pytest.mark.parametrize("size", [64, 128, 256, 448])
def test_marks_grow_with_the_picture(size):
    scene = render_scene(2, size)
    share = (draw_points(scene.image, [(size // 2, size // 2)], "A") != scene.image).any(-1).mean()
    assert 0.001 < share < 0.04


def test_questions_of_a_scene_can_be_drawn():
    for seed in range(20):
        scene = render_scene(seed)
        for question in ask(scene, np.random.default_rng(seed), ["closest_point"]):
            picture = draw_points(scene.image, question.points, question.letters)
            reds = (picture == (255, 0, 0)).all(-1)
            for x, y in question.points:
                assert reds[y - 3 : y + 4, x - 3 : x + 4].sum() >= 8


@pytest.mark.parametrize(
    ("image", "points", "letters", "message"),
    [
        (GREY.astype(np.float32), [(1, 1)], "A", "uint8"),
        (GREY[..., 0], [(1, 1)], "A", "uint8"),
        (GREY, [(1, 1)], "AB", "one letter"),
        (GREY, [(1, 1)], "?", "letters"),
        (GREY, [(128, 1)], "A", "outside"),
    ],
)
def test_wrong_arguments_are_explained(image, points, letters, message):
    with pytest.raises(ValueError, match=message):
        draw_points(image, points, letters)
