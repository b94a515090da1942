"""The processor: pictures and conversations in, `SpatialAnswer`s out."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import MultiModalData, ProcessorMixin

from perceptio_hf.modeling.attachments import needed
from perceptio_hf.modeling.mask_prediction import normalised
from perceptio_hf.modeling.remote_code import write_code
from perceptio_hf.tokens import SEG_TOKEN, picture_mark, spatial_tokens

from .messages import mark_strings, prepare_chat
from .phrases import joined, phrases_of, without_tags
from .pictures import load_picture, row_strips
from .plain_text import control_ids, drop_marks, mark_tokens, structure_ids

# What InternVLProcessor asks of a tokenizer (transformers 5.17 to 5.24).
_PICTURE_TOKENS = ("start_image_token", "end_image_token", "context_image_token", "video_token")
# Options of `__call__` that `apply_chat_template` hands on.
_CALL_OPTIONS = {"padding", "padding_side", "crop_to_patches", "max_length", "truncation", "min_patches", "max_patches"}


@dataclass(frozen=True)
class PictureGeometry:
    """What a response says about one picture, at the picture's own size (H, W).

    Args:
        masks: bool (n, H, W), one per [SEG].
        mask_scores: float32 (n,) predicted IoU of each mask.
        depth: float32 (H, W) relative inverse depth in [0, 1], 1 = nearest; None without a (whole) span.
        depth_codes: the N codes of the span, 0..K-1, in raster order over the grid; None without a span.
        depth_confidence: float32 (H, W) probability of the code chosen at each place; NaN where it was given.
        phrases: one per mask, the words its [SEG] was written for, None where there are none; see `phrases_of`.
    """

    masks: np.ndarray
    mask_scores: np.ndarray
    depth: np.ndarray | None = None
    depth_codes: list[int] | None = None
    depth_confidence: np.ndarray | None = None
    phrases: list[str | None] | None = None

    def __post_init__(self) -> None:
        if self.phrases is None:
            object.__setattr__(self, "phrases", [None] * len(self.masks))


@dataclass(frozen=True)
class SpatialAnswer:
    """One response: its words, and the geometry it wrote down before them.

    `masks`, `mask_scores`, `phrases`, `depth`, `depth_codes` and `depth_confidence` (see `PictureGeometry`) speak of
    the first picture; `pictures` has the geometry of every picture of the conversation. `well_formed` is False where a
    depth span was broken, or a [SEG] or span came without a picture: only in sequences of other engines.
    """

    text: str
    pictures: tuple[PictureGeometry, ...]
    well_formed: bool = True

    @property
    def masks(self) -> np.ndarray:
        return self.pictures[0].masks

    @property
    def mask_scores(self) -> np.ndarray:
        return self.pictures[0].mask_scores

    @property
    def phrases(self) -> list[str | None]:
        return self.pictures[0].phrases

    @property
    def depth(self) -> np.ndarray | None:
        return self.pictures[0].depth

    @property
    def depth_codes(self) -> list[int] | None:
        return self.pictures[0].depth_codes

    @property
    def depth_confidence(self) -> np.ndarray | None:
        return self.pictures[0].depth_confidence


class PerceptioProcessor(InternVLProcessor):
    """InternVL's processor with spatial tokens, SAM2's view of each picture, and the way back to pictures.

    What a user (a system prompt, a tool) writes in a conversation stays plain text, though it be spelled like a token:
    [SEG], <DEPTH_3>, <|im_end|>, <img>, or another special token of the tokenizer. In the assistant's turns spatial and
    other tokens are tokens, except those a conversation is built of: the marks of turns and of pictures. `__call__`
    takes text as rendered: there every token is one.

    Args:
        image_processor: InternVL's image processor (`GotOcr2ImageProcessor`).
        tokenizer: its tokenizer, a fast one; spatial tokens that it lacks are added to it, and it drops the marks of
            `plain_text`.
        image_seq_length: language tokens per tile.
        chat_template: as in transformers.
        num_depth_tokens: N, codes per depth span.
        num_depth_codes: K, entries of the codebook.
        mask_image_size: side S of SAM2's square input in pixels; None for a model without SAM2, whose inputs are then
            InternVL's alone.
        crop_to_patches: cut large pictures into several tiles, as InternVL does.
        mask_threshold: mask logits above it are inside; SAM2's own is 0.
        mask_resample: how SAM2's picture is scaled, "bilinear" as SAM2 does it or "bicubic" as Sa2VA does.
        response_end: words that end a response where the tokenizer has no token for it, and are no part of the answer.

    Raises:
        ValueError: an unknown `mask_resample`; a tokenizer without InternVL's picture tokens, or with depth tokens for
            another codebook; one that is not fast.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 256,
        chat_template=None,
        num_depth_tokens: int = 100,
        num_depth_codes: int = 128,
        mask_image_size: int | None = 1024,
        crop_to_patches: bool = True,
        mask_threshold: float = 0.0,
        mask_resample: str = "bilinear",
        response_end: str | None = None,
    ):
        if mask_resample not in ("bilinear", "bicubic"):
            raise ValueError(f"mask_resample is {mask_resample!r}; it must be 'bilinear' or 'bicubic'.")
        # InternVLProcessor.__init__ insists on a video processor, which needs torchvision: its work is done here.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.num_depth_tokens = num_depth_tokens
        self.num_depth_codes = num_depth_codes
        self.mask_image_size = mask_image_size
        self.crop_to_patches = crop_to_patches
        self.mask_threshold = mask_threshold
        self.mask_resample = mask_resample
        self.response_end = response_end
        self._read_tokenizer(tokenizer)

    @classmethod
    def from_components(cls, internvl, sam2=None, depth_codec=None, *, like=None) -> "PerceptioProcessor":
        """The processor for `PerceptioForConditionalGeneration.from_components` of the same parts.

        Picture settings, chat template and tokenizer are InternVL's. Spatial tokens that the tokenizer lacks join it
        behind all others; those it has keep their ids. `added_token_ids` tells which are new.

        Args:
            internvl: an InternVL's folder or Hub name, or a processor of one (it is left as it is).
            sam2: a `Sam2Model` or its configuration, which says how large SAM2's picture is; or where one is saved.
            depth_codec: the same of a `DepthVQVAE`, which says how many codes there are, and in one span.
            like: in place of these two, a Perceptio's folder or Hub name, or its processor: sizes and mask settings are
                taken over, and the spatial tokens must have the same ids.

        Raises:
            ValueError: where `internvl` has no such processor, or its tokenizer lacks the tokens around pictures, has
                depth tokens for another codebook, or takes a spatial token apart.
            ImportError: where only a copy of this file is at hand and not the package.
        """
        processor_from_components = needed("processor_from_components", "from_components")
        return processor_from_components(cls, internvl, sam2, depth_codec, like=like)

    def _read_tokenizer(self, tokenizer) -> None:
        lacking = [name for name in _PICTURE_TOKENS if not hasattr(tokenizer, name)]
        if lacking:
            raise ValueError(
                f"The tokenizer has no {', '.join(lacking)}, so it is not InternVL's. Name a checkpoint whose "
                "tokenizer_config.json says what these tokens are, such as those that end in -hf."
            )
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id
        self.video_token = tokenizer.video_token
        self.multimodal_pattern = re.compile(
            f"(?P<image>{re.escape(self.image_token)})|(?P<video>{re.escape(self.video_token)})"
        )
        tokens = spatial_tokens(self.num_depth_codes)
        vocabulary = tokenizer.get_vocab()
        _check_depth_tokens(vocabulary, tokens[2:-1])
        missing = [token for token in tokens if token not in vocabulary]
        if missing:
            # Not "special": decode(skip_special_tokens=True) keeps them, as the public checkpoints do.
            tokenizer.add_tokens(missing, special_tokens=False)
        self.added_token_ids = tuple(tokenizer.convert_tokens_to_ids(missing))
        self._spatial_ids = set(tokenizer.convert_tokens_to_ids(tokens))
        # Pipelines pad by the tokenizer's own side, and generation goes on where a row ends. Training pads on the right
        # by itself.
        tokenizer.padding_side = "left"
        drop_marks(tokenizer)
        self._guarded = None

    @property
    def seg_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(SEG_TOKEN)

    @property
    def model_input_names(self) -> list[str]:
        of_masks = [] if self.mask_image_size is None else ["mask_pixel_values", "original_sizes"]
        return [*super().model_input_names, *of_masks]

    def spatial_token_ids(self) -> dict:
        """The ids `PerceptioConfig` asks for, under its names."""
        seg, start, *codes, end = self.tokenizer.convert_tokens_to_ids(spatial_tokens(self.num_depth_codes))
        return {
            "seg_token_id": seg,
            "depth_start_token_id": start,
            "depth_end_token_id": end,
            "depth_token_ids": codes,
        }

    def picture_mark_token_ids(self) -> dict[str, list[int]]:
        """What `PerceptioConfig` asks for under this name: how the tokenizer spells ``Image-k:``.

        Marks may stand at the beginning of a response or line, behind a word, a bracket or a spatial token, and before
        words, line ends, ``**`` or a spatial token; pictures 1 to 99, and more where digits are tokens of their own.
        """
        marks = [picture_mark(number) for number in range(1, 100)]
        texts = [
            before + mark + after
            for mark in marks
            for before in ("", "\n", "x ", "(", SEG_TOKEN)
            for after in ("", "\n", "\n\n", " x", "**", SEG_TOKEN)
        ]
        ids = {token for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"] for token in row}
        pieces: dict[str, list[int]] = {}
        for token in sorted(ids):
            piece = self.tokenizer.decode([token]).strip("\n (*")
            if piece and any(piece in mark for mark in marks):
                pieces.setdefault(piece, []).append(token)
        return dict(sorted(pieces.items()))

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """Pictures and rendered text -> tensors of the model.

        Args:
            images: pictures or (nested) lists of them in reading order, each as `load_picture` takes it.
            text: one string or a list; each place of a picture is ``<IMG_CONTEXT>``.
            kwargs: as in transformers.

        Returns:
            input_ids, attention_mask, pixel_values (tiles, 3, h, w), mask_pixel_values (pictures, 3, S, S),
            original_sizes (pictures, 2) as (height, width).

        Raises:
            ValueError: a picture that cannot be read; text that is no string; another number of places than pictures;
                videos.

        Memory: beside the pictures themselves (`load_picture` says how much), transformers' image processor holds up to
        10 bytes a pixel of the one it is at: 1.4 GB at the peak for one picture of 100 million pixels.
        """
        if videos is not None:
            raise ValueError("Perceptio takes pictures, not videos: pass frames as images.")
        pictures = [] if images is None else [load_picture(picture, copy=False) for picture in _flatten(images)]
        rows = [text] if isinstance(text, str) else text or []
        if not all(isinstance(row, str) for row in rows):
            raise ValueError("text is one string, or a list of them.")
        places = sum(row.count(self.image_token) for row in rows)
        if places != len(pictures):
            came = f"{len(pictures) or 'no'} images came"
            raise ValueError(f"The text has {places} places of pictures ({self.image_token}), but {came}.")
        if isinstance(images, (list, tuple)) and len(images) == len(rows):
            for number, (row, own) in enumerate(zip(rows, images, strict=True)):
                if isinstance(own, (list, tuple)) and row.count(self.image_token) != len(_flatten(own)):
                    raise ValueError(
                        f"Row {number} of the text has {row.count(self.image_token)} places of pictures "
                        f"({self.image_token}), but {len(_flatten(own)) or 'no'} images came for it."
                    )
        if images is None:
            return super().__call__(text=text, **kwargs)
        if "crop_to_patches" not in (kwargs.get("images_kwargs") or {}):
            kwargs.setdefault("crop_to_patches", self.crop_to_patches)
        inputs = super().__call__(images=pictures or None, text=text, **kwargs)
        if pictures and self.mask_image_size is not None:
            inputs["mask_pixel_values"] = torch.stack([self.mask_pixels(picture) for picture in pictures])
            inputs["original_sizes"] = torch.tensor([[picture.height, picture.width] for picture in pictures])
            if isinstance(inputs["pixel_values"], np.ndarray):  # return_tensors="np"
                inputs |= {name: inputs[name].numpy() for name in ("mask_pixel_values", "original_sizes")}
        return inputs

    def mask_pixels(self, picture) -> torch.Tensor:
        """PIL RGB -> (3, S, S) as SAM2 prepares it: squashed with antialiasing, ImageNet statistics."""
        side = self.mask_image_size
        if self.mask_resample == "bicubic":  # Pillow's, in 8 bits; what follows then changes no pixel
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        # Torch, too, scales rows first and columns second. Doing the rows in strips keeps a large picture, which takes
        # 12 bytes a pixel as floats, out of memory.
        strips = [_scaled(_float_pixels(picture, *strip), width=side) for strip in row_strips(*picture.size)]
        return normalised(_scaled(torch.cat(strips, dim=1), width=side, height=side))

    def mask_bytes(self, picture) -> torch.Tensor:
        """PIL RGB -> (3, S, S) uint8, which the model normalises: for training, ten times as fast as `mask_pixels`, a
        quarter of its size, and within one step of 8 bits of it."""
        resample = Image.Resampling.BICUBIC if self.mask_resample == "bicubic" else Image.Resampling.BILINEAR
        pixels = np.array(picture.resize((self.mask_image_size,) * 2, resample))  # (S, S, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """As in transformers, for the tiles that `__call__` makes: vLLM plans with it. Sizes are (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        options = {"crop_to_patches": self.crop_to_patches, **kwargs}
        tiles = [self.image_processor.get_number_of_image_patches(*size, options) for size in image_sizes]
        around = 2  # the tokens that begin and end a picture
        tokens = [around + self.image_seq_length * count for count in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As in transformers, but texts stay texts (see the class); tools and documents too.

        Raises:
            ValueError: for content of another kind than text and pictures, a picture that cannot be read, or a user's
                turn without words; the message is named.
        """
        batched = (
            isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
        )
        mark = self._marker(chat_template)
        if batched:
            chats = [prepare_chat(chat, mark, f"Conversation {row}: ") for row, chat in enumerate(conversation)]
        else:
            chats = [prepare_chat(conversation, mark)]
        for name in ("tools", "documents"):
            if kwargs.get(name) is not None:
                kwargs[name] = mark_strings(kwargs[name], lambda text: mark([text], False)[0])
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        for name in _CALL_OPTIONS & set(kwargs):
            options[name] = kwargs.pop(name)
        if batched and kwargs.get("tokenize"):
            options.setdefault("padding", True)  # rows of a batch differ in length
        if "processor_kwargs" in inspect.signature(ProcessorMixin.apply_chat_template).parameters:
            kwargs["processor_kwargs"] = options
        else:
            kwargs |= options
        return super().apply_chat_template(chats if batched else chats[0], chat_template, **kwargs)

    def _marker(self, chat_template: str | None) -> Callable[[Sequence[str], bool], list[str]]:
        """Texts of a message, and whether the assistant says them -> the texts with the tokens in them marked."""
        template = chat_template or self.chat_template
        if isinstance(self.chat_template, dict):  # then it may be the name of one
            template = self.chat_template.get(chat_template or "default", template)
        template = str(template)
        if self._guarded is None or self._guarded[0] != (template, len(self.tokenizer)):
            pictures = [self.start_image_token, self.end_image_token, self.image_token, self.video_token]
            structure = structure_ids(self.tokenizer, template, pictures)
            self._guarded = (template, len(self.tokenizer)), control_ids(self.tokenizer), structure
        _, control, structure = self._guarded
        return lambda texts, own: mark_tokens(texts, self.tokenizer, structure if own else control)

    def post_process_spatial(self, outputs, threshold: float | None = None) -> list[SpatialAnswer]:
        """Generated tokens with their masks and depth maps -> one `SpatialAnswer` per row.

        Args:
            outputs: what `model.generate(..., return_dict_in_generate=True)` or `model.decode_spatial` returned.
            threshold: mask logits above it are inside; default: the processor's `mask_threshold`.

        Raises:
            ValueError: for plain token ids, which carry neither masks nor depth.
        """
        if not hasattr(outputs, "depth_maps") or outputs.prompt_length is None:
            raise ValueError(
                f"post_process_spatial got {type(outputs).__name__}; it needs the output of generate("
                "return_dict_in_generate=True), or of decode_spatial for sequences of another engine."
            )
        threshold = self.mask_threshold if threshold is None else threshold
        rows = range(len(outputs.well_formed))
        return [
            SpatialAnswer(
                text=self.words(outputs.sequences[row, outputs.prompt_length :].tolist()).strip(),
                pictures=tuple(_geometries(outputs, row, threshold, self._phrases(outputs, row))),
                well_formed=outputs.well_formed[row],
            )
            for row in rows
        ]

    def without_end(self, text: str) -> str:
        """The words of a response up to `response_end`."""
        return text.partition(self.response_end)[0] if self.response_end else text

    def words(self, ids: Iterable[int]) -> str:
        """The words of a response (ids) without spatial tokens, tags around phrases and what stands behind
        `response_end`."""
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token in self._spatial_ids:
                pieces.append([])
            else:
                pieces[-1].append(token)
        texts = (self.tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces if piece)
        return self.without_end(joined(map(without_tags, texts)))

    def _phrases(self, outputs, row: int) -> list[str | None]:
        """One per [SEG] of a response, as far as it speaks of pictures."""
        if not outputs.mask_pictures[row]:
            return []
        texts, words, line = [], [], ""
        for token in outputs.sequences[row, outputs.prompt_length :].tolist():
            if token == self.seg_token_id:
                texts.append(line + self.tokenizer.decode(words))
                words, line = [], ""
            elif token in self._spatial_ids:
                words, line = [], "\n"
            else:
                words.append(token)
        return phrases_of(texts)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save the processor and, beside it, the code that `trust_remote_code=True` loads elsewhere."""
        write_code(self, save_directory)
        return super().save_pretrained(save_directory, **kwargs)


def _check_depth_tokens(vocabulary: dict[str, int], codes: Sequence[str]) -> None:
    """A tokenizer knows the tokens of the whole codebook and no others, or none."""
    held = {token for token in vocabulary if token.startswith("<DEPTH_") and token[7:-1].isdigit()}
    if held and held != set(codes):
        raise ValueError(
            f"The tokenizer has {len(held)} depth tokens, but the codebook has {len(codes)} codes: use the depth codec "
            "that the tokenizer was made for, or a tokenizer without depth tokens."
        )


def _float_pixels(picture: Image.Image, top: int, end: int) -> torch.Tensor:
    """Rows of a picture: (3, rows, width), float32 in [0, 1]."""
    rows = np.array(picture.crop((0, top, picture.width, end)))
    return torch.from_numpy(rows).permute(2, 0, 1).float() / 255


def _scaled(pixels: torch.Tensor, *, width: int, height: int | None = None) -> torch.Tensor:
    size = (height or pixels.shape[1], width)
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def _flatten(images) -> list:
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:  # an array of pictures
        return [picture for item in images for picture in _flatten(item)]
    return [] if images is None else [images]


def _geometries(outputs, row: int, threshold: float, phrases: list[str | None]) -> list[PictureGeometry]:
    sizes = outputs.picture_sizes[row] if outputs.picture_sizes is not None else []
    named = [*outputs.mask_pictures[row], *outputs.depth_pictures[row], 0]
    count = max(len(sizes), max(named) + 1)
    return [
        _geometry(outputs, row, picture, sizes[picture] if sizes else None, threshold, phrases)
        for picture in range(count)
    ]


def _geometry(
    outputs, row: int, picture: int, size: tuple[int, int] | None, threshold: float, phrases: list[str | None]
) -> PictureGeometry:
    masks, scores = _masks(outputs, row, picture, size, threshold)
    of_masks = [phrase for phrase, of in zip(phrases, outputs.mask_pictures[row], strict=True) if of == picture]
    of_masks = of_masks[: len(masks)]  # none where there was nothing to make masks from
    if picture not in outputs.depth_pictures[row]:
        return PictureGeometry(masks, scores, phrases=of_masks)
    index = outputs.depth_pictures[row].index(picture)
    depth = outputs.depth_maps[row][index]
    size = size or tuple(depth.shape)
    return PictureGeometry(
        masks,
        scores,
        depth=_resize(depth, size).clip(0, 1),
        depth_codes=outputs.depth_codes[row][index].tolist(),
        depth_confidence=_resize(outputs.depth_confidence[row][index], size),
        phrases=of_masks,
    )


def _masks(outputs, row, picture, size, threshold) -> tuple[np.ndarray, np.ndarray]:
    if outputs.mask_logits is None:
        return np.zeros((0, *(size or (0, 0))), dtype=bool), np.zeros(0, dtype=np.float32)
    chosen = [index for index, of in enumerate(outputs.mask_pictures[row]) if of == picture]
    logits = outputs.mask_logits[row]
    size = size or tuple(logits.shape[1:])
    masks = np.zeros((len(chosen), *size), dtype=bool)
    for place, index in enumerate(chosen):  # one at a time: a float copy of many large masks would not fit
        masks[place] = _resize(logits[index], size) > threshold
    return masks, outputs.mask_scores[row][chosen].float().cpu().numpy()


def _resize(values: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> float32 (H, W), bilinear."""
    values = values.float().cpu()[None, None]
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
