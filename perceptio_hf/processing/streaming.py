"""What a model writes, while it writes it: words, masks and rows of depth as typed events.

Not among the files that travel with a checkpoint.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue
from threading import Thread

import torch
from transformers import BatchFeature
from transformers.generation.streamers import BaseStreamer

from perceptio_hf.tokens import SpatialVocabulary, read_sequence

from .phrases import phrases_of
from .processing_perceptio import PerceptioProcessor, SpatialAnswer

_HALF_TAG = re.compile(r"</?p?$")  # of "<p>" and "</p>", which are no words


@dataclass(frozen=True)
class TextEvent:
    """More words; all of an answer's, joined, are its `text`."""

    text: str


@dataclass(frozen=True)
class MaskEvent:
    """A [SEG] was written: mask `number` (from 0) of the answer, on `picture`, and the words it was written for.

    Its pixels come with the answer: they are computed from the state of the token, one pass later.
    """

    number: int
    picture: int
    phrase: str | None


@dataclass(frozen=True)
class DepthRowEvent:
    """Row `row` (from 0) of the `rows` rows of a depth span of `picture`: its codes, from left to right."""

    picture: int
    row: int
    rows: int
    codes: tuple[int, ...]


@dataclass(frozen=True)
class AnswerEvent:
    """The end: the whole answer, masks and depth included. Only `stream_answer` yields it."""

    answer: SpatialAnswer


SpatialEvent = TextEvent | MaskEvent | DepthRowEvent | AnswerEvent


class StreamClosed(Exception):
    """Raised inside `generate` when nobody listens any more, so that it stops."""


class SpatialStreamer(BaseStreamer):
    """A streamer for `model.generate(streamer=...)`: iterate over it in another thread than the one that generates.

        streamer = SpatialStreamer(model, processor)
        Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
        for event in streamer: ...

    One conversation at a time, greedy or sampled; with parallel span decoding the rows of a span come in bursts.
    `stream_answer` does the same and also handles errors, and gives the answer at the end.

    Args:
        model: the Perceptio that generates.
        processor: its processor.
        timeout: seconds to wait for the next event; None: for ever.

    Raises:
        ValueError: in `generate`, for a batch of several rows.
        queue.Empty: while iterating, after `timeout`.
    """

    def __init__(self, model, processor: PerceptioProcessor, timeout: float | None = None):
        self.processor, self.timeout = processor, timeout
        self.words: SpatialVocabulary = model.spatial_vocabulary()
        self.rows: int = model.config.depth_config.grid_size
        self.closed = False
        self._events: Queue[SpatialEvent | None] = Queue()
        self._ids: list[int] | None = None  # prompt and response; None before the prompt
        self._codes: list[int] | None = None  # of the open span
        self._picture = 0  # of the open span
        self._start = 0  # where the response begins
        self._sent = ""  # words told so far
        self._before_seg: list[str] = []  # for each [SEG] the words since the one before, as `phrases_of` takes them
        self._line: list[int] = []  # words since the last spatial token
        self._broken_line = False  # whether a span stands before these words

    @property
    def response(self) -> list[int]:
        """The ids written so far."""
        return [] if self._ids is None else self._ids[self._start :]

    def put(self, value: torch.Tensor) -> None:
        """The prompt (1, length) first, then tokens (n,), as `generate` gives them."""
        if self.closed:
            raise StreamClosed
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"A stream is of one conversation, but a batch of {value.shape[0]} came; ask one by one.")
        ids = value.flatten().tolist()
        if self._ids is None:
            self._begin(ids)
            return
        for token in ids:
            self._read(token)

    def end(self) -> None:
        """Called by `generate` when all is written."""
        self._tell_words(final=True)
        self._events.put(None)

    def close(self) -> None:
        """Nobody listens any more: `generate` ends with `StreamClosed` at its next token."""
        self.closed = True
        self._events.put(None)

    def __iter__(self) -> Iterator[SpatialEvent]:
        while (event := self._events.get(timeout=self.timeout)) is not None:
            yield event

    def _begin(self, prompt: list[int]) -> None:
        self._ids, self._start = prompt, len(prompt)
        if read_sequence(prompt, self.words, len(prompt)).open_codes is not None:  # a response begun there
            begun = len(prompt) - 1 - prompt[::-1].index(self.words.depth_start)
            self._picture, self._codes = self._current_picture(begun), []
            for token in prompt[begun + 1 :]:
                self._read_code(token)

    def _read(self, token: int) -> None:
        self._ids.append(token)
        if token == self.words.seg:
            self._read_seg()
        elif token == self.words.depth_start:
            self._tell_words(final=True)
            self._picture, self._codes = self._current_picture(len(self._ids) - 1), []
        elif token == self.words.depth_end:
            self._codes, self._line, self._broken_line = None, [], True
        elif token in self.words.code_index:
            self._read_code(token)
        else:
            self._line.append(token)
            self._tell_words()

    def _read_seg(self) -> None:
        self._tell_words(final=True)
        line = self.processor.tokenizer.decode(self._line)
        self._before_seg.append("\n" + line if self._broken_line else line)
        self._line, self._broken_line = [], False
        phrase, number = phrases_of(self._before_seg)[-1], len(self._before_seg) - 1
        self._events.put(MaskEvent(number, self._current_picture(len(self._ids) - 1), phrase))

    def _read_code(self, token: int) -> None:
        if self._codes is None or token not in self.words.code_index:
            return
        self._codes.append(self.words.code_index[token])
        row, rest = divmod(len(self._codes), self.rows)
        if not rest and row <= self.rows:
            self._events.put(DepthRowEvent(self._picture, row - 1, self.rows, tuple(self._codes[-self.rows :])))

    def _current_picture(self, position: int) -> int:
        """The picture that is spoken of at a position of the row."""
        segs = read_sequence([*self._ids[:position], self.words.seg], self.words, position).segs
        return segs[-1].picture if segs else 0

    def _tell_words(self, final: bool = False) -> None:
        """What can be read of the words, as far as no later token changes it."""
        text = self.processor.words(self.response).lstrip()
        if not final:
            text = _without_half(_HALF_TAG.sub("", text.rstrip("�")), self.processor.response_end or "")
        text = text.rstrip()  # whether they stay is known when something follows
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._events.put(TextEvent(text[len(self._sent) :]))
            self._sent = text


def _without_half(text: str, end: str) -> str:
    """`text` without what may become `end`, which is several tokens long."""
    lengths = range(min(len(text), len(end)), 0, -1)
    return text[: -next((length for length in lengths if text.endswith(end[:length])), 0) or None]


def stream_answer(model, processor: PerceptioProcessor, inputs: BatchFeature, **options) -> Iterator[SpatialEvent]:
    """Generate one answer and yield it bit by bit; the last event is an `AnswerEvent`.

    Who stops iterating stops the generation, at its next token.

    Args:
        inputs: what the processor made of one conversation.
        options: as `model.generate` takes them: spatial, max_new_tokens, do_sample ...

    Raises:
        Exception: whatever `generate` raised.
    """
    streamer = SpatialStreamer(model, processor)
    outcome: list = []

    def work() -> None:
        try:
            outcome.append(model.generate(**inputs, **options, streamer=streamer, return_dict_in_generate=True))
        except BaseException as error:  # handed on to who iterates
            outcome.append(error)
            streamer.close()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        yield AnswerEvent(processor.post_process_spatial(outcome[0])[0])
    finally:
        streamer.close()
        thread.join()
