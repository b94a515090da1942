"""`perceptio train`: the tiny checkpoint, from scratch, by a recipe."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[
        Path, typer.Option(help="The recipe, a YAML file such as recipes/tiny.yaml.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for stages and the finished checkpoint; a stopped run goes on from it.")
    ] = Path("runs/tiny"),
    processes: Annotated[int, typer.Option(min=1, help="Processes that share every batch, one thread each.")] = 2,
    workers: Annotated[int, typer.Option(min=0, help="Further processes, of each, that render scenes.")] = 1,
) -> None:
    """Train a tiny Perceptio on rendered scenes: codec, masks, vision, language; the result is OUT/checkpoint."""
    if not config.is_file():
        raise ValueError(f"There is no recipe {config}; recipes/tiny.yaml is the one of the embedded checkpoint.")

    from transformers.utils import logging

    from perceptio_hf.training.tiny import TinyRecipe, train_tiny

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipe = TinyRecipe.read(config)
    print(f"The finished checkpoint is {train_tiny(recipe, out, processes=processes, workers=workers)}")
