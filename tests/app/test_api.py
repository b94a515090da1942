"""The HTTP interface gives what Python gives; its errors are one line. Also the snippets of docs/serve.md."""

import itertools
import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import perceptio_hf
from perceptio_hf import PerceptioConfig
from perceptio_hf.app.assistant import Assistant, Question
from perceptio_hf.app.examples import EXAMPLES
from perceptio_hf.commands import checkpoints
from perceptio_hf.commands.main import run
from perceptio_hf.data.depth_maps import read_depth
from perceptio_hf.data.run_length import decode_mask

pytest.importorskip("gradio", reason="make test-app installs it")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

DOCUMENT = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def client(address) -> Client:
    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    EXAMPLES[1].render().save(path)
    return path


def test_an_answer_over_http_is_that_of_python(client, scene):
    record, depth = client.predict(
        picture=handle_file(str(scene)), question="Show me the box.", spatial="seg+depth", points=[], api_name="/answer"
    )
    assistant = Assistant(*checkpoints.load(perceptio_hf.tiny_checkpoint(), "cpu"), "tiny")
    *_, last = assistant.ask(Question(EXAMPLES[1].render(), "Show me the box.", "seg+depth"))
    assert record["text"] == last.answer.text and record["depth_codes"] == last.answer.depth_codes
    assert np.array_equal(decode_mask(record["masks"][0]), last.answer.masks[0])
    assert np.abs(read_depth(depth, "relative").relative - last.answer.depth).max() < 1e-3
    assert (record["width"], record["height"]) == (512, 512) and "rendered scenes" in record["note"]


def test_what_is_sent_and_answered_is_for_this_user_alone(client, scene, temporary):
    client.predict(picture=handle_file(str(scene)), question="Where?", spatial="depth", points=[], api_name="/answer")
    folders = list(temporary.glob("perceptio-app-*"))
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 2
    for name in ("scene.png", "depth.png"):  # gradio copies what it gives away
        assert any(next(folder.rglob(name), None) for folder in folders if "files" in folder.name)


def test_points_over_http(client, scene):
    record, _ = client.predict(
        picture=handle_file(str(scene)),
        question="",
        spatial="depth",
        points=[list(point) for point in EXAMPLES[1].points],
        api_name="/answer",
    )
    assert record["text"] and record["question"].startswith("Which of the circled points")
    assert (
        len(record["depth_codes"]) == PerceptioConfig.from_pretrained(perceptio_hf.tiny_checkpoint()).num_depth_tokens
    )


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"question": " "}, "question is empty"),
        ({"spatial": "masks"}, "seg\\+depth"),
        ({"picture": None}, "Send a picture"),
        ({"points": [[9999, 1]]}, "outside"),
        ({"points": "here"}, "list of"),
    ],
)
def test_mistakes_get_one_line(client, scene, asked, problem):
    request = {"picture": handle_file(str(scene)), "question": "Where?", "spatial": "auto", "points": []}
    with pytest.raises(AppError, match=problem):
        client.predict(**{**request, **asked}, api_name="/answer")


def test_a_file_of_the_server_is_not_given_away(client, address):
    """Neither by the interface nor by a browser that names one."""
    secret = str(Path(__file__).parents[2] / "docs" / "images" / "demo.png")
    data = {"data": [{"path": secret, "meta": {"_type": "gradio.FileData"}}, "Where?", "none", []]}
    begun = post(f"{address}/gradio_api/call/answer", data)
    told = urllib.request.urlopen(f"{address}/gradio_api/call/answer/{begun['event_id']}").read().decode()
    assert "event: error" in told
    from perceptio_hf.app.page import Page

    with pytest.raises(ValueError, match="not sent to this page"):
        Page._own(type("P", (), {"folder": Path("/nowhere")})(), secret)


def test_depth_and_words_grow_while_they_are_written(monkeypatch, tmp_path):
    from perceptio_hf.app import page as pages

    monkeypatch.setattr(pages, "_EVERY", 0.0)
    page = pages.Page(Assistant(*checkpoints.load(perceptio_hf.tiny_checkpoint(), "cpu"), "tiny"), tmp_path)
    begun, *cleared = page.read_picture({"chosen": page.examples[0]["path"], "name": "scene.png"})
    assert "appears here" in cleared[0]
    frozen, waiting = page.wait(begun, "Where?")
    assert "Where?" in waiting and "pp-caret" in waiting, "until its turn comes"
    assert frozen == {**begun, "busy": True} and "pp-caret" not in str(page.wait(frozen, "Again?"))
    assert "pp-caret" not in str(page.wait(begun, " ")) + str(page.wait({}, "Where?"))
    steps = list(page.ask(begun, "Show me the yellow object.", "seg+depth"))
    views = [step[0] for step in steps if "picture" in step[0]]
    of = page.assistant.model.config.depth_config.grid_size
    rows = [view["depth"]["rows"] for view in views if view["depth"] and view["depth"]["of"] == of]
    assert rows == list(range(1, of + 1))
    words = [re.search(r'pp-said">(.*?)<', step[1])[1] for step in steps]
    assert len(set(words)) > 1 and all(late.startswith(early) for early, late in itertools.pairwise(words))
    assert [view["busy"] for view in views] == [True] * (len(views) - 1) + [False]
    assert views[-1]["masks"] and views[-1]["veil"] and steps[-1][3]["interactive"]
    broken, *_ = page.read_picture({**views[-1], "chosen": str(tmp_path / "gone.png"), "name": "mine.png"})
    assert broken["picture"] == begun["picture"] and "mine.png" in broken["error"]
    (last,) = page.ask({**begun, "points": [[9999, 0]]}, "Where?", "none")
    assert "outside" in last[0]["error"] and not last[0]["busy"]
    assert "Choose a picture" in page.set_points({"picture": "a text"})["error"], "a browser may send anything"


def post(url: str, data: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())


def test_only_answer_is_offered(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/answer"]


def test_the_snippets_of_the_document_run(address, scene, tmp_path, monkeypatch):
    text = DOCUMENT.read_text(encoding="utf-8")
    snippets = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    assert snippets
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(scene.read_bytes())
    for snippet in snippets:
        exec(snippet.replace("http://127.0.0.1:7860", address), {})


def test_a_port_in_use_and_a_model_of_another_kind_are_told_in_one_line(address, tmp_path, capsys):
    assert run(["app", "--port", address.rpartition(":")[2]]) == 2
    assert "is in use" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert run(["app", "--port", "0"]) == 2
    capsys.readouterr()
    assert run(["app", "--model", str(tmp_path), "--port", "7999"]) == 2
    assert "cannot be loaded as a Perceptio" in capsys.readouterr().err
