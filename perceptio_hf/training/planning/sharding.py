"""How processes share a training, and what each of them holds of weights, gradients and optimizer state."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from perceptio_hf.files import read_yaml
from perceptio_hf.training import fsdp, zero3

if TYPE_CHECKING:
    from perceptio_hf.training.recipe import Recipe

STRATEGIES = ("ddp", "fsdp", "zero3")


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
        ValueError: for a file that is none, FSDP of version 1, or a stage of ZeRO that does not shard parameters.
    """
    values = read_yaml(file)
    kind = str(values.get("distributed_type", "NO")).upper()
    processes = values.get("num_processes", 1)
    if not isinstance(processes, int):
        raise ValueError(f"{file}: num_processes is {processes!r}; expected a whole number.")
    if kind == "FSDP":
        version = (values.get("fsdp_config") or {}).get("fsdp_version")
        if version != 2:
            raise ValueError(f"{file}: fsdp_version is {version!r}; expected 2.")
        return Layout(processes, "fsdp")
    if kind == "DEEPSPEED":
        return Layout(processes, _strategy_of_stage(values.get("deepspeed_config") or {}, str(file)))
    return Layout(processes if kind != "NO" else 1)


def _strategy_of_stage(settings: Mapping, place: str) -> str:
    stage = settings.get("zero_stage")
    if stage != 3:
        raise ValueError(f"{place}: zero_stage is {stage!r}; expected 3, which is what is reckoned with here.")
    return "zero3"


def layout_of_environment() -> Layout:
    """The layout that `accelerate launch` has set up for this process; one process where it has not.

    Raises:
        ValueError: for a stage of ZeRO that does not shard parameters.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
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


def shares_of(layout: Layout, model: nn.Module, weights: int, gradients: int, optimizer: int) -> Shares:
    """Divide what a training holds.

    With shards a block is gathered while it is computed, and the next one already on its way: two blocks at a time, and
    what belongs to no block (embedding, head, projectors, SAM2's frame) for the whole step. A gathered block that is
    trained has a whole gradient too before that is divided.

    Args:
        model: whose blocks are gathered (`_no_split_modules`).
        weights, gradients, optimizer: bytes of the undivided training.
    """
    if not layout.shards:
        gathered = gradients if layout.processes > 1 else 0
        why = "buckets in which gradients are exchanged" if gathered else ""
        return Shares(weights, gradients, optimizer, gathered, why, 1)
    blocks = _blocks(model)
    largest = max(blocks, key=_bytes, default=None)
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    root = [parameter for parameter in model.parameters() if id(parameter) not in in_blocks]
    outside = sum(parameter.numel() * parameter.itemsize for parameter in root)
    outside += sum(parameter.numel() * parameter.itemsize for parameter in root if parameter.requires_grad)
    gathered = outside + (2 * _bytes(largest) + _trained_bytes(largest) if largest is not None else 0)
    why = "two whole blocks and the gradient of one; embedding, head and what is in no block, with gradients"
    share = [-(-part // layout.processes) for part in (weights, gradients, optimizer)]
    return Shares(*share, gathered, why, layout.processes)


def _blocks(model: nn.Module) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def _trained_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)
