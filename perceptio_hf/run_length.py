"""Masks as COCO run lengths: the compressed form that pycocotools and the public data sets write."""

from typing import TypedDict

import numpy as np


class RunLengths(TypedDict):
    """size: [height, width]; counts: run lengths down the columns, starting with background, COCO-compressed.

    Public data sets also write the counts as a list of numbers or the compressed text as bytes: both can be read.
    """

    size: list[int]
    counts: str | bytes | list[int]


def encode_mask(mask: np.ndarray) -> RunLengths:
    """(height, width) bool -> run lengths, character for character what `pycocotools.mask.encode` gives.

    Raises:
        ValueError: for another shape.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 2:
        raise ValueError(f"A mask is (height, width), not {mask.shape}; encode masks one by one.")
    column_wise = mask.ravel(order="F")
    edges = np.flatnonzero(column_wise[1:] != column_wise[:-1]) + 1
    starts = [0, 0] if column_wise.size and column_wise[0] else [0]  # an empty first run where the mask starts inside
    counts = np.diff(np.concatenate([starts, edges, [column_wise.size]])).tolist()
    return RunLengths(size=list(mask.shape), counts=compress_counts(counts))


def decode_mask(lengths: RunLengths) -> np.ndarray:
    """Run lengths, compressed or not -> (height, width) bool.

    Raises:
        ValueError: where the runs do not fill the size.
    """
    height, width = lengths["size"]
    counts = lengths["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _read_counts(counts if isinstance(counts, str) else counts.decode("ascii", "replace"))
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"These runs cover {sum(counts)} pixels; a mask of {height} x {width} has {height * width}.")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def compress_counts(counts: list[int]) -> str:
    """Run lengths as numbers -> COCO's text."""
    return "".join(map(_digits, _differences(counts)))


def _differences(counts: list[int]) -> list[int]:
    """From the fourth run on, COCO stores the difference to the run two places before."""
    return [count - counts[i - 2] if i > 2 else count for i, count in enumerate(counts)]


def _digits(number: int) -> str:
    """Groups of five bits, lowest first, from character 48 on; bit 5 says that more follow, bit 4 is the sign."""
    text = ""
    while True:
        group, number = number & 31, number >> 5
        last = number == (-1 if group & 16 else 0)
        text += chr(48 + group + (0 if last else 32))
        if last:
            return text


def _read_counts(text: str) -> list[int]:
    counts: list[int] = []
    number = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"{character!r} does not occur in COCO run lengths.")
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:
            number -= (1 << shift) if group & 16 else 0
            counts.append(number + counts[-2] if len(counts) > 2 else number)
            number = shift = 0
    return counts
