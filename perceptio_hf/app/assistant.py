"""Questions about a picture, and about points marked on it, for a page that shows the answer while it is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from perceptio_hf.evaluation.run.answering import encode_questions
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.modeling.span_grammar import SPATIAL_MODES
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.processing.streaming import SpatialEvent, stream_answer
from perceptio_hf.world import draw_points

LETTERS = "ABCDEFGH"
CLOSEST = "Which of the circled points is the closest to the camera?"
_SMALLEST_MARKED = 32  # pixels; `draw_points` draws on nothing smaller
_MOST_ENLARGED = 10_000_000  # pixels of what is smaller, made large enough
_LONGEST_QUESTION = 2000  # characters

Point = tuple[float, float]  # (x, y) in pixels of the picture


@dataclass(frozen=True)
class Question:
    """What is asked: checked, so that the model need not refuse it.

    Args:
        picture: RGB.
        text: the question; empty with points: which of them is the closest.
        spatial: what is forced, one of `SPATIAL_MODES`.
        points: at most eight, lettered A, B, C ...

    Raises:
        ValueError: in one line, for whoever asks.
    """

    picture: Image.Image
    text: str = ""
    spatial: str = "auto"
    points: Sequence[Point] = ()

    def __post_init__(self) -> None:
        if self.spatial not in SPATIAL_MODES:
            raise ValueError(f"spatial is {self.spatial!r}; it must be one of {', '.join(SPATIAL_MODES)}.")
        if len(self.points) > len(LETTERS):
            raise ValueError(f"{len(self.points)} points came; at most {len(LETTERS)} have letters.")
        width, height = self.picture.size
        if not all(0 <= x < width and 0 <= y < height for x, y in self.points):
            raise ValueError(f"A point lies outside of the picture, which is {width} x {height} pixels.")
        factor = _enlarged(self.picture) if self.points else 1
        if factor > 1 and width * height * factor**2 > _MOST_ENLARGED:
            raise ValueError(f"The picture is too narrow for points: {width} x {height} pixels.")
        if not self.text.strip():
            if len(self.points) < 2:
                raise ValueError("The question is empty; ask something about the picture.")
            object.__setattr__(self, "text", CLOSEST)
        if len(self.text) > _LONGEST_QUESTION:
            raise ValueError(
                f"The question has {len(self.text):,} characters; at most {_LONGEST_QUESTION:,} are taken."
            )


class Assistant:
    """A model that answers one question at a time.

    Args:
        model, processor: a loaded Perceptio.
        name: what the page calls it.
        note: what people should know about it, if anything.
    """

    def __init__(
        self,
        model: PerceptioForConditionalGeneration,
        processor: PerceptioProcessor,
        name: str,
        note: str | None = None,
    ):
        self.model, self.processor, self.name, self.note = model, processor, name, note

    def ask(self, question: Question) -> Iterator[SpatialEvent]:
        """The answer bit by bit; the last event holds masks and depth at the picture's size."""
        seen = self._seen(question)
        inputs = encode_questions(self.processor, [seen], [question.text]).to(self.model.device)
        inputs["original_sizes"][:] = torch.tensor(question.picture.size[::-1])
        yield from stream_answer(self.model, self.processor, inputs, spatial=question.spatial, do_sample=False)

    def partial_depth(self, codes: Sequence[int]) -> np.ndarray:
        """The depth of a span of which only some rows are written, (S, S) in [0, 1]; the others repeat the last one."""
        rows = self.model.config.depth_config.grid_size
        grid = np.asarray(codes).reshape(-1, rows)
        whole = np.concatenate([grid, np.repeat(grid[-1:], rows - len(grid), axis=0)])
        with torch.no_grad():
            decoded = self.model.depth_model.decode(torch.from_numpy(whole.ravel())[None].to(self.model.device))
        return decoded[0].float().cpu().numpy()

    def _seen(self, question: Question) -> Image.Image:
        """The picture with its points. Where the model sees a single tile, they are drawn at its size, as they were in
        training, and not scaled with the picture."""
        picture = question.picture
        if not question.points:
            return picture
        size = picture.size
        tile = self.processor.image_processor.size
        if not self.processor.crop_to_patches and picture.width > tile["width"] and picture.height > tile["height"]:
            picture = picture.resize((tile["width"], tile["height"]), Image.Resampling.BICUBIC)
        return mark(picture, question.points, size)


def mark(picture: Image.Image, points: Sequence[Point], size: tuple[int, int]) -> Image.Image:
    """The picture with lettered circles at points given in pixels of a picture of `size` (width, height)."""
    if (factor := _enlarged(picture)) > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = np.array(picture.size) / size
    places = [tuple(((np.array(point) + 0.5) * scale).astype(int).tolist()) for point in points]
    return Image.fromarray(draw_points(np.array(picture.convert("RGB")), places, LETTERS[: len(places)]))


def _enlarged(picture: Image.Image) -> int:
    """How many times as large a picture becomes before points are drawn on it."""
    return max(1, -(-_SMALLEST_MARKED // min(picture.size)))
