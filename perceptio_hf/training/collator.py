"""Samples (see `perceptio_hf.data.samples`) -> batches to train on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.data.form import REASONS, SampleError
from perceptio_hf.data.samples import LoadedSample, load_sample, name_of
from perceptio_hf.modeling.modeling_depth_vqvae import prepare_depth
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.training.losses.labels import LabelLayout, read_labels

from .conversations import ConversationEncoder
from .losses import IGNORED_LABEL

_logger = logging.getLogger(__name__)
_LOGGED = 20  # skipped samples that each process describes; all are counted
_HOPELESS = 32  # so many bad samples before the first good one are a mistake in the data set, not bad luck
_COUNTERS = 256  # rows of the shared table of counts; one per worker, so that none overwrites another's


@dataclass(frozen=True, eq=False)
class _Encoded:
    """One sample as tensors: ids and labels (L,), pixel_values (tiles, 3, h, w), mask_pixel_values (n, 3, S, S) of the
    pictures that have masks, mask_pixel_pictures (n,), mask_targets (m, h, w), depth_targets and depth_valid (s, S, S),
    depth_given_as_codes (s,)."""

    ids: Tensor
    labels: Tensor
    num_pictures: int
    pixel_values: Tensor | None
    mask_pixel_values: Tensor | None
    mask_pixel_pictures: list[int]
    mask_targets: Tensor
    depth_targets: Tensor
    depth_valid: Tensor
    depth_given_as_codes: Tensor


class PerceptioDataCollator:
    """Turns samples into a batch: pictures are read, conversations tokenized, masks and depth brought to size.

    A batch holds (b rows, L tokens, p pictures, m [SEG] and s depth spans of the batch in reading order):

        input_ids, attention_mask  (b, L) padded on the right
        labels                     (b, L) every turn of the assistant with the token that ends it; -100 elsewhere
        pixel_values               (tiles, 3, h, w); absent where p = 0
        mask_pixel_values          (n, 3, S, S) uint8, of the n pictures that have masks, and mask_pixel_pictures (n,),
                                   which of the p pictures these are; absent where n = 0
        mask_targets               (m, h, w) float32 share of each cell inside, at the mask decoder's resolution
        depth_targets              (s, D, D) float32 relative inverse depth, 0 in holes
        depth_valid                (s, D, D) bool; all false where the span was given as codes
        depth_given_as_codes       (s,) bool; the other spans hold code 0 until the trainer's codec fills them in
        layout                     what `read_labels` says of the labels: read once, and here, where no GPU waits

    Args:
        processor: of the model to train.
        depth_image_size: D, the side of the codec's input (`model.config.depth_config.image_size`); needed as soon as a
            sample has a depth map.
        on_error: "raise" stops at a sample that cannot be used; "skip" leaves it out, counts it in `skipped` and logs
            the first ones. A batch whose every sample was left out has one row without labels, so that other processes
            need not wait.
        max_length: longest conversation in tokens. Nothing is ever cut: a longer one cannot be used.
        crop_to_patches: cut large pictures into tiles; default: as the processor does.
        max_patches: most tiles of one picture; default: as the image processor does.

    Raises:
        ValueError: (of calls) naming the sample and what to do.
    """

    def __init__(
        self,
        processor: PerceptioProcessor,
        *,
        depth_image_size: int | None = None,
        on_error: str = "raise",
        max_length: int | None = None,
        crop_to_patches: bool | None = None,
        max_patches: int | None = None,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}; it must be 'raise' or 'skip'.")
        self.processor, self.on_error, self.max_length = processor, on_error, max_length
        self.depth_image_size = depth_image_size
        crop = processor.crop_to_patches if crop_to_patches is None else crop_to_patches
        self.image_options = {"crop_to_patches": crop} | ({"max_patches": max_patches} if max_patches else {})
        self.conversations = ConversationEncoder(processor)
        # Workers of a DataLoader have copies of the collator, but tensors in shared memory stay one.
        self._counts = torch.zeros(_COUNTERS, 1 + len(REASONS), dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> dict[str, int]:
        """Samples left out so far, by reason, workers included; reasons that did not occur are left out."""
        counts = self._counts.sum(0).tolist()[1:]
        return {reason: count for reason, count in zip(REASONS, counts, strict=True) if count}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | LabelLayout]:
        encoded, errors = [], []
        for position, sample in enumerate(samples):
            try:
                encoded.append(self._encode(sample, position))
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                errors.append(error)
        self._count(len(encoded), errors)
        return self._batch(encoded or [self._nothing()])

    def _count(self, good: int, errors: list[SampleError]) -> None:
        worker = get_worker_info()
        row = self._counts[(worker.id + 1 if worker else 0) % _COUNTERS]
        row[0] += good
        for error in errors:
            row[1 + REASONS.index(error.reason)] += 1
            if row[1:].sum() <= _LOGGED:
                _logger.warning("Left out: %s", error)
        bad = int(row[1:].sum())
        if errors and not row[0] and bad >= _HOPELESS:
            raise ValueError(f"None of the first {bad} samples could be used; the last one: {errors[-1]}")

    def _encode(self, sample: Mapping[str, Any], position: int) -> _Encoded:
        processor = self.processor
        loaded = load_sample(
            sample,
            num_depth_tokens=processor.num_depth_tokens,
            num_depth_codes=processor.num_depth_codes,
            position=position,
        )
        pixel_values, tiles = self._pixels(loaded.pictures)
        try:
            ids, labels = self.conversations.encode(loaded.messages, tiles)
            self._check_length(len(ids))
            if len(loaded.pictures) > 1:  # one picture is all there is to speak of
                self.conversations.check_pictures(ids, loaded.mask_pictures, loaded.depth_pictures)
            depth_targets, depth_valid = self._depth(loaded.depths)
        except SampleError as error:
            raise SampleError(f"Sample {name_of(sample, position)}: {error}", error.reason) from None
        masked = sorted(set(loaded.mask_pictures))  # SAM2's view is a picture of its own, and nobody else looks at it
        views = [processor.mask_bytes(loaded.pictures[number]) for number in masked]
        return _Encoded(
            ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            num_pictures=len(loaded.pictures),
            pixel_values=pixel_values,
            mask_pixel_values=torch.stack(views) if views else None,
            mask_pixel_pictures=masked,
            mask_targets=self._masks(loaded),
            depth_targets=depth_targets,
            depth_valid=depth_valid,
            depth_given_as_codes=torch.tensor([depth is None for depth in loaded.depths], dtype=torch.bool),
        )

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise SampleError(
                f"its conversation has {length} tokens, more than max_length={self.max_length}; raise max_length, show "
                "fewer pictures or cut them into fewer tiles (max_patches of the checkpoint's image processor), "
                "shorten it, or leave it out with on_error='skip'.",
                "length",
            )

    def _pixels(self, pictures: list[Image.Image]) -> tuple[Tensor | None, list[int]]:
        """(tiles, 3, h, w) of all pictures, and how many tiles each has."""
        if not pictures:
            return None, []
        inputs = self.processor.image_processor(images=pictures, return_tensors="pt", **self.image_options)
        return inputs["pixel_values"], [int(number) for number in inputs["num_patches"]]

    def _masks(self, loaded: LoadedSample) -> Tensor:
        side = self.processor.mask_image_size // 4  # SAM2's mask decoder works at a quarter of its input
        return _stacked([_shrunk_mask(mask, side) for mask in loaded.masks], (side, side))

    def _depth(self, depths: list[DepthMap | None]) -> tuple[Tensor, Tensor]:
        """Targets and validity, (s, D, D) each."""
        side = self.depth_image_size
        if side is None and any(depth is not None for depth in depths):
            raise ValueError(
                "A sample has a depth map, but the collator does not know the codec's size: give "
                "depth_image_size=model.config.depth_config.image_size."
            )
        side = side or 0
        empty = torch.zeros(side, side), torch.zeros(side, side, dtype=torch.bool)
        pairs = [empty if depth is None else _resized_depth(depth, side) for depth in depths]
        return (
            _stacked([target for target, _ in pairs], (side, side)),
            _stacked([valid for _, valid in pairs], (side, side), torch.bool),
        )

    def _nothing(self) -> _Encoded:
        """A row of two tokens from which nothing is learnt."""
        ids = torch.full((2,), self.conversations.turn_end_id)
        depth_targets, depth_valid = self._depth([])
        side = self.processor.mask_image_size // 4
        return _Encoded(
            ids=ids,
            labels=torch.full_like(ids, IGNORED_LABEL),
            num_pictures=0,
            pixel_values=None,
            mask_pixel_values=None,
            mask_pixel_pictures=[],
            mask_targets=torch.zeros(0, side, side),
            depth_targets=depth_targets,
            depth_valid=depth_valid,
            depth_given_as_codes=torch.zeros(0, dtype=torch.bool),
        )

    def _batch(self, rows: list[_Encoded]) -> dict[str, Tensor | LabelLayout]:
        pad = self.processor.tokenizer.pad_token_id
        pad = self.conversations.turn_end_id if pad is None else pad
        ids = [row.ids for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(item) for item in ids], batch_first=True),
            "labels": pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORED_LABEL),
        }
        for name in ("pixel_values", "mask_pixel_values"):
            parts = [getattr(row, name) for row in rows if getattr(row, name) is not None]
            if parts:
                batch[name] = torch.cat(parts)
        if "mask_pixel_values" in batch:
            before = np.cumsum([0, *(row.num_pictures for row in rows)]).tolist()
            pairs = zip(before, rows, strict=False)
            held = [first + number for first, row in pairs for number in row.mask_pixel_pictures]
            batch["mask_pixel_pictures"] = torch.tensor(held)
        for name in ("mask_targets", "depth_targets", "depth_valid", "depth_given_as_codes"):
            batch[name] = torch.cat([getattr(row, name) for row in rows])
        batch["layout"] = read_labels(batch["labels"], self.conversations.vocabulary)
        return batch


def _stacked(parts: list[Tensor], size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack(parts) if parts else torch.zeros(0, *size, dtype=dtype)


def _shrunk_mask(mask: np.ndarray, side: int) -> Tensor:
    """(H, W) bool -> (side, side) float32 share inside, filtered as SAM2's view of the picture is."""
    inside = torch.from_numpy(np.ascontiguousarray(mask))[None, None].float()
    return F.interpolate(inside, (side, side), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def _resized_depth(depth: DepthMap, side: int) -> tuple[Tensor, Tensor]:
    """(side, side) relative inverse depth, and where at least half as much of it is measured as anywhere."""
    filled, weight = prepare_depth(torch.from_numpy(depth.relative), torch.from_numpy(depth.valid), side)
    valid = weight[0, 0] >= min(0.5, float(weight.max()) / 2)
    return torch.where(valid, filled[0, 0], 0.0).clamp(0, 1), valid
