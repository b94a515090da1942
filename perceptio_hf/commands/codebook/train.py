"""`perceptio codebook train`."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .settings import read_settings
from .sources import AsJson, Pattern, Unit, UnitOption, depth_source, figures_text, known

if TYPE_CHECKING:
    from accelerate import Accelerator

    from perceptio_hf import DepthVQVAE
    from perceptio_hf.training.codec import DepthSource

_IN_MEMORY = 1 << 30  # bytes of maps that are kept there; more of them are read as they are needed
_SHOWN_MAPS, _DRAWN = 256, 4  # maps whose figures are shown at the end; of the best and of the worst that are drawn


def train(
    out: Annotated[Path, typer.Option(help="Folder to make for the codec.", show_default=False)],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with these options, `codec` and `options`, or the name of one that comes with the package, "
            "codebook_tiny. What is given here wins."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="world, world:SEED, a folder of depth maps, what `perceptio label --maps` wrote, or, with --teacher, "
            "pictures. Default: world."
        ),
    ] = None,
    unit: UnitOption = None,
    pattern: Pattern = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A depth-estimation model that looks at the pictures --data names.", show_default=False),
    ] = None,
    teacher_unit: Annotated[
        Unit | None,
        typer.Option(help="What its numbers are, where its config.json does not say.", show_default=False),
    ] = None,
    maps: Annotated[
        int | None, typer.Option(min=1, help="Most depth maps to use. Default: all; of the world 4000.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps to train.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to train, instead of --steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights and batches. Default: 0.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read maps ahead.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda. Default: the GPU if there is one.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the codec that is in OUT, or a training of it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a depth codec from scratch and save it in OUT.

    Maps that take more than 1 GB are read while training, in random order over all of them; memory does not grow with
    their number. A map that cannot be used is left out and named, up to ten or a tenth of them. A training that was
    stopped goes on with the same command. For several GPUs: `accelerate launch -m perceptio_hf codebook train ...`.
    """
    from perceptio_hf.files import check_new_folder, expanded, in_use, new_folder, write_json, write_picture

    given = {"data": data, "unit": unit, "pattern": pattern, "maps": maps, "steps": steps, "minutes": minutes}
    given |= {"teacher": teacher, "teacher_unit": teacher_unit, "seed": seed}
    settings = read_settings(config, given)
    out = expanded(out)
    check_new_folder(out, overwrite, sources := _places(config, settings))

    from perceptio_hf import DepthVQVAEConfig
    from perceptio_hf.commands.checkpoints import quieten
    from perceptio_hf.data.keys import build
    from perceptio_hf.evaluation.report.codec_sheet import measure_maps
    from perceptio_hf.training.codec import CodebookOptions

    quieten()
    codec_config = build(DepthVQVAEConfig, settings["codec"], "codec")
    options = build(CodebookOptions, settings["options"], "options")
    accelerator = _accelerator(device)
    is_main = accelerator.is_main_process
    whole = _source(settings, codec_config.image_size, str(accelerator.device), out)
    work = out.with_name(f"{out.name}.training")
    with in_use(work, "perceptio codebook train") if is_main else nullcontext():
        if overwrite and is_main:
            (work / "state.pt").unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        codec = _trained(codec_config, whole, settings, options, workers, accelerator, work)
        if not is_main:
            return
        figures, drawn = measure_maps(codec, whole, _SHOWN_MAPS, _DRAWN)
        trained_on = known(figures)
        record = {"settings": settings, "parameters": codec.num_parameters(), "on_training_maps": trained_on}
        record["left_out"] = list(whole.left_out)
        with new_folder(out, overwrite, sources) as folder:
            codec.save_pretrained(folder)
            write_json(folder / "codec.json", record)
            write_picture(folder / "maps.png", drawn)
        (work / "state.pt").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    text = f"{figures_text(trained_on)}\nBest and worst maps: {out / 'maps.png'}\nCodec: {out}"
    print(json.dumps({"codec": str(out), **record}, indent=2) if as_json else text)


def _places(config: Path | None, settings: dict[str, Any]) -> list[str | Path | None]:
    """What is read and must not be replaced; the world lies nowhere, also where a folder has its name."""
    data = settings["data"]
    return [config, settings["teacher"], None if data.partition(":")[0] == "world" else data]


def _accelerator(device: str | None) -> "Accelerator":
    from accelerate import Accelerator

    from perceptio_hf.commands.checkpoints import check_device

    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; give cpu or cuda, and choose GPUs by CUDA_VISIBLE_DEVICES.")
    if device is not None:
        check_device(device)
    # The recipe's `precision` counts; accelerate's would wrap several processes' forward in an autocast of its own.
    return Accelerator(cpu=device == "cpu", mixed_precision="no")


def _source(settings: dict[str, Any], size: int, device: str, out: Path) -> "DepthSource":
    """All maps that the settings name, without what an earlier run drew into `out`."""
    looking = None
    if settings["teacher"] is not None:
        from perceptio_hf.labelling.teacher import Teacher, teacher_info

        looking = Teacher(teacher_info(settings["teacher"], settings["teacher_unit"]), device)
    elif settings["teacher_unit"] is not None:
        raise ValueError("--teacher-unit is for a --teacher; add it, or give --unit for a folder of maps.")
    places = [settings[key] for key in ("data", "unit", "pattern", "maps")]
    return depth_source(*places, size, first_seed=0, teacher=looking, leave_out=out)


def _trained(
    codec_config, whole: "DepthSource", settings: dict[str, Any], options, workers: int, accelerator, work: Path
) -> "DepthVQVAE":
    from perceptio_hf.bulk.progress import progress, tracked
    from perceptio_hf.training.codec import DepthBank, train_codebook
    from perceptio_hf.training.codec.loop import Saving

    source = whole
    if len(whole) * codec_config.image_size**2 * 8 <= _IN_MEMORY:
        read = whole.read_each(tracked(range(len(whole)), "reading", "maps"))
        source = DepthBank.gather((item for _, item in read), codec_config)
        workers = 0
    names = ("data", "unit", "pattern", "maps", "teacher", "teacher_unit")
    claim = {"data": {key: settings[key] for key in names}, "maps": len(whole)}
    with progress() if accelerator.is_main_process else nullcontext() as watch:
        try:
            return train_codebook(
                codec_config,
                source,
                options=options,
                workers=workers,
                accelerator=accelerator,
                saving=Saving(work / "state.pt", claim),
                progress=None
                if watch is None
                else lambda share, error: watch("training", share, 1.0, f"error {error:.4f}"),
                **{key: settings[key] for key in ("steps", "minutes", "seed")},
            )
        except RuntimeError as error:
            if not str(error).startswith("The loss is"):
                raise
            raise ValueError(f"{error} (options: learning_rate in --config)") from None
