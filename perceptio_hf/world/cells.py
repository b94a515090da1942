"""Places and distances as words: how a model can say in its answer which cell of the picture it looks at.

A picture is divided into a g x g grid, the one of the depth span. Cell k, in raster order, is the word `p07`; how near
a cell is, from 0 (farthest) to `NEARNESS_LEVELS` - 1, is the word `d21`. An answer such as
`A p27 d21 B p03 d09: A` names the cell of each marked point and the nearness read there, before it concludes. Small
language models learn to use their depth span when these words are single tokens; large ones spell them.
"""

from collections.abc import Sequence

NEARNESS_LEVELS = 32


def cell_word(cell: int) -> str:
    """The word of a cell in raster order, from 0."""
    return f"p{cell:02d}"


def nearness_word(level: int) -> str:
    """The word of a nearness level, 0 = farthest."""
    return f"d{level:02d}"


def cell_words(grid: int) -> list[str]:
    """All words of cells for a grid of `grid` x `grid`, as tokens that hold the space before them."""
    return [f" {cell_word(cell)}" for cell in range(grid * grid)]


def nearness_words() -> list[str]:
    """All words of nearness levels, as tokens that hold the space before them."""
    return [f" {nearness_word(level)}" for level in range(NEARNESS_LEVELS)]


def cell_at(point: Sequence[float], size: tuple[int, int], grid: int) -> int:
    """The cell of a pixel (x, y) in a picture of `size` (height, width).

    Raises:
        ValueError: if the pixel lies outside.
    """
    (x, y), (height, width) = point, size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"The point {tuple(point)} lies outside of a picture {width} wide and {height} high.")
    return int(y * grid // height) * grid + int(x * grid // width)
