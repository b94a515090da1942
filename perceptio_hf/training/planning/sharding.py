"""What each of several processes holds of weights, gradients and optimizer state."""

from dataclasses import dataclass

from torch import nn

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
        return self.strategy != "ddp" and self.processes > 1


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
