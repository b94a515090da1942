"""Learning rates of their own for the parts that make masks: parameter groups of the optimizer."""

from torch import nn
from torch.optim import Optimizer


def give_own_rates(optimizer: Optimizer, rates: list[tuple[nn.Module, float]]) -> None:
    """Move the parameters of modules into parameter groups with rates of their own, which schedules scale as the rest.

    Each group is divided in place, so that weight decay and whatever else it has stays; a group that would become empty
    changes its rate instead. For an optimizer that has made no step.

    Args:
        rates: modules and their learning rates; where modules share a parameter the last one counts.

    Raises:
        ValueError: if none of a module's parameters is trained.
    """
    wanted = {id(parameter): rate for module, rate in rates for parameter in module.parameters()}
    for module, _ in rates:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in trained for parameter in module.parameters()):
            raise ValueError(
                f"There is a learning rate for {type(module).__name__}, but no parameter of it is trained: leave the "
                "rate out, or do not freeze it (with adapters, name it in lora_modules_to_save)."
            )
    for group in list(optimizer.param_groups):
        for rate in sorted({wanted[id(p)] for p in group["params"] if id(p) in wanted}):
            own = [p for p in group["params"] if wanted.get(id(p)) == rate]
            rest = [p for p in group["params"] if wanted.get(id(p)) != rate]
            if not rest:
                group["lr"] = rate
                continue
            group["params"] = rest
            optimizer.add_param_group({**group, "params": own, "lr": rate})
