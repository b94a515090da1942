"""Conversations as token ids and labels: what the assistant says is learnt, all else is context."""

import re
from collections.abc import Sequence

from perceptio_hf.data.form import SampleError
from perceptio_hf.processing.messages import words_of
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.tokens import SpatialVocabulary, read_sequence

from .losses import IGNORED_LABEL

# Two characters without a meaning mark the assistant's words in the rendered text, whatever the chat template is.
_BEGIN, _END = "\U000f5e60", "\U000f5e61"
_MARKED = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)


class ConversationEncoder:
    """Tokenizes whole conversations for one processor, each text once.

    The assistant's words and the token that ends its turn are labels, tokenized apart from what stands before them, as
    if they had been generated there.

    Raises:
        ValueError: where the chat template or the tokenizer do not allow that.
    """

    def __init__(self, processor: PerceptioProcessor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here it is."}]
        pieces = self._render(chat)
        if pieces[0] != processor.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False):
            raise ValueError(
                "This chat template writes something other before the assistant's words than it does as generation "
                "prompt; a model would learn another prompt than it is given. Use the template the model came with."
            )
        self.turn_end, self.turn_end_id = self._first_special(pieces[2])
        whole = processor(text=["".join(pieces)])["input_ids"][0]
        if list(whole) != [token for tokens in self._tokenize(pieces) for token in tokens]:
            raise ValueError(
                "This tokenizer reads words differently after a special token than inside a text (a prefix space?); "
                "set its pre-tokenizer's prepend_scheme to 'first'."
            )

        self.vocabulary = self._spatial_vocabulary()

    def _spatial_vocabulary(self) -> SpatialVocabulary:
        """What the model reads, which the processor knows as well."""
        ids, pieces = self.processor.spatial_token_ids(), self.processor.picture_mark_token_ids()
        return SpatialVocabulary(
            seg=ids["seg_token_id"],
            depth_start=ids["depth_start_token_id"],
            depth_end=ids["depth_end_token_id"],
            codes=tuple(ids["depth_token_ids"]),
            num_depth_tokens=self.processor.num_depth_tokens,
            image=self.processor.image_token_id,
            turn_ends=frozenset([self.turn_end_id]),
            mark_pieces={token: piece for piece, tokens in pieces.items() for token in tokens},
        )

    def check_pictures(self, ids: Sequence[int], mask_pictures: Sequence[int], depth_pictures: Sequence[int]) -> None:
        """Whether the token ids of a conversation speak of the pictures that its words speak of.

        Raises:
            SampleError: where the tokenizer spells a mark ``Image-k:`` so that a model would not find it.
        """
        read = read_sequence(ids, self.vocabulary)
        found = [seg.picture for seg in read.segs], [span.picture for span in read.spans]
        if found != (list(mask_pictures), list(depth_pictures)):
            raise SampleError(
                f"its [SEG] and depth spans speak of pictures {list(mask_pictures)} and {list(depth_pictures)}, as "
                f"token ids of {found[0]} and {found[1]}: this tokenizer joins a mark with what stands beside it. "
                "Write marks at the beginning of the response or of a line, or after a space, and a space behind them.",
                "picture",
            )

    def _first_special(self, text: str) -> tuple[str, int]:
        """The special token that `text`, what follows the assistant's words, begins with: it ends the turn."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        token = self.tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        if token is None or not text.startswith(token.content):
            raise ValueError(
                f"This chat template ends the assistant's turn with {text[:20]!r}, which is no special token of the "
                "tokenizer; a model would never learn to stop. Use the template the model came with."
            )
        return token.content, ids[0]

    def encode(self, messages: Sequence[dict], tiles: Sequence[int]) -> tuple[list[int], list[int]]:
        """One conversation -> token ids and labels, of equal length.

        Args:
            messages: with the spatial tokens of the assistant written out.
            tiles: tiles of each picture, in reading order.

        Raises:
            SampleError: for a conversation that the chat template refuses or that holds tokens it must not hold.
        """
        pieces = self._render(messages)
        pieces[::2] = self._with_pictures(pieces[::2], tiles)
        ids: list[int] = []
        labels: list[int] = []
        for index, tokens in enumerate(self._tokenize(pieces)):
            ids += tokens
            if index % 2:
                labels += tokens
            else:
                ends = index > 0  # what follows the assistant's words begins with the end of its turn
                labels += tokens[:ends] + [IGNORED_LABEL] * (len(tokens) - ends)
        return ids, labels

    def _render(self, messages: Sequence[dict]) -> list[str]:
        """The rendered text, cut into pieces: context, words of the assistant, context, words, ..., context."""
        try:
            marked = [_mark(message) if message["role"] == "assistant" else message for message in messages]
            text = self.processor.apply_chat_template(marked, tokenize=False)
        except ValueError as error:
            raise SampleError(str(error)) from None
        pieces = _MARKED.split(text)
        turns = sum(message["role"] == "assistant" for message in messages)
        if len(pieces) != 2 * turns + 1 or _BEGIN in "".join(pieces) or _END in "".join(pieces):
            raise SampleError(
                "the chat template changes or drops what the assistant says; use a template that writes it as it is."
            )
        return pieces

    def _with_pictures(self, context: list[str], tiles: Sequence[int]) -> list[str]:
        """Every place of a picture becomes its image tokens."""
        places = sum(piece.count(self.processor.image_token) for piece in context)
        if places != len(tiles):
            raise SampleError(
                f"the rendered conversation has {places} places ({self.processor.image_token}) for {len(tiles)} "
                "pictures; the messages and the chat template must have one for each."
            )
        numbers = iter(range(len(tiles)))
        pattern = re.compile(re.escape(self.processor.image_token))

        def tokens(_: re.Match) -> str:
            return self.processor.replace_image_token({"num_patches": list(tiles)}, next(numbers))

        return [pattern.sub(tokens, piece) for piece in context]

    def _tokenize(self, pieces: Sequence[str]) -> list[list[int]]:
        """Token ids of each piece. All but the first stand behind a special token, which is dropped again: some
        tokenizers put a space before the first word of a text, and these words are not its first."""
        bos = self.tokenizer.bos_token
        first = self.tokenizer(pieces[0], add_special_tokens=not (bos and pieces[0].startswith(bos)))["input_ids"]
        rest = self.tokenizer([self.turn_end + piece for piece in pieces[1:]], add_special_tokens=False)["input_ids"]
        return [list(first), *(list(tokens[1:]) for tokens in rest)]


def _mark(message: dict) -> dict:
    return {**message, "content": _BEGIN + "".join(words_of(message, "The assistant's turn")) + _END}
