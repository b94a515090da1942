"""Making the embedded checkpoint out of a trained one: weights and configurations, without the code.

    python -m perceptio_hf.lab.embedded runs/tiny/checkpoint

writes `perceptio_hf/tiny`. Whoever loads the embedded checkpoint has the package, and with it the code; a checkpoint
that is saved or pushed carries it.
"""

import json
import shutil
import sys
from pathlib import Path

from perceptio_hf import tiny_checkpoint
from perceptio_hf.files import new_folder, write_json

_KEPT = {".json", ".jinja", ".safetensors"}


def embed(source: str | Path, folder: str | Path, card: str | Path | None = None) -> Path:
    """Copy the checkpoint in `source` to `folder`, which is replaced, without code and without mention of it.

    Args:
        card: a README.md to go with it.

    Raises:
        ValueError: where `source` is no saved model or lies in `folder`, or `folder` is something else than one.
    """
    source, folder = Path(source), Path(folder)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; name the folder of a trained checkpoint.")
    with new_folder(folder, overwrite=True, sources=(source,)) as fresh:
        for path in sorted(source.iterdir()):
            if path.suffix in _KEPT:
                shutil.copyfile(path, fresh / path.name)
        for path in fresh.glob("*.json"):
            settings = json.loads(path.read_text(encoding="utf-8"))
            if (codeless := _without_code(settings)) != settings:
                write_json(path, codeless)
        if card is not None:
            shutil.copyfile(card, fresh / "README.md")
    return folder


def _without_code(settings):
    """The same without `auto_map`, in the configurations of parts too."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without_code(value) for name, value in settings.items() if name != "auto_map"}


if __name__ == "__main__":
    embed(sys.argv[1], tiny_checkpoint(), card=Path(tiny_checkpoint()) / "README.md")
