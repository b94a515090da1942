"""The language lesson of the tiny training: what the model learns from one batch of rendered scenes and questions.

The losses are those of `losses.composite_loss`; attention is taught where to look (`alignment`). All questions about a
picture share the keys and values of its prefix, which is exact and several times cheaper than repeating the picture.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
from perceptio_hf.modeling.modeling_perceptio import CACHE, PerceptioForConditionalGeneration, picture_features
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.training.attention.loss import (
    FIND,
    FIND_OBJECT,
    READ,
    SEGMENT,
    WRITE,
    alignment_loss,
    looking_costs,
    mean_by_reason,
)
from perceptio_hf.training.losses import LossCounts, LossWeights, composite_loss, loss_counts
from perceptio_hf.training.losses.labels import IGNORED_LABEL
from perceptio_hf.world import render_scene
from perceptio_hf.world.cells import NEARNESS_LEVELS, cell_words, nearness_words

from .batches import SceneBatch, TurnBatch
from .lookup_lesson import LookupAsker

_REASONS = {
    WRITE: "look_write",
    FIND: "look_find",
    READ: "look_read",
    SEGMENT: "look_segment",
    FIND_OBJECT: "look_object",
}
# The layer whose attention is taught, for each reason: words must have been read before what they name can be found.
_LAYERS = {1: (WRITE, FIND, READ), 2: (SEGMENT, FIND_OBJECT)}
_LOOKUP_LAYER = 1
# The token loss is over the codes alone, so that only the count loss keeps probability on them: at a weight of 5, 18 %
# of spans sampled without the grammar broke, at 50 some 5 %, at 100 (and after many more steps) 1.8 %.
LESSON_WEIGHTS = LossWeights(count=100.0, count_beta=1e-3)
_NEARNESS_SCENES, _NEARNESS_SEED = 256, 40_000_000


def nearness_of_codes(codec: DepthVQVAE) -> Tensor:
    """(K,) the nearness level, 0 to NEARNESS_LEVELS - 1, that each code stands for.

    A code's nearness is the mean of what cells with that code decode to, over rendered scenes; the levels hold equally
    many cells each. Codes that no cell has get level 0.
    """
    maps = [
        DepthMap.from_metric(render_scene(_NEARNESS_SEED + k, size=codec.config.image_size).depth).relative
        for k in range(_NEARNESS_SCENES)
    ]
    with torch.no_grad():
        codes = codec.encode(torch.stack([torch.as_tensor(values) for values in maps]))
        cells = F.adaptive_avg_pool2d(codec.decode(codes)[:, None], codec.config.grid_size).flatten(1)
    sums = torch.zeros(codec.config.num_codes).index_add_(0, codes.flatten(), cells.flatten())
    means = sums / codes.flatten().bincount(minlength=codec.config.num_codes).clamp(min=1)
    edges = means[codes].flatten().quantile(torch.linspace(0, 1, NEARNESS_LEVELS + 1)[1:-1])
    return torch.bucketize(means, edges)


@dataclass(frozen=True)
class Lesson:
    """What one batch gave: the loss in words and depth, its parts, and states for the losses of pictures.

    `seg_states` (m, d) in reading order, `image_states` (b, g * g, d) after the projector, `codes` (b, N).
    """

    loss: Tensor
    parts: dict[str, Tensor]
    seg_states: Tensor
    image_states: Tensor
    codes: Tensor


class LanguageLesson:
    """Reads batches of scenes with a model.

    Args:
        nearness: (K,) level of each code, see `nearness_of_codes`.
        weights: of the parts of the composite objective.
        plain: take cross-entropy over all learnt tokens in its place.
        alignment: weight of `alignment_loss`.
        heads: how many heads of a layer are taught where to look.
        revise: spans of a batch that are also asked about without their pictures (`look_up`), lest it be forgotten.
        compare: spans of a batch in which named things are also compared without pictures (`compare_names`).
        span_noise: mean share of a span's input codes that are replaced by others of the span; those that the answer
            speaks of stay. As `PerceptioSFTConfig.span_noise`: spans are then decoded in fewer passes.
    """

    def __init__(
        self,
        model: PerceptioForConditionalGeneration,
        processor: PerceptioProcessor,
        nearness: Tensor,
        *,
        weights: LossWeights | None = None,
        plain: bool = False,
        alignment: float = 1.0,
        heads: int = 2,
        revise: int = 0,
        compare: int = 0,
        span_noise: float = 0.0,
    ):
        device = model.device
        self.model, self.processor, self.nearness, self.plain = model, processor, nearness.to(device), plain
        self.weights = weights or LESSON_WEIGHTS
        self.alignment, self.heads, self.span_noise = alignment, heads, span_noise
        self.revise, self.compare = revise, compare
        self.vocabulary = model.spatial_vocabulary()
        self.code_ids = torch.tensor(model.config.depth_token_ids, device=device)
        grid = model.config.depth_config.grid_size
        to_id = processor.tokenizer.convert_tokens_to_ids
        self.first_cell = to_id(cell_words(grid)[0])
        self.first_level = to_id(nearness_words()[0])
        self.asker = LookupAsker(processor, nearness)

    def read(self, scenes: SceneBatch) -> Lesson:
        """Losses of all turns of a batch."""
        codes = self.model.depth_model.encode(scenes.inverse_depth)  # (b, N)
        past = DynamicCache()
        prefix = self.model.model(input_ids=scenes.prefix_ids, pixel_values=scenes.pixel_values, **{CACHE: past})
        labels = [self._fill(turns.labels, codes[turns.rows]) for turns in scenes.turns]
        counts = sum((loss_counts(filled, self.vocabulary) for filled in labels), LossCounts())
        total, parts, states, looking = 0.0, {}, [], []
        for turns, filled in zip(scenes.turns, labels, strict=True):
            ids = self._disturbed(turns, self._fill(turns.input_ids, codes[turns.rows]))
            hidden, attention = self._behind(past, turns.rows, ids)
            loss, own = self._token_losses(hidden, filled, scenes, turns, counts)
            total = total + loss
            parts = {name: parts.get(name, 0) + own.get(name, 0) for name in parts | own}
            states.append(hidden[turns.labels == self.vocabulary.seg])
            for layer, reasons in _LAYERS.items():
                wanted = torch.isin(turns.looks, torch.tensor(reasons, dtype=torch.uint8, device=turns.looks.device))
                looking.append(looking_costs(attention[layer], turns.looks * wanted))
        costs, reasons = (torch.cat(group) for group in zip(*looking, strict=True))
        if len(costs):
            total = total + self.alignment * mean_by_reason(costs, reasons)
            parts |= {name: costs[reasons == why].mean() for why, name in _REASONS.items() if (reasons == why).any()}
        if self.revise:
            revision, figures = self.look_up(codes[: self.revise])
            total = total + revision
            parts |= {name: figures[name] for name in ("read", "concluded") if name in figures}
        if self.compare:
            comparison, figures = self.compare_names(codes[: self.compare])
            total = total + comparison
            parts["compared"] = figures["compared"]
        return Lesson(total, parts, torch.cat(states), picture_features(prefix), codes)

    def look_up(self, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of questions about spans of `codes` (b, N) alone, without pictures."""
        batch = self.asker.batch(codes, torch.default_generator)
        past = DynamicCache()
        self.model.model.language_model(input_ids=batch.prefix_ids, **{CACHE: past})
        hidden, attention = self._behind(past, batch.rows, batch.input_ids)
        logits, targets = self._predicted(hidden, batch.labels)
        parts = {
            "text": F.cross_entropy(logits, targets),
            "looking": alignment_loss(attention[_LOOKUP_LAYER], batch.looks),
        }
        right = (logits.argmax(-1) == targets).float().detach()
        is_level = (targets >= self.first_level) & (targets < self.first_level + NEARNESS_LEVELS)
        concluding = ~is_level & (targets != self.asker.stop)
        figures = {"read": right[is_level].mean()}
        if concluding.any():
            figures["concluded"] = right[concluding].mean()
        return parts["text"] + self.alignment * parts["looking"], parts | figures

    def compare_names(self, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of comparisons of named things behind spans of `codes` (b, N), without pictures."""
        batch = self.asker.comparisons(codes, torch.default_generator)
        output = self.model.model(input_ids=batch.input_ids, output_attentions=True)
        logits, targets = self._predicted(output.last_hidden_state, batch.labels)
        words = F.cross_entropy(logits, targets)
        looking = alignment_loss(output.attentions[_LOOKUP_LAYER][:, : self.heads], batch.looks)
        right = (logits.argmax(-1) == targets).float().detach()
        return words + self.alignment * looking, {"words": words, "compared": right.mean()}

    def _predicted(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (t, V) for all tokens that are learnt, and these (t,); `hidden` (n, L, d), `labels` (n, L)."""
        learnt = labels[:, 1:] != IGNORED_LABEL
        return self.model.lm_head(hidden[:, :-1][learnt]).float(), labels[:, 1:][learnt]

    def _token_losses(
        self, hidden: Tensor, labels: Tensor, scenes: SceneBatch, turns: TurnBatch, counts: LossCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.plain:
            loss = F.cross_entropy(*self._predicted(hidden, labels), reduction="sum") / (
                counts.text + counts.markers + counts.codes
            )
            return loss, {"cross_entropy": loss}
        has_span = (turns.labels == self.vocabulary.depth_start).any(1)
        return composite_loss(
            hidden,
            self.model.lm_head,
            labels,
            self.vocabulary,
            codec=self.model.depth_model,
            depth=scenes.inverse_depth[turns.rows[has_span]],
            weights=self.weights,
            counts=counts,
        )

    def _behind(self, prefix: DynamicCache, rows: Tensor, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """States (n, L, d) of `ids` (n, L) behind the cached prefixes `rows` (n,), with gradients through both, and of
        every layer the attention (n, heads, L, P + L) that may be taught where to look."""
        cache = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in prefix.layers])
        output = self.model.model(input_ids=ids, **{CACHE: cache}, output_attentions=True)
        return output.last_hidden_state, [attention[:, : self.heads] for attention in output.attentions]

    def _disturbed(self, turns: TurnBatch, ids: Tensor) -> Tensor:
        """`ids` (n, L) with some codes of each span replaced by others of it, see `span_noise`."""
        starts = turns.input_ids == self.vocabulary.depth_start
        rows, first = starts.nonzero(as_tuple=True)
        if not self.span_noise or not len(rows):
            return ids
        length = self.model.config.num_depth_tokens
        places = first[:, None] + 1 + torch.arange(length, device=ids.device)  # (s, N)
        codes, cells = ids[rows[:, None], places], ids[rows] - self.first_cell
        spoken = torch.zeros(len(rows), length + 1, dtype=torch.bool, device=ids.device)  # the last column: other words
        spoken.scatter_(1, cells.where((cells >= 0) & (cells < length), length), True)
        share = 2 * self.span_noise * torch.rand(len(rows), 1, device=ids.device)
        others = codes.gather(1, torch.rand(codes.shape, device=ids.device).argsort(1))
        lost = (torch.rand(codes.shape, device=ids.device) < share) & ~spoken[:, :length]
        return ids.index_put((rows[:, None], places), torch.where(lost, others, codes))

    def _fill(self, ids: Tensor, codes: Tensor) -> Tensor:
        """Put each row's codes (n, N) into its blank depth span, if it has one, and the nearness behind its cells."""
        ids = ids.clone()
        blank = ids == self.code_ids[0]
        ids[blank] = self.code_ids[codes[blank.any(1)]].flatten()
        rows, places = (ids == self.first_level).nonzero(as_tuple=True)
        if len(rows):
            cells = ids[rows, places - 1] - self.first_cell
            ids[rows, places] = self.first_level + self.nearness[codes[rows, cells]]
        return ids
