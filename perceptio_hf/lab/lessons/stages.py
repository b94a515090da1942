"""Training the tiny checkpoint from scratch on rendered scenes, stage by stage.

1. codec: the depth VQ-VAE, on rendered depth.
2. masks: SAM2 learns to segment what a click points at, as the real one did.
3. vision: the ViT learns what each image token shows (depth code, shape, colour, size, material, letter) and where, by
   a head that is thrown away. Without it the language model has nothing to read from for most of the training.
4. lookup: the language model learns to look cells up in spans of true codes, and to compare named things by them,
   without pictures.
5. grounding: it learns to find what words name: phrases behind a picture, each with a [SEG] that is told where to look.
   Vision tower and SAM2's image encoder are frozen. Masks follow once [SEG] states say where their object is: the
   projector is then fitted to SAM2's own prompts, since one that starts anywhere loses most of its units.
6. language: everything but the codec and SAM2's image encoder learns to answer, with masks and depth spans.

Each finished stage is kept in the output folder, and the language stage writes checkpoints, so that a run that was
stopped goes on where it was.
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.data.keys import build
from perceptio_hf.files import new_folder, read_yaml, replacing, write_text
from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.modeling.placement import multiplies_bfloat16
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.training.checkpoint_files import own_fault
from perceptio_hf.training.codec import CodebookOptions, DepthBank, train_codebook
from perceptio_hf.training.logging import draw_losses
from perceptio_hf.training.masks.projector import fit_seg_projector
from perceptio_hf.world import render_scene, text_corpus

from .batches import SceneBatch, click_prompts, scene_batches
from .conversation_lesson import LESSON_WEIGHTS, LanguageLesson, nearness_of_codes
from .model import IMAGE_SEQ_LENGTH, IMAGE_SIZE, tiny_config, tiny_processor, tiny_tokenizer
from .pictures_lesson import CellHead, prompted_masks

STAGES = ("masks", "vision", "lookup", "grounding", "language")
# [SEG] states share a large mean, so that early steps of Adam move what enters the projector's ReLU all one way: at the
# full rate four fifths of its units died, and masks stopped improving.
_PROJECTOR_RATE = 0.2
_SHOWN = 20  # steps that progress bar and plot average over
_DECODER_RATE = 0.5  # of the mask decoder, which knows how to segment by then
_REVISED = 4  # spans per process and step that are also asked about, and compared in, without their pictures
_PHRASES = {"masks": 6, "grounding": 10, "language": 3}  # referring questions about a scene, besides all others
# How scenes are asked about; in the language stage in every way.
_WAYS = {"masks": "referred", "vision": "practice", "lookup": "practice", "grounding": "referred"}
_CLICKED = 4  # one [SEG] of so many is also clicked at, lest SAM2 forget to listen to clicks
_ALIGNED = 0.2  # weight of pulling projected [SEG] states to clicks
# A relative error of 0.001 in the number of codes is one broken span in 16: the count loss is to have its slope there.
_WEIGHTS = replace(LESSON_WEIGHTS, count_beta=1e-4)
_LOOKING = 2.5  # weight of taught attention
_SEEN = 0.8  # weight, in the language stage, of what image tokens tell of their cells
_PRACTISED = {"language": 2}  # one further scene for so many, from which only seeing is learnt
_UNSEEN = 0.2  # share of the grounding stage before masks: no [SEG] knows yet where its object is
_FITTED = 768  # [SEG] states that the projector is fitted to
_RENDEZVOUS = ".rendezvous"  # where the processes find one another


@dataclass
class TinyRecipe:
    """Settings of the tiny training; `recipes/tiny.yaml` holds those of a checkpoint like the shipped one.

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
    grounding_steps: int = 800
    grounding_batch: int = 16
    grounding_lr: float = 1.5e-3
    language_steps: int = 2500
    language_batch: int = 16
    language_lr: float = 1.5e-3
    span_noise: float = 0.5
    checkpoint_every: int = 200

    @classmethod
    def read(cls, path: str | Path) -> "TinyRecipe":
        """Read a YAML file.

        Raises:
            ValueError: for a file that is no mapping, a key that is unknown, or a number out of range.
        """
        values = read_yaml(path)
        values.pop("recipe", None)  # what kind of recipe this is, for the command
        recipe = build(cls, values, str(path))
        try:
            recipe.codec_parts()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return recipe

    def __post_init__(self) -> None:
        if self.seed < 0 or not 0 <= self.span_noise <= 1:
            raise ValueError(f"seed is {self.seed} and span_noise {self.span_noise}; expected 0 or more, and 0 to 1.")
        for name, value in vars(self).items():
            if name not in ("seed", "span_noise") and not isinstance(value, dict) and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")

    def codec_parts(self) -> tuple[DepthVQVAEConfig, CodebookOptions]:
        """Shape of the codec, and how it is trained."""
        config = build(DepthVQVAEConfig, self.codec, "codec")
        options = build(CodebookOptions, self.codec_options, "codec_options")
        if config.num_tokens != IMAGE_SEQ_LENGTH:
            raise ValueError(
                f"The recipe's codec has {config.num_tokens} codes per depth map; the tiny model needs one for each of "
                f"its {IMAGE_SEQ_LENGTH} image tokens: image_size / downsample must be {int(IMAGE_SEQ_LENGTH**0.5)}."
            )
        return config, options


def train_tiny(
    recipe: TinyRecipe, out: str | Path, *, processes: int = 2, workers: int = 1, device: str = "cpu"
) -> Path:
    """Train all stages into `out`; returns the folder of the finished checkpoint, `out/checkpoint`.

    A folder with finished stages of the same recipe is continued.

    Args:
        processes: share every batch; one thread each. In a model this small, threads only wait for one another: two
            processes are twice as fast as one process with two threads.
        workers: further processes, of each, that render scenes; 0 renders in line.
        device: where the model is trained; on a GPU by one process, with many workers.

    Raises:
        ValueError: if `out` holds another recipe's stages, or `processes` do not divide the batches or share a GPU; a
            training that diverges.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if processes < 1 or any(getattr(recipe, f"{stage}_batch") % processes for stage in STAGES):
        raise ValueError(f"{processes} processes cannot share the recipe's batches evenly; choose a divisor of them.")
    if device != "cpu" and processes > 1:
        raise ValueError(f"{processes} processes cannot share {device}; use one process.")
    _claim(recipe, out)
    _check_stages(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _prepare(recipe, out)
    (out / _RENDEZVOUS).unlink(missing_ok=True)  # of a run that was stopped
    try:
        torch.multiprocessing.spawn(_train_stages, args=(processes, recipe, out, workers, device), nprocs=processes)
    except torch.multiprocessing.ProcessRaisedException as error:  # its text is the traceback of the process
        kind, _, said = str(error).rstrip().rpartition("\n")[2].partition(": ")
        if kind not in ("ValueError", "OSError"):
            raise
        raise ValueError(said) from error
    torch.set_num_threads(threads)
    return out / "checkpoint"


def _train_stages(rank: int, processes: int, recipe: TinyRecipe, out: Path, workers: int, device: str) -> None:
    """One of the processes that train the model; the first one shows progress and writes files."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    rendezvous = (out / _RENDEZVOUS).resolve()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    codec = DepthVQVAE.from_pretrained(out / "codec")
    processor = PerceptioProcessor.from_pretrained(out / "processor")
    torch.manual_seed(recipe.seed)
    model = fresh_model(processor, codec)
    trainer = _Stages(recipe, out, model, processor, workers, device)
    torch.manual_seed(recipe.seed * 1000 + rank)  # the weights are the same everywhere, the draws are not
    for stage in STAGES:
        trainer.run(stage)
        if stage == "grounding" and rank == 0 and not (out / "start").exists():
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


def _prepare(recipe: TinyRecipe, out: Path) -> None:
    """The codec, and a processor whose tokenizer knows the world's words."""
    codec, folder = _codec_stage(recipe, out), out / "processor"
    if not folder.exists():
        tokenizer = tiny_tokenizer(text_corpus(recipe.corpus_scenes, recipe.seed))
        with new_folder(folder) as fresh:
            tiny_processor(tokenizer, codec.config).save_pretrained(fresh)


def _codec_stage(recipe: TinyRecipe, out: Path) -> DepthVQVAE:
    folder = out / "codec"
    if not folder.exists():
        config, options = recipe.codec_parts()
        seeds = tqdm(range(recipe.codec_scenes), desc="rendering depth")
        maps = (DepthMap.from_metric(render_scene(seed, size=config.image_size).depth) for seed in seeds)
        bank = DepthBank.gather(maps, config)
        with tqdm(total=recipe.codec_steps, desc="codec") as bar:

            def show(share: float, loss: float) -> None:
                bar.set_postfix(reconstruction=f"{loss:.4f}")
                bar.update(round(share * recipe.codec_steps) - bar.n)

            codec = train_codebook(
                config, bank, steps=recipe.codec_steps, seed=recipe.seed, options=options, progress=show
            )
        with new_folder(folder) as fresh:
            codec.save_pretrained(fresh)
    return DepthVQVAE.from_pretrained(folder)


class _Stages:
    """The stages that train the model itself."""

    def __init__(self, recipe: TinyRecipe, out: Path, model, processor: PerceptioProcessor, workers: int, device: str):
        self.recipe, self.out, self.processor, self.workers = recipe, out, processor, workers
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.device, nearness = torch.device(device), nearness_of_codes(model.depth_model)
        head = CellHead(model.config.text_config.hidden_size, model.config.num_depth_codes)
        self.model, self.cell_head = model.to(self.device), head.to(self.device)
        self.lesson = LanguageLesson(
            model,
            processor,
            nearness,
            weights=_WEIGHTS,
            alignment=_LOOKING,
            revise=_REVISED,
            compare=_REVISED,
            span_noise=recipe.span_noise,
        )
        # The last [SEG] states, and what they should become.
        self.fitting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run(self, stage: str) -> None:
        """Train one stage, or load its result where it is finished."""
        path, done = self.out / f"{stage}.pt", self.out / f"{stage}.done"
        if done.exists():
            self._load(path)
            return
        steps, batch, rate = (getattr(self.recipe, f"{stage}_{what}") for what in ("steps", "batch", "lr"))
        parameters = self._parameters(stage)
        optimizer = adamw(self.model, parameters, decoder_rate=1.0 if stage == "masks" else _DECODER_RATE)
        self.history: list[dict[str, float]] = []
        first = self._load(path, optimizer) if path.exists() else 0
        shown: dict[str, deque[torch.Tensor]] = defaultdict(lambda: deque(maxlen=_SHOWN))
        batches = islice(self._batches(stage, first * batch, batch), steps - first)
        progress = tqdm(batches, desc=stage, initial=first, total=steps, disable=self.rank > 0)
        for step, scenes in enumerate(progress, start=first):
            set_rate(optimizer, rate * schedule(step, steps))
            parts = self._step(stage, step, scenes.to(self.device), parameters, optimizer)
            for name, value in parts.items():
                shown[name].append(value)
            if step % 10 == 0:
                means = {name: float(sum(values)) / len(values) for name, values in shown.items()}
                self.history.append({"step": step} | means)
                progress.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
            if (step + 1) % self.recipe.checkpoint_every == 0 or step + 1 == steps:
                self._keep(path, step + 1, optimizer if step + 1 < steps else None)
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
            phrases=_PHRASES.get(stage, 0),
            practised=batch // self.processes // _PRACTISED[stage] if stage in _PRACTISED else 0,
            way=_WAYS.get(stage, "scene"),
            workers=self.workers,
            rank=self.rank,
            processes=self.processes,
        )

    def _step(self, stage: str, step: int, scenes: SceneBatch, parameters, optimizer) -> dict[str, torch.Tensor]:
        with autocast(self.device):
            loss, parts = getattr(self, f"_{stage}_loss")(scenes, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.processes > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.processes
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            values = {name: float(value) for name, value in parts.items()}
            raise ValueError(
                f"{stage}, step {step}: the gradient's norm is {norm.item()}, the losses {values}; lower {stage}_lr."
            )
        optimizer.step()
        return {name: value.detach() for name, value in parts.items()}

    def _parameters(self, stage: str) -> list[nn.Parameter]:
        model = self.model
        model.eval().requires_grad_(False)
        chosen = {
            "masks": [model.mask_model],
            "vision": [model.model.vision_tower, model.model.multi_modal_projector, self.cell_head],
            "lookup": [model.model.language_model, model.lm_head],
            "grounding": [
                model.model.language_model,
                model.lm_head,
                model.seg_projector,
                model.mask_model.mask_decoder,
            ],
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

    def _keep(self, path: Path, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Write a checkpoint; that of a finished stage has no optimizer any more."""
        if self.rank > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "heads": self.cell_head.state_dict(),
            "step": step,
            "history": self.history,
            "fitting": self.fitting,
        }
        if optimizer is not None:
            state["optimizer"] = optimizer.state_dict()
        with replacing(path) as partial:
            torch.save(state, partial)

    def _load(self, path: Path, optimizer: torch.optim.Optimizer | None = None) -> int:
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.cell_head.load_state_dict(state["heads"])
        if optimizer is not None:
            self.history, self.fitting = state["history"], state.get("fitting", [])
            if "optimizer" in state:
                optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def _masks_loss(self, scenes: SceneBatch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Masks of clicked objects."""
        return prompted_masks(self.model, scenes, click_prompts(self.model, scenes), self._every(scenes, 1))

    def _vision_loss(self, scenes: SceneBatch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = self.model.get_image_features(scenes.pixel_values, return_dict=True).pooler_output
        return self.cell_head.loss(scenes, features, self.model.depth_model.encode(scenes.inverse_depth))

    def _lookup_loss(self, scenes: SceneBatch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        codes = self.model.depth_model.encode(scenes.inverse_depth)
        cells, cell_parts = self.lesson.look_up(codes)
        names, name_parts = self.lesson.compare_names(codes)
        return cells + names, cell_parts | name_parts

    def _grounding_loss(self, scenes: SceneBatch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        lesson, clicks = self.lesson.read(scenes), click_prompts(self.model, scenes).detach()
        unseen = round(_UNSEEN * self.recipe.grounding_steps)
        if step <= unseen:
            self._collect(lesson.seg_states, clicks)
        if step < unseen:
            return lesson.loss, lesson.parts
        if step == unseen:
            self._fit_projector()
        masks, parts = self._spoken_masks(scenes, lesson.seg_states, clicks)
        return lesson.loss + masks, lesson.parts | parts

    def _language_loss(self, scenes: SceneBatch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        lesson = self.lesson.read(scenes)
        masks, mask_parts = self._spoken_masks(scenes, lesson.seg_states, click_prompts(self.model, scenes).detach())
        cells, cell_parts = self.cell_head.loss(scenes, lesson.image_states, lesson.codes)
        return lesson.loss + masks + _SEEN * cells, lesson.parts | mask_parts | cell_parts

    def _every(self, scenes: SceneBatch, apart: int) -> torch.Tensor:
        return torch.arange(0, len(scenes.mask_rows), apart, device=self.device)

    def _spoken_masks(self, scenes: SceneBatch, states, clicks) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Masks that [SEG] states (m, d) and some of the clicks (m, C) on the same objects give."""
        prompts = self.model.seg_projector(states)
        clicked = self._every(scenes, _CLICKED)
        masks = torch.cat([self._every(scenes, 1), clicked])
        loss, parts = prompted_masks(self.model, scenes, torch.cat([prompts, clicks[clicked].to(prompts)]), masks)
        parts["align"] = F.mse_loss(prompts.float(), clicks.float())
        return loss + _ALIGNED * parts["align"], parts

    def _collect(self, states: torch.Tensor, prompts: torch.Tensor) -> None:
        """Keep the last [SEG] states and the prompts they should become."""
        self.fitting = [*self.fitting, (states.detach().float(), prompts.float())]
        while sum(len(kept) for kept, _ in self.fitting[1:]) >= _FITTED:
            self.fitting.pop(0)

    def _fit_projector(self) -> None:
        """Fit the [SEG] projector to what was collected, on all processes to what the first one has."""
        fit_seg_projector(self.model.seg_projector, *map(torch.cat, zip(*self.fitting, strict=True)))
        self.fitting = []
        if self.processes > 1:
            for parameter in self.model.seg_projector.parameters():
                dist.broadcast(parameter.data, 0)


_FIRST_SEEDS = {
    "masks": 10_000_000,
    "vision": 20_000_000,
    "lookup": 50_000_000,
    "grounding": 60_000_000,
    "language": 30_000_000,
}


def adamw(
    model: PerceptioForConditionalGeneration, parameters: list[nn.Parameter], decoder_rate: float = 1.0
) -> torch.optim.AdamW:
    """The optimizer of all stages, with groups of their own for the first layer of the [SEG] projector and for the mask
    decoder, which learns at `decoder_rate`."""
    shares = {id(parameter): _PROJECTOR_RATE for parameter in model.seg_projector.linear_in.parameters()}
    shares |= {id(parameter): decoder_rate for parameter in model.mask_model.mask_decoder.parameters()}
    groups = [
        {"params": [item for item in parameters if shares.get(id(item), 1.0) == share], "share": share}
        for share in sorted({*shares.values(), 1.0}, reverse=True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on processors that multiply it. A GPU computes matrices this small faster than it can be told to cast
    them."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=device.type == "cpu" and multiplies_bfloat16(device))


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
