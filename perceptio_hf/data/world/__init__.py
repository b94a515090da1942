"""A rendered world to learn from: pictures with exact depth and masks, and questions whose answers are known.

    scene = render_scene(7)                                   # the same number and size give the same bytes
    questions = ask(scene, numpy.random.default_rng(7))
    picture = draw_points(scene.image, points, letters)       # as HardBLINK marks points
"""

from perceptio_hf.data.world.points import draw_points
from perceptio_hf.data.world.questions import QUESTION_KINDS, Question, ask, text_corpus
from perceptio_hf.data.world.render import render_scene
from perceptio_hf.data.world.scene import Scene, SceneObject

__all__ = [
    "QUESTION_KINDS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "draw_points",
    "render_scene",
    "text_corpus",
]
