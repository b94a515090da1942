"""How much memory a training step takes, found by running one without numbers.

    predicted = predict_memory(model, batch, settings)
    print("\\n".join(predicted.arithmetic()))

`model` may be a configuration: nothing is loaded then, and a model of 8 billion parameters is rehearsed in a minute on
a laptop. The step that is run is the real one: the same forward, losses and backward, on tensors that have shapes only.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from perceptio_hf.modeling.configuration_perceptio import PerceptioConfig
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.training import fsdp
from perceptio_hf.training.config import PerceptioSFTConfig
from perceptio_hf.training.losses import composite_loss
from perceptio_hf.training.trainer import check_trains, choose_trainable, zero_of

from .gathering import Gathering
from .rehearsal import ByteCounter, fake_batch, fake_copy, without_numbers
from .sharding import Layout, Shares, shares_of

_TARGETS = ("labels", "mask_targets", "depth_targets", "depth_valid", "depth_given_as_codes")
GIB = 2**30


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on one device during training; the parts add up to `peak`.

    Args:
        weights: parameters and buffers, trained or not.
        gradients: of all that is trained.
        optimizer: its state.
        activations: what the step needs beside these at its peak: activations kept for the backward pass, logits, casts
            to half precision, the batch itself.
        gathered: with shards, whole parameters and gradients of what is computed at the moment; with several processes
            and without shards, the buckets in which gradients are exchanged.
        whole: all weights, wherever they are; on each device too, unless processes share them out.
        parameters, trained: how many numbers the model has, and how many of them learn.
        batch: (rows, tokens a row) of the batch it was predicted for.
        notes: how each part was computed, in words.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    whole: int
    parameters: int
    trained: int
    batch: tuple[int, int]
    notes: dict[str, str]

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered

    @property
    def answering(self) -> int:
        """Bytes while a copy of the whole model answers beside this device's share."""
        return self.whole + self.weights + self.optimizer

    def arithmetic(self) -> list[str]:
        """One line for each part: its GiB, and how they come about."""
        lines = [
            f"{name:<12}{getattr(self, name) / GIB:9.3f} GiB  {self.notes[name]}"
            for name in ("weights", "gradients", "optimizer", "activations", "gathered")
            if getattr(self, name) or name in ("weights", "gradients")
        ]
        return [*lines, f"{'peak':<12}{self.peak / GIB:9.3f} GiB  the sum"]


def predict_memory(
    model: PerceptioForConditionalGeneration | nn.Module | PerceptioConfig,
    batch: dict[str, Tensor],
    settings: PerceptioSFTConfig,
    *,
    adapters: Callable[[PerceptioForConditionalGeneration], Any] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
) -> MemoryPrediction:
    """The memory of one process's device while it trains.

    Compare it with `torch.cuda.max_memory_allocated()`: what the allocator reserves beyond that, CUDA itself (about
    0.5 GiB) and other programs come on top.

    Args:
        model: a model as it will be trained (a PEFT model too), or the configuration of one. Its weights are not read.
        batch: of `PerceptioDataCollator`, one micro batch as large as they get.
        settings: of the training: what is frozen, precision, checkpointing, optimizer, gradient accumulation.
        adapters: with a configuration: what makes a PEFT configuration for the model, such as
            `functools.partial(lora_config, r=16)`.
        dtype: with a configuration: type of the weights; SAM2, codec and [SEG] projector are float32 in any case.
        layout: how many processes share the work, and how; None: one process.

    Raises:
        ValueError: where nothing would be trained, or the optimizer cannot be run without numbers.
    """
    if isinstance(model, PerceptioConfig):
        model = _described(model, settings, adapters, dtype)
    with without_numbers() as mode:
        fake = fake_copy(mode, model).train()
        if not hasattr(fake, "peft_config"):
            choose_trainable(fake, settings)
        check_trains(fake)
        _checkpoint_activations(fake, settings)
        inputs = fake_batch(mode, batch)
        counter = ByteCounter(values=mode)
        weights = counter.watch([*fake.parameters(), *fake.buffers()])
        given = counter.watch(inputs.values())
        trained = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        optimizer = _optimizer(fake, trained, settings)
        layout = layout or Layout()
        with counter:
            if layout.shards:
                gathering = Gathering(_inner(fake), counter, layout.processes)
                _run_in_shards(fake, inputs, settings, optimizer, gathering)
            else:
                _run(fake, inputs, settings, optimizer)
        state = _bytes_of(optimizer.state.values())
    gradients = sum(parameter.numel() * parameter.itemsize for parameter in trained)
    shares = shares_of(layout, weights, gradients, state, counter.gathered_at_peak, _shares_gradients(settings))
    # At the peak not all gradients need be there yet (one micro batch a step): what is left of it is activations.
    resident = weights + state + gradients + counter.gathered_at_peak
    activations = max(counter.peak - resident, given)
    return _prediction(fake, trained, shares, weights, state, activations, batch, settings)


def _described(
    config: PerceptioConfig, settings: PerceptioSFTConfig, adapters: Callable | None, dtype: torch.dtype
) -> nn.Module:
    """The model that will be trained, on the device that holds nothing: built, cast and adapted as any."""
    with torch.device("meta"):
        model = PerceptioForConditionalGeneration(config).to(dtype)
        choose_trainable(model, settings)
        if adapters is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapters(model))
    return model


def _checkpoint_activations(model: nn.Module, settings: PerceptioSFTConfig) -> None:
    """As transformers' trainer does, under its name before 5.20 and since."""
    if not settings.checkpoints_activations:
        return
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()  # as TRL does


def _optimizer(model: nn.Module, trained: list[nn.Parameter], settings: PerceptioSFTConfig) -> torch.optim.Optimizer:
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(settings, model)
        return kind(trained, **{"lr": settings.learning_rate, **options})
    except Exception as error:  # bitsandbytes, GaLore and others want real memory, or are not installed
        raise ValueError(
            f"The memory of optim: {_name(settings.optim)} cannot be predicted ({error}); predict with adamw_torch, "
            "which needs 8 bytes for each trained parameter, and reckon with its bytes instead."
        ) from error


def _run(model: nn.Module, inputs: dict[str, Tensor], settings: PerceptioSFTConfig, optimizer: Any) -> None:
    """The second step of a training, which finds the optimizer's state in place. Where gradients are accumulated it has
    two micro batches: the second finds gradients in place."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for _ in range(min(2, settings.gradient_accumulation_steps)):
        with _precision(settings):
            loss = _loss(model, inputs, settings)
        loss.backward()
        del loss
    optimizer.step()


def _run_in_shards(
    model: nn.Module, inputs: dict[str, Tensor], settings: PerceptioSFTConfig, optimizer: Any, gathering: Gathering
) -> None:
    """A micro batch that finds gradients and optimizer's state in place, and what processes gather for it.

    Of a step's only micro batch it is a little too much: its gradients come bit by bit.
    """
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # makes the state
    counter = gathering.counter
    stepping = (counter.peak - counter.now) // gathering.processes  # what the optimizer needs for a moment
    counter.restart()
    with gathering.micro_batch():
        with _precision(settings):
            loss = _loss(model, inputs, settings)
        loss.backward()
        del loss
    counter.gather(stepping)
    counter.gather(-stepping)


def _shares_gradients(settings: PerceptioSFTConfig) -> bool:
    return settings.gradient_accumulation_steps == 1 or fsdp.shares_gradients(settings)


def _half(settings: PerceptioSFTConfig) -> torch.dtype | None:
    """What is computed in, where it is not what the weights are."""
    return torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None


def _precision(settings: PerceptioSFTConfig):
    half = _half(settings)
    return nullcontext() if half is None else torch.autocast("cpu", dtype=half, cache_enabled=False)


def _loss(model: nn.Module, inputs: dict[str, Tensor], settings: PerceptioSFTConfig) -> Tensor:
    """The trainer's loss of one micro batch; spans hold code 0, which takes as much memory as any."""
    perceptio = _inner(model)
    targets = {name: inputs[name] for name in _TARGETS}
    inputs = {name: value for name, value in inputs.items() if name not in _TARGETS}

    def criterion(hidden_states: Tensor, lm_head: Callable, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = composite_loss(
            hidden_states,
            lm_head,
            targets["labels"],
            perceptio.spatial_vocabulary(),
            codec=perceptio.depth_model,
            depth=targets["depth_targets"],
            depth_valid=targets["depth_valid"],
            mask_logits=outputs.mask_logits,
            mask_targets=None if outputs.mask_logits is None else targets["mask_targets"],
            mask_scores=outputs.mask_scores,
            weights=settings.loss_weights(),
        )
        return loss + zero_of([perceptio.seg_projector, perceptio.mask_model.mask_decoder], loss.device), parts

    extras = {"output_attentions": True} if settings.look_weight else {}
    return model(**inputs, use_cache=False, criterion=criterion, **extras).loss


def _inner(model: nn.Module) -> PerceptioForConditionalGeneration:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _bytes_of(states: Iterator[dict[str, Any]]) -> int:
    return sum(item.numel() * item.itemsize for state in states for item in state.values() if isinstance(item, Tensor))


def _products(parameters: Iterable[nn.Parameter]) -> str:
    """How many numbers there are of each size, as `0.630 billion x 4 bytes`."""
    counts: Counter = Counter()
    for parameter in parameters:
        counts[parameter.itemsize] += parameter.numel()
    return " + ".join(f"{count / 1e9:.3f} billion x {size} bytes" for size, count in sorted(counts.items()))


def _name(optimizer: Any) -> str:
    return str(getattr(optimizer, "value", optimizer))


def _prediction(
    model: nn.Module,
    trained: list[nn.Parameter],
    shares: Shares,
    weights: int,
    state: int,
    activations: int,
    batch: dict[str, Tensor],
    settings: PerceptioSFTConfig,
) -> MemoryPrediction:
    learnt, rows = sum(parameter.numel() for parameter in trained), tuple(batch["input_ids"].shape)
    kept = "inputs of blocks kept, the rest computed again" if settings.checkpoints_activations else "all kept"
    kept += "" if (half := _half(settings)) is None else f"; in {str(half).removeprefix('torch.')}"
    pictures = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    notes = {
        "weights": shares.note(_products(model.parameters())),
        "gradients": shares.note(_products(trained)),
        "optimizer": shares.note(f"{_name(settings.optim)}, {state / max(learnt, 1):.2g} bytes for each that learns"),
        "activations": f"counted in one step of {rows[0]} rows of {rows[1]} tokens, {pictures} tiles; {kept}",
        "gathered": shares.why_gathered,
    }
    return MemoryPrediction(
        weights=shares.weights,
        gradients=shares.gradients,
        optimizer=shares.optimizer,
        activations=activations,
        gathered=shares.gathered,
        whole=weights,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=learnt,
        batch=rows,
        notes=notes,
    )
