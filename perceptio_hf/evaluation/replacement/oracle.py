"""The codes of true depth, for the Token Replacement Test: from the benchmark, a folder of depth maps or a teacher."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from perceptio_hf.data.depth_maps import SUFFIXES, UNITS, DepthMap, depth_from_values, read_depth
from perceptio_hf.evaluation.benchmarks.sample import Sample
from perceptio_hf.files import expanded
from perceptio_hf.labelling.teacher import Teacher, teacher_info

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE

DepthOf = Callable[[Sample], DepthMap]


def open_oracle(name: str | None, unit: str | None, samples: list[Sample], device: str) -> DepthOf:
    """Where the true depth of samples comes from.

    Args:
        name: a folder of depth maps, named as the pictures are; the folder or Hub name of a depth estimation model, the
            teacher; None for the depth that comes with the benchmark.
        unit: of the folder's maps, or of a teacher that does not say it (see `perceptio_hf.data.depth_maps`).
        samples: that depth will be asked for.
        device: where the teacher goes.

    Raises:
        ValueError: for depth that is missing, or a name that is neither.
    """
    if name is None:
        lacking = lacks_depth(samples)
        if lacking is not None:
            raise ValueError(f"The replacement `oracle` cannot be had: {lacking}")
        return lambda sample: _upright(sample.depth.open(), sample)
    folder = expanded(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return _folder_oracle(folder, unit, samples)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--oracle {name} is a file; name a folder of depth maps or a depth estimation model.")
    return _teacher_oracle(name, unit, device)


def lacks_depth(samples: list[Sample]) -> str | None:
    """Why the benchmark itself cannot serve as the oracle, None where it can."""
    lacking = next((sample.id for sample in samples if sample.depth is None), None)
    if lacking is None:
        return None
    return f"no true depth of {lacking} is known; name a folder of depth maps or a teacher with --oracle."


def encode_oracle(codec: "DepthVQVAE", depth: DepthMap) -> list[int]:
    """The N codes of a depth map, in raster order."""
    relative, valid = (torch.from_numpy(array).to(codec.device) for array in (depth.relative, depth.valid))
    with torch.no_grad():
        return codec.encode(relative, valid).flatten().tolist()


def _folder_oracle(folder: Path, unit: str | None, samples: list[Sample]) -> DepthOf:
    if unit not in UNITS:
        raise ValueError(f"--oracle {folder} needs --oracle-unit, what its values are: {', '.join(UNITS)}.")
    names = {sample.picture.name for sample in samples}
    shared = Counter(Path(name).stem for name in names)
    paths = {
        sample.id: _depth_path(folder, sample, alone=shared[Path(sample.picture.name).stem] == 1) for sample in samples
    }
    return lambda sample: _upright(read_depth(paths[sample.id], unit), sample)


def _upright(depth: DepthMap, sample: Sample) -> DepthMap:
    depth.check_orientation(sample.picture.size())
    return depth


def _depth_path(folder: Path, sample: Sample, *, alone: bool) -> Path:
    """FOLDER/SET/NAME.png (or .tif, .npy, .npz) for a picture SET/NAME.jpg, FOLDER/NAME.png where no two pictures share
    NAME, or FOLDER/ID.png."""
    picture = Path(sample.picture.name)
    stems = [folder / picture.parent.name / picture.stem] + [folder / picture.stem] * alone + [folder / sample.id]
    places = list(dict.fromkeys(stem.with_name(stem.name + suffix) for stem in stems for suffix in SUFFIXES))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"There is no depth map of {sample.id}; looked for {', '.join(map(str, places))}.")
    return found


def _teacher_oracle(name: str, unit: str | None, device: str) -> DepthOf:
    teacher = Teacher(teacher_info(name, unit, option="--oracle"), device, option="--oracle")

    def estimate(sample: Sample) -> DepthMap:
        picture = sample.picture.open()
        seen = teacher.look(teacher.prepare(picture), [(picture.height, picture.width)])[0]
        return depth_from_values(seen.numpy(), teacher.info.unit)

    return estimate
