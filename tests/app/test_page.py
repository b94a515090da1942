"""The page in a real browser: what people do, what goes wrong, and how it looks.

With PERCEPTIO_SCREENSHOTS=FOLDER the pictures of README.md are taken: app.png and app-phone.png.
"""

import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceptio_hf import PerceptioConfig, tiny_checkpoint
from perceptio_hf.app.examples import EXAMPLES

playwright = pytest.importorskip("playwright.sync_api", reason="make test-app installs it")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
if BROWSER is None:
    pytest.skip("make test-app installs Chromium", allow_module_level=True)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
CODES = PerceptioConfig.from_pretrained(tiny_checkpoint()).num_depth_tokens
WAIT = 120_000  # milliseconds; the machine may be busy
READY = "document.querySelector('.pp').dataset.state == 'ready'"
SAID = "document.querySelector('.pp-said') && !document.querySelector('.pp-caret') && " + READY
READING = "document.querySelector('.pp-reading').textContent"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, address: str, **options):
    """A new visitor. Requests to elsewhere and errors in the console fail the test."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
    page, wrong = context.new_page(), []
    own = (address.partition("/?")[0], "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.wait_for_selector(".pp-example")
    try:
        yield page
    finally:
        context.close()
    assert wrong == []


def choose(page, path: Path) -> None:
    page.set_input_files(".pp-file", str(path))


def ask(page, question: str, spatial: str = "Masks + depth") -> str:
    """-> the words of the answer, once it is on the page."""
    page.fill("#question textarea", question)
    page.check(f"#spatial label:has-text('{spatial}') input")
    page.click("button#ask")
    answered(page, depth="depth" in spatial.lower())
    return page.inner_text(".pp-said")


def answered(page, depth: bool = True) -> None:
    """Wait for the first answer of this page, and for its figures: a browser draws them when it has time."""
    page.wait_for_function(SAID)
    if depth:
        page.wait_for_function("document.querySelector('.pp').dataset.depth == '1 of 1'")


def reading(page, figure: str, x: float, y: float) -> float:
    """The depth that is shown when the pointer stands at (x, y), shares of the figure's width and height."""
    box = page.locator(figure).bounding_box()
    page.hover("#head")
    page.wait_for_function(f"!{READING}")
    page.hover(figure, position={"x": x * box["width"], "y": y * box["height"]})
    page.wait_for_function(READING)
    return float(page.inner_text(".pp-reading").split()[0])


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    EXAMPLES[0].render().save(path)
    return path


def pixels(page, selector: str) -> np.ndarray:
    """(height, width, 3) of an element as it is seen, when all its pictures are drawn."""
    page.evaluate(
        "Promise.all([...document.querySelectorAll('.pp-stage img[src]')].map((picture) => picture.decode()))"
    )
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)


def test_picture_question_mask_depth_words_and_files(browser, address, scene):
    with opened(browser, address) as page:
        assert "knows only rendered scenes" in page.inner_text(".pp-notice")
        choose(page, scene)
        page.wait_for_function(READY)
        plain = pixels(page, ".pp-left")
        assert ask(page, EXAMPLES[0].question)
        masks = page.locator(".pp-masks li")
        assert masks.count() >= 1 and re.search(r"expected IoU [01]\.\d\d", masks.first.inner_text())
        masked = pixels(page, ".pp-left")
        assert (np.abs(masked - plain).max(-1) > 30).mean() > 0.01
        for box in page.locator(".pp-masks input").all():
            box.uncheck()
        assert np.abs(pixels(page, ".pp-left") - plain).max() <= 2, "a mask that is switched off is gone"

        depth = pixels(page, ".pp-right")
        assert depth[-20:].mean() > depth[:20].mean() + 20, "near below, far above"
        assert reading(page, ".pp-left", 0.3, 0.02) < reading(page, ".pp-right", 0.3, 0.98) <= 1
        page.check(".pp-veil-switch input")
        assert np.abs(pixels(page, ".pp-right") - depth).mean() > 2

        page.click("#written-box button")
        assert f"{CODES} of {CODES} codes" in page.inner_text("#written summary") and "[SEG]" in page.inner_text(
            "#written"
        )
        assert page.locator("#written details[open]").count() == 0, "spans are folded"
        files = {name: download(page, f"#{name}") for name in ("masks", "lengths", "depth")}
        if masks.count() == 1:
            mask = np.asarray(Image.open(io.BytesIO(files["masks"])))
            assert mask.shape == (512, 512) and 0 < (mask > 0).mean() < 0.5
        assert json.loads(files["lengths"])["masks"][0]["size"] == [512, 512]
        assert Image.open(io.BytesIO(files["depth"])).mode.startswith("I;16")


def download(page, button: str) -> bytes:
    with page.expect_download() as begun:
        page.click(button)
    return Path(begun.value.path()).read_bytes()


def test_points_set_by_clicks_are_asked_about(browser, address, scene):
    with opened(browser, address) as page:
        choose(page, scene)
        page.wait_for_function(READY)
        assert page.is_disabled(".pp-closest")
        places = [(0.2, 0.2), (0.5, 0.9), (0.8, 0.5)]
        for number, place in enumerate(places, 1):
            before = page.get_attribute(".pp-base", "src")
            click(page, *place)
            page.wait_for_function("(old) => document.querySelector('.pp-base').src != old", arg=before)
            assert page.inner_text(".pp-hint").startswith("One point" if number == 1 else f"{number} points")
        assert all(circled(page, *place) for place in places)
        before = page.get_attribute(".pp-base", "src")
        page.click(".pp-undo")
        page.wait_for_function("(old) => document.querySelector('.pp-base').src != old", arg=before)
        assert page.inner_text(".pp-hint").startswith("2 points")
        page.click(".pp-closest")
        answered(page)
        assert page.inner_text(".pp-said").strip()
        assert page.inner_text(".pp-asked").startswith("Which of the circled points")


def test_what_cannot_be_read_gets_one_line_and_the_page_goes_on(browser, address, scene, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    data = scene.read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    Image.new("1", (30_000, 30_000)).save(tmp_path / "wide.png")
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(100_000_000)
    (tmp_path / "none.png").touch()
    told = {
        "text.png": "is not a picture",
        "half.png": "damaged",
        "wide.png": "too large",
        "large.jpg": "at most 50 MB",
    }
    with opened(browser, address) as page:
        page.click("button#ask")
        page.wait_for_function("document.querySelector('.pp-error').textContent.includes('Choose a picture')")
        for name, part in {**told, "none.png": "empty"}.items():
            choose(page, tmp_path / name)
            page.wait_for_function(f"document.querySelector('.pp-error').textContent.includes({part!r})")
            line = page.inner_text(".pp-error")
            assert name in line and "/tmp" not in line and "\n" not in line
        choose(page, scene)
        page.wait_for_function(READY)
        assert page.is_hidden(".pp-error")
        page.fill("#question textarea", "  ")
        page.click("button#ask")
        page.wait_for_function("document.querySelector('.pp-error').textContent.includes('question is empty')")
        choose(page, tmp_path / "text.png")
        page.wait_for_function("document.querySelector('.pp-error').textContent.includes('not a picture')")
        assert ask(page, EXAMPLES[0].question, "Words only"), "the picture before is still there"


def test_two_visitors_at_once_get_their_own_answers(browser, address, scene):
    with opened(browser, address) as one, opened(browser, address) as two:
        for page, example in ((one, 0), (two, 2)):
            page.click(f".pp-example >> nth={example}")
            page.wait_for_function(READY)
        for page in (one, two):
            page.click("button#ask")
        for page, example in ((one, 0), (two, 2)):
            answered(page)
            assert page.inner_text(".pp-asked") == EXAMPLES[example].question
        assert np.abs(pixels(one, ".pp-right") - pixels(two, ".pp-right")).mean() > 1


def test_visitors_who_leave_in_the_middle_block_nobody(browser, address):
    """One as soon as the question is sent, one when the answer is begun, or done, as fast as the machine may be."""
    for begun in (None, "document.querySelector('.pp-asked')"):
        with opened(browser, address) as page:
            page.click(".pp-example >> nth=0")
            page.wait_for_function(READY)
            with page.expect_request(lambda request: "queue/join" in request.url):
                page.click("button#ask")
            if begun:
                page.wait_for_function(begun)
    with opened(browser, address) as page:
        page.click(".pp-example >> nth=2")
        page.wait_for_function(READY)
        page.click("button#ask")
        answered(page)


def slow_line(page) -> tuple[list, Callable[[], None]]:
    """What the page asks of the server and does not get yet, and a function that lets it go."""
    held, slow = [], [True]
    page.route("**/queue/join*", lambda route: held.append(route) if slow else route.continue_())

    def let_go() -> None:
        slow.clear()
        for route in held:
            route.continue_()

    return held, let_go


def test_points_set_faster_than_the_line_stay(browser, address, scene):
    """The server answers about the first point when others are set already."""
    with opened(browser, address) as page:
        choose(page, scene)
        page.wait_for_function(READY)
        held, let_go = slow_line(page)
        for x in (0.2, 0.5, 0.8):
            click(page, x, 0.5)
        page.wait_for_timeout(100)
        assert held and page.inner_text(".pp-hint").startswith("3 points")
        let_go()
        deadline = time.monotonic() + WAIT / 1000
        while not all(circled(page, x, 0.5) for x in (0.2, 0.5, 0.8)):
            assert time.monotonic() < deadline, "a point was lost"
            page.wait_for_timeout(100)
        assert page.inner_text(".pp-hint").startswith("3 points")


def test_a_question_that_waits_keeps_its_picture_and_points(browser, address, scene):
    """Others may be asking: until its turn comes nothing can be changed that its answer would not be about."""
    with opened(browser, address) as page:
        choose(page, scene)
        page.wait_for_function(READY)
        _, let_go = slow_line(page)
        page.fill("#question textarea", EXAMPLES[0].question)
        page.check("#spatial label:has-text('Masks + depth') input")
        page.click("button#ask")
        page.wait_for_function("document.querySelector('.pp').dataset.state == 'busy'")
        click(page, 0.5, 0.5)
        page.click(".pp-example >> nth=2")
        page.wait_for_timeout(300)
        assert page.inner_text(".pp-hint").startswith("Click on the picture")
        let_go()
        answered(page)
        assert page.locator(".pp-masks li").count() >= 1
        assert page.inner_text(".pp-asked") == EXAMPLES[0].question


def test_nothing_is_said_about_a_new_picture(browser, address, scene):
    with opened(browser, address) as page:
        for begin in (lambda: choose(page, scene), lambda: page.click(".pp-example >> nth=1")):
            choose(page, scene)
            page.wait_for_function(READY)
            assert ask(page, EXAMPLES[0].question) and page.is_enabled("#depth")
            begin()
            page.wait_for_function("!document.querySelector('.pp-asked')")
            page.wait_for_function("document.querySelector('#depth').disabled")
            assert page.inner_text("#answer") == "The answer appears here."
            assert page.locator(".pp-masks li").count() == 0


def click(page, x: float, y: float) -> None:
    """At a place of the picture, shares of its width and height."""
    box = page.locator(".pp-left").bounding_box()
    page.click(".pp-left", position={"x": x * box["width"], "y": y * box["height"]})


def circled(page, x: float, y: float) -> bool:
    """Whether a red circle stands there."""
    seen = pixels(page, ".pp-left")
    red = np.argwhere((np.abs(seen - (255, 0, 0)) < 60).all(-1)) / seen.shape[:2]
    return (np.abs(red - (y, x)).max(-1) < 0.04).sum() > 8


def test_everything_can_be_done_with_the_keyboard(browser, address):
    with opened(browser, address) as page:
        page.focus(".pp-example >> nth=1")
        page.keyboard.press("Enter")
        page.wait_for_function(READY)
        page.focus(".pp-left")
        page.keyboard.press("Delete")
        page.wait_for_function("document.querySelector('.pp-hint').textContent.startsWith('2 points')")
        for key in ("ArrowDown", "ArrowDown", "Shift+ArrowRight", "Enter"):
            page.keyboard.press(key)
        page.wait_for_function("document.querySelector('.pp-hint').textContent.startsWith('3 points')")
        for _ in range(12):  # tabs lead to the button
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.className").find("pp-closest") >= 0:
                break
        page.keyboard.press("Enter")
        answered(page)
        assert page.inner_text(".pp-said").strip()


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser, address, colors, tmp_path):
    phone = {"viewport": {"width": 380, "height": 800}, "device_scale_factor": 2}
    with opened(browser, f"{address}/?__theme={colors}", **phone) as page:
        page.click(".pp-example >> nth=0")
        page.wait_for_function(READY)
        page.click("button#ask")
        answered(page)
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") == 380
        outside = page.evaluate(
            "[...document.querySelectorAll('.pp *, button, textarea')].filter((e) => e.offsetParent && "
            "(e.getBoundingClientRect().right > 381 || e.getBoundingClientRect().left < -1)).length"
        )
        assert outside == 0
        paper = pixels(page, "#head").reshape(-1, 3)
        assert (np.median(paper) < 60) == (colors == "dark")
        top = {"x": 0, "y": 0, "width": 380, "height": 1120}
        if colors == "dark" and os.environ.get("PERCEPTIO_SCREENSHOTS"):
            page.screenshot(path=f"{os.environ['PERCEPTIO_SCREENSHOTS']}/app-phone.png", clip=top, full_page=True)


def test_the_picture_in_the_readme(browser, address):
    # As tall as the page: a browser that grows for the picture may lose the pointer.
    with opened(browser, address, viewport={"width": 1280, "height": 924}, device_scale_factor=1.5) as page:
        page.click(".pp-example >> nth=0")
        page.wait_for_function(READY)
        page.click("button#ask")
        answered(page)
        page.click("#written-box button")
        page.hover(".pp-left", position={"x": 262, "y": 160})
        page.wait_for_function(READING)
        page.wait_for_timeout(400)
        assert page.is_visible(".pp-cross >> nth=1")
        if os.environ.get("PERCEPTIO_SCREENSHOTS"):
            page.screenshot(path=f"{os.environ['PERCEPTIO_SCREENSHOTS']}/app.png")
