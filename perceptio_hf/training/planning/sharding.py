"""How processes share a training, and what each of them holds of weights, gradients and optimizer state."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perceptio_hf.files import read_yaml
from perceptio_hf.training import fsdp, zero3

if TYPE_CHECKING:
    from perceptio_hf.training.recipe import Recipe

STRATEGIES = ("ddp", "fsdp", "zero3")
# Settings of FSDP and DeepSpeed that decide about memory -> what is reckoned with, which is their default.
_RECKONED = {
    "fsdp_reshard_after_forward": "true",
    "fsdp_offload_params": "false",
    "fsdp_activation_checkpointing": "false",
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
}


@dataclass(frozen=True)
class Layout:
    """How processes share a training.

    Args:
        processes: on all machines together, one for each GPU.
        strategy: "ddp" (each has everything), "fsdp" (FSDP2) or "zero3" (DeepSpeed): shards.

    Raises:
        ValueError: for an unknown strategy or no process.
    """

    processes: int = 1
    strategy: str = "ddp"

    def __post_init__(self):
        if self.strategy not in STRATEGIES or self.processes < 1:
            raise ValueError(
                f"{self.processes} processes with strategy {self.strategy!r}; expected 1 or more, and one of "
                f"{', '.join(STRATEGIES)}."
            )

    @property
    def shards(self) -> bool:
        """Also with one process, which gathers what it has."""
        return self.strategy != "ddp"


def layout_of_file(file: str | os.PathLike) -> Layout:
    """The layout of a configuration of accelerate, such as those in recipes/accelerate.

    Raises:
        ValueError: for a file that is none, FSDP of version 1, a stage of ZeRO that does not shard parameters, or
            settings that memory is not reckoned with.
    """
    values = read_yaml(file)
    kind = str(values.get("distributed_type", "NO")).upper()
    processes = values.get("num_processes", 1)
    if not isinstance(processes, int):
        raise ValueError(f"{file}: num_processes is {processes!r}; expected a whole number.")
    if kind == "FSDP":
        settings = values.get("fsdp_config") or {}
        version = settings.get("fsdp_version")
        if version != 2:
            raise ValueError(f"{file}: fsdp_version is {version!r}; expected 2.")
        _check_reckoned(settings, str(file))
        return Layout(processes, "fsdp")
    if kind == "DEEPSPEED":
        settings = values.get("deepspeed_config") or {}
        _check_reckoned(settings, str(file))
        return Layout(processes, _strategy_of_stage(settings, str(file)))
    return Layout(processes if kind != "NO" else 1)


def _check_reckoned(settings: Mapping, place: str) -> None:
    """ValueError for a setting that changes what a process holds in a way that is not reckoned with."""
    for name, expected in _RECKONED.items():
        value = str(settings.get(name, expected)).lower()
        if value != expected:
            raise ValueError(
                f"{place}: {name} is {value}, and memory is reckoned with {expected} alone; plan without it."
            )


def check_precision(file: str | os.PathLike, recipe: "Recipe") -> None:
    """ValueError where a configuration of accelerate would decide on the precision, and on another than is planned
    with: what a recipe says of it counts."""
    settings = recipe.settings
    planned = "bf16" if settings.bf16 else "fp16" if settings.fp16 else "no"
    asked = str(read_yaml(file).get("mixed_precision", "no")).lower()
    if asked != planned and not {"bf16", "fp16"} & set(recipe.values):
        raise ValueError(
            f"{file}: mixed_precision is {asked}, which counts where a recipe says nothing of it, and here it would be "
            f"planned with {planned}: add --bf16 {str(asked == 'bf16').lower()} to the command or the recipe."
        )


def _strategy_of_stage(settings: Mapping, place: str) -> str:
    stage = settings.get("zero_stage")
    if stage != 3:
        raise ValueError(f"{place}: zero_stage is {stage!r}; expected 3, which is what is reckoned with here.")
    return "zero3"


def layout_of_environment() -> Layout:
    """The layout that `accelerate launch` has set up for this process; one process where it has not.

    Raises:
        ValueError: for a stage of ZeRO that does not shard parameters, or settings that memory is not reckoned with.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    names = {name: name if name.startswith("fsdp") else f"accelerate_deepspeed_{name}" for name in _RECKONED}
    said = {name: os.environ.get(key.upper()) for name, key in names.items()}
    _check_reckoned({name: value for name, value in said.items() if value is not None}, "accelerate launch")
    if fsdp.is_wanted():
        return Layout(processes, "fsdp")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 3))
        return Layout(processes, _strategy_of_stage({"zero_stage": stage}, "accelerate launch"))
    return Layout(processes)


def check_layout(layout: Layout, recipe: "Recipe") -> None:
    """ValueError for what a training refuses where processes share the model in this way."""
    arguments, settings = recipe.arguments, recipe.settings
    if layout.strategy != "ddp" and arguments.lora_r is not None:
        raise ValueError(fsdp.NO_ADAPTERS)
    if layout.strategy == "fsdp" and settings.seg_projector_start_step:
        raise ValueError(fsdp.NO_LATE_START)
    if layout.strategy == "zero3":
        if settings.bf16 or settings.fp16:
            raise ValueError(zero3.what_is_rounded("bf16" if settings.bf16 else "fp16"))
        if settings.seg_projector_start:
            raise ValueError(zero3.NO_START)


@dataclass(frozen=True)
class Shares:
    """Bytes of one process, and in words why."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    why_gathered: str
    divided_by: int

    def note(self, what: str) -> str:
        return f"{what}, shared by {self.divided_by}" if self.divided_by > 1 else what


def shares_of(
    layout: Layout, weights: int, gradients: int, optimizer: int, gathered: int = 0, shares_gradients: bool = True
) -> Shares:
    """Divide what a training holds.

    Args:
        weights, gradients, optimizer: bytes of the undivided training.
        gathered: bytes that are whole at the peak where processes share the model.
        shares_gradients: False where each process keeps whole gradients until a step's last micro batch.
    """
    if not layout.shards:
        gathered = gradients if layout.processes > 1 else 0
        why = "buckets in which gradients are exchanged" if gathered else ""
        return Shares(weights, gradients, optimizer, gathered, why, 1)
    share = [-(-part // layout.processes) for part in (weights, gradients, optimizer)]
    why = "at the peak: embedding, head and what is in no block, blocks of the moment, their gradients"
    if not shares_gradients and layout.strategy == "fsdp":
        share[1] = gradients
        why += "; gradients are whole (sync_each_batch: false)"
    return Shares(*share, gathered, why, layout.processes)
