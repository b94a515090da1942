"""What one call of `generate` asks of the spatial tokens, and whether it can be had."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from perceptio_hf.modeling.span_grammar import required_new_tokens
from perceptio_hf.tokens import SpatialSequence, SpatialVocabulary, read_sequence

from .grammar_state import GrammarState, LoopGrammar

# New tokens beyond the spans, where the caller sets no limit: transformers' default of 20 would fit no span at all.
_DEFAULT_ANSWER_TOKENS = 128
_FORCED = ("seg", "depth", "seg+depth")


def generation_setting(name: str, argument: Any, asked: GenerationConfig | None, own: GenerationConfig) -> Any:
    """A setting: the argument of the call, else of the configuration that came with it, else the model's; or None."""
    if argument is not None:
        return argument
    for config in (asked, own):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def keep_own_settings(config: GenerationConfig) -> None:
    """Let a generation configuration keep our settings when it is saved, perhaps edited there, and read again.

    transformers marks those it derived from a model's configuration, and of marked ones reads no field but its own.
    """
    config._from_model_config = False


@dataclass
class SpatialRequest:
    """The prompts' spatial side, the mode and the room there is.

    Args:
        words: the token ids.
        spatial: one of `SPATIAL_MODES`.
        rows: what each prompt says about space; empty where the prompts came as embeddings only.
        prompt_length: ids before the response, as `generate` returns them.
        new_tokens: how many it may add.
    """

    words: SpatialVocabulary
    spatial: str
    rows: list[SpatialSequence]
    prompt_length: int
    new_tokens: int

    @classmethod
    def of(
        cls,
        words: SpatialVocabulary,
        spatial: str,
        prompt: torch.Tensor | None,
        embedded: int,
        configs: Sequence[GenerationConfig],
        kwargs: dict,
    ) -> "SpatialRequest":
        """Read the prompts (batch, length); None: there are `embedded` embeddings, and ids begin with the response.

        Of `kwargs` and `configs`, that of the call and the model's, the first that sets a length says how long it is.
        """
        if prompt is None:
            if spatial in _FORCED:
                raise ValueError(
                    f"spatial={spatial!r} needs input_ids: from inputs_embeds alone the pictures of the prompt are "
                    "unknown. Pass both, or spatial='none'."
                )
            return cls(words, "none", [], 0, _new_token_limit(embedded, configs, kwargs, [], words))
        rows = [read_sequence(ids, words, prompt.shape[1]) for ids in prompt.tolist()]
        new_tokens = _new_token_limit(prompt.shape[1], configs, kwargs, rows, words)
        return cls(words, spatial, rows, prompt.shape[1], new_tokens)

    def check(self, *, needs_masks: bool, **of_pictures: torch.Tensor | None) -> None:
        """Raise a ValueError for what cannot be had.

        Args:
            needs_masks: masks are to be made, and their pixels lack.
            of_pictures: what has a row for each picture of the prompts, by its name.
        """
        check_rows(sum(row.pictures_shown for row in self.rows) if self.rows else None, of_pictures)
        if self.spatial in _FORCED and not any(row.num_pictures for row in self.rows):
            raise ValueError(
                f"spatial={self.spatial!r} needs a picture, but no prompt has one. (A further question with the cache "
                "of an earlier one needs the ids of all turns: pictures are counted in input_ids.)"
            )
        for number, row in enumerate(self.rows):
            self._check_row(number, row)
        if self.spatial in ("seg", "seg+depth") and needs_masks:
            raise ValueError(
                f"spatial={self.spatial!r} with return_dict_in_generate=True makes masks and needs mask_pixel_values: "
                "pass everything the processor returns, model.generate(**inputs)."
            )

    def _check_row(self, number: int, row: SpatialSequence) -> None:
        if row.open_codes is not None and row.open_codes > self.words.num_depth_tokens:
            raise ValueError(
                f"The prompt of row {number} ends in a depth span of {row.open_codes} codes; a span has "
                f"{self.words.num_depth_tokens}."
            )
        if self.new_tokens < 1:
            raise ValueError(
                f"The limit leaves {self.new_tokens} tokens for a response: max_length counts the prompt's "
                f"{self.prompt_length} too. Pass max_new_tokens instead."
            )
        needed = required_new_tokens(self.spatial, row.num_pictures, self.words.span_length)
        if row.open_codes is not None:
            needed = max(needed, self.words.num_depth_tokens - row.open_codes + 1)
        if self.new_tokens < needed:
            raise ValueError(
                f"Row {number} may add {self.new_tokens} tokens, but spatial={self.spatial!r} with {row.num_pictures} "
                f"picture(s) needs {needed} for its spans alone. Pass max_new_tokens="
                f"{needed + _DEFAULT_ANSWER_TOKENS} or so."
            )

    @property
    def spans_allowed(self) -> list[int]:
        """Of each row: forced spans go through the pictures shown last; a free response may speak of any of them."""
        free = self.spatial == "auto"
        return [row.pictures_shown if free else row.num_pictures for row in self.rows]

    def grammar(self) -> LoopGrammar:
        """The grammar of this request."""
        rows = self.rows
        return LoopGrammar(
            self.words,
            spatial=self.spatial,
            prompt_length=self.prompt_length,
            max_length=self.prompt_length + self.new_tokens,
            num_pictures=torch.tensor(self.spans_allowed or [0]),
            open_codes=torch.tensor([-1 if row.open_codes is None else row.open_codes for row in rows] or [-1]),
        )

    def state(self, rows: int, device: torch.device) -> GrammarState:
        """The same grammar as state on the device, for `rows` rows: the prompts, each repeated as often as asked."""
        pictures = self._spread(self.spans_allowed or [0], rows).to(device)
        in_span = self._spread([row.open_codes is not None for row in self.rows] or [False], rows).to(device)
        return GrammarState(self.words, self.spatial, pictures, in_span)

    def span_ends(self, rows: int) -> torch.Tensor:
        """(rows,) position of the end marker of the span that a prompt left open; 0 where it did not."""
        missing = [self.words.num_depth_tokens - (row.open_codes or 0) for row in self.rows] or [0]
        return self.prompt_length + self._spread(missing, rows)

    @staticmethod
    def _spread(values: list, rows: int) -> torch.Tensor:
        return torch.tensor(values).repeat_interleave(rows // len(values))


def _new_token_limit(
    prompt_length: int,
    configs: Sequence[GenerationConfig],
    kwargs: dict,
    rows: list[SpatialSequence],
    words: SpatialVocabulary,
) -> int:
    """How many tokens `generate` may add."""
    limits = [(kwargs.get("max_new_tokens"), kwargs.get("max_length"))]
    # 20 is what older versions of transformers have where nothing was set.
    limits += [(config.max_new_tokens, None if config.max_length == 20 else config.max_length) for config in configs]
    for new_tokens, length in limits:
        if new_tokens is not None:
            return new_tokens
        if length is not None:
            return length - prompt_length
    pictures = max((row.pictures_shown for row in rows), default=0)
    return pictures * (words.span_length + 1) + _DEFAULT_ANSWER_TOKENS


def check_rows(pictures: int | None, given: dict[str, torch.Tensor | None]) -> None:
    """Raise a ValueError where what was `given` by name has not a row for each picture; None: they are not known."""
    for name, value in given.items():
        if value is not None and pictures is not None and len(value) != pictures:
            raise ValueError(
                f"{name} has {len(value)} rows, but the prompts show {pictures} pictures: pass what the processor "
                "returns for all of them, model.generate(**inputs)."
            )


def check_mode(name: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError for a value that does not exist."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, known))}.")
