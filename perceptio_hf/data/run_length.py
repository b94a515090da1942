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
        ValueError: as `read_counts`.
    """
    counts = read_counts(lengths)
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(tuple(lengths["size"]), order="F")


def read_counts(lengths: RunLengths) -> np.ndarray:
    """The runs themselves: (n,) int64, background and mask in turn, down the columns.

    Raises:
        ValueError: where the size or the counts cannot be read, or the runs do not fill the size.
    """
    try:
        height, width = (int(side) for side in lengths["size"])
        counts = lengths["counts"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"Run lengths are {{'size': [height, width], 'counts': ...}}, not {lengths!r:.80}.") from None
    if isinstance(counts, (str, bytes)):
        runs = _expand_counts(counts if isinstance(counts, bytes) else counts.encode("utf-8"))
    else:
        runs = np.array(counts)
        if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
            raise ValueError(f"Counts are COCO's text or whole numbers, not {counts!r:.80}.")
        runs = runs.astype(np.int64)
    most = height * width
    if runs.min(initial=0) < 0 or runs.max(initial=0) > most or runs.sum() != most:  # the sum alone could overflow
        raise ValueError(f"These runs cover {runs.sum()} pixels; a mask of {height} x {width} has {height * width}.")
    return runs


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


def _expand_counts(text: bytes) -> np.ndarray:
    """COCO's text -> run lengths (n,) int64; the reverse of `compress_counts`, all numbers at once."""
    groups = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    wrong = np.flatnonzero((groups < 0) | (groups > 63))
    if wrong.size:
        raise ValueError(f"{chr(text[wrong[0]])!r} does not occur in COCO run lengths.")
    ends = np.flatnonzero(groups & 32 == 0)
    digits = np.diff(ends, prepend=-1)  # groups per number
    if digits.sum() != groups.size or digits.max(initial=0) > 7:
        raise ValueError(f"These COCO run lengths break off or hold a number beyond 32 bits: {text[-20:]!r}.")
    if not ends.size:
        return ends
    starts = ends - digits + 1
    places = np.arange(groups.size) - np.repeat(starts, digits)
    numbers = np.add.reduceat((groups & 31) << (5 * places), starts)
    numbers -= np.where(groups[ends] & 16, 1 << (5 * digits), 0)
    for first in (1, 2):  # undo `_differences`: every second number, added up
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
