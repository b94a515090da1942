"""`perceptio label`: what a depth teacher sees in many pictures, as the codes of a depth codec."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .checkpoints import DTypeName
from .predict import Address, EngineName, Workers, check_out

if TYPE_CHECKING:
    from perceptio_hf import DepthVQVAE
    from perceptio_hf.labelling.labels import Tally
    from perceptio_hf.labelling.objects import Annotations
    from perceptio_hf.labelling.teacher import Teacher, TeacherInfo

Unit = Literal["mm", "m", "m/256", "disparity", "relative"]


def label(
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURES...",
            help="A folder, a pattern, a list (.txt, .jsonl), tar shards in WebDataset's form, parquet, or a saved "
            "data set with an image column.",
            show_default=False,
        ),
    ],
    teacher: Annotated[
        str,
        typer.Option(help="Folder or Hub name of a depth-estimation model of transformers.", show_default=False),
    ],
    depth_codec: Annotated[
        str,
        typer.Option(
            help="Folder of a depth codec, or of a checkpoint that has one; tiny is the embedded one.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the labels.", show_default=False)],
    maps: Annotated[bool, typer.Option("--maps", help="Keep the teacher's maps too, as 16-bit PNG.")] = False,
    questions: Annotated[
        str | None,
        typer.Option(
            help="Write questions that the depth answers as well: closest, order, objects, with commas between. Keeps "
            "the maps.",
            show_default=False,
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="For the questions about objects: instances in COCO's form, .json.", show_default=False),
    ] = None,
    teacher_unit: Annotated[
        Unit | None,
        typer.Option(help="What the teacher's numbers are, where its config.json does not say.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that go through the teacher together.")] = 8,
    device: Annotated[
        str | None,
        typer.Option(help="Where the teacher runs. Default: the GPU if there is one.", show_default=False),
    ] = None,
    dtype: Annotated[DTypeName, typer.Option(help="Numbers the teacher computes with; auto takes its own.")] = "auto",
    engine: Annotated[EngineName, typer.Option(help="What does the work: this process, or workers of Ray.")] = "local",
    address: Address = None,
    workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace labels of other pictures, another teacher or codec.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Write what a depth teacher sees in PICTURES as the codes of a depth codec: a data set that training reads.

    A run that was stopped goes on where it was; pictures that cannot be read are listed in OUT/failures.jsonl.
    """
    from perceptio_hf.labelling.questions import check_kinds

    kinds = check_kinds(questions, annotations)
    check_out(out)

    from perceptio_hf.bulk.archives import TarMember
    from perceptio_hf.bulk.engines import open_engine
    from perceptio_hf.bulk.items import list_items
    from perceptio_hf.files import expanded
    from perceptio_hf.labelling.objects import Annotations
    from perceptio_hf.labelling.teacher import teacher_info

    from . import checkpoints

    checkpoints.quieten()
    out = expanded(out)
    items = list_items(pictures, out)  # before what takes longer
    instances = None if annotations is None else Annotations(annotations)  # all that is named is read before the work
    if instances is not None and all(isinstance(item.source, str | TarMember) or item.error for item in items):
        instances.check([item.id, item.picture or ""] for item in items)  # rows of tables have names of their own
    opened = open_engine(engine, address, workers, device)
    if device is not None and engine == "local":
        checkpoints.check_device(device)
    teacher = os.path.abspath(os.path.expanduser(teacher)) if os.path.isdir(os.path.expanduser(teacher)) else teacher
    info = teacher_info(teacher, teacher_unit)
    depth_codec = checkpoints.or_tiny(depth_codec)
    codec = os.path.abspath(depth_codec) if os.path.exists(depth_codec) else depth_codec
    about = _about(info, codec, dtype, maps or bool(kinds))
    load = partial(load_labeller, info, codec, device, dtype)
    begin = time.monotonic()
    tally = _label(items, out, opened, load, about, batch_size, overwrite)
    seconds = time.monotonic() - begin
    summary: dict[str, Any] = {**vars(tally), "seconds": round(seconds, 1)}
    if tally.fresh:
        summary["pictures_per_second"] = round(tally.fresh / seconds, 2)
    summary["out"] = str(out)
    if kinds:
        summary["questions"] = _ask(out, kinds, instances)
    print(json.dumps(summary, indent=2) if as_json else _shown(summary))


def load_labeller(info: "TeacherInfo", codec: str, device: str | None, dtype: str) -> "tuple[Teacher, DepthVQVAE]":
    """Teacher and codec, ready to work; called in the process of each worker."""
    import torch

    from perceptio_hf.conversion.saved_models import load_depth_codec
    from perceptio_hf.labelling.teacher import Teacher

    from . import checkpoints

    checkpoints.quieten()
    teacher = Teacher(info, device, dtype)
    if teacher.model.device.type == "cpu" and teacher.model.num_parameters() < checkpoints.SMALL:
        torch.set_num_threads(1)
    return teacher, load_depth_codec(codec)


def _about(info: "TeacherInfo", codec: str, dtype: str, maps: bool) -> dict[str, Any]:
    """What labels depend on besides the pictures."""
    from perceptio_hf.conversion.saved_models import load_depth_codec
    from perceptio_hf.modeling.codec_identity import codec_fingerprint

    from .checkpoints import fingerprint

    loaded = load_depth_codec(codec)
    seen_by = fingerprint(info.name)
    return {
        "teacher": {
            "name": info.name,
            "fingerprint": seen_by[:16] if os.path.isdir(info.name) else seen_by,
            "model_type": info.model_type,
            "unit": info.unit,
            "dtype": dtype,
        },
        "codec": {
            "name": codec,
            "fingerprint": codec_fingerprint(loaded),
            "image_size": loaded.config.image_size,
            "grid_size": loaded.grid_size,
            "num_tokens": loaded.num_tokens,
            "num_codes": loaded.config.num_codes,
        },
        "maps": maps,
    }


def _label(items, out: Path, engine, load, about: dict, batch_size: int, overwrite: bool) -> "Tally":
    from perceptio_hf.bulk.engines import LocalEngine
    from perceptio_hf.bulk.progress import progress
    from perceptio_hf.files import in_use
    from perceptio_hf.labelling.labels import label_items

    with in_use(out, "perceptio label"):
        if isinstance(engine, LocalEngine):
            loaded = load()  # before anything is written
            load = lambda: loaded  # noqa: E731
        with progress("pictures") as watch:
            return label_items(
                items,
                out,
                engine,
                load,
                about,
                batch_size=batch_size,
                overwrite=overwrite,
                watch=lambda done, total: watch("labelling", done, total, ""),
            )


def _ask(out: Path, kinds: tuple[str, ...], annotations: "Annotations | None") -> dict[str, Any]:
    from perceptio_hf.bulk.progress import progress
    from perceptio_hf.files import in_use
    from perceptio_hf.labelling.questions import write_questions

    with in_use(out, "perceptio label"), progress("pictures") as watch:
        return write_questions(out, kinds, annotations, watch=lambda done, total: watch("asking", done, total, ""))


def _shown(summary: dict[str, Any]) -> str:
    speed = f" ({summary['pictures_per_second']:,} a second)" if "pictures_per_second" in summary else ""
    lines = [f"{summary['labelled']:,} pictures labelled{speed}; written to {summary['out']}"]
    if summary["failed"]:
        lines.append(f"{summary['failed']:,} failed; listed with the reasons in {summary['out']}/failures.jsonl")
    for kind, found in summary.get("questions", {}).get("kinds", {}).items():
        rules = ", ".join(f"{rule} {share:.3f}" for rule, share in found["rules"].items())
        chance = f"; chance {found['chance']:.3f}; {rules}" if rules else ": more pictures would give fair sets"
        lines.append(f"{found['questions']:,} questions {kind}{chance}")
    if other := summary.get("questions", {}).get("annotations", {}).get("pictures_of_another_size_than_annotated"):
        lines.append(
            f"{other:,} pictures have another size than their annotations say; no objects were asked about there"
        )
    return "\n".join(lines)
