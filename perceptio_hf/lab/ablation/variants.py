"""What each part of the training contributes: variants trained alike from one base, over several seeds.

A Perceptio is made from a model that answers questions about pictures already. Here that is the base, which every run
starts from: a training with masks and words, then one with depth spans too, both by plain cross-entropy; small models
need many more steps to write a span at all than to learn what the variants differ in. Every run then has the same
number of steps and stream of scenes; what differs is the answers that are learnt and the losses. The vision tower,
SAM2's image encoder and the depth codec are frozen, as in fine-tuning a real checkpoint; vision tower and SAM2 may come
from another checkpoint, which has learnt to see for longer.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from perceptio_hf.data.keys import build
from perceptio_hf.files import new_folder, read_yaml, replacing, write_json
from perceptio_hf.lab.lessons.answers import AnswerForm
from perceptio_hf.lab.lessons.batches import SceneBatch, click_prompts, scene_batches
from perceptio_hf.lab.lessons.conversation_lesson import LESSON_WEIGHTS, LanguageLesson, nearness_of_codes
from perceptio_hf.lab.lessons.model import IMAGE_SIZE
from perceptio_hf.lab.lessons.stages import adamw, autocast, schedule, set_rate
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.training.losses import LossWeights, mask_loss, score_loss

from .figures import METRICS, POINTS, evaluate

_SPAN_ALIGNMENT = 4.0  # weight of taught attention while the base learns to write spans
_SHOWN_EVERY = 10  # steps between two looks at the losses, which a GPU has to be waited for
_REVISED = 4  # spans per step that are also asked about without their pictures
# Of the scenes that the two parts of the base and the variants are trained on.
_WORDS_SEED, _SPANS_SEED, _FIRST_SEED = 190_000_000, 195_000_000, 200_000_000


@dataclass(frozen=True)
class Variant:
    """What one variant learns: the form of its answers and the losses of its words.

    `plain` takes cross-entropy over all learnt tokens in place of the composite objective with `weights`; `span_noise`
    is that of `LanguageLesson`.
    """

    form: AnswerForm
    plain: bool = False
    weights: LossWeights = LESSON_WEIGHTS
    span_noise: float = 0.0


_SPANS, _NO_RECONSTRUCTION = AnswerForm(), replace(LESSON_WEIGHTS, reconstruction=0.0)
VARIANTS = {
    "answers_only": Variant(AnswerForm(masks=False, depth=False, steps=False), plain=True),
    "steps_only": Variant(AnswerForm(masks=False, depth=False), plain=True),
    "spans_ce": Variant(_SPANS, plain=True),
    "composite": Variant(_SPANS, weights=_NO_RECONSTRUCTION),
    "full": Variant(_SPANS),
    "full_vocabulary": Variant(_SPANS, weights=replace(LESSON_WEIGHTS, token_over="vocabulary")),
    "full_noise": Variant(_SPANS, span_noise=0.5),
    "full_no_seg": Variant(AnswerForm(masks=False)),
    "seg_only": Variant(AnswerForm(depth=False, steps=False, words=False), plain=True),
}
_CLAIM = "recipe.json"
# What of a recipe the base depends on.
_BASE_KEYS = ("words_steps", "words_learning_rate", "spans_steps", "spans_learning_rate", "batch")
_WORDS_BASE = Variant(AnswerForm(depth=False), plain=True)  # finds what a question names, and keeps its masks alive
_SPANS_BASE = VARIANTS["spans_ce"]


@dataclass(frozen=True)
class AblationRecipe:
    """Settings of all runs; `recipes/ablation.yaml` holds those of the published table.

    Args:
        words_steps, spans_steps: of the base that all runs start from, without and then with spans.
        words_learning_rate, spans_learning_rate: as `learning_rate`, for these.
        steps, batch, learning_rate: of each run; the rate is the peak of a warm-up and cosine schedule.
        dice_weight, click_weight: of the mask loss, and of pulling [SEG] towards SAM2's own embedding of a click.
        closest, replaced: fair questions for each number of points, and how many of them get their span replaced.
        scenes: held-out scenes for all other metrics.
        malformed: sampled responses without the grammar.
    """

    words_steps: int = 1600
    words_learning_rate: float = 1e-3
    spans_steps: int = 1000
    spans_learning_rate: float = 2e-3
    steps: int = 300
    batch: int = 8
    learning_rate: float = 1e-3
    dice_weight: float = 4.0
    click_weight: float = 1.0
    closest: int = 500
    replaced: int = 150
    scenes: int = 192
    malformed: int = 1024

    @classmethod
    def read(cls, path: str | Path) -> "AblationRecipe":
        """Read a YAML file.

        Raises:
            ValueError: for a file that is no mapping, a key that is unknown, or a value of another kind or not above 0.
        """
        return build(cls, read_yaml(path), str(path))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        if self.replaced < max(POINTS):
            raise ValueError(f"replaced is {self.replaced}; it must be {max(POINTS)} or more, one whole set.")


def train_base(
    recipe: AblationRecipe,
    start: str | Path,
    out: str | Path,
    *,
    sight: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Train the base from the checkpoint `start`; returns its folder, `out`/base, which is not made twice.

    Args:
        sight: a checkpoint whose vision tower and SAM2 take the place of the start's.
        device: where it is trained.

    Raises:
        ValueError: if `out` holds the base of another recipe or start, or `sight` is of another shape or codec.
    """
    claim = {name: getattr(recipe, name) for name in _BASE_KEYS}
    claim |= {"start": _digest(start), "sight": sight and _digest(sight)}
    torch.set_num_threads(1)

    def learn_words() -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
        model, processor = _load(start)
        if sight is not None:
            _take_sight(model, sight)
        # Revised, lest the look-ups that the start knows be lost.
        lesson = _lesson(model, processor, _WORDS_BASE, device, revise=_REVISED)
        settings = replace(recipe, learning_rate=recipe.words_learning_rate)
        _train(lesson, _WORDS_BASE, settings, recipe.words_steps, seed=0, first_seed=_WORDS_SEED, name="base, words")
        return model, processor

    def learn_spans() -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
        model, processor = _load(words)
        lesson = _lesson(model, processor, _SPANS_BASE, device, revise=_REVISED, alignment=_SPAN_ALIGNMENT)
        settings = replace(recipe, learning_rate=recipe.spans_learning_rate)
        _train(lesson, _SPANS_BASE, settings, recipe.spans_steps, seed=0, first_seed=_SPANS_SEED, name="base, spans")
        return model, processor

    words = _made_once(Path(out) / "words", claim, learn_words)
    return _made_once(Path(out) / "base", claim, learn_spans)


def _made_once(
    folder: Path,
    claim: dict,
    make: Callable[[], tuple[PerceptioForConditionalGeneration, PerceptioProcessor]],
) -> Path:
    """The folder of the checkpoint that `make` gives, unless it is there already."""
    if folder.exists():
        if json.loads((folder / _CLAIM).read_text(encoding="utf-8")) != claim:
            raise ValueError(f"{folder} was trained by another recipe or from another start; choose another folder.")
        return folder
    with new_folder(folder) as fresh:
        for part in make():
            part.save_pretrained(fresh)
        write_json(fresh / _CLAIM, claim)
    return folder


def run_variant(
    name: str,
    seed: int,
    recipe: AblationRecipe,
    start: str | Path,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    position: int = 0,
) -> dict[str, float]:
    """Train one variant from the checkpoint `start` and evaluate it; the scores are kept in `out`/NAME-SEED.json.

    A run whose scores are there already is not repeated, one that was trained is only evaluated, whichever `device` did
    so.

    Raises:
        ValueError: if `out` holds the scores of another recipe or start, or the name is unknown.
    """
    if name not in VARIANTS:
        raise ValueError(f"Unknown variant {name!r}; use {', '.join(VARIANTS)}.")
    path, claim = Path(out) / f"{name}-{seed}.json", asdict(recipe) | {"start": _digest(start)}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["recipe"] != claim:
            raise ValueError(f"{path} holds the scores of another recipe; choose another folder.")
        return kept["scores"]
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    model, processor = _load(start)
    variant, weights = VARIANTS[name], path.with_suffix(".pt")
    if weights.exists():
        kept = torch.load(weights, weights_only=True, map_location="cpu")
        if kept["recipe"] != claim:
            raise ValueError(f"{weights} was trained by another recipe; choose another folder.")
        model.load_state_dict(kept["model"])
    else:
        revise = _REVISED if variant.form.depth and variant.form.words else 0
        lesson = _lesson(model, processor, variant, device, revise=revise)
        first_seed = _FIRST_SEED + seed * 10_000_000
        label = f"{name} {seed}"
        _train(lesson, variant, recipe, recipe.steps, seed=seed, first_seed=first_seed, name=label, position=position)
        with replacing(weights) as partial:
            torch.save({"recipe": claim, "model": model.state_dict()}, partial)
    scores = evaluate(
        model.to(device).eval(),
        processor,
        form=variant.form,
        closest=recipe.closest,
        replaced=recipe.replaced,
        scenes=recipe.scenes,
        malformed=recipe.malformed,
    )
    write_json(path, {"recipe": claim, "scores": scores})
    weights.unlink()
    return scores


def _digest(start: str | Path) -> str:
    """What tells the weights of one start from those of another."""
    digest = hashlib.sha256()
    for path in sorted(Path(start).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _load(folder: str | Path) -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
    model = PerceptioForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return model, PerceptioProcessor.from_pretrained(folder)


def _take_sight(model: PerceptioForConditionalGeneration, folder: str | Path) -> None:
    """Put the vision tower and SAM2 of the checkpoint `folder` into `model`."""
    other, _ = _load(folder)
    parts = ("model.vision_tower.", "mask_model.", "depth_model.")
    weights = {name: tensor for name, tensor in other.state_dict().items() if name.startswith(parts)}
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(parts)}
    if {name: tensor.shape for name, tensor in own.items()} != {name: item.shape for name, item in weights.items()}:
        raise ValueError(f"{folder} has a vision tower, SAM2 or codec of another shape than the start.")
    if any(not torch.equal(own[name], weights[name]) for name in own if name.startswith("depth_model.")):
        raise ValueError(f"{folder} has another depth codec than the start; its vision tower knows other codes.")
    model.load_state_dict(weights, strict=False)


def _lesson(
    model: PerceptioForConditionalGeneration,
    processor: PerceptioProcessor,
    variant: Variant,
    device: str | torch.device,
    *,
    revise: int,
    alignment: float = 1.0,
) -> LanguageLesson:
    nearness = nearness_of_codes(model.depth_model)  # of rendered scenes, which lie on the host
    return LanguageLesson(
        model.to(device),
        processor,
        nearness,
        weights=variant.weights,
        plain=variant.plain,
        alignment=alignment,
        revise=revise,
        span_noise=variant.span_noise,
    )


def _train(
    lesson: LanguageLesson,
    variant: Variant,
    recipe: AblationRecipe,
    steps: int,
    *,
    seed: int,
    first_seed: int,
    name: str,
    position: int = 0,
) -> None:
    torch.manual_seed(seed)
    device = lesson.model.device
    progress = tqdm(total=steps, desc=name, position=position, leave=False)
    parameters = _trainable(lesson.model)
    optimizer = adamw(lesson.model, parameters)
    batches = scene_batches(
        lesson.processor,
        size=IMAGE_SIZE,
        batch_size=recipe.batch,
        first_seed=first_seed,
        form=variant.form,
        workers=0,
    )
    for step, scenes in enumerate(islice(batches, steps)):
        set_rate(optimizer, recipe.learning_rate * schedule(step, steps, warmup=20))
        with autocast(device):
            loss, parts = _loss(lesson, scenes.to(device), recipe)
        looked_at = step % _SHOWN_EVERY == 0 or step + 1 == steps  # weights that are lost stay so
        if looked_at and not torch.isfinite(loss):
            raise ValueError(f"{name}, step {step}: the loss is {loss.item()}; lower the learning rate of the recipe.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if looked_at:
            progress.set_postfix({name: f"{value.item():.2f}" for name, value in parts.items()}, refresh=False)
        progress.update()
    progress.close()


def _trainable(model: PerceptioForConditionalGeneration) -> list[nn.Parameter]:
    model.train().requires_grad_(False)
    model.model.vision_tower.eval()
    parts = [model.model.language_model, model.model.multi_modal_projector, model.lm_head, model.seg_projector]
    parts.append(model.mask_model.mask_decoder)
    return list({id(p): p for part in parts for p in part.requires_grad_().parameters()}.values())


def _loss(
    lesson: LanguageLesson, scenes: SceneBatch, recipe: AblationRecipe
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model, read = lesson.model, lesson.read(scenes)
    if not len(read.seg_states):
        return read.loss, read.parts
    logits, scores = model.predict_masks(read.seg_states, scenes.mask_pixel_values, scenes.mask_rows)
    targets = scenes.mask_targets(tuple(logits.shape[1:]))
    masks, _ = mask_loss(logits, targets, dice_weight=recipe.dice_weight)
    clicks = click_prompts(model, scenes)
    pull = nn.functional.mse_loss(model.seg_projector(read.seg_states).float(), clicks.detach().float())
    total = read.loss + masks + 0.5 * score_loss(scores, logits, targets) + recipe.click_weight * pull
    return total, read.parts | {"masks": masks}


def summarise(scores: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """{variant: [scores of each seed]} -> {variant: {metric: {mean, std, n}}}; std is the sample's, 0 for one seed."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for variant, runs in scores.items():
        table[variant] = {}
        for metric in METRICS:
            values = torch.tensor([run[metric] for run in runs if metric in run], dtype=torch.float64)
            if len(values):
                spread = float(values.std()) if len(values) > 1 else 0.0
                table[variant][metric] = {"mean": float(values.mean()), "std": spread, "n": len(values)}
    return table
