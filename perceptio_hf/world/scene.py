"""What the rendered world is made of: the vocabulary of its objects and the records that describe a picture."""

from dataclasses import dataclass

import numpy as np

SHAPES = ("ball", "box", "cylinder", "cone")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
MATERIALS = ("matte", "shiny")
ATTRIBUTES = {
    "size": SIZES,
    "material": MATERIALS,
    "color": COLORS,
    "shape": SHAPES,
}  # in the order of English adjectives

SURFACES = ("ground", "back wall", "left wall", "right wall", "platform")

MIN_SIZE = 32

# Seeds below the first are for training, those from it on for evaluation, those from the second on for demonstrations.
HELD_OUT_SEED = 1_000_000_000
DEMO_SEED = 2_000_000_000


@dataclass(frozen=True)
class SceneObject:
    """One visible object of a picture. Distances are metres, positions are pixels of the picture.

    `box` is (x0, y0, x1, y1) with x1 and y1 exclusive; `center` is the visible pixel (x, y) nearest to the mean of them
    all; `depth` is the median z-depth of the visible pixels.
    """

    shape: str
    color: str
    size: str
    material: str
    pixels: int
    depth: float
    box: tuple[int, int, int, int]
    center: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """A rendered picture with everything that is known about it.

    `image` uint8 (size, size, 3); `depth` float32 (size, size), metric z-depth in metres along the optical axis, finite
    everywhere; `instances` uint8 (size, size), 0 = background and k = `objects[k - 1]`; `surfaces` uint8 (size, size),
    what the background is there or would be behind an object, an index into `SURFACES`.
    """

    seed: int
    image: np.ndarray
    depth: np.ndarray
    instances: np.ndarray
    surfaces: np.ndarray
    objects: list[SceneObject]

    @property
    def size(self) -> int:
        """Width and height of the picture in pixels."""
        return self.image.shape[0]

    def mask(self, instance: int) -> np.ndarray:
        """Bool (size, size), true where object number `instance` (from 1) is visible."""
        if not 1 <= instance <= len(self.objects):
            raise ValueError(f"there is no object {instance}: this scene has objects 1 to {len(self.objects)}")
        return self.instances == instance
