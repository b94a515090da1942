"""The processor: pictures and conversations in, `SpatialAnswer`s out."""

import copy
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import ProcessorMixin

from perceptio_hf.modeling.attachments import needed
from perceptio_hf.modeling.remote_code import write_code
from perceptio_hf.tokens import SEG_TOKEN, escape_spatial_tokens, picture_mark, spatial_tokens

from .phrases import phrases_of, without_tags
from .pictures import load_picture

# SAM2 normalises with ImageNet's statistics whatever InternVL's image processor does.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_IGNORED_LABEL = -100
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

    Spatial token strings that a user (or a system prompt) writes in a conversation stay plain text; in the
    assistant's turns they are tokens.

    Args:
        image_processor: InternVL's image processor (`GotOcr2ImageProcessor`).
        tokenizer: its tokenizer; spatial tokens that it lacks are added to it.
        image_seq_length: language tokens per tile.
        chat_template: as in transformers.
        num_depth_tokens: N, codes per depth span.
        num_depth_codes: K, entries of the codebook.
        mask_image_size: side S of SAM2's square input in pixels.
        crop_to_patches: cut large pictures into several tiles, as InternVL does.
        mask_threshold: mask logits above it are inside; SAM2's own is 0.
        mask_resample: how SAM2's picture is scaled, "bilinear" as SAM2 does it or "bicubic" as Sa2VA does.

    Raises:
        ValueError: an unknown `mask_resample`; a tokenizer without InternVL's picture tokens, or with depth tokens for
            another codebook.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 256,
        chat_template=None,
        num_depth_tokens: int = 100,
        num_depth_codes: int = 128,
        mask_image_size: int = 1024,
        crop_to_patches: bool = True,
        mask_threshold: float = 0.0,
        mask_resample: str = "bilinear",
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
        self._read_tokenizer(tokenizer)

    @classmethod
    def from_components(cls, internvl, sam2, depth_codec) -> "PerceptioProcessor":
        """The processor for `PerceptioForConditionalGeneration.from_components` of the same three.

        Picture settings, chat template and tokenizer are InternVL's. Spatial tokens that the tokenizer lacks join it
        behind all others; those it has keep their ids. `added_token_ids` tells which are new.

        Args:
            internvl: an InternVL's folder or Hub name, or a processor of one (it is left as it is).
            sam2: a `Sam2Model` or its configuration, which says how large SAM2's picture is; or where one is saved.
            depth_codec: the same of a `DepthVQVAE`, which says how many codes there are, and in one span.

        Raises:
            ValueError: where `internvl` has no such processor, or its tokenizer lacks the tokens around pictures, has
                depth tokens for another codebook, or takes a spatial token apart.
            ImportError: where only a copy of this file is at hand and not the package.
        """
        processor_from_components = needed("processor_from_components", "from_components")
        return processor_from_components(cls, internvl, sam2, depth_codec)

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

    @property
    def seg_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(SEG_TOKEN)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mask_pixel_values", "original_sizes"]

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
            images: pictures or (nested) lists of them in reading order: PIL, arrays or file names.
            text: one string or a list; each place of a picture is ``<IMG_CONTEXT>``.
            kwargs: as in transformers.

        Returns:
            input_ids, attention_mask, pixel_values (tiles, 3, h, w), mask_pixel_values (pictures, 3, S, S),
            original_sizes (pictures, 2) as (height, width).

        Raises:
            ValueError: a picture that cannot be read; another number of places than pictures; videos.
        """
        if videos is not None:
            raise ValueError("Perceptio takes pictures, not videos: pass frames as images.")
        pictures = [] if images is None else [load_picture(picture) for picture in _flatten(images)]
        places = sum(row.count(self.image_token) for row in ([text] if isinstance(text, str) else text or []))
        if places != len(pictures):
            came = f"{len(pictures) or 'no'} images came"
            raise ValueError(f"The text has {places} places of pictures ({self.image_token}), but {came}.")
        if images is None:
            return super().__call__(text=text, **kwargs)
        kwargs.setdefault("crop_to_patches", self.crop_to_patches)
        inputs = super().__call__(images=pictures or None, text=text, **kwargs)
        if pictures:
            inputs["mask_pixel_values"] = torch.stack([self.mask_pixels(picture) for picture in pictures])
            inputs["original_sizes"] = torch.tensor([[picture.height, picture.width] for picture in pictures])
        return inputs

    def mask_pixels(self, picture) -> torch.Tensor:
        """PIL RGB -> (3, S, S) as SAM2 prepares it: squashed with antialiasing, ImageNet statistics."""
        side = self.mask_image_size
        if self.mask_resample == "bicubic":  # Pillow's, in 8 bits; what follows then changes no pixel
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
        mean, std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As in transformers; spatial token strings outside the assistant's turns stay plain text.

        Raises:
            ValueError: for a picture that cannot be read or a user's turn without words.
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        chats = conversation if batched else [conversation]
        chats = [[_prepare_message(message) for message in chat] for chat in chats]
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
                text=self._words(outputs.sequences[row, outputs.prompt_length :].tolist()),
                pictures=tuple(_geometries(outputs, row, threshold, self._phrases(outputs, row))),
                well_formed=outputs.well_formed[row],
            )
            for row in rows
        ]

    def _words(self, ids: list[int]) -> str:
        kept = [token for token in ids if token not in self._spatial_ids]
        text = without_tags(self.tokenizer.decode(kept, skip_special_tokens=True))
        if len(kept) < len(ids):  # "the cat [SEG] and" leaves both of the spaces around the token
            text = re.sub(r"(?<=\S) {2,}(?=\S)", " ", text)
        return text.strip()

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


def _flatten(images) -> list:
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flatten(item)]
    return [] if images is None else [images]


def _prepare_message(message: dict) -> dict:
    """A copy of one message with its pictures read, and its words safe unless they are the assistant's."""
    message = copy.copy(message)
    content = message.get("content")
    safe = (lambda text: text) if message.get("role") == "assistant" else escape_spatial_tokens
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        return message
    parts = [dict(part) if isinstance(part, dict) else part for part in content]
    for part in parts:
        if part.get("type") == "text":
            part["text"] = safe(part["text"])
        elif part.get("type") == "image":
            _read_picture(part)
    words = [part["text"] for part in parts if part.get("type") == "text"]
    if message.get("role") == "user" and not "".join(words).strip():
        raise ValueError("The user's turn has no words: ask a question about the picture.")
    message["content"] = parts
    return message


def _read_picture(part: dict) -> None:
    """Replace a local picture by its pixels; a URL stays for transformers to fetch, since the user named it."""
    for key in ("image", "path", "url"):
        source = part.get(key)
        if source is None or (isinstance(source, str) and source.startswith(("http://", "https://", "data:"))):
            continue
        del part[key]
        part["image"] = load_picture(source)
        return


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
