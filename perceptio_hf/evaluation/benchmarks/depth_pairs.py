"""Depth estimation on a folder of pictures with measured depth beside them."""

from collections.abc import Iterator

from perceptio_hf.data.depth_maps import UNITS
from perceptio_hf.data.sources import paired_files
from perceptio_hf.world.questions import DEPTH_QUESTIONS

from .prompts import ask
from .reading import Request
from .registration import Prompt, benchmark
from .sample import DepthSource, PictureSource, Sample

_PICTURES, _DEPTHS = "*.color.jpg", "*.depth.png"


@benchmark(
    "depth",
    "Depth estimation on pictures with depth maps beside them",
    files="a folder of pictures and depth maps, with --unit",
    prompt=Prompt(DEPTH_QUESTIONS[0], "ours: the rendered world's first question of this kind"),
    hub=("depth-pairs", "Pictures with depth maps"),
    task="depth",
    spatial="depth",
)
def read_depth_pairs(request: Request) -> Iterator[Sample]:
    """One sample for each picture with a depth map, in order of the names that they share.

    Raises:
        ValueError: for a missing or unknown unit, one without distances beside `max_depth`, patterns without exactly
            one `*`, no pair, or a file without its partner.
    """
    if request.unit not in UNITS:
        raise ValueError(f"--unit says what the depth maps hold: {', '.join(UNITS)}; not {request.unit!r}.")
    if request.max_depth is not None and request.unit in ("disparity", "relative"):
        raise ValueError(f"--max-depth is in metres, and --unit {request.unit} has no distances; leave it out.")
    if not request.path.is_dir():
        raise ValueError(f"{request.path} is a file; name the folder of the pictures and depth maps.")
    pairs = paired_files(request.path, request.pictures or _PICTURES, request.depths or _DEPTHS)
    for name, (picture, depth) in pairs.items():
        source = DepthSource(depth.name, depth, request.unit, request.max_depth)
        target = {"depth": depth.relative_to(request.path).as_posix()}
        yield Sample(name, PictureSource(picture.name, picture), ask(request.name), target, source)
