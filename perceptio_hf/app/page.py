"""The page: two figures, a question, an answer, files to keep, examples; and the same as an HTTP interface.

What the figures show is one value, the view: `picture` (url, path, width, height), `points` (x, y in pixels), `marked`
(url of the picture with its points), `masks`, `depth`, `veil`, `error` (one line) and `busy`.
"""

import html
import os
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it asks nothing of the network

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image, ImageFile

from perceptio_hf.evaluation.run.answering import describe
from perceptio_hf.processing.pictures import load_picture
from perceptio_hf.processing.streaming import AnswerEvent, DepthRowEvent, SpatialEvent, TextEvent
from perceptio_hf.visualization import depth_colors

from . import results
from .assistant import CLOSEST, LETTERS, Assistant, Question, mark
from .examples import EXAMPLES, write_examples

# gradio lets Pillow fill up files that were cut off, in the whole process; here they are refused, as everywhere.
ImageFile.LOAD_TRUNCATED_IMAGES = False

MOST_BYTES = 50_000_000  # of an upload
_STATIC = Path(__file__).parent / "static"
_MODES = (
    ("Model decides", "auto"),
    ("Masks", "seg"),
    ("Depth", "depth"),
    ("Masks + depth", "seg+depth"),
    ("Words only", "none"),
)
_EVERY = 0.08  # seconds between two drawings of a depth map that grows
_KEPT = 16  # answers whose files are kept
_ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
_OWN = {"api_visibility": "private", "show_progress": "hidden"}
_AT_ONCE = {**_OWN, "queue": False}
_EMPTY = {
    "picture": None,
    "points": [],
    "marked": None,
    "masks": [],
    "depth": None,
    "veil": None,
    "error": "",
    "busy": False,
}


class Page:
    """The handlers of one app.

    Args:
        assistant: who answers.
        folder: for example scenes and files of answers; of this process alone.
    """

    def __init__(self, assistant: Assistant, folder: Path):
        self.assistant, self.folder = assistant, folder
        self.examples = write_examples(folder)
        self._kept: deque[Path] = deque()

    def read_picture(self, view: dict) -> dict:
        """The picture that was just sent, or in one line why not; the picture before it stays then."""
        name = str(view.get("name") or "This file")
        try:
            path = self._own(view.get("chosen"))
            picture = _opened(path, name)
        except ValueError as error:
            return {**_EMPTY, **view, "error": str(error), "chosen": None}
        return {**_EMPTY, "picture": _about(picture, path)}

    def set_points(self, view: dict) -> dict:
        """The picture with its points drawn."""
        try:
            picture, points = self._picture(view), _points(view)
            Question(picture, CLOSEST, points=points)
        except ValueError as error:
            return {**view, "points": [], "marked": None, "error": str(error)}
        return {**view, "points": points, "marked": _marked(picture, points), "error": ""}

    def show_example(self, data: gr.EventData) -> tuple[dict, str, str]:
        """View, question and spatial mode of the example that was chosen."""
        number = int(data._data["number"]) % len(EXAMPLES)
        example, path = EXAMPLES[number], Path(self.examples[number]["path"])
        picture = _opened(path, path.name)
        view = {**_EMPTY, "picture": _about(picture, path), "points": list(map(list, example.points))}
        return {**view, "marked": _marked(picture, example.points)}, example.question, example.spatial

    def wait(self, view: dict, text: str) -> str:
        """The question, until its turn comes: others may be asking."""
        if not view.get("picture") or not (text or "").strip():
            return gr.skip()  # `ask` says what is missing
        return results.show_words(text, "", True)

    def ask(self, view: dict, text: str, spatial: str) -> Iterator[tuple]:
        """View, answer, what was written, and three files, again and again while the answer is written."""
        nothing = (gr.skip(), gr.skip(), *[gr.skip()] * 3)
        try:
            question = Question(self._picture(view), text or "", spatial, _points(view))
            yield from self._answer(view, question)
        except ValueError as error:
            yield {**view, "busy": False, "error": str(error)}, *nothing
        except Exception as error:  # of the model: the page goes on
            traceback.print_exc()
            yield {**view, "busy": False, "error": f"The model failed: {' '.join(str(error).split())[:300]}"}, *nothing

    def ask_closest(self, view: dict) -> Iterator[tuple]:
        """The same for "which of the points is the closest"."""
        if len(_points(view)) < 2:
            yield {**view, "error": "Set at least two points on the picture first."}, *[gr.skip()] * 5
            return
        yield from self.ask(view, "", "depth")

    def answer(
        self, picture: str | None, question: str = "", spatial: str = "auto", points: list | None = None
    ) -> tuple[dict, str | None]:
        """One question over HTTP.

        Returns:
            What `describe` says, with `width`, `height`, `question` and `note`; the path of the 16-bit depth.
        """
        try:
            if not picture:
                raise ValueError("Send a picture.")
            opened = _opened(Path(picture), Path(picture).name)
            asked = Question(opened, question or "", spatial or "auto", _points({"points": points or []}))
            *_, last = self.assistant.ask(asked)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        files = results.write_files(last.answer, self._folder())
        about = {"question": asked.text, "width": opened.width, "height": opened.height, "note": self.assistant.note}
        return {**about, **describe(last.answer)}, files["depth"]

    def _answer(self, view: dict, question: Question) -> Iterator[tuple]:
        view = {**view, "busy": True, "error": "", "masks": [], "depth": None, "veil": None}
        events: list[SpatialEvent] = []
        words, codes, shown, drawn = "", [], 0, 0.0
        width = self.assistant.model.config.depth_config.grid_size
        off = [gr.update(interactive=False, value=None)] * 3
        yield view, results.show_words(question.text, "", True), results.show_written(events), *off
        for event in self.assistant.ask(question):
            if isinstance(event, AnswerEvent):
                break
            events.append(event)
            if isinstance(event, TextEvent):
                words += event.text
            elif isinstance(event, DepthRowEvent):
                codes = [*codes, *event.codes] if event.row else list(event.codes)
            if time.monotonic() - drawn < _EVERY:
                continue  # more than the eye can follow: the next event, or the whole answer, shows this one too
            seen = gr.skip()
            if len(codes) != shown:
                depth = results.show_depth(self.assistant.partial_depth(codes), len(codes) // width, width)
                view, shown = {**view, "depth": depth}, len(codes)
                seen = view
            said = results.show_words(question.text, words, True)
            yield seen, said, results.show_written(events), *[gr.skip()] * 3
            drawn = time.monotonic()
        answer = event.answer
        depth = None if answer.depth is None else results.show_depth(answer.depth)
        veil = None if answer.depth_confidence is None else results.show_veil(answer.depth_confidence)
        view = {**view, "busy": False, "masks": results.show_masks(answer), "depth": depth, "veil": veil}
        files = results.write_files(answer, self._folder())
        buttons = [
            gr.update(value=files[name], interactive=bool(files[name])) for name in ("masks", "lengths", "depth")
        ]
        yield view, results.show_words(question.text, answer.text), results.show_written(events), *buttons

    def _own(self, path: str | None) -> Path:
        """A path the page was given by this server; a browser may send any.

        Raises:
            ValueError: for another, or none.
        """
        if not path:
            raise ValueError("Choose a picture first: drop it on the page, paste it, or take an example.")
        place = Path(str(path)).resolve()
        if not any(place.is_relative_to(Path(home).resolve()) for home in (get_upload_folder(), self.folder)):
            raise ValueError("This picture was not sent to this page; choose it again.")
        return place

    def _picture(self, view: dict) -> Image.Image:
        path = self._own((view.get("picture") or {}).get("path"))
        return _opened(path, "The picture")

    def _folder(self) -> Path:
        """A new folder for the files of one answer; the oldest go."""
        self._kept.append(Path(tempfile.mkdtemp(dir=self.folder)))
        while len(self._kept) > _KEPT:
            rmtree(self._kept.popleft(), ignore_errors=True)
        return self._kept[-1]


def build_page(assistant: Assistant, folder: Path) -> gr.Blocks:
    """The page of an assistant, ready to launch with `page_options`; `folder` as in `Page`."""
    page = Page(assistant, folder)
    with gr.Blocks(title="Perceptio", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as blocks:
        gr.HTML(_head(assistant), elem_id="head")
        with gr.Row(equal_height=False, elem_id="layout"):
            with gr.Column(elem_id="area-figures", min_width=0):
                viewer = _viewer()
            with gr.Column(elem_id="area-question", min_width=0):
                text = gr.Textbox(
                    label="Question",
                    lines=2,
                    max_lines=6,
                    placeholder="Ask about the picture ...",
                    submit_btn=False,
                    elem_id="question",
                )
                spatial = gr.Radio(list(_MODES), value="auto", label="Write down first", elem_id="spatial")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                said = gr.HTML(results.show_words(None, "The answer appears here."), elem_id="answer")
                with gr.Accordion("What the model wrote", open=False, elem_id="written-box"):
                    written = gr.HTML('<p class="pp-faint">Nothing yet.</p>', elem_id="written")
                with gr.Row(elem_id="files"):
                    files = [
                        gr.DownloadButton(label, interactive=False, size="sm", min_width=90, elem_id=name)
                        for name, label in (
                            ("masks", "Masks PNG"),
                            ("lengths", "Masks JSON"),
                            ("depth", "Depth 16-bit"),
                        )
                    ]
            with gr.Column(elem_id="area-examples", min_width=0):
                examples = _examples(page.examples)
        shown = [viewer, said, written, *files]
        viewer.picture_chosen(page.read_picture, viewer, viewer, **_OWN)
        viewer.points_set(page.set_points, viewer, viewer, trigger_mode="always_last", **_OWN)
        viewer.closest_asked(lambda view: page.wait(view, CLOSEST), viewer, said, **_AT_ONCE).then(
            page.ask_closest, viewer, shown, **_OWN, **_ONE_AT_A_TIME
        )
        examples.example_chosen(page.show_example, None, [viewer, text, spatial], **_OWN)
        for asked in (button.click, text.submit):
            asked(page.wait, [viewer, text], said, **_AT_ONCE).then(
                page.ask, [viewer, text, spatial], shown, **_OWN, **_ONE_AT_A_TIME
            )
        _publish(page.answer)
    return blocks.queue(default_concurrency_limit=4, max_size=64)


def page_options() -> dict:
    """What `launch` needs to know of the page: nothing on it comes from elsewhere, fonts included."""
    theme = gr.themes.Default(
        primary_hue="blue",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    parts = ("background_fill", "background_fill_dark", "border_color", "border_color_dark")
    hover = ("background_fill_hover", "background_fill_hover_dark")
    colors = {f"button_primary_{part}": "#0072b2" for part in parts}
    colors |= {f"button_primary_{part}": "#005a8d" for part in hover}
    theme = theme.set(**colors, button_primary_text_color="white")
    return {"theme": theme, "css": (_STATIC / "page.css").read_text(encoding="utf-8"), "max_file_size": MOST_BYTES}


def _viewer() -> gr.HTML:
    return gr.HTML(
        dict(_EMPTY),
        html_template=(_STATIC / "viewer.html").read_text(encoding="utf-8"),
        js_on_load=(_STATIC / "viewer.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        palette=depth_colors().tobytes().hex(),
        letters=LETTERS,
        most=MOST_BYTES,
        elem_id="viewer",
    )


def _examples(examples: list[dict]) -> gr.HTML:
    tiles = "".join(
        f'<button type="button" class="pp-example" data-number="{number}"><img src="{example["url"]}" alt="">'
        f"<span>{example['question']}</span></button>"
        for number, example in enumerate(examples)
    )
    return gr.HTML(
        html_template='<div class="pp-examples-title">Rendered scenes to try</div>'
        f'<div class="pp-examples">{tiles}</div>',
        js_on_load="for (const tile of element.querySelectorAll('.pp-example')) tile.addEventListener('click', () => "
        "trigger('example_chosen', { number: Number(tile.dataset.number) }));",
        apply_default_css=False,
        elem_id="examples",
    )


def _head(assistant: Assistant) -> str:
    note = f'<p class="pp-notice" role="note">{_unbroken(assistant.note)}</p>' if assistant.note else ""
    return (
        '<div class="pp-head"><h1>Perceptio</h1><span>writes masks and depth down, then answers</span>'
        f"<span>{html.escape(assistant.name)}</span></div>{note}"
    )


def _unbroken(text: str) -> str:
    """As HTML in which an option, such as --model, stays on one line."""
    words = (html.escape(word) for word in text.split(" "))
    return " ".join(f'<span style="white-space: nowrap">{word}</span>' if "--" in word else word for word in words)


def _publish(answer: Callable) -> None:
    """`answer` as /answer of the HTTP interface; files go through gradio's own checks."""
    with gr.Row(visible=False):
        picture = gr.File(label="picture", type="filepath")
        question = gr.Textbox(label="question")
        spatial = gr.Textbox("auto", label="spatial")
        points = gr.JSON([], label="points")
        record, depth = gr.JSON(label="answer"), gr.File(label="depth")
        gr.Button().click(
            answer, [picture, question, spatial, points], [record, depth], api_name="answer", **_ONE_AT_A_TIME
        )


def _opened(path: Path, name: str) -> Image.Image:
    """Raises ValueError in the words of `load_picture`, with the name people know in place of the server's path."""
    try:
        return load_picture(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None


def _about(picture: Image.Image, path: Path) -> dict:
    size = {"width": picture.width, "height": picture.height}
    return {"url": results.show_picture(picture), "path": str(path), **size}


def _points(view: dict) -> list[list[float]]:
    """Raises ValueError for what is no list of pairs of numbers."""
    try:
        return [[float(x), float(y)] for x, y in view.get("points") or []]
    except (TypeError, ValueError):
        raise ValueError("points are a list of [x, y] in pixels of the picture.") from None


def _marked(picture: Image.Image, points: list) -> str | None:
    if not points:
        return None
    shown = picture.copy()
    shown.thumbnail((results.SHOWN, results.SHOWN))
    return results.show_picture(mark(shown, points, picture.size))
