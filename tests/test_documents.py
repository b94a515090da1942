"""Every command and every block of Python in README.md and docs/ runs, in order, in an empty folder, without a network.

What the documents name (`photo.jpg`, `OpenGVLab/InternVL3-1B-hf`) lies in the folder, small; long work is cut short by
options that follow those of the document. A block that is neither run nor listed here as shown fails.
"""

import glob
import json
import multiprocessing
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from component_helpers import codec, mask_model, save_internvl, save_teacher
from conversion.test_sa2va import write_source
from document_blocks import Block, blocks_of
from evaluation import published_formats as formats
from original_aurora import aurora_tensors
from original_layout import original_config, random_tensors, write_checkpoint, write_tokenizer
from PIL import Image

from perceptio_hf import tiny_checkpoint
from perceptio_hf.commands import main
from perceptio_hf.world import render_scene

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
if not hasattr(os, "fork"):
    pytest.skip("every document runs in a process that is forked", allow_module_level=True)

# Blocks that are shown and not run: document -> how each begins.
OUTPUTS = {
    "README.md": ["Question: Give me the mask"],
    "benchmarks.md": [
        "refcoco/refs(unc).p",
        "RefCOCO/data/val",
        "grefcoco/grefs",
        "hardblink/questions",
        "BLINK/",
        "rgbd/",
    ],
    "convert.md": ["SAM2.1 large, Meta's layout"],
    "data.md": ["my_data/samples.jsonl"],
    "export.md": [
        "response = torch.tensor([output.outputs",  # tests/conversion/test_export.py runs it
        "import xgrammar",  # as does tests/conversion/test_engine_grammars.py, in other words
        "from openai import OpenAI",
        "import requests",
        "import base64, json, pathlib",  # tests/conversion/test_transformers_serve.py asks so
    ],
    "extending.md": ["tasks:"],
    "serve.md": ["from gradio_client import"],  # tests/app/test_api.py runs it
}
# Commands that prepare an environment, or need another program: how they begin, and where they are tried.
ELSEWHERE = {
    "make": "targets must exist",
    "python3 -m venv": "make env",
    ". .venv/bin/activate": "make env",
    ".venv/bin/pip install": "make env",
    ".venv/bin/python -m pytest": "make test",
    "pip install": "make env",
    "lmms-eval": "make test-lmms-eval",
    "perceptio predict questions.jsonl --engine ray": "make test-ray",
    "perceptio eval refcoco --data DATA --model M --engine ray": "make test-ray",
    "perceptio app": "make test-app",
}
SLOW = ("README.md", "evaluation.md", "lora.md", "training.md")  # those that train
# Further options that make long work short: the beginning of a command -> what is put behind it.
SHORT = {
    "train --config recipes/grpo_world.yaml": "--eval_prompts 2 --eval_steps 1 "
    "--max_steps 1 --prompts 4 --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 1 --num_generations 2 --logging_steps 1",
    "train": "--max_steps 2 --per_device_train_batch_size 2 --logging_steps 1 --eval_strategy no --use_cpu true",
    "codebook train": "--steps 3 --maps 4 --config codebook_tiny",
    "codebook eval": "--maps 2",
    "eval hardblink": "--limit 2",
    "eval world-closest": "--limit 3",
    "ablate": "--seeds 1 --variants answers_only --processes 1",
    "push": "--dry-run pushed",
}
ABLATION = {
    "words_steps": 1,
    "spans_steps": 1,
    "steps": 1,
    "batch": 2,
    "closest": 5,
    "replaced": 5,
    "scenes": 2,
    "malformed": 2,
}


# --- what the documents name ---------------------------------------------------------------------------------------


def _picture(path: Path, seed: int = 3) -> None:
    Image.fromarray(render_scene(seed).image).save(path)


def _photos(path: Path) -> None:
    (path / "2026").mkdir(parents=True)
    _picture(path / "2026" / "a.jpg")


def _questions(path: Path) -> None:
    _picture(path.with_name("asked.jpg"))
    path.write_text(json.dumps({"picture": "asked.jpg", "question": "Which object is closest?"}) + "\n")


def _saved_data_set(path: Path) -> None:
    from datasets import Dataset, Image

    _picture(path.with_name("row.png"))
    table = Dataset.from_dict({"image": [str(path.with_name("row.png"))]}).cast_column("image", Image())
    table.save_to_disk(str(path))


def _answers(path: Path) -> None:
    _picture(path.with_name("photo.jpg"))
    path.write_text(json.dumps({"picture": "photo.jpg", "question": "Which?", "text": "[SEG] The red ball."}) + "\n")


def _rooms(path: Path) -> None:
    path.mkdir()
    for number in range(6):
        scene = render_scene(number)
        Image.fromarray(scene.image).save(path / f"{number}.color.jpg")
        _millimetres(path / f"{number}.depth.png", scene.depth)


def _millimetres(path: Path, metres: np.ndarray) -> None:
    Image.fromarray((1000 * metres).astype(np.uint16)).save(path)


def _depth_pngs(path: Path) -> None:
    path.mkdir()
    for number in range(3):
        _millimetres(path / f"{number}.png", render_scene(number).depth)


def _aurora(path: Path) -> None:
    torch.save({"weights": {f"module.{name}": tensor for name, tensor in aurora_tensors(width=2).items()}}, path)


def _tiny(path: Path) -> None:
    path.symlink_to(tiny_checkpoint())


def _opengvlab(path: Path) -> None:
    config = original_config()
    write_checkpoint(path, config, random_tensors(config))
    write_tokenizer(path)


def _llava(path: Path) -> None:
    """LLaVA's file, with its pictures in the folder that docs/data.md names."""
    (path.parent / "llava" / "images" / "coco").mkdir(parents=True)
    _picture(path.parent / "llava" / "images" / "coco" / "1.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A ball."}]
    path.write_text(json.dumps([{"id": "1", "image": "coco/1.jpg", "conversations": turns}]))


def _instances(path: Path) -> None:
    """Two objects in the one picture of `photos`, in COCO's form."""
    image = {"id": 1, "file_name": "a.jpg"}
    boxes = [[10, 10, 60, 10, 60, 60, 10, 60], [70, 70, 120, 70, 120, 120, 70, 120]]
    things = [{"image_id": 1, "category_id": k, "segmentation": [box], "iscrowd": 0} for k, box in enumerate(boxes)]
    names = [{"id": number, "name": name} for number, name in enumerate(("mug", "box"))]
    path.write_text(json.dumps({"images": [image], "annotations": things, "categories": names}))


INPUTS: dict[str, Callable[[Path], object]] = {
    "photo.jpg": _picture,
    "answers.jsonl": _answers,
    "other.png": _picture,
    "photos": _photos,
    "questions.jsonl": _questions,
    "saved_data_set": _saved_data_set,
    "frame.png": lambda path: _millimetres(path, render_scene(1).depth),
    "my_depth_pngs": _depth_pngs,
    "my_room": _rooms,
    "OpenGVLab/InternVL3-1B-hf": save_internvl,
    "InternVL3-1B-hf": save_internvl,
    "InternVL2_5-2B": _opengvlab,
    "sam2.1_hiera_large.pt": lambda path: mask_model().save_pretrained(path),  # of Meta's own sizes the least is 160 MB
    "sam2.1-hiera-large": lambda path: mask_model().save_pretrained(path),
    "vae-final.pt": _aurora,
    "depth-codec": lambda path: codec().save_pretrained(path),
    "Sa2VA-1B": lambda path: write_source(path, "Qwen2ForCausalLM"),
    "Sa2VA-4B": lambda path: write_source(path, "Qwen2ForCausalLM"),
    "Depth-Anything-V2-Small-hf": save_teacher,
    "instances_train.json": _instances,
    "llava_v1_5_mix665k.json": _llava,
    "HARDBLINK_FOLDER": lambda path: formats.write_hardblink(path, formats.scenes_of(range(5, 9))[:2]),
    "path/to/hardblink": lambda path: formats.write_hardblink(path, formats.scenes_of(range(5, 9))[:2]),
    "M": _tiny,
    "your/checkpoint": _tiny,
    "runs/sft_world/checkpoint": _tiny,
    "runs/tiny/start": _tiny,
    "recipes/ablation.yaml": lambda path: path.write_text(yaml.safe_dump(ABLATION)),
}
# Runs whose results a document takes for granted.
BEFORE = {"evaluation.md": ["perceptio eval world-plain --limit 1 --out runs/refcoco"]}


def _prepare(document: Path, folder: Path) -> None:
    """Make the inputs that are named in the document and that none of its own commands makes first."""
    text = "\n".join(block.text for block in blocks_of(document) if block.kind in ("python", "shell"))
    made = set(re.findall(r"--out[ =](\S+)|convert \S+ \S+ (\S+)|save_pretrained\(\"(\S+?)\"\)", text))
    outputs = {f"{name}/checkpoint" for names in made for name in names if name} | {
        n for names in made for n in names if n
    }
    for name, make in INPUTS.items():
        if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", text) and name not in outputs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            make(folder / name)


# --- running ---------------------------------------------------------------------------------------------------------


def _run_document(document: Path, folder: Path) -> None:
    """In a process of its own: all of the document's blocks in one folder and one namespace, until one fails."""
    log = os.open(folder.with_name("log.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    _deny_network(folder.with_name("network.txt"))
    try:
        _small_sam2_in_sa2va()
        _prepare(document, folder)
        os.chdir(folder)
        for line in BEFORE.get(document.name, ()):
            _run(line.split(), document.name)
        names: dict = {"__name__": "__main__"}
        for block in blocks_of(document):
            where, begin = f"{document.name}:{block.line}", time.monotonic()
            if block.kind == "python":
                exec(compile(block.text, where, "exec"), names)
            elif block.kind == "shell":
                for words in block.commands():
                    _run(words, where)
            print(f"=== {where} {block.kind} {time.monotonic() - begin:.1f} s", file=sys.__stdout__, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _run(words: list[str], where: str) -> None:
    line = " ".join(words)
    if any(line.startswith(begin) for begin in ELSEWHERE):
        return
    assert words[0] in ("perceptio", ".venv/bin/perceptio"), f"{where}: nobody has said how to try `{line}`"
    arguments = [name for word in words[1:] for name in (sorted(glob.glob(word)) or [word])]
    typed = " ".join(arguments)
    more = next((more for begin, more in SHORT.items() if typed.startswith(begin)), "")
    if "--dry-run" in arguments:
        more = ""
    print(f"$ perceptio {typed} {more}", flush=True)
    code = main.run([*arguments, *more.split()])
    assert code == 0, f"{where}: `{line}` ended with {code}"


def _deny_network(log: Path) -> None:
    """Whoever looks for a machine or connects to one fails, and stands in `log` with the lines that led there."""
    import huggingface_hub.constants as constants

    constants.HF_HUB_OFFLINE = False  # set for the tests: as a user has it
    constants.HF_HUB_DISABLE_TELEMETRY = False
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI"):
        os.environ.pop(name, None)
    os.environ["PYTHONPATH"] = str(ROOT)

    def deny(what: str, real: Callable) -> Callable:
        def called(*arguments, **options):
            if isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX:
                return real(*arguments, **options)
            with open(log, "a") as file:
                file.write(f"{what} {arguments[-1:]}\n{''.join(traceback.format_stack()[:-1])}\n")
            raise OSError("there is no network in this test")

        return called

    for what in ("connect", "connect_ex"):
        setattr(socket.socket, what, deny(what, getattr(socket.socket, what)))
    for what in ("getaddrinfo", "gethostbyname", "create_connection"):
        setattr(socket, what, deny(what, getattr(socket, what)))


def _small_sam2_in_sa2va() -> None:
    """A SAM2 of the published sizes has 39 million parameters; the converter knows a smaller one only if told."""
    from perceptio_hf.conversion import sa2va
    from perceptio_hf.lab.lessons.model import tiny_mask_config

    for function in (sa2va.convert_sa2va, sa2va.load_sa2va):
        function.__kwdefaults__["mask_config"] = tiny_mask_config()


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=path.name, marks=[pytest.mark.slow] * (path.name in SLOW)) for path in DOCUMENTS],
)
def test_the_document_runs_without_a_network(document, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=_run_document, args=(document, folder))
    process.start()
    process.join(900)  # it takes a fraction of that, but not beside other work
    process.kill()
    log, network = tmp_path / "log.txt", tmp_path / "network.txt"
    print(log.read_text()[-6000:])
    assert process.exitcode == 0
    assert not network.exists(), network.read_text()[-3000:]


# --- nothing is left out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_run_or_known_to_be_shown(document):
    shown = OUTPUTS.get(document.name, [])
    unknown = [block for block in blocks_of(document) if block.kind == "unknown"]
    stray = [f"{document.name}:{b.line}: {b.text[:60]}" for b in unknown if not b.text.startswith(tuple(shown))]
    assert stray == [], "say how these are tried: as python or bash, as json, yaml or text, or in OUTPUTS"
    assert all(any(block.text.startswith(begin) for block in unknown) for begin in shown), "OUTPUTS lists what is gone"


def test_every_command_is_in_a_document():
    """Also what denies every command the network: this file runs those of the documents."""
    typed = {
        " ".join(words[1:3])
        for document in DOCUMENTS
        for block in blocks_of(document)
        if block.kind == "shell"
        for words in block.commands()
        if words[0].endswith("perceptio")
    }
    commands = {f"convert {name}" for name in ("sam2", "aurora-vqvae", "sa2va")}
    commands |= {f"codebook {name}" for name in ("train", "eval", "encode")}
    commands |= {command.name or command.callback.__name__ for command in main.app.registered_commands}
    commands = {"eval" if command == "evaluate" else command for command in commands}
    assert {command for command in commands if not any(line.startswith(command) for line in typed)} == set()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for block in blocks_of(document):
            for words in block.commands() if block.kind == "shell" else ():
                if words[0] == "make":
                    target = next((word for word in words[1:] if "=" not in word), "help")
                    assert re.search(rf"(?m)^{re.escape(target)}:", makefile), (document.name, words)


def test_blocks_are_found(tmp_path):
    path = tmp_path / "a.md"
    lines = ["Text", "", "    perceptio a \\", "      --b  # why", "    make c", "", "- list", "  more", ""]
    path.write_text("\n".join([*lines, "```python no-run", "x = 1", "```", "```", "out", "```", ""]))
    shell, python, other = blocks_of(path)
    assert (shell.kind, python.kind, other.kind) == ("shell", "python", "unknown")
    assert list(shell.commands()) == [["perceptio", "a", "--b"], ["make", "c"]]
    assert python == Block("python no-run", "x = 1", 10)


def test_the_network_is_noticed(tmp_path):
    """The test above would pass if nothing were denied."""

    def look() -> None:
        _deny_network(tmp_path / "network.txt")
        try:
            socket.create_connection(("huggingface.co", 443))
        except OSError:
            os._exit(7)

    process = multiprocessing.get_context("fork").Process(target=look)
    process.start()
    process.join(30)
    assert process.exitcode == 7 and "huggingface.co" in (tmp_path / "network.txt").read_text()
