"""What every benchmark is read into: samples, each one picture with one question and what a right answer is.

Listing a benchmark decodes no picture: pictures and depth maps are sources, opened when their sample's turn comes.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from perceptio_hf.data.depth_maps import DepthMap, read_depth
from perceptio_hf.data.encoded import open_encoded
from perceptio_hf.processing.pictures import load_picture

Task = Literal["referring_segmentation", "relative_depth", "multiple_choice", "depth"]
Spatial = Literal["auto", "none", "seg", "depth", "seg+depth"]

_ORIENTATION = 0x0112  # EXIF tag; values above 4 exchange width and height


@dataclass(frozen=True, eq=False)
class PictureSource:
    """Where a picture comes from.

    Args:
        name: for messages and for the data hash: what tells it from others, such as a file's name or a table's row.
        content: a path, the bytes of a picture file, or a function without arguments that gives either, or a picture
            or an array uint8 (H, W, 3).
    """

    name: str
    content: Path | bytes | Callable[[], Any]

    def open(self) -> Image.Image:
        """The picture, RGB and upright.

        Raises:
            ValueError: naming a picture that cannot be read.
        """
        content = self.content() if callable(self.content) else self.content
        try:
            return load_picture(open_encoded(content))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture, of a file read from its header.

        Raises:
            ValueError: naming a picture whose header cannot be read.
        """
        return self.header()[0]

    def header(self) -> tuple[tuple[int, int], int]:
        """`size`, and by which of EXIF's orientations the picture as it is stored was turned for that; 1: not at all.
        Errors as `size`."""
        content = self.content() if callable(self.content) else self.content
        if not isinstance(content, (bytes, str, os.PathLike)):
            return load_picture(open_encoded(content)).size, 1
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
                turned = picture.getexif().get(_ORIENTATION, 1)
                return ((picture.height, picture.width) if turned > 4 else picture.size), turned
        except Exception as error:  # Pillow's readers raise many kinds
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"the picture {self.name} cannot be read ({reason}); copy it again.") from None

    def signature(self) -> str:
        """What the data hash says of it: name and size of a file, a digest of bytes, the name of anything else."""
        if isinstance(self.content, bytes):
            return f"{self.name} {hashlib.sha256(self.content).hexdigest()}"
        return _signature(self.name, self.content)


@dataclass(frozen=True, eq=False)
class DepthSource:
    """Where a sample's true depth comes from.

    Args:
        name: as in `PictureSource`.
        content: a .png, .tif, .npy or .npz file, or a function without arguments that gives the depth map.
        unit: of a file: "mm", "m", "m/256", "disparity" or "relative" (see `perceptio_hf.data.depth_maps`).
        most: metres beyond which a reading counts as none; None: all count.
    """

    name: str
    content: Path | Callable[[], DepthMap]
    unit: str = "m"
    most: float | None = None

    def open(self) -> DepthMap:
        """The depth map.

        Raises:
            ValueError: naming a file that cannot be read, or has no reading within `most`.
        """
        found = self.content() if callable(self.content) else read_depth(self.content, self.unit)
        if self.most is None:
            return found
        try:
            return DepthMap.from_metric(found.metric, found.valid & (found.metric <= self.most))
        except ValueError as error:
            raise ValueError(f"{self.name}, up to {self.most:g} m: {error}") from None

    def signature(self) -> str:
        most = "" if self.most is None else f" up to {self.most:g}"
        return f"{_signature(self.name, self.content)} {self.unit}{most}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about one picture.

    Args:
        id: tells it from all other samples of its benchmark, and is the same each time the benchmark is read.
        picture: the picture.
        question: the whole prompt in words.
        target: what is right, of types that JSON has. By task of the benchmark:
            referring_segmentation: "masks", COCO run lengths at the size of the upright picture, as many as the
                expression refers to; "no_target", whether there are none; "size", [height, width] of the picture.
            relative_depth: "answer", the letter of the nearest point; "choices", all letters; "points", how many.
            multiple_choice: "answer", a letter; "choices", the letters that are listed; "texts", what A, B, ... stand
                for, "" for one that is not listed; "category",
                "l2_category", or None; "index", the number of the row in the published table, or None; "group", what
                rotated rows of one question share.
            depth: "depth", the depth map's path in the benchmark's folder, or None where it is rendered.
        depth: the true depth of the picture, where it is known.
    """

    id: str
    picture: PictureSource
    question: str
    target: dict[str, Any]
    depth: DepthSource | None = None


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Samples of one kind, in a fixed order.

    Args:
        name: one of `BENCHMARKS`.
        task: what its answers are: masks, the letter of a point, the letter of a choice, or depth.
        spatial: which spatial tokens are to be generated unless the user says otherwise.
        prompt: the wording that `question` was made with (see `prompts`).
        split: which part of the published data this is.
        samples: at least one.
        notes: what was left out and why, one line each.
    """

    name: str
    task: Task
    spatial: Spatial
    prompt: str
    split: str
    samples: list[Sample]
    notes: tuple[str, ...] = ()
    data_hash: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "data_hash", hash_samples(self.samples))


def hash_samples(samples: Iterable[Sample]) -> str:
    """SHA-256 over ids, questions, targets and the signatures of pictures and depth maps, in order.

    Files count by name and size, not by content: reading every picture would take longer than the hash is worth.
    """
    digest = hashlib.sha256()
    for sample in samples:
        depth = sample.depth.signature() if sample.depth else None
        row = [sample.id, sample.question, sample.target, sample.picture.signature(), depth]
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _signature(name: str, content: Any) -> str:
    return f"{name} {content.stat().st_size}" if isinstance(content, Path) else name
