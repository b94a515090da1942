"""Whether a folder that was written holds what was to be written: every weight bit for bit, and every setting.

Digests stand for weights, so that no two copies of a model are in memory.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .saved_models import load_strictly

_ROWS_AT_ONCE = 4096
# What a configuration says otherwise when it is read again; dtypes are compared with the weights.
_OF_SAVING = {"architectures", "auto_map", "dtype", "transformers_version"}


@dataclass(frozen=True)
class Written:
    """What a model is before it is saved.

    Args:
        model_class: that loads it.
        digests: of each tensor.
        settings: every field of the configuration.
    """

    model_class: type[PreTrainedModel]
    digests: dict[str, bytes]
    settings: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Written":
        """Note a model, which may be let go then."""
        digests = {name: digest(value) for name, value in model.state_dict().items()}
        return cls(type(model), digests, dict(settings_of(model.config)))

    def check(self, folder: str | os.PathLike) -> None:
        """Load `folder` and compare.

        Raises:
            ValueError: it cannot be loaded, or a weight or setting is not what it was; names the first.
        """
        model = load_strictly(self.model_class, folder, "what was written")
        values = model.state_dict()
        names = [*self.digests, *(name for name in values if name not in self.digests)]
        changed = [
            name for name in names if name not in values or digest(values[name]) != self.digests.get(name, b"absent")
        ]
        found = dict(settings_of(model.config))
        changed += [f"{name} in config.json" for name, value in self.settings.items() if found.get(name) != value]
        if changed:
            count = len(names) + len(self.settings)
            raise ValueError(
                f"What was written is not what was to be written: {changed[0]} differs ({len(changed)} of {count} "
                "weights and settings do). Nothing was kept. Please report this, with the versions of torch and "
                "transformers."
            )


def digest(value: Tensor, rows: Tensor | None = None) -> bytes:
    """Of the bits of a tensor, its shape and its dtype; `rows` (n,) chooses some of a matrix."""
    shape = list(value.shape) if rows is None else [len(rows), *value.shape[1:]]
    found = hashlib.sha256(repr((str(value.dtype), shape)).encode())
    pieces: Iterable[Tensor] = [value]
    if rows is not None:  # in pieces, since a choice of rows is a copy
        pieces = (value[part.to(value.device)] for part in rows.split(_ROWS_AT_ONCE))
    for piece in pieces:
        found.update(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.digest()


def settings_of(config: PreTrainedConfig, without: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """(name, value) of each field of a configuration, section by section, as config.json has them.

    Args:
        without: further names to leave out, alone or with their section ("text_config.vocab_size").
    """
    left_out = _OF_SAVING | set(without)
    sections = [("", json.loads(json.dumps(config.to_dict(), default=str)))]
    for prefix, section in sections:
        for name, value in section.items():
            if name.startswith("_") or {name, prefix + name} & left_out:
                continue
            if isinstance(value, dict):
                sections.append((f"{prefix}{name}.", value))
            else:
                yield prefix + name, value
