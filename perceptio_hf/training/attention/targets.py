"""Where the tokens of any batch had better look: codes at their own place in the picture, [SEG] at its object."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from perceptio_hf.tokens import SpatialVocabulary, read_sequence
from perceptio_hf.training.losses.labels import IGNORED_LABEL, LossCounts
from perceptio_hf.training.losses.parts import LoggedPart

from .loss import SEGMENT, WRITE, looking_costs

# The parts of the loss: what they are means over, and the titles of their curves.
LOOKS = {
    "look_write": LoggedPart("look_write", "codes", "where codes look"),
    "look_segment": LoggedPart("look_segment", "masks", "where [SEG] looks"),
}
_MOSTLY = 0.5  # image tokens count as the object's that hold at least this share of what the fullest one holds


def places_to_look(
    input_ids: Tensor,
    labels: Tensor,
    vocabulary: SpatialVocabulary,
    mask_targets: Tensor,
    *,
    image_seq_length: int,
) -> Tensor:
    """What `alignment.looking_costs` takes, for the depth spans and [SEG] tokens that are learnt.

    Of a picture in several tiles the last one is meant, which shows all of it.

    Args:
        input_ids, labels: (b, L).
        mask_targets: (m, h, w) share inside, one for each [SEG] among the labels, in reading order.
        image_seq_length: image tokens of one tile, a square number.

    Returns:
        (b, L, L) uint8: `WRITE` where the state that predicts a code had better look, `SEGMENT` where [SEG] had, or 0.
    """
    looks = torch.zeros(*input_ids.shape, input_ids.shape[1], dtype=torch.uint8)
    under_cells = _image_tokens_of_cells(vocabulary.num_depth_tokens, image_seq_length)
    under_masks, mask = _image_tokens_of_masks(mask_targets.cpu(), image_seq_length), 0
    learnt = (labels != IGNORED_LABEL).tolist()
    for row, ids in enumerate(input_ids.tolist()):
        tiles, read = _last_tiles(ids, vocabulary.image, image_seq_length), read_sequence(ids, vocabulary)
        for seg in read.segs:
            if learnt[row][seg.position]:
                if tiles:
                    tile = slice(tiles[seg.picture], tiles[seg.picture] + image_seq_length)
                    looks[row, seg.position, tile] = under_masks[mask] * SEGMENT
                mask += 1
        for span in read.spans:
            if learnt[row][span.position] and tiles:
                tile = slice(tiles[span.picture], tiles[span.picture] + image_seq_length)
                codes = slice(span.position, span.position + vocabulary.num_depth_tokens)
                looks[row, codes, tile] = under_cells * WRITE
    return looks.to(input_ids.device)


def looking_parts(attention: Tensor, looks: Tensor, counts: LossCounts) -> dict[str, Tensor]:
    """What tokens cost that look elsewhere than they should: `look_write` over codes, `look_segment` over masks.

    Args:
        attention: (b, h, L, L) of the heads that are taught.
        looks: of `places_to_look`.
        counts: of the whole step.
    """
    costs, reasons = looking_costs(attention, looks)
    return {
        "look_write": costs[reasons == WRITE].sum() / max(counts.codes, 1),
        "look_segment": costs[reasons == SEGMENT].sum() / max(counts.masks, 1),
    }


def look_layer(config: PreTrainedConfig, layer: int | None) -> int:
    """The layer whose attention is taught; None: the one a third of the way up.

    Args:
        config: of the language model.

    Raises:
        ValueError: if there is no such layer, or the attention does not give its weights.
    """
    if config._attn_implementation != "eager":
        raise ValueError(
            f"look_weight needs attention weights, which {config._attn_implementation!r} attention does not give: load "
            "the model with attn_implementation='eager'."
        )
    layer = config.num_hidden_layers // 3 if layer is None else layer
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"look_layer is {layer}; the language model has layers 0 to {config.num_hidden_layers - 1}.")
    return layer


def _last_tiles(ids: list[int], image: int, length: int) -> list[int]:
    """For each picture, a run of image tokens, where its last tile begins."""
    ends = [place + 1 for place, token in enumerate(ids) if token == image and ids[place + 1 : place + 2] != [image]]
    return [end - length for end in ends]


def _image_tokens_of_cells(num_cells: int, length: int) -> Tensor:
    """(num_cells, length) uint8, 1 where a cell of the depth grid and an image token overlap."""
    cells, tokens = math.isqrt(num_cells), math.isqrt(length)
    low, high = torch.arange(cells) / cells, (torch.arange(cells) + 1) / cells
    start, end = torch.arange(tokens) / tokens, (torch.arange(tokens) + 1) / tokens
    slack = 1e-6  # edges that only touch
    along = (low[:, None] < end - slack) & (high[:, None] > start + slack)  # (cells, tokens)
    return torch.kron(along.to(torch.uint8), along.to(torch.uint8))


def _image_tokens_of_masks(targets: Tensor, length: int) -> Tensor:
    """(m, length) uint8, 1 where an image token mostly shows the object; all 0 for an empty mask."""
    side = math.isqrt(length)
    if not len(targets):
        return torch.zeros(0, length, dtype=torch.uint8)
    shares = F.adaptive_avg_pool2d(targets.float()[:, None], side).flatten(1)
    return ((shares > 0) & (shares >= _MOSTLY * shares.amax(1, keepdim=True))).to(torch.uint8)
