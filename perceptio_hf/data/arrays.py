"""Reads .npy and .npz files of strangers: numbers only, nothing unpickled, nothing allocated that a file does not hold.

`numpy.load` allocates what a header claims before it reads, and lets a dozen kinds of exceptions out of damaged files.
"""

import io
import math
import os
import warnings
import zipfile
from typing import IO

import numpy as np

MOST_BYTES = 80_000_000 * 8  # of one array
NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK"
_HEAD = 1 << 16  # bytes that hold every header that numpy itself would read
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MOST_SHRUNK = 1100  # deflate makes nothing smaller than by 1032
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes


def read_array(source: str | os.PathLike | bytes) -> np.ndarray:
    """The array of a .npy file, or of a .npz with one array or one named "depth".

    Args:
        source: a path, or the bytes of such a file; its first bytes tell which of the two it is.

    Returns:
        Integers, floating point numbers or bool, of any shape. It may be read-only.

    Raises:
        ValueError: for whatever is damaged, cut off, too large, of objects, or no such file.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            first = file.read(len(NPY_MAGIC))
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return _read_npz(file) if first.startswith(ZIP_MAGIC) else _read_npy(file, size)
    except ValueError:
        raise
    # zipfile, zlib and the parser of headers raise a dozen kinds; MemoryError, where even what is there is too much.
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"cannot be read as an array ({reason or type(error).__name__}).") from None


def _read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """An array that fills the `size` bytes of `file`, which stands at its start."""
    head = file.read(_HEAD)
    shape, is_fortran, dtype, start = _header(head)
    needed = math.prod(shape) * dtype.itemsize  # Python's integers: no overflow
    if needed > MOST_BYTES:
        raise ValueError(f"claims {needed:,} bytes of numbers; more than {MOST_BYTES:,} are not read.")
    if needed != size - start:
        raise ValueError(
            f"is cut off or damaged: its header claims {needed:,} bytes of numbers, and {size - start:,} are there."
        )
    data = head[start:] + file.read(needed + start - len(head)) if needed + start > len(head) else head[start:]
    if len(data) != needed:
        raise ValueError(f"is cut off: {len(data):,} of {needed:,} bytes could be read.")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, column order, type, and where the numbers start."""
    beginning = io.BytesIO(head)
    version = np.lib.format.read_magic(beginning)
    if version not in _HEADERS:  # 3.0 is for names of fields alone
        raise ValueError(f"is of the unknown .npy version {version}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers that Python 2 wrote
        shape, is_fortran, dtype = _HEADERS[version](beginning)
    if dtype.kind not in "biuf" or dtype.hasobject or dtype.subdtype:
        raise ValueError(f"holds {dtype} values; expected integers or floating point numbers.")
    if any(side < 0 for side in shape):
        raise ValueError(f"claims the shape {shape}.")
    return shape, is_fortran, dtype, beginning.tell()


def _read_npz(file: IO[bytes]) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        chosen = names[0] if len(names) == 1 else "depth"
        if chosen not in names:
            raise ValueError(f"holds {', '.join(names[:10])}; expected one array, or one of them named 'depth'.")
        info = archive.infolist()[names.index(chosen)]
        is_possible = info.file_size <= info.compress_size * _MOST_SHRUNK + _MOST_SHRUNK
        if info.compress_type not in _METHODS or info.flag_bits & 1 or not is_possible:
            raise ValueError(f"{info.filename} is damaged, encrypted, or packed as numpy packs nothing.")
        if info.file_size > MOST_BYTES + _HEAD:
            raise ValueError(f"{info.filename} has {info.file_size:,} bytes; more than {MOST_BYTES:,} are not read.")
        with archive.open(info) as member:
            return _read_npy(member, info.file_size)
