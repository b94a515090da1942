"""`transformers serve` with an exported folder, asked as OpenAI's client asks, and its answer decoded.

Skipped without what the server needs; `make test-engines` installs it.
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import perceptio_hf
from perceptio_hf.commands import main
from perceptio_hf.conversion.export import export_internvl
from perceptio_hf.lab.held_out import encode_items, held_out_items

STOCK = """
import sys, torch
from PIL import Image
from transformers import AutoProcessor, InternVLForConditionalGeneration
folder, picture, text, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "url": picture}, {"type": "text", "text": text}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
InternVLForConditionalGeneration.from_pretrained(folder).generate(**inputs, do_sample=False, max_new_tokens=4)
assert not any(name.startswith("perceptio_hf") for name in sys.modules)
torch.save(dict(inputs), out)
"""
KINDS = ("refer", "depth", "count")


@pytest.fixture(scope="module")
def tiny():
    folder = perceptio_hf.tiny_checkpoint()
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "served"
    export_internvl(*tiny, folder, with_code=True)
    return folder


def questions() -> list:
    items = {item.question.kind: item for item in held_out_items(2)}
    return [items[kind] for kind in KINDS]


def test_the_processor_that_travels_along_gives_the_inputs_of_internvl(tiny, served, tmp_path):
    """In a process without this package, and without torchvision: our prompts, nothing of SAM2's."""
    item = questions()[0]
    typed = f"{item.question.text} [SEG] <DEPTH_3>"
    picture = tmp_path / "picture.png"
    Image.fromarray(item.picture).save(picture)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", STOCK, str(served), str(picture), typed, str(tmp_path / "inputs.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "inputs.pt")
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": typed}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ours = tiny[1].apply_chat_template([{"role": "user", "content": content}], **options)
    assert sorted(theirs) == ["attention_mask", "input_ids", "pixel_values"]
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert tiny[0].config.seg_token_id not in theirs["input_ids"], "what a user types stays text"


@pytest.fixture
def address(served, tmp_path):
    """Where the server listens."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason=f"{module} is not installed; make test-engines installs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(served)]
    command += ["--trust-remote-code", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    log = tmp_path / "server.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    begun = time.monotonic()
    while time.monotonic() < begun + 300 and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text())


def test_an_answer_of_the_server_is_decoded(tiny, served, address, tmp_path, capsys):
    from openai import OpenAI

    model, processor = tiny
    client, lines = OpenAI(base_url=address, api_key="none"), []
    for number, item in enumerate(questions()):
        Image.fromarray(item.picture).save(tmp_path / f"{number}.png")
        stream = io.BytesIO()
        Image.fromarray(item.picture).save(stream, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.question.text}]
        asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 192}
        text = client.chat.completions.create(model=str(served), **asked).choices[0].message.content
        lines.append({"picture": f"{number}.png", "question": item.question.text, "text": text})
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main.run(["decode", str(answers), "--out", str(tmp_path / "out"), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)["answers"]

    inputs = encode_items(processor, questions())
    ours = processor.post_process_spatial(model.generate(**inputs, do_sample=False, return_dict_in_generate=True))
    assert [answer["text"] for answer in read] == [answer.text for answer in ours]
    assert [answer["depth_codes"] for answer in read] == [answer.depth_codes for answer in ours]
    assert [len(answer["masks"]) for answer in read] == [len(answer.masks) for answer in ours]
    assert all(answer["well_formed"] for answer in read)
    assert any(answer.depth_codes for answer in ours) and any(len(answer.masks) for answer in ours)
