"""The lmms-eval plug-in: found by its entry point, run on a small local task, spans stripped or kept."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from helpers import picture
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager

from perceptio_hf.integrations import lmms_eval as plugin

ROOT = Path(__file__).parents[2]
TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
{more}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def request(doc_id: int, messages: list[dict], task: str = "t", **options) -> Instance:
    arguments = (f"context {doc_id}", lambda doc: doc, {"max_new_tokens": 5, **options}, doc_id, task, "test")
    metadata = {"task": task, "doc_id": doc_id, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def message(*pictures, text="Where is the ball?") -> list[dict]:
    parts = [{"type": "image", "url": item} for item in pictures] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def guest(tiny_folder):
    return plugin.Perceptio(str(tiny_folder), device="cpu", batch_size="3", spatial_tasks="points; more")


def ask(guest, chats: list, task: str = "t", **options) -> list[str]:
    guest.task_dict = {task: {"test": chats}}
    return guest.generate_until([request(index, chat, task, **options) for index, chat in enumerate(chats)])


def test_plain_tasks_get_words_and_spatial_ones_the_spans_too(guest):
    chats = [message(picture(seed=index), text=f"What is {index}?") for index in range(4)]
    plain = ask(guest, chats)
    assert not any("<DEPTH" in text or "[SEG]" in text for text in plain)
    kept = ask(guest, chats, spatial="depth")
    codes = guest.model.config.num_depth_tokens
    for text in kept:
        assert text.startswith("<DEPTH_START>") and text.count("<DEPTH_") == codes + 2
    named = ask(guest, chats, task="points", spatial="seg+depth")
    assert all(text.startswith("[SEG]") for text in named)
    guest.spatial = "depth"
    try:
        assert all(text.startswith("<DEPTH_START>") for text in ask(guest, chats, task="more"))
        assert not any("<DEPTH" in text for text in ask(guest, chats))
    finally:
        guest.spatial = "auto"


def test_the_limit_counts_words_and_stop_strings_end_an_answer(guest):
    chats = [message(picture(seed=1))]
    long = ask(guest, chats, spatial="depth", max_new_tokens=12)[0].split("<DEPTH_END>")[1]
    short = ask(guest, chats, spatial="depth", max_new_tokens=2)[0].split("<DEPTH_END>")[1]
    assert short and long.startswith(short) and len(short) < len(long)
    stop = long.strip()[1]
    stopped = ask(guest, chats, spatial="depth", max_new_tokens=12, until=[stop])[0].split("<DEPTH_END>")[-1]
    assert stop not in stopped


def test_order_does_not_depend_on_batches(guest):
    chats = [message(picture(seed=index), text="What?" * (1 + index % 3)) for index in range(5)]
    options = [{"spatial": "depth"} if index % 2 else {"spatial": "seg"} for index in range(5)]
    guest.task_dict = {"t": {"test": chats}}
    requests = [request(index, chat, **options[index]) for index, chat in enumerate(chats)]
    together = guest.generate_until(requests)
    assert together == [guest.generate_until([one])[0] for one in requests]


def test_prompts_without_a_picture_or_with_several(guest):
    words, pair = ask(guest, [message(text="Hello?"), message(picture(seed=1), picture(seed=2))], spatial="auto")
    assert isinstance(words, str) and isinstance(pair, str)
    assert "<DEPTH" not in ask(guest, [message(text="Hello?")], spatial="depth")[0]


def test_refuses_what_it_cannot_do(guest, tiny_folder):
    with pytest.raises(ValueError, match="resolution"):
        plugin.Perceptio(str(tiny_folder), device="cpu", resolution=3)
    with pytest.raises(ValueError, match="sideways"):
        plugin.Perceptio(str(tiny_folder), device="cpu", spatial="sideways")
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="not videos"):
        ask(guest, [video])
    for method in (guest.loglikelihood, guest.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            method([])


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> TaskManager:
    """Two tasks over the same four local rows: a plain one and a spatial one."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {"image": [picture(seed=index) for index in range(4)], "question": ["Which?"] * 4, "answer": ["B"] * 4}
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    for name, more in (("plain_points", ""), ("spatial_points", "  spatial: depth")):
        task = TASK.format(data=tmp_path / "rows.parquet", name=name, more=more)
        (folder / f"{name}.yaml").write_text(task)
    return TaskManager("ERROR", include_path=str(folder), include_defaults=False)


def test_lmms_eval_runs_it_on_local_tasks(tasks, tiny_folder, tmp_path, monkeypatch):
    from importlib import metadata

    from lmms_eval.models.registry_v2 import ModelRegistryV2

    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no pyproject.toml")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    installed = tmp_path / "site" / "perceptio_hf-0.dist-info"  # what an installation would leave
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: perceptio-hf\nVersion: 0\n")
    lines = [f"{name} = {place}" for name, place in declared.items()]
    (installed / "entry_points.txt").write_text("[lmms_eval.models]\n" + "\n".join(lines))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert metadata.distribution("perceptio-hf").version == "0"
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("perceptio") is plugin.Perceptio

    import lmms_eval.models
    from lmms_eval.evaluator import simple_evaluate

    monkeypatch.setattr(lmms_eval.models, "MODEL_REGISTRY_V2", registry)
    results = simple_evaluate(
        model="perceptio",
        model_args=f"pretrained={tiny_folder},device=cpu",
        tasks=["plain_points", "spatial_points"],
        task_manager=tasks,
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
    )
    for name in ("plain_points", "spatial_points"):
        texts = [sample["resps"][0][0] for sample in results["samples"][name]]
        assert len(texts) == 4
        assert all(("<DEPTH_START>" in text) == (name == "spatial_points") for text in texts), json.dumps(texts)
        assert 0 <= results["results"][name]["exact_match,none"] <= 1
