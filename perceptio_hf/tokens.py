"""The spatial tokens: their strings, their ids, and how a sequence of ids is read.

One response may hold, in this order, ``[SEG]`` tokens (one mask each), depth spans (one picture each) and words::

    [SEG] <DEPTH_START> <DEPTH_17> <DEPTH_3> ... (N codes) <DEPTH_END> the answer in words

Which picture they speak of: the pictures of a conversation are numbered 1, 2, ... in the order they are shown. A
response begins with the first picture of the turn that last showed any; each depth span that ends moves on to the next
picture; and the mark ``Image-k:`` in the response goes to picture k, wherever in the conversation it was shown::

    Image-2: [SEG] is behind, and seen first in Image-1: [SEG]

This is the only home of these strings and of this rule; generation, training and parsing all call `read_sequence`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SEG_TOKEN = "[SEG]"
DEPTH_START_TOKEN = "<DEPTH_START>"
DEPTH_END_TOKEN = "<DEPTH_END>"

PICTURE_MARK = re.compile(r"Image-([1-9]\d{0,3}):")  # group 1: the picture's number in the conversation, from 1
_LONGEST_MARK = len("Image-9999:")


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


def picture_mark(number: int) -> str:
    """What a response writes to speak of picture `number` (1, 2, ...) from there on."""
    return f"Image-{number}:"


@dataclass(frozen=True)
class SpatialVocabulary:
    """Token ids of the spatial tokens, of the picture placeholder and of the end of a turn.

    `codes[k]` is the id of ``<DEPTH_k>``; `num_depth_tokens` is N, the number of codes in one span. `mark_pieces` are
    the tokens that marks ``Image-k:`` are spelt with and their text without spaces; without them no mark is read.
    """

    seg: int
    depth_start: int
    depth_end: int
    codes: tuple[int, ...]
    num_depth_tokens: int
    image: int
    turn_ends: frozenset[int] = frozenset()
    mark_pieces: Mapping[int, str] = field(default_factory=dict, repr=False, hash=False)
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

    `num_pictures` counts the pictures of the turn that last showed any, `pictures_shown` those of the whole row.
    `open_codes` is the number of codes in a span that has begun and not ended (None when there is none). `well_formed`
    is False if any span is broken, or a [SEG] or span stands where no picture was shown.
    """

    segs: tuple[SegToken, ...]
    spans: tuple[DepthSpan, ...]
    well_formed: bool
    num_pictures: int
    pictures_shown: int
    open_codes: int | None


class _Scanner:
    """Reads one row from left to right; see `read_sequence`."""

    def __init__(self, vocabulary: SpatialVocabulary, start: int):
        self.vocabulary, self.start = vocabulary, start
        self.segs: list[SegToken] = []
        self.spans: list[DepthSpan] = []
        self.well_formed = True
        self.pictures = self.first = 0  # how many were shown, and the first of those last shown together
        self.shows = False  # whether this turn has shown one
        self.current = 0  # the picture spoken of; the last one stays so when its span has ended
        self.written = ""  # the end of the words just written, as far as they may spell a mark
        self.open_at: int | None = None
        self.codes: list[int] = []

    def picture(self) -> int | None:
        """Index of the picture spoken of; None where none was shown."""
        return min(self.current, self.pictures - 1) if self.pictures else None

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
            if self.written or token in words.mark_pieces:
                self._read_mark(position, token)
            if token == words.depth_start:
                self.open_at, self.codes = position, []
            elif token == words.seg and position >= self.start:
                self._read_seg(position)
            elif token == words.image and previous != words.image:
                self._show()
            elif token in words.turn_ends:
                self.shows, self.current = False, self.first

    def _show(self) -> None:
        if not self.shows:
            self.shows, self.first, self.current = True, self.pictures, self.pictures
        self.pictures += 1

    def _read_seg(self, position: int) -> None:
        picture = self.picture()
        if picture is None:
            self.broken(position)
        else:
            self.segs.append(SegToken(position, picture))

    def _read_mark(self, position: int, token: int) -> None:
        """A mark counts in responses only: what a user types before `start`, in the turn that shows pictures or in any
        other turn of the user, ends with that turn."""
        piece = self.vocabulary.mark_pieces.get(token, "")
        self.written = (self.written + piece)[-_LONGEST_MARK:] if piece else ""
        if not piece.endswith(":") or (self.shows and position < self.start):
            return
        marks = list(PICTURE_MARK.finditer(self.written))
        if marks and marks[-1].end() == len(self.written) and int(marks[-1][1]) <= self.pictures:
            self.current = int(marks[-1][1]) - 1

    def _close(self, position: int) -> None:
        picture = self.picture()
        if self.open_at is None or picture is None or len(self.codes) != self.vocabulary.num_depth_tokens:
            self.broken(position)
            return
        if position >= self.start:
            self.spans.append(DepthSpan(self.open_at, picture, tuple(self.codes)))
        self.open_at, self.current = None, self.current + 1


def read_sequence(ids: Sequence[int], vocabulary: SpatialVocabulary, start: int = 0) -> SpatialSequence:
    """Find masks and depth spans in one row of token ids.

    Tokens before `start` (the prompt) give context only: the pictures shown, and what a response already begun there
    has said: a span left open, the picture it speaks of. A span is reported if it ends at or after `start`. Broken
    spans, and [SEG] and spans without a picture, are left out and flagged, never raised.
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
        num_pictures=scanner.pictures - scanner.first,
        pictures_shown=scanner.pictures,
        open_codes=len(scanner.codes) if is_open else None,
    )
