"""Rendered scenes that no training saw, with questions, for people without a picture at hand."""

import io
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from perceptio_hf.world import DEMO_SEED, render_scene

from .assistant import CLOSEST, Point

_SIZE, _THUMBNAIL = 512, 144  # pixels


@dataclass(frozen=True)
class Example:
    """A scene by its number behind `DEMO_SEED`, and what is asked about it."""

    scene: int
    question: str
    spatial: str
    points: tuple[Point, ...] = ()

    def render(self) -> Image.Image:
        """The scene as people see it."""
        return Image.fromarray(render_scene(DEMO_SEED + self.scene, _SIZE).image)


EXAMPLES = (
    Example(5032, "Show me the yellow object.", "seg+depth"),
    Example(5004, CLOSEST, "depth", ((326, 138), (342, 302), (214, 250))),
    Example(5037, "Segment the white object.", "seg+depth"),
    Example(5006, CLOSEST, "depth", ((206, 282), (210, 202), (378, 406), (134, 294))),
    Example(5009, "Show me the blue object.", "seg+depth"),
    Example(5019, "How many objects are there?", "none"),
)


def write_examples(folder: Path) -> list[dict]:
    """Render all into `folder` -> for each what the page shows: `path`, `question`, and `url` of a small picture."""
    shown = []
    for number, example in enumerate(EXAMPLES):
        picture, path = example.render(), folder / f"scene-{number + 1}.png"
        picture.save(path)
        small, data = picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS), io.BytesIO()
        small.save(data, "JPEG", quality=88)
        url = f"data:image/jpeg;base64,{b64encode(data.getvalue()).decode()}"
        shown.append({"path": str(path), "question": example.question, "url": url})
    return shown
