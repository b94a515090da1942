"""Training the tiny checkpoint from scratch on rendered scenes, stage by stage.

1. codec: the depth VQ-VAE, on rendered depth.
2. masks: SAM2 learns to segment what a click points at, as the real one did, and what a vector for its kind names, so
   that its features tell kinds apart as those of a large model do. The language stage keeps this up, and pulls the
   projected [SEG] states towards such prompts: what to say to SAM2 is then known before SAM2 has learnt to listen.
3. vision: the ViT learns what each image token shows (depth code, shape, colour, size, material), by a head that is
   thrown away. Without it the language model has nothing to read from for most of the training.
4. lookup: the language model learns to look cells up in spans of true codes, without pictures.
5. language: everything but the codec and SAM2's image encoder learns to answer, with masks and depth spans.

Each finished stage is kept in the output folder, and the language stage writes checkpoints, so that a run that was
stopped goes on where it was.
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.files import new_folder, read_yaml, replacing, write_text
from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.training.checkpoint_files import own_fault
from perceptio_hf.training.codec import CodebookOptions, DepthBank, train_codebook
from perceptio_hf.training.logging import draw_losses
from perceptio_hf.training.losses import mask_loss, score_loss
from perceptio_hf.world import render_scene, text_corpus

from .batches import CELL_CLASSES, KIND_CLASSES, SceneBatch, click_prompts, scene_batches
from .conversation_lesson import LanguageLesson, nearness_of_codes
from .model import IMAGE_SEQ_LENGTH, IMAGE_SIZE, tiny_config, tiny_processor, tiny_tokenizer

STAGES = ("masks", "vision", "lookup", "language")
# Where masks start from nothing and objects are small, the cross-entropy of the background holds every logit down.
_DICE_WEIGHT = 4.0
# [SEG] states share a large mean, so that early steps of Adam move what enters the projector's ReLU all one way: at the
# full rate four fifths of its units died, and masks stopped improving.
_PROJECTOR_RATE = 0.2
_SHOWN = 20  # steps that progress bar and plot average over
_REVISED = 2  # spans per process and step of the language stage
_RENDEZVOUS = ".rendezvous"  # where the processes find one another


@dataclass
class TinyRecipe:
    """Settings of the tiny training; `recipes/tiny.yaml` holds those of the shipped checkpoint.

    Steps are what makes a run repeatable. Learning rates are peaks of a warm-up and cosine schedule.
    """

    seed: int = 0
    corpus_scenes: int = 2000
    codec: dict = field(default_factory=dict)
    codec_options: dict = field(default_factory=dict)
    codec_scenes: int = 4000
    codec_steps: int = 1000
    masks_steps: int = 600
    masks_batch: int = 16
    masks_lr: float = 2e-3
    vision_steps: int = 800
    vision_batch: int = 16
    vision_lr: float = 1.5e-3
    lookup_steps: int = 800
    lookup_batch: int = 16
    lookup_lr: float = 2e-3
    language_steps: int = 2500
    language_batch: int = 16
    language_lr: float = 1.5e-3
    checkpoint_every: int = 200

    @classmethod
    def read(cls, path: str | Path) -> "TinyRecipe":
        """Read a YAML file.

        Raises:
            ValueError: for a file that is no mapping, a key that is unknown, or a number out of range.
        """
        values = read_yaml(path)
        values.pop("recipe", None)  # what kind of recipe this is, for the command
        known = {item.name: item.type for item in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{path}: unknown key {key!r}; known are {', '.join(known)}.")
            if known[key] is int and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{path}: {key} must be a whole number of 0 or more, got {value!r}.")
        return cls(**values)


def train_tiny(recipe: TinyRecipe, out: str | Path, *, processes: int = 2, workers: int = 1) -> Path:
    """Train all stages into `out`; returns the folder of the finished checkpoint, `out/checkpoint`.

    A folder with finished stages of the same recipe is continued.

    Args:
        processes: share every batch; one thread each. In a model this small, threads only wait for one another: two
            processes are twice as fast as one process with two threads.
        workers: further processes, of each, that render scenes; 0 renders in line.

    Raises:
        ValueError: if `out` holds another recipe's stages, or `processes` do not divide the batches.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if processes < 1 or any(getattr(recipe, f"{stage}_batch") % processes for stage in STAGES):
        raise ValueError(f"{processes} processes cannot share the recipe's batches evenly; choose a divisor of them.")
    _claim(recipe, out)
    _check_stages(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _codec_stage(recipe, out)
    (out / _RENDEZVOUS).unlink(missing_ok=True)  # of a run that was stopped
    torch.multiprocessing.spawn(_train_stages, args=(processes, recipe, out, workers), nprocs=processes)
    torch.set_num_threads(threads)
    return out / "checkpoint"


def _train_stages(rank: int, processes: int, recipe: TinyRecipe, out: Path, workers: int) -> None:
    """One of the processes that train the model; the first one shows progress and writes files."""
    torch.set_num_threads(1)
    rendezvous = (out / _RENDEZVOUS).resolve()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    codec = DepthVQVAE.from_pretrained(out / "codec")
    processor = tiny_processor(tiny_tokenizer(text_corpus(recipe.corpus_scenes, recipe.seed)), codec.config)
    torch.manual_seed(recipe.seed)
    model = fresh_model(processor, codec)
    trainer = _Stages(recipe, out, model, processor, workers)
    torch.manual_seed(recipe.seed * 1000 + rank)  # the weights are the same everywhere, the draws are not
    for stage in STAGES:
        trainer.run(stage)
        if stage == "lookup" and rank == 0 and not (out / "start").exists():
            _save(model, processor, out / "start")  # where an ablation begins
    if rank == 0:
        _save(model, processor, out / "checkpoint")
    dist.destroy_process_group()


def fresh_model(processor: PerceptioProcessor, codec: DepthVQVAE) -> PerceptioForConditionalGeneration:
    """An untrained tiny model around a trained codec."""
    model = PerceptioForConditionalGeneration(tiny_config(processor, codec.config))
    model.set_attn_implementation("eager")  # on a CPU faster than sdpa for sequences this short
    model.config.depth_config.name_or_path = ""  # the path of one training run says nothing to others
    model.depth_model.load_state_dict(codec.state_dict())
    for part in (model.model, model.seg_projector, model.mask_model):
        part.apply(_widen)
    hiera = model.mask_model.vision_encoder.backbone
    for positions in (hiera.pos_embed, hiera.pos_embed_window, model.model.vision_tower.embeddings.position_embeddings):
        nn.init.normal_(positions, std=0.1)
    for module in model.mask_model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)  # SAM2's own start: as large as its position encoding
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 192
    return model


def _widen(module: nn.Module) -> None:
    """Draw weights at a scale that keeps the variance in narrow layers. The classes' default, 0.02 everywhere, suits
    wide layers; here signals so small would spend the first thousand steps growing."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        fan_in = module.in_channels if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
        nn.init.normal_(module.weight, std=fan_in**-0.5)


def _claim(recipe: TinyRecipe, out: Path) -> None:
    path, text = out / "recipe.json", json.dumps(asdict(recipe), indent=2)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds the stages of another recipe ({path}); choose another folder.")
    write_text(path, text)


def _check_stages(out: Path) -> None:
    """Raise ValueError for what an earlier run left and a disk has damaged, before processes are started."""
    for stage in ("codec", *STAGES):
        path = out / "codec" / "model.safetensors" if stage == "codec" else out / f"{stage}.pt"
        fault = own_fault(path) if path.exists() else None
        if fault is not None:
            what = "the folder codec" if stage == "codec" else f"it, and {stage}.done where that is there"
            raise ValueError(f"{path} cannot be used: {fault}. Delete {what}; the stage is then trained again.")


def _save(model: PerceptioForConditionalGeneration, processor: PerceptioProcessor, folder: Path) -> Path:
    with new_folder(folder, overwrite=True) as fresh:
        model.eval().save_pretrained(fresh)
        processor.save_pretrained(fresh)
    return folder


def _codec_stage(recipe: TinyRecipe, out: Path) -> DepthVQVAE:
    folder = out / "codec"
    if not folder.exists():
        config = DepthVQVAEConfig(**recipe.codec)
        if config.num_tokens != IMAGE_SEQ_LENGTH:
            raise ValueError(
                f"The recipe's codec has {config.num_tokens} codes per depth map; the tiny model needs one for each of "
                f"its {IMAGE_SEQ_LENGTH} image tokens: image_size / downsample must be {int(IMAGE_SEQ_LENGTH**0.5)}."
            )
        seeds = tqdm(range(recipe.codec_scenes), desc="rendering depth")
        maps = (DepthMap.from_metric(render_scene(seed, size=config.image_size).depth) for seed in seeds)
        bank = DepthBank.gather(maps, config)
        with tqdm(total=recipe.codec_steps, desc="codec") as bar:

            def show(share: float, loss: float) -> None:
                bar.set_postfix(reconstruction=f"{loss:.4f}")
                bar.update(round(share * recipe.codec_steps) - bar.n)

            options = CodebookOptions(**recipe.codec_options)
            codec = train_codebook(
                config, bank, steps=recipe.codec_steps, seed=recipe.seed, options=options, progress=show
            )
        with new_folder(folder) as fresh:
            codec.save_pretrained(fresh)
    return DepthVQVAE.from_pretrained(folder)


class _Stages:
    """The three stages that train the model itself."""

    def __init__(self, recipe: TinyRecipe, out: Path, model, processor: PerceptioProcessor, workers: int):
        self.recipe, self.out, self.model, self.processor, self.workers = recipe, out, model, processor, workers
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        hidden = model.config.text_config.hidden_size
        prompt = model.config.mask_config.mask_decoder_config.hidden_size
        # Heads that only training needs.
        self.cell_head = nn.Linear(hidden, model.config.num_depth_codes + sum(CELL_CLASSES))
        self.kind_prompts = nn.ModuleList([nn.Embedding(count, prompt) for count in KIND_CLASSES])
        self.heads = nn.ModuleList([self.cell_head, self.kind_prompts])
        self.lesson = LanguageLesson(model, processor, nearness_of_codes(model.depth_model), revise=_REVISED)

    def run(self, stage: str) -> None:
        """Train one stage, or load its result where it is finished."""
        path, done = self.out / f"{stage}.pt", self.out / f"{stage}.done"
        if done.exists():
            self._load(path)
            return
        steps, batch, rate = (getattr(self.recipe, f"{stage}_{what}") for what in ("steps", "batch", "lr"))
        parameters = self._parameters(stage)
        optimizer = adamw(self.model, parameters)
        self.history: list[dict[str, float]] = []
        first = self._load(path, optimizer) if path.exists() else 0
        shown: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_SHOWN))
        batches = islice(self._batches(stage, first * batch, batch), steps - first)
        progress = tqdm(batches, desc=stage, initial=first, total=steps, disable=self.rank > 0)
        for step, scenes in enumerate(progress, start=first):
            set_rate(optimizer, rate * schedule(step, steps))
            for name, value in self._step(stage, step, scenes, parameters, optimizer).items():
                shown[name].append(float(value))
            if step % 10 == 0:
                means = {name: sum(values) / len(values) for name, values in shown.items()}
                self.history.append({"step": step} | means)
                progress.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
            if (step + 1) % self.recipe.checkpoint_every == 0 or step + 1 == steps:
                self._keep(path, step + 1, optimizer)
        dist.barrier()
        if self.rank == 0:
            picture = "losses.png" if stage == STAGES[-1] else f"losses_{stage}.png"
            names = [name for name in dict.fromkeys(chain.from_iterable(self.history)) if name != "step"]
            draw_losses(self.history, self.out / picture, names=names)
            done.touch()

    def _batches(self, stage: str, seen: int, batch: int) -> Iterator[SceneBatch]:
        """This process's share of every batch; `seen` scenes of the stage have been trained on."""
        return scene_batches(
            self.processor,
            size=IMAGE_SIZE,
            batch_size=batch // self.processes,
            first_seed=_FIRST_SEEDS[stage] + self.recipe.seed * 100_000_000 + seen,
            practice=stage == "vision",
            workers=self.workers,
            rank=self.rank,
            processes=self.processes,
        )

    def _step(self, stage: str, step: int, scenes: SceneBatch, parameters, optimizer) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, parts = getattr(self, f"_{stage}_loss")(scenes)
        if not torch.isfinite(loss):
            values = {name: float(value) for name, value in parts.items()}
            raise RuntimeError(f"{stage}, step {step}: the loss is {loss.item()}, its parts {values}.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.processes
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {name: value.detach() for name, value in parts.items()}

    def _parameters(self, stage: str) -> list[nn.Parameter]:
        model = self.model
        model.eval().requires_grad_(False)
        chosen = {
            "masks": [model.mask_model, self.kind_prompts],
            "vision": [model.model.vision_tower, model.model.multi_modal_projector, self.cell_head],
            "lookup": [model.model.language_model, model.lm_head],
            "language": [
                model.model,
                model.lm_head,
                model.seg_projector,
                model.mask_model.mask_decoder,
                self.cell_head,
            ],
        }[stage]
        parameters = list({id(p): p for module in chosen for p in module.requires_grad_().parameters()}.values())
        for parameter in (model.mask_model.prompt_encoder.shared_embedding.positional_embedding,):
            parameter.requires_grad_(False)
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _keep(self, path: Path, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.rank > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "history": self.history,
        }
        with replacing(path) as partial:
            torch.save(state, partial)

    def _load(self, path: Path, optimizer: torch.optim.Optimizer | None = None) -> int:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
            self.history = state.get("history", [])
        return state["step"]

    def _masks_loss(self, scenes: SceneBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Masks of the objects the questions name, each clicked at, named by its kind, or both."""
        kinds, clicks = self._prompts(scenes)
        draw = torch.rand(len(kinds), 1)
        return self._prompted_masks(scenes, torch.where(draw < 2 / 3, kinds, 0) + torch.where(draw > 1 / 3, clicks, 0))

    def _prompts(self, scenes: SceneBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """For each object asked for: (m, C) a learnt vector of its kind, and SAM2's embedding of a click on it."""
        kinds = torch.cat([turns.mask_kinds for turns in scenes.turns])
        named = sum(table(kinds[:, index]) for index, table in enumerate(self.kind_prompts))
        return named, click_prompts(self.model, scenes)

    def _prompted_masks(self, scenes: SceneBatch, *prompts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses of the masks that each set of prompts (m, C) gives; the parts are those of the first set.

        Unlike the model's own path this one lets gradients through to the image encoder, for the masks stage.
        """
        sam, rows = self.model.mask_model, scenes.mask_rows.repeat(len(prompts))
        features = sam.vision_encoder(scenes.mask_pixel_values, return_dict=True).fpn_hidden_states
        fine = [sam.mask_decoder.conv_s0(features[0]), sam.mask_decoder.conv_s1(features[1])]
        embedding = features[2] + sam.no_memory_embedding.view(1, -1, 1, 1)
        logits, scores = self.model.decode_masks(
            torch.cat(prompts), embedding[rows], [feature[rows] for feature in fine]
        )
        sets = [
            self._mask_parts(scenes, *pair)
            for pair in zip(logits.chunk(len(prompts)), scores.chunk(len(prompts)), strict=True)
        ]
        return sum(loss for loss, _ in sets), sets[0][1]

    def _mask_parts(self, scenes: SceneBatch, logits, scores) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        targets = scenes.mask_targets(tuple(logits.shape[1:]))
        loss, parts = mask_loss(logits, targets, dice_weight=_DICE_WEIGHT)
        parts["mask_score"] = score_loss(scores, logits, targets)
        with torch.no_grad():
            inside, truth = logits > 0, targets > 0.5
            union = (inside | truth).sum((1, 2)).clamp(min=1)
            parts["iou"] = ((inside & truth).sum((1, 2)) / union).mean()
        return loss + 0.5 * parts["mask_score"], parts

    def _vision_loss(self, scenes: SceneBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = self.model.get_image_features(scenes.pixel_values, return_dict=True).pooler_output
        return self._cell_parts(scenes, features, self.model.depth_model.encode(scenes.inverse_depth))

    def _cell_parts(self, scenes: SceneBatch, features, codes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        depth, *kinds = self.cell_head(features).float().split([self.model.config.num_depth_codes, *CELL_CLASSES], -1)
        code_loss = F.cross_entropy(depth.flatten(0, 1), codes.flatten())
        kind_losses = [balanced_cross_entropy(kind, scenes.cells[..., index]) for index, kind in enumerate(kinds)]
        parts = {"cell_code": code_loss, "cell_kind": sum(kind_losses)}
        marked = scenes.cells[..., -1] > 0
        if marked.any():
            right = kinds[-1].argmax(-1) == scenes.cells[..., -1]
            parts["letters"] = right[marked].float().mean()
        return code_loss + sum(kind_losses), parts

    def _lookup_loss(self, scenes: SceneBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.lesson.look_up(self.model.depth_model.encode(scenes.inverse_depth))

    def _language_loss(self, scenes: SceneBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        lesson = self.lesson.read(scenes)
        segs, taught = self.model.seg_projector(lesson.seg_states), sum(self._prompts(scenes))
        masks, mask_parts = self._prompted_masks(scenes, segs, taught)
        mask_parts["align"] = F.mse_loss(segs.float(), taught.detach().float())
        cells, cell_parts = self._cell_parts(scenes, lesson.image_states, lesson.codes)
        total = lesson.loss + masks + mask_parts["align"] + 0.2 * cells
        return total, lesson.parts | mask_parts | cell_parts


_FIRST_SEEDS = {"masks": 10_000_000, "vision": 20_000_000, "lookup": 50_000_000, "language": 30_000_000}


def balanced_cross_entropy(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (b, N, C) logits, averaged over all cells and once more over those that are not background (0),
    which are few."""
    costs = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none")
    shown = classes.flatten() > 0
    return costs.mean() + (costs[shown].mean() if shown.any() else 0.0)


def adamw(model: PerceptioForConditionalGeneration, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of all stages, with a group of its own for the first layer of the [SEG] projector."""
    slow = {id(parameter) for parameter in model.seg_projector.linear_in.parameters()}
    groups = [
        {"params": [parameter for parameter in parameters if id(parameter) not in slow], "share": 1.0},
        {"params": [parameter for parameter in parameters if id(parameter) in slow], "share": _PROJECTOR_RATE},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))
