"""Masks and depth maps of finished sequences, from the states that were kept or from one pass over them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import logging

from perceptio_hf.tokens import SpatialSequence, read_sequence

from .spatial_output import SpatialOutput
from .spatial_recorder import ReplayedStates, StateReader
from .spatial_request import check_rows

logger = logging.get_logger(__name__)


@dataclass
class Prompts:
    """One batch of prompts: what is needed to make masks and depth of their responses."""

    ids: torch.Tensor  # (batch, length)
    pixel_values: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    mask_pixel_values: torch.Tensor | None = None
    original_sizes: torch.Tensor | None = None


def count_pictures(input_ids: torch.Tensor, image_token: int) -> torch.Tensor:
    """(rows, length) -> (rows,) pictures of each row: a picture is a run of placeholder tokens."""
    is_image = input_ids == image_token
    return (is_image & ~F.pad(is_image, (1, 0))[:, :-1]).sum(1)


class SpatialReadingMixin:
    """`decode_spatial` of `PerceptioForConditionalGeneration`, and what `generate` shares with it."""

    @torch.no_grad()
    def decode_spatial(
        self,
        sequences: torch.LongTensor,
        *,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        mask_pixel_values: torch.FloatTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
    ) -> SpatialOutput:
        """The masks and depth maps of sequences that another engine generated, by one forward pass over them.

        Args:
            sequences: (rows, length) prompt and response, right-padded; rows may be a multiple of the prompts.
            input_ids, pixel_values, attention_mask, mask_pixel_values, original_sizes: the processor's output for the
                prompts.

        Raises:
            ValueError: if `sequences` do not begin with `input_ids`, or show pictures without `pixel_values`, or
                `mask_pixel_values` or `original_sizes` have not a row for each picture.
        """
        sequences = sequences.to(input_ids.device)
        batch, length = input_ids.shape
        rows = sequences.shape[0]
        if rows % batch or not torch.equal(sequences[:, :length], input_ids.repeat_interleave(rows // batch, dim=0)):
            raise ValueError(
                f"decode_spatial got sequences of shape {tuple(sequences.shape)} which do not begin with input_ids of "
                f"shape {tuple(input_ids.shape)}. Pass prompt and response: torch.cat([input_ids, response], 1)."
            )
        prompts = Prompts(input_ids, pixel_values, attention_mask, mask_pixel_values, original_sizes)
        shown = int(count_pictures(input_ids, self.spatial_vocabulary().image).sum())
        check_rows(shown, {"mask_pixel_values": mask_pixel_values, "original_sizes": original_sizes})
        return SpatialOutput(sequences=sequences, **self._read_spatial(sequences, prompts, None))

    def _read_spatial(self, sequences: torch.Tensor, prompts: Prompts, states: StateReader | None) -> dict:
        """Fields of `SpatialOutput`; without `states` they come from a forward pass over the sequences."""
        words = self.spatial_vocabulary()
        prompt_length = prompts.ids.shape[1]
        counts = count_pictures(prompts.ids, words.image).tolist()
        copies = sequences.shape[0] // len(counts)
        pictures = [counts[row // copies] for row in range(sequences.shape[0])]
        parsed = [read_sequence(ids, words, prompt_length) for ids in sequences.tolist()]
        if states is None:
            states = self._replay(sequences, [row for row, line in enumerate(parsed) if _is_busy(line)], prompts)
        first_picture = [sum(counts[: row // copies]) for row in range(sequences.shape[0])]
        fields = self._read_masks(sequences, parsed, prompts, states, first_picture)
        fields |= self._read_depth(parsed, states, sequences.device)
        fields |= {"prompt_length": prompt_length, "well_formed": [line.well_formed for line in parsed]}
        if prompts.original_sizes is not None:
            sizes = [tuple(size) for size in prompts.original_sizes.tolist()]
            fields["picture_sizes"] = [
                sizes[first : first + shown] for first, shown in zip(first_picture, pictures, strict=True)
            ]
        return fields

    def _read_masks(
        self,
        sequences: torch.Tensor,
        parsed: list[SpatialSequence],
        prompts: Prompts,
        states: StateReader,
        first_picture: list[int],
    ) -> dict:
        segs = [(row, seg) for row, line in enumerate(parsed) for seg in line.segs]
        fields = {"mask_pictures": [[seg.picture for seg in line.segs] for line in parsed]}
        if prompts.mask_pixel_values is None:
            if segs:
                logger.warning_once("[SEG] was generated, but without mask_pixel_values there are no masks.")
            return fields
        masks, scores = self._no_masks(prompts.mask_pixel_values.device)
        if segs:
            places = [row for row, _ in segs], [seg.position for _, seg in segs]
            found, known = states.seg_states(*places)
            lost = sorted({row for (row, _), here in zip(segs, known, strict=True) if not here})
            if lost:  # generation was stopped right after a [SEG], before its state existed
                at = [number for number, (row, _) in enumerate(segs) if row in lost]
                again = self._replay(sequences, lost, prompts)
                found[at] = again.seg_states(*([axis[number] for number in at] for axis in places))[0].to(found)
            pictures = torch.tensor([first_picture[row] + seg.picture for row, seg in segs])
            masks, scores = self.predict_masks(found, prompts.mask_pixel_values, pictures)
        counts = [len(line.segs) for line in parsed]
        return fields | {"mask_logits": list(masks.split(counts)), "mask_scores": list(scores.split(counts))}

    def _read_depth(self, parsed: list[SpatialSequence], states: StateReader, device: torch.device) -> dict:
        spans = [(row, span) for row, line in enumerate(parsed) for span in line.spans]
        counts = [len(line.spans) for line in parsed]
        chosen = [span.codes for _, span in spans]
        size, grid = self.config.depth_config.image_size, self.config.depth_config.grid_size
        maps, confidence = torch.zeros(0, size, size, device=device), torch.zeros(0, grid, grid)
        codes = torch.tensor(chosen, device=device).reshape(-1, self.config.num_depth_tokens)
        if spans:
            maps = self.depth_model.decode(codes)
            odds = states.code_odds([row for row, _ in spans], [span.position for _, span in spans], chosen)
            confidence = odds.reshape(-1, grid, grid)
        return {
            "depth_maps": list(maps.split(counts)),
            "depth_codes": list(codes.to(maps.device).split(counts)),
            "depth_confidence": list(confidence.split(counts)),
            "depth_pictures": [[span.picture for span in line.spans] for line in parsed],
        }

    def _replay(self, sequences: torch.Tensor, rows: list[int], prompts: Prompts) -> StateReader:
        """The states of `rows` from one forward pass over the finished sequences."""
        words, length = self.spatial_vocabulary(), prompts.ids.shape[1]
        if not rows:
            return ReplayedStates(words, length, rows, torch.zeros(0, 0, 0), self.lm_head)
        copies = sequences.shape[0] // prompts.ids.shape[0]
        of_rows = torch.tensor([row // copies for row in rows], device=prompts.ids.device)
        ids = sequences[rows]
        if prompts.pixel_values is None and bool((ids == words.image).any()):
            raise ValueError(
                "Masks and depth are to be read by one more pass over the sequences, which show pictures, but no "
                "pixel_values came. Pass them; a further question that is asked with a cache alone needs no such pass, "
                "unless tokens are drafted, there are beams, or a static cache is full."
            )
        mask = torch.ones_like(ids)
        mask[:, :length] = self._attention_of(prompts)[of_rows].to(mask)
        # Parts that are kept on disk have no device; their hooks move what comes.
        device = ids.device if self.device.type == "meta" else self.device
        pixels = self._pixels_of(of_rows, prompts)
        hidden = self.model(
            input_ids=ids.to(device),
            pixel_values=None if pixels is None else pixels.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=False,
        ).last_hidden_state
        return ReplayedStates(words, length, rows, hidden, self.lm_head)

    def _attention_of(self, prompts: Prompts) -> torch.Tensor:
        """(batch, length), which `generate` reads off the padding where nobody says it."""
        if prompts.attention_mask is not None:
            return prompts.attention_mask
        pad, ends = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
            return torch.ones_like(prompts.ids)
        return prompts.ids != pad

    def _pixels_of(self, of_rows: torch.Tensor, prompts: Prompts) -> torch.Tensor | None:
        """The picture tiles of the prompts listed (with repeats), in their order."""
        if prompts.pixel_values is None:
            return None
        tiles = (prompts.ids == self.config.image_token_id).sum(1) // self.config.image_seq_length
        groups = prompts.pixel_values.split(tiles.tolist())
        return torch.cat([groups[row] for row in of_rows.tolist()])


def _is_busy(line: SpatialSequence) -> bool:
    return bool(line.segs or line.spans)
