"""Pictures for the places that a trainer reports to (`report_to`): TensorBoard, Weights & Biases, trackio."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from perceptio_hf.files import write_picture

if TYPE_CHECKING:
    from transformers import Trainer

    from .figures import HeldOutFigures

FOLDER = "figures"  # in output_dir


class TrainerFigures:
    """What `PerceptioSFTTrainer.figures` calls at every evaluation: figures come back, pictures go to `figures/` in the
    output folder and to the trackers."""

    def __init__(self, held_out: "HeldOutFigures"):
        self.held_out = held_out

    def __call__(self, trainer: "Trainer", model: Any) -> dict[str, float]:
        figures, pictures = self.held_out.measure(model, trainer.processing_class)
        show_pictures(trainer, pictures)
        return figures


def show_pictures(trainer: "Trainer", pictures: Mapping[str, Image.Image]) -> None:
    """Write pictures as figures/NAME-STEP.png into the output folder, and hand them to the trackers as cases/NAME."""
    step, folder = trainer.state.global_step, Path(trainer.args.output_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_picture(folder / f"{name}-{step}.png", picture)
        for callback in trainer.callback_handler.callbacks:
            _show(callback, f"cases/{name}", picture, step)


def _show(callback: Any, name: str, picture: Image.Image, step: int) -> None:
    """transformers keeps what it reports to inside its callbacks."""
    kind = type(callback).__name__
    if kind == "TensorBoardCallback" and callback.tb_writer is not None:
        callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif kind == "WandbCallback" and callback._wandb is not None and callback._wandb.run is not None:
        callback._wandb.log({name: callback._wandb.Image(picture), "train/global_step": step})
    elif kind == "TrackioCallback" and getattr(callback, "_initialized", True):
        callback._trackio.log({name: callback._trackio.Image(picture)})
