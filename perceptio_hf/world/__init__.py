"""A rendered world to learn from: pictures with exact depth and masks, and questions whose answers are known.

`render_scene(7)` draws scene number 7, `ask(scene, rng)` asks about it, and `draw_points(scene.image, question.points,
question.letters)` marks points with letters as HardBLINK does.
"""

from .points import draw_points
from .questions import QUESTION_KINDS, Question, ask, refer_often, text_corpus
from .render import render_scene
from .scene import DEMO_SEED, HELD_OUT_SEED, Scene, SceneObject

__all__ = [
    "DEMO_SEED",
    "HELD_OUT_SEED",
    "QUESTION_KINDS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "draw_points",
    "refer_often",
    "render_scene",
    "text_corpus",
]
