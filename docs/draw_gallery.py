"""Draws docs/images/gallery.jpg, the five demos behind the one that README shows, good and bad: `make plan`."""

from pathlib import Path

from PIL import Image

from perceptio_hf.commands import checkpoints
from perceptio_hf.commands.demo import answer_scene, choose_scene, compare
from perceptio_hf.data.depth_maps import relative_from_metric
from perceptio_hf.visualization import Panel, depth_panel, mask_panel, sheet

PICTURE = Path(__file__).parent / "images" / "gallery.jpg"
DEMOS = range(1, 6)


def rows(loaded: tuple, demo: int) -> tuple[list[Panel | tuple], str]:
    """What a demo of this number shows, as a row of five panels, and its questions and answers in two lines."""
    scene, refer, closest = choose_scene(demo)
    scene, marked, answers = answer_scene(loaded, scene, refer, closest)
    scores, picture = compare(scene, refer, answers[0]), Image.fromarray(scene.image)
    panels = [
        mask_panel(picture, answers[0].masks, title=f"{demo}. mask (IoU {scores['mask_iou']:.2f})"),
        mask_panel(picture, scene.mask(refer.targets[0])[None], title="true mask"),
        depth_panel(answers[0].depth, title=f"depth (mean error {scores['depth_error']:.2f})")._replace(legend=None),
        depth_panel(relative_from_metric(scene.depth), title="true depth")._replace(legend=None),
        Panel("points of the second question", marked),
    ]
    asked = zip((refer, closest), answers, strict=True)
    said = [f"{question.text}  {answer.text}  (true: {question.answer})" for question, answer in asked]
    return panels, f"{demo}. " + "\n    ".join(said)


def main() -> None:
    loaded = checkpoints.load(checkpoints.resolve(None))
    panels, captions = zip(*(rows(loaded, demo) for demo in DEMOS), strict=True)
    page = sheet([panel for row in panels for panel in row], "\n".join(captions), columns=len(panels[0]))
    page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS).save(PICTURE, quality=88)
    print(PICTURE)


if __name__ == "__main__":
    main()
