"""Maps from the tensor names of one layout to those of another, what became of each, and strict loading."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class ConversionReport:
    """What a conversion read, what became of it, and what the result has that the source did not.

    Args:
        source: What the user named.
        layout: What it turned out to be, such as "SAM2.1 tiny, Meta's layout".
        mapped: Name in the source -> name in the result.
        ignored: Why -> names in the source.
        added: Name in the result -> where it comes from, as the source does not have it.
        unexpected: Names in the source that no rule knows; `fill_model` refuses them.
        notes: Anything else the user should know.
    """

    source: str
    layout: str = ""
    mapped: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_read(self) -> int:
        """Tensors in the source."""
        return len(self.mapped) + sum(map(len, self.ignored.values())) + len(self.unexpected)

    def merge(self, part: "ConversionReport", prefix: str = "", target_prefix: str = "") -> None:
        """Take over what became of a part whose names lie under `prefix` here and under `target_prefix` there."""
        self.mapped.update((prefix + old, target_prefix + new) for old, new in part.mapped.items())
        for why, names in part.ignored.items():
            self.ignored.setdefault(why, []).extend(prefix + name for name in names)
        self.added.update((target_prefix + name, why) for name, why in part.added.items())
        self.unexpected.extend(prefix + name for name in part.unexpected)
        self.notes.extend(part.notes)

    def as_dict(self) -> dict[str, Any]:
        """For --json: counts, and every name."""
        ignored = [{"why": why, "count": len(names), "names": names} for why, names in self.ignored.items()]
        return {
            "source": self.source,
            "layout": self.layout,
            "read": self.num_read,
            "mapped": len(self.mapped),
            "ignored": ignored,
            "added": self.added,
            "notes": self.notes,
            "names": self.mapped,
        }


class KeyMap:
    """Renames tensors by a table of regular expressions; each must match a whole name, the first that does decides.

    A name that matches nothing is unexpected: a table says everything it knows, and guesses nothing.

    Args:
        renames: (expression, replacement as in `re.Match.expand`) pairs.
        ignored: Expression -> why tensors of that name are left out. These are looked at first.
    """

    def __init__(self, renames: Sequence[tuple[str, str]], ignored: Mapping[str, str] | None = None):
        self._renames = [(re.compile(expression), replacement) for expression, replacement in renames]
        self._ignored = [(re.compile(expression), why) for expression, why in (ignored or {}).items()]

    def apply(self, tensors: Mapping[str, Tensor], report: ConversionReport) -> dict[str, Tensor]:
        """`tensors` under their new names; `report` learns what became of each.

        Raises:
            ValueError: Two tensors would get the same name.
        """
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            why = next((why for expression, why in self._ignored if expression.fullmatch(name)), None)
            target = None if why is not None else self.rename(name)
            if why is not None:
                report.ignored.setdefault(why, []).append(name)
            elif target is None:
                report.unexpected.append(name)
            elif target in renamed:
                first = next(old for old, new in report.mapped.items() if new == target)
                raise ValueError(f"{report.source} holds both {first} and {name}, which would both become {target}.")
            else:
                renamed[target] = tensor
                report.mapped[name] = target
        return renamed

    def rename(self, name: str) -> str | None:
        """The new name of one tensor; None where no rule knows it."""
        for expression, replacement in self._renames:
            match = expression.fullmatch(name)
            if match:
                return match.expand(replacement)
        return None


def refusal(
    source: str, layout: str, *, unexpected: Sequence[str] = (), missing: Sequence[str] = (), wrong: Sequence[str] = ()
) -> ValueError:
    """The error for a source that is not `layout`: names the first of each kind and counts the rest.

    Args:
        wrong: What is wrong with the shape or values of tensors, e.g. "conv.weight is (8, 3), expected (8, 4)".
    """
    kinds = {"unexpected": unexpected, "missing": missing, "wrong": wrong}
    found = [f"{kind} {_first_of(names)}" for kind, names in kinds.items() if names]
    return ValueError(f"{source} is not {layout}: {'; '.join(found)}.")


def require(tensors: Mapping[str, Tensor], names: Iterable[str], report: ConversionReport, layout: str) -> None:
    """Refuse a source without `names`, which a reader needs before it can tell the architecture.

    Raises:
        ValueError: names the first unexpected and missing names.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise refusal(report.source, layout, unexpected=report.unexpected, missing=missing)


def fill_model(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    report: ConversionReport,
    layout: str,
    *,
    optional: Iterable[str] = (),
) -> None:
    """Copy `tensors` into `model`, all of them, in the model's own precision; `report` notes where that rounds.

    Args:
        layout: What the source should be, for the error: "a SAM2 checkpoint".
        optional: Names of the model that the source may lack, such as tied weights.

    Raises:
        ValueError: Names are unexpected or missing, a shape is wrong, or a value is not finite. Nothing is copied then.
    """
    wanted = model.state_dict()
    origin = {new: old for old, new in report.mapped.items()}  # users know the names of their own file
    unexpected = [*report.unexpected, *(origin.get(name, name) for name in tensors if name not in wanted)]
    missing = sorted(set(wanted) - set(tensors) - set(optional))
    wrong = [
        f"{origin.get(name, name)} is {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if not (unexpected or missing or wrong):
        wrong = [f"{origin.get(name, name)} holds NaN or infinity" for name in tensors if not _is_finite(tensors[name])]
    if unexpected or missing or wrong:
        raise refusal(report.source, layout, unexpected=unexpected, missing=missing, wrong=wrong)
    model.load_state_dict(dict(tensors), strict=False)  # names were checked; `optional` may be absent
    rounded = [name for name, tensor in tensors.items() if not torch.equal(wanted[name].to(tensor), tensor)]
    if rounded:
        report.notes.append(
            f"{len(rounded)} tensors do not fit into {wanted[rounded[0]].dtype} and were rounded, the first is "
            f"{origin.get(rounded[0], rounded[0])}."
        )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
