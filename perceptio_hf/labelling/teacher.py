"""A depth teacher: any depth-estimation model of transformers, and the unit of what it says."""

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from perceptio_hf.data.depth_maps import UNITS

LONGEST = 1024  # pixels of a map's longer side; teachers see about half of that
# What architectures give that do not say it in their configuration. DPT's and others' do not say, and there are both.
_KNOWN_UNITS = {"glpn": "m", "zoedepth": "m", "depth_pro": "m"}
_OF_TYPE = {"relative": "disparity", "metric": "m"}


@dataclass(frozen=True)
class TeacherInfo:
    """What is known of a teacher without its weights.

    Args:
        name: its folder, or its name on the Hub.
        model_type: as transformers calls its architecture.
        unit: of its numbers: "disparity", "m", "mm", "m/256" or "relative" (see `perceptio_hf.data.depth_maps`).
    """

    name: str
    model_type: str
    unit: str


def teacher_info(name: str, unit: str | None = None, *, option: str = "--teacher") -> TeacherInfo:
    """Read a teacher's configuration.

    Args:
        unit: what the user says its numbers are.
        option: of the command that names the teacher, for what is said; the unit's has "-unit" behind it.

    Raises:
        ValueError: it cannot be found, is no depth-estimation model, does not say its unit, or says another.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES as KNOWN

    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{option} {name} has no config.json, so it is no saved model; name the folder that does.")
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # whatever transformers or the Hub raise
        reason = " ".join(str(error).split()).split(". ")[0]
        where = "" if os.path.isdir(name) else "it is no folder here, and the Hub does not give it. "
        raise ValueError(f"{option} {name} cannot be loaded: {where}{reason}") from None
    if config.model_type not in KNOWN:
        raise ValueError(
            f"{option} {name} is a {config.model_type!r} model, which says no depth; expected a depth-estimation "
            f"model of transformers: {', '.join(KNOWN)}."
        )
    own = _OF_TYPE.get(getattr(config, "depth_estimation_type", None)) or _KNOWN_UNITS.get(config.model_type)
    if unit is None and own is None:
        raise ValueError(
            f"{option} {name}: a {config.model_type!r} model does not say what its numbers are; give {option}-unit: "
            "disparity (larger = nearer, as MiDaS's), m (distance in metres), mm or relative."
        )
    if None not in (unit, own) and unit != own:
        raise ValueError(f"{option}-unit {unit}, but {name} says in its config.json that it gives {own}; leave it out.")
    assert (unit or own) in UNITS
    return TeacherInfo(name, config.model_type, unit or own)


class Teacher:
    """A depth-estimation model with its image processor, ready to look at pictures.

    Args:
        device: where it computes; default: the GPU where there is one.
        dtype: as torch names it, or "auto": as it was saved.
        option: see `teacher_info`.

    Raises:
        ValueError: its weights or image processor cannot be loaded.
    """

    def __init__(self, info: TeacherInfo, device: str | None = None, dtype: str = "auto", *, option: str = "--teacher"):
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        self.info = info
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model, found = AutoModelForDepthEstimation.from_pretrained(
                info.name, dtype=dtype, output_loading_info=True
            )
            self.processor = AutoImageProcessor.from_pretrained(info.name)
        except Exception as error:  # whatever transformers, safetensors or the Hub raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{option} {info.name} cannot be loaded: {reason}") from None
        if found["missing_keys"]:
            first = sorted(found["missing_keys"])[0]
            raise ValueError(f"{option} {info.name} lacks weights such as {first}; download it again.")
        self.model.eval().to(device)
        parameters = inspect.signature(self.processor.post_process_depth_estimation).parameters
        self._needs_source = "source_sizes" in parameters

    def prepare(self, picture: Image.Image) -> Tensor:
        """(1, 3, h, w) on the CPU: the picture as the teacher sees it. May be called from several threads.

        Raises:
            ValueError: for one so narrow or small that nothing of it is left at the teacher's size.
        """
        try:
            return self.processor(images=[picture], return_tensors="pt")["pixel_values"]
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"the teacher's image processor cannot take a picture of {picture.width} x {picture.height} "
                f"({' '.join(str(error).split())[:200]}); cut or enlarge it, or leave it out."
            ) from None

    @torch.inference_mode()
    def look(self, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The depth of several pictures at once.

        Args:
            pixels: (B, 3, h, w), of `prepare`.
            sizes: (height, width) of each picture.

        Returns:
            For each (H, W) float32 on the CPU, in the teacher's unit, of the size `map_size` says.
        """
        outputs = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        outputs["predicted_depth"] = outputs.predicted_depth.float()
        targets = [map_size(size) for size in sizes]
        options: dict[str, Any] = {"source_sizes": list(sizes)} if self._needs_source else {}
        found = self.processor.post_process_depth_estimation(outputs, target_sizes=targets, **options)
        # Image processors squeeze sides of one pixel away.
        depths = [entry["predicted_depth"].reshape(target) for entry, target in zip(found, targets, strict=True)]
        return [depth.float().cpu() for depth in depths]


def map_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the map of a picture of this size: the same, or with `LONGEST` as its longer side."""
    share = min(1.0, LONGEST / max(size))
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))
