"""`perceptio demo`: the embedded checkpoint answers questions about a rendered scene that no training saw."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image

    from perceptio_hf import SpatialAnswer
    from perceptio_hf.world import Question, Scene

_STEP = re.compile(r"\bp\d\d d\d\d\b")  # of an answer that looks nearness up, see perceptio_hf.world.cells
_SEEDS_PER_DEMO = 1000  # not every scene supports both questions; that many are tried


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("perceptio-demo"),
    seed: Annotated[int, typer.Option(min=0, max=1_000_000, help="Another number shows another scene.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Another checkpoint. Default: the embedded tiny one.", show_default=False)
    ] = None,
) -> None:
    """Render a scene no training saw, ask about it, and show what the model wrote beside the truth.

    Look at OUT/sheet.png first. Beside it: picture.png, overlay.png (the mask), depth.png (16 bit, 65535 = nearest),
    depth_color.png, marked.png (the points of the second question) and answer.json.
    """
    from . import checkpoints
    from .predict import check_out

    check_out(out)
    loaded = checkpoints.load(checkpoints.resolve(model))
    scene, refer, closest = choose_scene(seed)
    pictures, answers = _ask(loaded, scene, refer, closest)
    scores = compare(scene, refer, answers[0])
    about = {"picture": str(out / "picture.png"), "seed": scene.seed, "question": refer.text, "spatial": "seg+depth"}
    about |= {"truth": refer.answer, "second_question": closest.text, "second_text": answers[1].text}
    about |= {"second_truth": closest.answer, **scores}
    record = _write(out, scene, pictures, answers[0], about)
    print(json.dumps(record, indent=2, ensure_ascii=False) if as_json else _tell(record))


def choose_scene(seed: int) -> "tuple[Scene, Question, Question]":
    """Demo number `seed`: a held-out scene, a question for a mask, and one which of the marked points is closest."""
    import numpy as np

    from perceptio_hf.world import DEMO_SEED, ask, render_scene

    first = DEMO_SEED + seed * _SEEDS_PER_DEMO
    for number in range(first, first + _SEEDS_PER_DEMO):
        scene = render_scene(number)
        refer = ask(scene, np.random.default_rng(number), kinds=["refer"])
        closest = ask(scene, np.random.default_rng(number), kinds=["closest_point"])
        if refer and closest:
            return scene, refer[0], closest[0]
    raise AssertionError(f"no scene from {first} on supports both questions")


def _ask(loaded: tuple, scene: "Scene", refer: "Question", closest: "Question"):
    """The picture, plain and with the marked points, and the answers: with masks and depth first, and with depth."""
    from PIL import Image

    from perceptio_hf.world import draw_points

    from .predict import answer_questions

    plain = Image.fromarray(scene.image)
    marked = Image.fromarray(draw_points(scene.image, closest.points, closest.letters))
    first = answer_questions(*loaded, [plain], [refer.text], spatial="seg+depth")
    second = answer_questions(*loaded, [marked], [closest.text], spatial="depth")
    return (plain, marked), [*first, *second]


def compare(scene: "Scene", question: "Question", answer: "SpatialAnswer") -> dict[str, float]:
    """The first mask's intersection over union with the object asked for, and the mean depth error in [0, 1]."""
    import numpy as np

    from perceptio_hf.data.depth_maps import relative_from_metric

    true = scene.mask(question.targets[0])
    mask = answer.masks[0]
    error = np.abs(answer.depth - relative_from_metric(scene.depth)).mean()
    return {
        "mask_iou": round(float((mask & true).sum() / (mask | true).sum()), 3),
        "depth_error": round(float(error), 3),
    }


def _write(
    out: Path, scene: "Scene", pictures: "tuple[Image.Image, Image.Image]", answer: "SpatialAnswer", about: dict
) -> dict:
    from perceptio_hf.data.depth_maps import relative_from_metric
    from perceptio_hf.files import write_picture
    from perceptio_hf.visualization import colorize_depth, overlay, sheet

    from .predict import write_answer

    picture, marked = pictures
    out.mkdir(parents=True, exist_ok=True)
    write_picture(out / "picture.png", picture)
    write_picture(out / "marked.png", marked)
    panels = [
        ("picture", picture),
        (f"mask (IoU {about['mask_iou']:.2f})", overlay(picture, answer.masks)),
        (f"depth (mean error {about['depth_error']:.2f})", colorize_depth(answer.depth)),
        ("true depth", colorize_depth(relative_from_metric(scene.depth))),
        ("marked points", marked),
    ]
    write_picture(out / "sheet.png", sheet(panels, _conversation(about | {"text": answer.text})))
    return write_answer(out, picture, answer, about)


def _conversation(record: dict) -> str:
    return "\n".join(
        [
            f"Question: {record['question']}",
            f"Answer:   {record['text']}   (true: {record['truth']})",
            f"Question: {record['second_question']}",
            f"Answer:   {record['second_text']}   (true: {record['second_truth']})",
        ]
    )


def _tell(record: dict) -> str:
    folder = Path(record["files"]["answer"]).parent
    steps = ["          (p27: a cell of the depth grid; d21: the nearness read there, d31 = nearest)"]
    return "\n".join(
        [
            _conversation(record),
            *(steps if _STEP.search(record["second_text"]) else []),
            f"Mask:     overlaps the object by {record['mask_iou']:.2f} (intersection over union)",
            f"Depth:    mean error {record['depth_error']:.2f} on a scale from 0 (farthest) to 1 (nearest)",
            f"Look at {folder / 'sheet.png'}; the single pictures and answer.json are beside it.",
        ]
    )
