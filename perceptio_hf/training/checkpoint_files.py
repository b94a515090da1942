"""What makes the files of a checkpoint whole: sizes and digests, written when it is complete and compared before use.

A checkpoint of another program, or from before there was such a record, is checked by what its files say of themselves:
the headers of safetensors and the checksums inside of what torch.save writes.
"""

import hashlib
import json
import struct
import zipfile
from functools import lru_cache
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from perceptio_hf.files import write_json

RECORD = "files.json"  # in a checkpoint: {name: {"size": bytes, "sha256": hexadecimal}}
_TORCH_FILES = (".pt", ".pth", ".bin")
# Where an optimizer's state lies: transformers' own, FSDP's in its two forms, DeepSpeed's.
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model.bin", "global_step*")


def write_record(checkpoint: Path) -> None:
    """Record every file of a checkpoint; it must not change afterwards. Reads all of it, about a second a gigabyte."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RECORD)
    record = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": _digest_of(path)}
        for path in files
    }
    write_json(checkpoint / RECORD, record)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, None where nothing is. Every file of it is read."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    return _state_fault(checkpoint / TRAINER_STATE_NAME) or _files_fault(checkpoint) or _missing_part(checkpoint)


def _files_fault(checkpoint: Path) -> str | None:
    path = checkpoint / RECORD
    if not path.exists():
        return next(filter(None, map(own_fault, sorted(checkpoint.rglob("*")))), None)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        expected = [(name, int(item["size"]), str(item["sha256"])) for name, item in record.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{RECORD} is damaged"
    return next(filter(None, (_recorded_fault(checkpoint / name, *rest) for name, *rest in expected)), None)


def _state_fault(path: Path) -> str | None:
    """transformers writes the trainer's state last; where a program without this record was stopped it is missing."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = None
    return None if isinstance(state, dict) and "global_step" in state else f"{path.name} is missing or damaged"


def _missing_part(checkpoint: Path) -> str | None:
    """transformers goes on without an optimizer's state, and without a word: from other moments to other weights."""
    for names, what in ((_WEIGHTS, "weights"), (_OPTIMIZER, "state of the optimizer (optimizer.pt)")):
        if not any(next(checkpoint.glob(name), None) for name in names):
            return f"it holds no {what}"
    return None


def _recorded_fault(path: Path, size: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    found = path.stat().st_size
    if found != size:
        return f"{path.name} has {found} bytes instead of {size}"
    return None if _digest_of(path) == sha256 else f"{path.name} is not what was written (another SHA-256)"


def own_fault(path: Path) -> str | None:
    """What a file of weights or of torch.save says of its own damage; None where nothing, or for other files."""
    if path.suffix == ".safetensors":
        return _safetensors_fault(path)
    if path.name.endswith(".safetensors.index.json"):
        return _index_fault(path)
    if path.suffix not in _TORCH_FILES or not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError):
        damaged = True
    return f"{path.name} is damaged or incomplete" if damaged else None


def _safetensors_fault(path: Path) -> str | None:
    """A header of JSON whose length stands in front, and behind it exactly as many bytes as it says."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= size else None
        ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (OSError, struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError):
        whole = False
    return None if whole else f"{path.name} is damaged or incomplete"


def _index_fault(path: Path) -> str | None:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{path.name} is damaged"
    return next((f"{name} is missing" for name in names if not (path.parent / name).is_file()), None)


def _digest_of(path: Path) -> str:
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256; a file that has not changed is read once by a process."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
