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
SHOWN = 512  # pixels of the pictures for people
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
    depth_color.png, marked.png (the points of the second question) and answer.json. They have 512 pixels; the model
    sees the same scene at its own size.
    """
    from . import checkpoints
    from .predict import check_out

    check_out(out)
    loaded = checkpoints.load(checkpoints.resolve(model))
    scene, refer, closest = choose_scene(seed)
    shown, marked, answers = answer_scene(loaded, scene, refer, closest)
    scores = compare(shown, refer, answers[0])
    about = {"picture": str(out / "picture.png"), "seed": scene.seed, "question": refer.text, "spatial": "seg+depth"}
    about |= {"truth": refer.answer, "second_question": closest.text, "second_text": answers[1].text}
    about |= {"second_truth": closest.answer, **scores}
    record = _write(out, shown, marked, refer, answers[0], about)
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


def answer_scene(
    loaded: tuple, scene: "Scene", refer: "Question", closest: "Question"
) -> "tuple[Scene, Image.Image, list[SpatialAnswer]]":
    """The scene and the marked picture as people see them, and two answers: with mask and depth first, and with depth.

    The model sees both at its own size; masks and depth come out at the size that is shown.
    """
    from PIL import Image

    from perceptio_hf.evaluation.run.answering import encode_questions
    from perceptio_hf.world import render_scene

    model, processor = loaded
    shown = render_scene(scene.seed, SHOWN)
    seen = render_scene(scene.seed, max(scene.size, processor.image_processor.size["height"]))
    asked = [(Image.fromarray(seen.image), refer, "seg+depth"), (_mark(seen, scene.size, closest), closest, "depth")]
    answers = []
    for picture, question, spatial in asked:
        inputs = encode_questions(processor, [picture], [question.text]).to(model.device)
        inputs["original_sizes"][:] = SHOWN
        outputs = model.generate(**inputs, spatial=spatial, do_sample=False, return_dict_in_generate=True)
        answers += processor.post_process_spatial(outputs)
    return shown, _mark(shown, scene.size, closest), answers


def _mark(scene: "Scene", size: int, question: "Question") -> "Image.Image":
    """The scene with the question's points, which are given in pixels of a picture of `size`."""
    from PIL import Image

    from perceptio_hf.world import draw_points

    factor = scene.size / size
    points = [(int((x + 0.5) * factor), int((y + 0.5) * factor)) for x, y in question.points]
    return Image.fromarray(draw_points(scene.image, points, question.letters))


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
    out: Path, scene: "Scene", marked: "Image.Image", refer: "Question", answer: "SpatialAnswer", about: dict
) -> dict:
    from PIL import Image

    from perceptio_hf.data.depth_maps import relative_from_metric
    from perceptio_hf.files import write_picture
    from perceptio_hf.visualization import depth_panel, mask_panel, sheet

    from .predict import write_answer

    picture = Image.fromarray(scene.image)
    out.mkdir(parents=True, exist_ok=True)
    write_picture(out / "picture.png", picture)
    write_picture(out / "marked.png", marked)
    record = write_answer(out, picture, answer, about)
    panels = [
        ("picture", picture),
        mask_panel(picture, answer.masks, title=f"mask the model wrote (IoU {about['mask_iou']:.2f})"),
        mask_panel(picture, scene.mask(refer.targets[0])[None], title="true mask"),
        ("points of the second question", marked),
        depth_panel(answer.depth, title=f"depth the model wrote (mean error {about['depth_error']:.2f})"),
        depth_panel(relative_from_metric(scene.depth), title="true depth"),
    ]
    write_picture(out / "sheet.png", sheet(panels, _conversation(record), columns=3))
    return record


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
