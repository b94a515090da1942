"""Reading the tensors of a checkpoint, whatever file they are in, without running anything that came with it."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceptio_hf.files import expanded

SAFETENSORS, PICKLED = (".safetensors",), (".pt", ".pth", ".bin")
WRAPPERS = ("model", "state_dict", "weights")  # where training code keeps a model's tensors in a .pt
# In the order transformers looks for them.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def read_tensors(
    path: str | os.PathLike, *, wrappers: Sequence[str] = (), prefix: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a file or a saved folder, on the CPU, by name.

    Files are mapped into memory where their format allows it (safetensors, and what torch.save has written since
    version 1.6), so that tensors take memory when they are used. Pickles are read with `weights_only`: a file that
    would run code is refused, and not run.

    Args:
        path: A .safetensors, .pt, .pth or .bin file; or a folder with model.safetensors or pytorch_model.bin, alone or
            in shards with an index.
        wrappers: Names, such as `WRAPPERS`, under which the tensors may lie in a .pt; one level is opened.
        prefix: Removed where every name starts with it, such as the "module." of DistributedDataParallel.

    Raises:
        ValueError: Nothing is there, it is damaged or incomplete, it holds something else than tensors, or it would
            run code.
    """
    path = expanded(path)
    if path.is_dir():
        tensors = _read_folder(path)
    elif path.is_file():
        tensors = _read_file(path, wrappers)
    else:
        raise ValueError(f"There is no file or folder {path}.")
    if not tensors:
        raise ValueError(f"{path} holds no tensors.")
    return remove_prefix(tensors, prefix) if prefix else tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file such as config.json.

    Raises:
        ValueError: The file is missing, no JSON, or holds no object.
    """
    if not path.is_file():
        if path.name == "config.json" and (path.parent / "adapter_config.json").is_file():
            raise ValueError(
                f"{path.parent} holds an adapter, not a model: merge it into its base first (docs/lora.md)."
            )
        raise ValueError(f"{path.parent} is not a saved model: it has no {path.name}.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}; expected an object.")
    return document


def remove_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`tensors` without `prefix` where all names start with it, else as they are."""
    if not all(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in (_INDEXES[0], _SINGLE[0], _INDEXES[1], _SINGLE[1]):
        if (folder / name).is_file():
            return _read_shards(folder / name) if name in _INDEXES else _read_file(folder / name, ())
    raise ValueError(f"{folder} holds no weights: expected {', '.join((*_SINGLE, *_INDEXES))}.")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """What an index promises, all of it and nothing else."""
    places = _read_index(index)
    shards = {name: index.parent / name for name in sorted(set(places.values()))}
    absent = [name for name, shard in shards.items() if not shard.is_file()]
    if absent:
        raise ValueError(f"{index} names {absent[0]}, which is missing ({len(absent)} of {len(shards)} files are).")
    tensors: dict[str, Tensor] = {}
    for name, shard in shards.items():
        held = _read_file(shard, ())
        wanted = [key for key, place in places.items() if place == name]
        lost = [key for key in wanted if key not in held]
        if lost:
            raise ValueError(f"{index} places {lost[0]} in {name}, which does not hold it.")
        tensors.update((key, held[key]) for key in wanted)
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is not the index of a sharded checkpoint: it has no `weight_map` of file names.")
    outside = [name for name in places.values() if name != Path(name).name]
    if outside:  # a path could point anywhere on the disk
        raise ValueError(f"{index} names {outside[0]}, outside its own folder; expected plain file names.")
    return places


def _read_file(path: Path, wrappers: Sequence[str]) -> dict[str, Tensor]:
    if path.suffix in SAFETENSORS:
        return _read_safetensors(path)
    if path.suffix in PICKLED:
        return _only_tensors(_unwrap(_load_pickled(path), wrappers), path)
    raise ValueError(f"{path} is of no known kind; expected {', '.join((*SAFETENSORS, *PICKLED))} or a folder.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    # A damaged header can also name a shape or kind of number that makes torch itself fail.
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read, it is truncated or damaged: {_short(error)}") from None


def _load_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise ValueError(
                f"{path} is refused: it is a pickle that asks for {named.group(1)}, so reading it would run code. "
                "Save only its tensors, best as .safetensors."
            ) from None
        raise ValueError(f"{path} cannot be read, it is damaged or no PyTorch file: {_short(error)}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged archive fails in the unpickler in any of Python's ways
        raise ValueError(f"{path} cannot be read, it is truncated or no PyTorch file: {_short(error)}") from None


def _unwrap(document: Any, wrappers: Sequence[str]) -> Any:
    if isinstance(document, Mapping):
        for name in wrappers:
            if isinstance(document.get(name), Mapping):
                return document[name]
    return document


def _only_tensors(document: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(document, Mapping):
        raise ValueError(f"{path} holds a {type(document).__name__}; expected tensors by name (a state dict).")
    for name, value in document.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds {name!r}, a {type(value).__name__}; expected tensors by name only.")
    return dict(document)


def _short(error: Exception) -> str:
    """The first sentence of an error, on one line; torch's go on for paragraphs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
