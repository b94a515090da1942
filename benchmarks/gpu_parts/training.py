"""Training steps at the 1B shape, in a loop set up as the trainer is: their pace, their memory, predicted and found."""

import copy
import os
import socket
import tempfile
from functools import partial

import torch

from perceptio_hf.training.losses import composite_loss

from .tools import part, peak_memory, perceptio_config, random_model, release, seconds_of

ROWS, WORDS_LEARNT = 4, 60


def batch_of(setup, config) -> dict[str, torch.Tensor]:
    """What the collator makes of some samples with one tile, one mask, one span and 60 words each, on the host."""
    rows = setup.size(ROWS, 2)
    generator = torch.Generator().manual_seed(0)
    words = config.spatial_vocabulary()
    learnt = setup.size(WORDS_LEARNT, 4)
    lines, side = [], config.vision_config.image_size[0]
    for _ in range(rows):
        text = torch.randint(2, words.seg - 8, (learnt + 16,), generator=generator)
        codes = torch.tensor(words.codes)[
            torch.randint(len(words.codes), (words.num_depth_tokens,), generator=generator)
        ]
        picture = torch.full((config.image_seq_length,), words.image)
        marked = [torch.tensor([words.seg]), torch.tensor([words.depth_start]), codes, torch.tensor([words.depth_end])]
        lines.append(torch.cat([picture, text[:16], *marked, text[16:]]))
    ids = torch.stack(lines)
    labels = ids.clone()
    labels[:, : config.image_seq_length + 16] = -100
    square, codec = config.mask_config.prompt_encoder_config.image_size, config.depth_config.image_size
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, side, side, generator=generator),
        "mask_pixel_values": torch.randn(rows, 3, square, square, generator=generator),
        "labels": labels,
        "depth_targets": torch.rand(rows, codec, codec, generator=generator),
        "depth_valid": torch.ones(rows, codec, codec, dtype=torch.bool),
        "depth_given_as_codes": torch.zeros(rows, dtype=torch.bool),
        "mask_targets": (torch.rand(rows, square // 4, square // 4, generator=generator) > 0.5).float(),
    }
    return batch


def choose_trainable(model) -> None:
    """What `PerceptioSFTConfig` trains by default."""
    model.requires_grad_(False)
    for module in (model.model.language_model, model.lm_head, model.model.multi_modal_projector):
        module.requires_grad_(True)
    model.seg_projector.requires_grad_(True)
    model.mask_model.mask_decoder.requires_grad_(True)
    model.mask_model.mask_decoder.pred_obj_score_head.requires_grad_(False)


def checkpoint_activations(model) -> None:
    """As transformers' trainer does, by whichever of two names it has."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def loss_of(model, batch: dict, codec, words) -> torch.Tensor:
    """The trainer's loss of a batch, codes read from the depth as it does."""
    with torch.no_grad():
        codec.encode(batch["depth_targets"])

    def criterion(hidden, lm_head, outputs):
        return composite_loss(
            hidden,
            lm_head,
            batch["labels"],
            words,
            codec=codec,
            depth=batch["depth_targets"],
            depth_valid=batch["depth_valid"],
            mask_logits=outputs.mask_logits,
            mask_targets=batch["mask_targets"],
            mask_scores=outputs.mask_scores,
        )

    names = ("input_ids", "attention_mask", "pixel_values", "mask_pixel_values")
    return model(**{name: batch[name] for name in names}, use_cache=False, criterion=criterion).loss


def adapted(model):
    """With the adapters of `perceptio_hf.training.lora`."""
    from peft import get_peft_model

    from perceptio_hf.training.lora import lora_config

    return get_peft_model(model, lora_config(model, r=16))


FSDP2 = "full, bfloat16, float32 weights"  # the case of `fsdp`
CASES = {  # weights, autocast, adapters, activations again in the backward pass
    "full, bfloat16, float32 weights": (torch.float32, torch.bfloat16, False, True),
    "LoRA, bfloat16, bfloat16 weights": (torch.bfloat16, torch.bfloat16, True, True),
    "full, float16, float32 weights": (torch.float32, torch.float16, False, True),
    "LoRA, float16, float32 weights": (torch.float32, torch.float16, True, True),
    "full, bfloat16, bfloat16 weights": (torch.bfloat16, torch.bfloat16, False, True),
    "full, bfloat16, float32 weights, all activations kept": (torch.float32, torch.bfloat16, False, False),
}


def _cases(setup) -> list[tuple[str, tuple]]:
    return list(CASES.items())[setup.size(slice(None), slice(1, 3))]


@part(seconds=35)
def training(setup, record):
    """Steps of 4 rows with forward, backward and AdamW; memory by torch's own counter."""
    config = perceptio_config(setup)
    for name, case in _cases(setup):
        with record.case(name) as figures:
            measure_case(setup, config, figures, *case)
        release()


def measure_case(setup, config, figures: dict, weights, autocast, adapters: bool, checkpoints: bool) -> None:
    model = random_model(setup, config, weights)
    words, codec = model.spatial_vocabulary(), model.depth_model
    choose_trainable(model)
    if checkpoints:
        checkpoint_activations(model)
    if adapters:
        model = adapted(model)
        if checkpoints:
            model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = {"fused": True} if setup.is_cuda else {}
    optimizer = torch.optim.AdamW(trained, lr=1e-5, **fused)
    scaler = torch.amp.GradScaler(setup.device.type) if autocast == torch.float16 else None
    batch = {name: value.to(setup.device) for name, value in batch_of(setup, config).items()}
    rows, losses = len(batch["input_ids"]), []

    def step() -> None:
        with torch.autocast(setup.device.type, dtype=autocast, cache_enabled=False):  # as the trainer has it
            loss = loss_of(model, batch, codec, words)
        if scaler is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    figures["parameters_millions"] = sum(p.numel() for p in model.parameters()) / 1e6
    figures["trained_millions"] = sum(p.numel() for p in trained) / 1e6
    figures["rows"], figures["tokens_a_row"] = rows, batch["input_ids"].shape[1]
    step()
    with peak_memory(setup) as memory:
        figures["step_seconds"] = seconds_of(setup, step, repeats=setup.size(3, 1), warm=setup.size(1, 0))
    figures["rows_per_second"] = rows / figures["step_seconds"]
    figures["losses"] = [round(float(loss), 4) for loss in losses]
    figures["found_gib"] = memory["allocated"] / 2**30
    figures["reserved_gib"] = memory["reserved"] / 2**30
    sums = {
        "weights_gib": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients_gib": sum(p.nbytes for p in trained),
        "optimizer_gib": sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ),
    }
    figures |= {name: value / 2**30 for name, value in sums.items()}
    figures["rest_gib"] = (memory["allocated"] - sum(sums.values())) / 2**30


@part(seconds=40, on_host=True)
def memory(setup, record):
    """The memory of `training` and `fsdp` as `perceptio train --dry-run` predicts it, by a step without numbers."""
    from perceptio_hf import PerceptioSFTConfig
    from perceptio_hf.training.lora import lora_config
    from perceptio_hf.training.planning.memory import predict_memory
    from perceptio_hf.training.planning.sharding import Layout

    config = perceptio_config(setup)
    batch = batch_of(setup, config)
    cases = [(*case, Layout()) for case in _cases(setup)[: setup.size(None, 1)]]
    cases.append((FSDP2, CASES[FSDP2], Layout(1, "fsdp")))
    for name, (weights, autocast, adapters, checkpoints), layout in cases:
        with record.case(f"{name}, FSDP2" if layout.shards else name) as figures:
            half = "bf16" if autocast == torch.bfloat16 else "fp16"
            settings = PerceptioSFTConfig("unused", gradient_checkpointing=checkpoints, bf16=False, report_to="none")
            setattr(settings, half, True)  # a machine without a GPU would refuse fp16
            chosen = {"dtype": weights, "adapters": partial(lora_config, r=16) if adapters else None}
            found = predict_memory(config, batch, settings, **chosen, layout=layout)
            for kind in ("weights", "gradients", "optimizer", "activations", "gathered", "peak"):
                figures[f"{kind}_gib"] = getattr(found, kind) / 2**30


@part(seconds=40)
def trainer(setup, record):
    """The embedded checkpoint through the trainer that users have: its pace, its memory, its losses."""
    from perceptio_hf import PerceptioSFTConfig, PerceptioSFTTrainer, tiny_checkpoint
    from perceptio_hf.data.world_samples import world_dataset

    steps, rows = setup.size(20, 2), setup.size(16, 2)
    data = world_dataset("depth", scenes=rows * steps, first_seed=400_000_000)
    precisions = {"bfloat16": {"bf16": True}, "float32": {}, "float16": {"fp16": True}}
    for name, half in list(precisions.items())[: setup.size(3, 1)]:
        with record.case(name) as figures, tempfile.TemporaryDirectory() as out:
            values = {"max_steps": steps, "per_device_train_batch_size": rows, "learning_rate": 1e-4, "bf16": False}
            values |= {"save_strategy": "no", "report_to": "none", "plot_losses": False, "logging_steps": 1}
            values |= {"gradient_checkpointing": False, "disable_tqdm": True, **half}
            training = PerceptioSFTTrainer(tiny_checkpoint(), PerceptioSFTConfig(out, **values), train_dataset=data)
            with peak_memory(setup) as found:
                training.train()
            logged = training.state.log_history
            figures["steps_per_second"] = logged[-1]["train_steps_per_second"]
            figures["losses"] = [entry["loss"] for entry in logged if "loss" in entry]
            figures["device"], figures["found_gib"] = str(training.model.device), found["allocated"] / 2**30


@part(seconds=12)
def fsdp(setup, record):
    """FSDP2 by accelerate, one process, set up as the trainer sets it up when launched with `--use_fsdp`."""
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    from perceptio_hf.training import fsdp as settings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    if not setup.is_cuda:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with record.case(FSDP2) as figures:
        accelerator = Accelerator(mixed_precision="bf16", cpu=not setup.is_cuda)
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        settings.enable_on_cpu(accelerator)
        settings.prepare(accelerator.state.fsdp_plugin)
        config = perceptio_config(setup)
        model = random_model(setup, config)
        choose_trainable(model)
        checkpoint_activations(model)
        words = model.spatial_vocabulary()
        codec = copy.deepcopy(model.depth_model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Fused, as trainers have it on a GPU; else the step holds another copy of all that learns.
        optimizer = torch.optim.AdamW(trained, lr=1e-5, **({"fused": True} if setup.is_cuda else {}))
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        batch = {name: value.to(setup.device) for name, value in batch_of(setup, config).items()}
        rows, losses = len(batch["input_ids"]), []

        def step() -> None:
            with accelerator.autocast():
                loss = loss_of(model, batch, codec, words)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

        step()
        with peak_memory(setup) as memory:
            figures["step_seconds"] = seconds_of(setup, step, repeats=setup.size(3, 1))
        figures["kind"] = str(accelerator.distributed_type)
        figures["sharded"] = sum(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        figures["rows_per_second"] = rows / figures["step_seconds"]
        figures["losses"] = [round(float(loss), 4) for loss in losses]
        figures["found_gib"] = memory["allocated"] / 2**30
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
