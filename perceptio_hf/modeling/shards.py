"""What the index of a sharded checkpoint may name: files of its own folder."""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath


def check_shards(folder: str | os.PathLike, subfolder: str | None = None) -> None:
    """Refuse a saved folder with an index that names a file elsewhere; transformers would load it from there.

    Repositories of the Hub are left to its client, which checks names itself.

    Raises:
        ValueError: names the index, and what it names.
    """
    place = Path(folder, subfolder or "")
    # A variant, fp16 say, is named behind: model.safetensors.index.fp16.json.
    for index in sorted(file for kind in ("safetensors", "bin") for file in place.glob(f"*.{kind}.index*.json")):
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            outside = [name for name in places.values() if _leaves(name)]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{index} is not the index of a sharded checkpoint: it has no weight_map of file names."
            ) from None
        if outside:
            raise ValueError(f"{index} names {outside[0]}, outside its own folder; weights are read from there only.")


def _leaves(name: str) -> bool:
    """Whether a path, as any system may read it, can leave the folder it is relative to."""
    return any(kind(name).anchor or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath))
