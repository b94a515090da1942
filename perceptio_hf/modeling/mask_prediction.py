"""From [SEG] states to masks: the projector, SAM2's image encoder and its mask decoder."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call

from .placement import device_of, is_here, read_parameter
from .shared_mask_decoder import best_masks, can_share

# SAM2 normalises with ImageNet's statistics whatever InternVL's image processor does.
SAM2_MEAN = (0.485, 0.456, 0.406)
SAM2_STD = (0.229, 0.224, 0.225)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 3, height, width) in [0, 1], or bytes -> float32 as SAM2 wants them."""
    mean, std = (pixels.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (SAM2_MEAN, SAM2_STD))
    return ((pixels / 255 if pixels.dtype == torch.uint8 else pixels) - mean) / std


class SegProjector(nn.Module):
    """Projects the language model's [SEG] state into the prompt space of the mask decoder (as Sa2VA and LISA do)."""

    def __init__(self, hidden_size: int, prompt_size: int):
        super().__init__()
        self.linear_in = nn.Linear(hidden_size, hidden_size)
        self.linear_out = nn.Linear(hidden_size, prompt_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(n, hidden) of any dtype -> (n, prompt) in the projector's own dtype."""
        return self.linear_out(self.linear_in(states.to(self.linear_in.weight.dtype)).relu())


class MaskFeatures:
    """SAM2's features of the `pictures` pictures that were asked about last, each beside the pixels it was made of."""

    def __init__(self, pictures: int):
        self.pictures = pictures
        self._kept: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # the last used at the end

    def get(self, pixels: torch.Tensor) -> list[torch.Tensor] | None:
        """pixels: (3, S, S) -> its features, if they are kept."""
        for number, (known, features) in enumerate(self._kept):
            if known.shape == pixels.shape and known.device == pixels.device and torch.equal(known, pixels):
                self._kept.append(self._kept.pop(number))
                return features
        return None

    def put(self, pixels: torch.Tensor, features: list[torch.Tensor]) -> None:
        """Keep the features of a picture, and forget those of the one that was used longest ago."""
        self._kept = [*self._kept, (pixels, features)][-self.pictures :]


class MaskPredictionMixin:
    """`predict_masks` and its two halves, for a model with `mask_model` (SAM2), `seg_projector` and their `config`.

    SAM2 may lie on another device than the language model, on disk, or in shards: parameters are read within their
    modules' forward only, and every index goes where the indexed tensor is.
    """

    _mask_features: tuple[MaskFeatures, ...] = ()  # of the contexts that are open

    @contextmanager
    def keep_mask_features(self, pictures: int = 8):
        """Within this context SAM2 encodes a picture once, however often it is asked about, as in a conversation.

        Args:
            pictures: how many are kept; at 1024 pixels 17 MB each, and 13 MB of pixels that they are known by.

        The features are those of the weights as they are: leave the context before these change. Where gradients are
        computed nothing is kept.
        """
        if not isinstance(pictures, int) or pictures < 1:
            raise ValueError(f"keep_mask_features(pictures={pictures!r}): keep 1 or more, or leave the context out.")
        own = MaskFeatures(pictures)
        self._mask_features = (*self._mask_features, own)
        try:
            yield
        finally:  # of several threads the first to come need not be the last to go
            self._mask_features = tuple(kept for kept in self._mask_features if kept is not own)

    @property
    def mask_size(self) -> tuple[int, int]:
        """(height, width) of the mask decoder's output: four times its image embedding."""
        height, width = self.mask_model.prompt_encoder.image_embedding_size
        return 4 * height, 4 * width

    def encode_mask_pixels(self, mask_pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """SAM2's image features: (n, 3, S, S) -> (n, C, S/16, S/16) and the two finer maps of the mask decoder.

        Pixels are normalised, or bytes (uint8) that are not.

        The image encoder is frozen; gradients reach `conv_s0` and `conv_s1`, which belong to the mask decoder
        (`Sam2Model.get_image_embeddings` would cut them).
        """
        sam = self.mask_model
        with torch.no_grad():
            pixels = mask_pixel_values.to(device_of(sam.vision_encoder))
            pixels = normalised(pixels) if pixels.dtype == torch.uint8 else pixels
            pixels = pixels.to(sam.no_memory_embedding.dtype)
            features = sam.vision_encoder(pixels, return_dict=True).fpn_hidden_states  # fine to coarse, NCHW
        fine = [sam.mask_decoder.conv_s0(features[0]), sam.mask_decoder.conv_s1(features[1])]
        no_memory = read_parameter(sam, "no_memory_embedding").to(features[2].device)
        return features[2] + no_memory.view(1, -1, 1, 1), fine

    def predict_masks(
        self, seg_states: torch.Tensor, mask_pixel_values: torch.Tensor, pictures: torch.Tensor | Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of n [SEG] states in one call of the mask decoder; each picture they lie on is encoded once.

        Args:
            seg_states: (n, hidden), n >= 1.
            mask_pixel_values: (p, 3, S, S) all pictures of the batch.
            pictures: n indices 0..p-1.

        Returns:
            (n, h, w) logits and (n,) predicted IoU, float32.
        """
        numbers = [int(picture) for picture in pictures]  # on the host they may index tensors of any device
        used = sorted(set(numbers))
        index = [used.index(number) for number in numbers]
        embedding, *fine = self._features_of(mask_pixel_values, used)
        prompts = self.seg_projector(seg_states.to(device_of(self.seg_projector)))
        return self.decode_masks(prompts, embedding, fine, index)

    def _features_of(self, mask_pixel_values: torch.Tensor, used: list[int]) -> list[torch.Tensor]:
        """Features of some of the pictures, three tensors of (len(used), ...); what is kept is not computed again."""
        open_stores = self._mask_features
        store = None if torch.is_grad_enabled() or not open_stores else open_stores[-1]
        kept = {} if store is None else {number: store.get(mask_pixel_values[number]) for number in used}
        missing = [number for number in used if kept.get(number) is None]
        if not missing:
            return [torch.stack(parts) for parts in zip(*(kept[number] for number in used), strict=True)]
        embedding, fine = self.encode_mask_pixels(mask_pixel_values[missing])
        if store is None:
            return [embedding, *fine]
        for row, number in enumerate(missing):
            kept[number] = [part[row].clone() for part in (embedding, *fine)]
            store.put(mask_pixel_values[number].clone(), kept[number])
        return [torch.stack(parts) for parts in zip(*(kept[number] for number in used), strict=True)]

    def decode_masks(
        self,
        prompts: torch.Tensor,
        embedding: torch.Tensor,
        fine: list[torch.Tensor],
        pictures: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM2's mask decoder on n prompts (n, C) with the features of pictures -> (n, h, w), (n,).

        Args:
            pictures: n indices into the features; None: there are features for each prompt, in order.
        """
        sam, count = self.mask_model, prompts.shape[0]
        first = torch.zeros(1, dtype=torch.long, device=embedding.device)
        sparse = prompts.to(embedding)[:, None, None]  # (n, 1 prompt, 1 token, C)
        if self.config.mask_padding_points:
            padding = sam.prompt_encoder.not_a_point_embed(first).to(embedding).view(1, 1, 1, -1)
            sparse = torch.cat([padding.expand(count, 1, self.config.mask_padding_points, -1), sparse], dim=2)
        dense = sam.prompt_encoder.no_mask_embed(first).to(embedding).view(1, -1, 1, 1)  # as for a picture without mask
        positions, multimask = self._positions(embedding), self.config.mask_multimask_output
        if can_share(sam.mask_decoder, embedding, multimask=multimask):
            numbers = range(count) if pictures is None else pictures
            masks, scores = best_masks(
                sam.mask_decoder, embedding + dense, positions, sparse[:, 0], fine, numbers, multimask=multimask
            )
            return masks.float(), scores.float()
        if pictures is not None:
            index = torch.tensor(pictures, device=embedding.device)
            embedding, fine = embedding[index], [feature[index.to(feature.device)] for feature in fine]
        arguments = {
            "image_embeddings": embedding,
            "image_positional_embeddings": positions.expand(count, -1, -1, -1),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": dense.expand(count, -1, *embedding.shape[2:]),
            "multimask_output": multimask,
            "high_resolution_features": fine,
        }
        absent, decoder = self._absent_tokens(embedding), sam.mask_decoder
        outputs = functional_call(decoder, absent, kwargs=arguments) if absent else decoder(**arguments)
        masks, scores = outputs[:2]
        masks, scores = masks[:, 0], scores[:, 0]  # (n, m, h, w), (n, m)
        best = scores.argmax(-1)
        rows = torch.arange(count, device=best.device)
        return masks[rows, best].float(), scores[rows, best].float()

    def _positions(self, embedding: torch.Tensor) -> torch.Tensor:
        """(1, C, height, width) positional encoding, as `Sam2Model.get_image_wide_positional_embeddings` makes it."""
        height, width = embedding.shape[2:]
        grid = torch.ones(height, width, device=embedding.device, dtype=embedding.dtype)
        rows, columns = (grid.cumsum(0) - 0.5) / height, (grid.cumsum(1) - 0.5) / width
        encoded = self.mask_model.shared_image_embedding(torch.stack([columns, rows], dim=-1))
        return encoded.to(embedding).permute(2, 0, 1)[None]

    def _absent_tokens(self, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mask decoder's own tokens, whose weights it reads past their forward, where they are not here now."""
        absent = {}
        for name in ("obj_score_token", "iou_token", "mask_tokens"):
            token = getattr(self.mask_model.mask_decoder, name)
            if not is_here(token.weight):
                index = torch.arange(token.num_embeddings, device=embedding.device)
                absent[f"{name}.weight"] = token(index).to(embedding)
        return absent
