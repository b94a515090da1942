"""The spatial tokens: their strings, their ids, and how a sequence of ids is read.

One response may hold, in this order, ``[SEG]`` tokens (one mask each), depth spans (one picture each) and words::

    [SEG] <DEPTH_START> <DEPTH_17> <DEPTH_3> ... (N codes) <DEPTH_END> the answer in words

This is the only home of these strings and of the rule which picture a token speaks about.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SEG_TOKEN = "[SEG]"
DEPTH_START_TOKEN = "<DEPTH_START>"
DEPTH_END_TOKEN = "<DEPTH_END>"


def depth_token(code: int) -> str:
    """The string of one depth code, ``<DEPTH_k>``."""
    return f"<DEPTH_{code}>"


def spatial_tokens(num_depth_codes: int) -> list[str]:
    """All spatial token strings for a codebook of `num_depth_codes` entries, in the order they join a vocabulary."""
    codes = [depth_token(code) for code in range(num_depth_codes)]
    return [SEG_TOKEN, DEPTH_START_TOKEN, *codes, DEPTH_END_TOKEN]


def depth_span(codes: Iterable[int]) -> str:
    """The text of one depth span: start marker, the codes in raster order, end marker."""
    return DEPTH_START_TOKEN + "".join(depth_token(int(code)) for code in codes) + DEPTH_END_TOKEN


@dataclass(frozen=True)
class SpatialVocabulary:
    """Token ids of the spatial tokens, of the picture placeholder and of the end of a turn.

    `codes[k]` is the id of ``<DEPTH_k>``; `num_depth_tokens` is N, the number of codes in one span.
    """

    seg: int
    depth_start: int
    depth_end: int
    codes: tuple[int, ...]
    num_depth_tokens: int
    image: int
    turn_ends: frozenset[int] = frozenset()
    code_index: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code_index", {token: code for code, token in enumerate(self.codes)})

    @property
    def span_length(self) -> int:
        """Tokens of one depth span, both markers included."""
        return self.num_depth_tokens + 2


@dataclass(frozen=True)
class SegToken:
    """One ``[SEG]``: its position in the row and the index of its picture among the row's pictures."""

    position: int
    picture: int


@dataclass(frozen=True)
class DepthSpan:
    """One complete depth span: position of its start marker, its N codes (0..K-1) and the index of its picture."""

    position: int
    picture: int
    codes: tuple[int, ...]


@dataclass(frozen=True)
class SpatialSequence:
    """What one row of token ids says about space, from a given position on.

    `num_pictures` counts the pictures the next response speaks about, `open_codes` is the number of codes in a span
    that has begun and not ended (None when there is none), `well_formed` is False if any span is broken.
    """

    segs: tuple[SegToken, ...]
    spans: tuple[DepthSpan, ...]
    well_formed: bool
    num_pictures: int
    open_codes: int | None


class _Scanner:
    """Reads one row from left to right; see `read_sequence`."""

    def __init__(self, vocabulary: SpatialVocabulary, start: int):
        self.vocabulary, self.start = vocabulary, start
        self.segs: list[SegToken] = []
        self.spans: list[DepthSpan] = []
        self.well_formed = True
        self.picture_turns: list[int] = []  # the turn in which each picture was shown
        self.turn = self.closed = 0  # closed: spans that ended in this turn
        self.open_at: int | None = None
        self.codes: list[int] = []

    def picture(self) -> int:
        """The k-th span of a response, and the [SEG] before it, speak of the k-th picture last shown together."""
        if not self.picture_turns:
            return 0
        first = self.picture_turns.index(self.picture_turns[-1])
        return min(first + self.closed, len(self.picture_turns) - 1)

    def broken(self, position: int) -> None:
        self.open_at = None
        if position >= self.start:
            self.well_formed = False

    def step(self, position: int, token: int, previous: int | None) -> None:
        words = self.vocabulary
        if token in words.code_index:
            self.codes.append(words.code_index[token])
            if self.open_at is None:
                self.broken(position)
        elif token == words.depth_end:
            self._close(position)
        else:
            if self.open_at is not None:
                self.broken(position)
            if token == words.depth_start:
                self.open_at, self.codes = position, []
            elif token == words.seg and position >= self.start:
                self.segs.append(SegToken(position, self.picture()))
            elif token == words.image and previous != words.image:
                self.picture_turns.append(self.turn)
            elif token in words.turn_ends:
                self.turn, self.closed = self.turn + 1, 0

    def _close(self, position: int) -> None:
        if self.open_at is None or len(self.codes) != self.vocabulary.num_depth_tokens:
            self.broken(position)
            return
        if position >= self.start:
            self.spans.append(DepthSpan(self.open_at, self.picture(), tuple(self.codes)))
        self.open_at, self.closed = None, self.closed + 1


def read_sequence(ids: Sequence[int], vocabulary: SpatialVocabulary, start: int = 0) -> SpatialSequence:
    """Find masks and depth spans in one row of token ids.

    Tokens before `start` (the prompt) give context only: the pictures shown, and a span left open for the response to
    go on with. A span is reported if it ends at or after `start`. Broken spans are left out and flagged, never raised.
    """
    scanner = _Scanner(vocabulary, start)
    previous = None
    for position, token in enumerate(ids):
        scanner.step(position, token, previous)
        previous = token
    is_open = scanner.open_at is not None
    return SpatialSequence(
        segs=tuple(scanner.segs),
        spans=tuple(scanner.spans),
        well_formed=scanner.well_formed and not (is_open and len(ids) > start),
        num_pictures=scanner.picture_turns.count(scanner.picture_turns[-1]) if scanner.picture_turns else 0,
        open_codes=len(scanner.codes) if is_open else None,
    )
