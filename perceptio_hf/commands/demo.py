"""`perceptio demo`: the embedded checkpoint answers questions about a rendered scene that no training saw."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image

    from perceptio_hf import SpatialAnswer
    from perceptio_hf.data.world import Question, Scene

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
    depth_color.png and answer.json.
    """
    from perceptio_hf.commands import checkpoints
    from perceptio_hf.commands.predict import check_out

    check_out(out)
    loaded = checkpoints.load(checkpoints.resolve(model))
    scene, refer, closer = choose_scene(seed)
    picture, answers = _ask(loaded, scene, refer, closer)
    scores = compare(scene, refer, answers[0])
    about = {"picture": str(out / "picture.png"), "seed": scene.seed, "question": refer.text, "spatial": "seg+depth"}
    about |= {"truth": refer.answer, "second_question": closer.text, "second_text": answers[1].text}
    about |= {"second_truth": closer.answer, **scores}
    record = _write(out, scene, picture, answers[0], about)
    print(json.dumps(record, indent=2, ensure_ascii=False) if as_json else _tell(record))


def choose_scene(seed: int) -> "tuple[Scene, Question, Question]":
    """Demo number `seed`: a held-out scene, a question for a mask, and one which of two objects is closer."""
    import numpy as np

    from perceptio_hf.data.world import DEMO_SEED, ask, render_scene

    first = DEMO_SEED + seed * _SEEDS_PER_DEMO
    for number in range(first, first + _SEEDS_PER_DEMO):
        scene = render_scene(number)
        refer = ask(scene, np.random.default_rng(number), kinds=["refer"])
        closer = ask(scene, np.random.default_rng(number), kinds=["closer_object"])
        if refer and closer:
            return scene, refer[0], closer[0]
    raise AssertionError(f"no scene from {first} on supports both questions")


def _ask(loaded: tuple, scene: "Scene", refer: "Question", closer: "Question"):
    """The picture, and the answers to both questions: each with masks and depth first."""
    from PIL import Image

    from perceptio_hf.commands.predict import answer_questions

    picture = Image.fromarray(scene.image)
    first = answer_questions(*loaded, [picture], [refer.text], spatial="seg+depth")
    second = answer_questions(*loaded, [picture], [closer.text], spatial="seg+depth")
    return picture, [*first, *second]


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


def _write(out: Path, scene: "Scene", picture: "Image.Image", answer: "SpatialAnswer", about: dict) -> dict:
    from perceptio_hf.commands.predict import write_answer
    from perceptio_hf.data.depth_maps import relative_from_metric
    from perceptio_hf.files import write_picture
    from perceptio_hf.visualization import colorize_depth, overlay, sheet

    out.mkdir(parents=True, exist_ok=True)
    write_picture(out / "picture.png", picture)
    panels = [
        ("picture", picture),
        (f"mask (IoU {about['mask_iou']:.2f})", overlay(picture, answer.masks)),
        (f"depth (mean error {about['depth_error']:.2f})", colorize_depth(answer.depth)),
        ("true depth", colorize_depth(relative_from_metric(scene.depth))),
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
    return "\n".join(
        [
            _conversation(record),
            f"Mask:     overlaps the object by {record['mask_iou']:.2f} (intersection over union)",
            f"Depth:    mean error {record['depth_error']:.2f} on a scale from 0 (farthest) to 1 (nearest)",
            f"Look at {folder / 'sheet.png'}; the single pictures and answer.json are beside it.",
        ]
    )
