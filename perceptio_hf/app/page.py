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
from gradio.events import Dependency
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


_OFF = (gr.update(interactive=False, value=None),) * 3  # the buttons of files
_STAYS = (gr.skip(),) * 5  # words, what was written, three files


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

    def read_picture(self, view: dict) -> tuple:
        """The picture that was just sent, with nothing said about it yet; or in one line why not, and what was there
        stays."""
        name = str(view.get("name") or "This file")
        try:
            path = self._own(view.get("chosen"))
            picture = _opened(path, name)
        except ValueError as error:
            return {**_EMPTY, **view, "error": str(error), "chosen": None}, *_STAYS
        return {**_EMPTY, "picture": _about(picture, path)}, *_nothing_said()

    def set_points(self, view: dict) -> dict:
        """The picture with its points drawn."""
        try:
            picture, points = self._picture(view), _points(view)
            Question(picture, CLOSEST, points=points)
        except ValueError as error:
            return {**view, "points": [], "marked": None, "error": str(error)}
        return {**view, "points": points, "marked": _marked(picture, points), "error": ""}

    def show_example(self, data: gr.EventData) -> tuple:
        """View of the example that was chosen, with nothing said about it yet, its question and spatial mode."""
        number = int(data._data["number"]) % len(EXAMPLES)
        example, path = EXAMPLES[number], Path(self.examples[number]["path"])
        picture = _opened(path, path.name)
        view = {**_EMPTY, "picture": _about(picture, path), "points": list(map(list, example.points))}
        view["marked"] = _marked(picture, example.points)
        return view, *_nothing_said(), example.question, example.spatial

    def wait(self, view: dict, text: str) -> tuple:
        """The question, until its turn comes: others may be asking. Picture and points are those of the question."""
        if view.get("busy") or not view.get("picture") or not (text or "").strip():
            return gr.skip(), gr.skip()  # there is a question already, or `ask` says what is missing
        return {**view, "busy": True}, results.show_words(text, "", True)

    def ask(self, view: dict, text: str, spatial: str) -> Iterator[tuple]:
        """View, answer, what was written, and three files, again and again while the answer is written."""
        try:
            question = Question(self._picture(view), text or "", spatial, _points(view))
            yield from self._answer(view, question)
        except ValueError as error:
            yield {**view, "busy": False, "error": str(error)}, *_STAYS
        except Exception as error:  # of the model: the page goes on
            traceback.print_exc()
            yield {**view, "busy": False, "error": f"The model failed: {' '.join(str(error).split())[:300]}"}, *_STAYS

    def ask_closest(self, view: dict) -> Iterator[tuple]:
        """The same for "which of the points is the closest"."""
        if len(_points(view)) < 2:
            yield {**view, "busy": False, "error": "Set at least two points on the picture first."}, *_STAYS
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
        yield view, results.show_words(question.text, "", True), results.show_written(events), *_OFF
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
        picture = view.get("picture")
        path = self._own(picture.get("path") if isinstance(picture, dict) else None)
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
                words, nothing_written, *_ = _nothing_said()
                said = gr.HTML(words, elem_id="answer")
                with gr.Accordion("What the model wrote", open=False, elem_id="written-box"):
                    written = gr.HTML(nothing_written, elem_id="written")
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
        viewer.picture_chosen(page.read_picture, viewer, shown, **_OWN)
        viewer.points_set(page.set_points, viewer, viewer, trigger_mode="always_last", **_OWN)
        waits = viewer.closest_asked(lambda view: page.wait(view, CLOSEST), viewer, [viewer, said], **_AT_ONCE)
        _then_ask(waits, page.ask_closest, [viewer], shown)
        examples.example_chosen(page.show_example, None, [*shown, text, spatial], **_OWN)
        for asked in (button.click, text.submit):
            waits = asked(page.wait, [viewer, text], [viewer, said], **_AT_ONCE)
            _then_ask(waits, page.ask, [viewer, text, spatial], shown)
        _publish(page.answer)
    return blocks.queue(default_concurrency_limit=4, max_size=64)


def _then_ask(waits: Dependency, ask: Callable, given: list, shown: list) -> None:
    """Ask when the turn comes. Where no answer came, since too many wait, say, the page goes on nevertheless."""
    asked = waits.then(ask, given, shown, **_OWN, **_ONE_AT_A_TIME)
    asked.then(None, shown[0], shown[0], js="(view) => view.busy ? { ...view, busy: false } : view", **_OWN)


def _nothing_said() -> tuple:
    """Words, what was written, and three files, where nothing was asked about a picture."""
    return results.show_words(None, "The answer appears here."), '<p class="pp-faint">Nothing yet.</p>', *_OFF


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
        "document.querySelector('.pp').dataset.state === 'busy' || "
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
