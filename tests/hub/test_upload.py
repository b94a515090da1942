"""Uploads to a stand-in of the Hub: what arrives, what stays behind, and what is refused before anything is sent."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import chat, encode, picture
from hub_server import TOKEN, HubServer, client_environment, point_client_at, serve_hub
from huggingface_hub import EvalResult, HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BitsAndBytesConfig

from perceptio_hf import PerceptioProcessor, tiny_checkpoint
from perceptio_hf.hub.card import CardFacts, read_results
from perceptio_hf.hub.upload import plan_upload, upload

WITHOUT_THE_PACKAGE = """
import sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("me/fine", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("me/fine", trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "Where?"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
torch.save(model.generate(**inputs, spatial="seg+depth", do_sample=False), "out.pt")
assert not any(name.startswith("perceptio_hf") for name in sys.modules)
"""
BY_PUSH_TO_HUB = """
from transformers import AutoModel, AutoProcessor
import perceptio_hf
model, processor = AutoModel.from_pretrained("me/fine"), AutoProcessor.from_pretrained("me/fine")
model.push_to_hub("me/own", tags=["mine"])
processor.push_to_hub("me/own")
model.push_to_hub("me/own", commit_message="again", revision="v2")
"""


@pytest.fixture
def hub(monkeypatch):
    with serve_hub() as server:
        point_client_at(monkeypatch, server.url)
        yield server


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A checkpoint to change, with things beside it that are nobody's business."""
    copy = tmp_path / "saved"
    shutil.copytree(tiny_folder, copy)
    for name in (".env", "optimizer.pt", "training_args.bin", "notes.txt", "recipe.json", "old.safetensors"):
        (copy / name).write_text("private")
    (copy / "checkpoint-5").mkdir()
    (copy / "checkpoint-5" / "config.json").write_text("{}")
    (copy / "LICENSE").write_text("Do as you like.")
    return copy


def run(code: str, hub: HubServer, place: Path, **environment: str) -> None:
    settings = client_environment(hub.url, place / "home") | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_upload_is_the_dry_run_byte_for_byte_and_loads_elsewhere(hub, folder, tmp_path, model, processor):
    plan = plan_upload(folder, "me/fine", CardFacts(license="mit"))
    plan.write(tmp_path / "dry")
    url = upload(plan, token=TOKEN, message="First")
    repo = hub.repos["me/fine"]
    dry = {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()}
    assert repo.branches["main"] == dry and set(dry) == set(plan.files)
    assert url == f"{hub.url}/me/fine/commit/{repo.sha('main')}" and repo.messages == ["First"] and not repo.private
    for name in set(dry) - {"README.md"}:
        assert dry[name] == (folder / name).read_bytes()
    assert {"LICENSE", "model.safetensors", "config.json", "tokenizer.json", "modeling_perceptio.py"} <= set(dry)
    assert set(plan.left_out) == set(os.listdir(folder)) - set(dry) and ".env" in plan.left_out
    assert not any(content == b"private" for content in dry.values())

    picture().save(tmp_path / "p.png")
    run(WITHOUT_THE_PACKAGE, hub, tmp_path, PYTHONPATH="")
    ours = model.generate(**encode(processor, chat(picture(), text="Where?")), spatial="seg+depth", do_sample=False)
    assert torch.equal(torch.load(tmp_path / "out.pt"), ours)


def test_push_to_hub_brings_code_and_card(hub, folder, tmp_path):
    upload(plan_upload(folder, "me/fine"), token=TOKEN)
    run(BY_PUSH_TO_HUB, hub, tmp_path, PYTHONPATH=str(Path(__file__).parents[2]))
    files = hub.repos["me/own"].branches["main"]
    assert set(files) == set(hub.repos["me/fine"].branches["main"]) - {"LICENSE"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["me/fine"] and card.data.pipeline_tag == "image-text-to-text"
    assert {"perceptio", "mine"} <= set(card.data.tags) and 'from_pretrained("me/own"' in card.text
    assert hub.repos["me/own"].branches["v2"].keys() == files.keys()


def test_a_branch_is_made_and_main_left_alone(hub, folder):
    upload(plan_upload(folder, "me/fine"), token=TOKEN, branch="v1", private=True)
    repo = hub.repos["me/fine"]
    assert repo.private and repo.branches["main"] == {} and "config.json" in repo.branches["v1"]


def test_shards_go_up_with_their_index_and_no_others(hub, folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    (folder / "model-00009-of-00009.safetensors").write_text("stale")
    plan = plan_upload(folder, "me/fine")
    weights = {name for name in plan.files if name.endswith(".safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert weights == set(index["weight_map"].values()) and len(weights) > 2
    assert "model.safetensors.index.json" in plan.files and "model-00009-of-00009.safetensors" in plan.left_out
    upload(plan, token=TOKEN)
    assert len([line for line in hub.requests if line.startswith("PUT /large/")]) == len(weights)


def test_code_that_is_missing_is_added(folder, tmp_path):
    original = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "span_grammar.py").unlink()
    (folder / "tokens.py").write_text("# of another version")
    for name in ("config.json", "processor_config.json"):
        settings = json.loads(original[name])
        del settings["auto_map"]
        (folder / name).write_text(json.dumps(settings))
    plan = plan_upload(folder, "me/fine")
    plan.write(tmp_path / "dry")
    for name in plan.files:
        if name.endswith(".py"):
            assert (tmp_path / "dry" / name).read_bytes() == original[name]
        elif name in ("config.json", "processor_config.json"):
            assert json.loads((tmp_path / "dry" / name).read_text()) == json.loads(original[name])
    assert not (folder / "span_grammar.py").exists(), "the folder itself stays as it is"


def test_code_of_others_and_places_on_the_disk_stay_here(folder, tmp_path):
    (folder / "my_secrets.py").write_text("TOKEN = 'hf_abc'")
    (folder / "LICENSE.d").mkdir()
    settings = json.loads((folder / "config.json").read_text())
    settings["depth_config"]["_name_or_path"] = "/home/me/codec"  # as earlier versions wrote it
    (folder / "config.json").write_text(json.dumps(settings))
    plan = plan_upload(folder, "me/fine")
    assert {"my_secrets.py", "LICENSE.d"} <= set(plan.left_out) and "modeling_perceptio.py" in plan.files
    plan.write(tmp_path / "dry")
    assert not any(b"/home/me" in path.read_bytes() for path in (tmp_path / "dry").rglob("*") if path.is_file())
    assert json.loads((tmp_path / "dry" / "config.json").read_text())["depth_config"]["image_size"]


def test_a_card_behind_a_byte_order_mark_has_its_metadata(folder):
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\nMine.\n")
    card = plan_upload(folder, "me/fine").files["README.md"]
    assert card.startswith(b"---") and card.count(b"license: mit") == 1


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_go_up(tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="the extra quantize installs it")
    source, folder = tiny_checkpoint(), tmp_path / "saved"
    settings = BitsAndBytesConfig(**{bits: True})
    AutoModel.from_pretrained(source, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(folder)
    PerceptioProcessor.from_pretrained(source).save_pretrained(folder)
    files = plan_upload(folder, "me/small").files
    assert files["model.safetensors"] == folder / "model.safetensors" and b"me/small" in files["README.md"]


def test_a_card_of_the_folder_is_kept_unless_told(folder):
    (folder / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n# By hand\r\n")
    plan = plan_upload(folder, "me/fine")
    assert plan.keeps_card and plan.files["README.md"] == folder / "README.md"
    result = EvalResult("image-segmentation", "a/b", "B", "ciou", 0.5)
    plan = plan_upload(folder, "me/fine", CardFacts(results=(result,)))
    assert plan.keeps_card and plan.files["README.md"].endswith(b"---\r\n# By hand\r\n")
    assert ModelCard(plan.files["README.md"].decode()).data.eval_results == [result]
    plan = plan_upload(folder, "me/fine", card_anew=True)
    assert not plan.keeps_card and b"By hand" not in plan.files["README.md"]
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        plan_upload(folder, "me/fine")


def truncated(folder: Path) -> str:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    return r"model\.safetensors .*truncated"


def without_a_tensor(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    del weights["seg_projector.linear_out.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return "missing keys, the first is seg_projector.linear_out.bias"


def without_a_shard(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {
        name: "model-00001-of-00002.safetensors" for name in load_file(folder / "model-00001-of-00002.safetensors")
    }
    places[next(iter(places))] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return "model-00002-of-00002.safetensors, which is missing"


def of_two_minds(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{}")
    return "has both"


def without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "has neither"


def of_another_size(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    return "cannot be loaded"


def of_another_kind(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "internvl"}))
    return "holds a 'internvl' model"


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "no config.json"


def without_processor(folder: Path) -> str:
    (folder / "processor_config.json").unlink()
    return "has no processor"


def an_adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text("{}")
    return "holds an adapter"


def with_another_tokenizer(folder: Path) -> str:
    processor = PerceptioProcessor.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["seg_token_id"], config["depth_start_token_id"] = config["depth_start_token_id"], config["seg_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    return rf"\[SEG\] has the id {processor.seg_token_id} there"


def with_a_broken_card(folder: Path) -> str:
    (folder / "README.md").write_text("---\na: [\n---\n")
    return "metadata of README.md"


@pytest.mark.parametrize(
    "damage",
    [
        *(
            truncated,
            without_a_tensor,
            without_a_shard,
            of_two_minds,
            without_weights,
            of_another_size,
            of_another_kind,
        ),
        *(without_config, without_processor, an_adapter, with_another_tokenizer, with_a_broken_card),
    ],
)
def test_folders_that_are_refused(folder, damage):
    says = damage(folder)
    with pytest.raises(ValueError, match=says):
        plan_upload(folder, "me/fine")


@pytest.mark.parametrize("name", ["fine", "me/fine/x", "me/fi ne", "-me/x", "me/x.git", "", "me/", "a" * 97 + "/x"])
def test_names_that_are_refused(folder, name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        plan_upload(folder, name)


@pytest.fixture
def plan(folder):
    return plan_upload(folder, "me/fine")


def failure(plan, **options) -> str:
    """What a refused upload says: one line, and never the token."""
    with pytest.raises(ValueError) as raised:
        upload(plan, **{"token": TOKEN} | options)
    assert TOKEN not in str(raised.value) and raised.value.__cause__ is None
    return str(raised.value)


def test_no_token(hub, plan, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "There is no token" in failure(plan, token=None)
    assert "characters that no token has" in failure(plan, token="two\nlines")
    assert hub.requests == []


def test_a_token_the_hub_does_not_know(hub, plan):
    assert "does not know this token" in failure(plan, token=TOKEN[:-1] + "b")
    assert hub.repos == {}


def test_a_name_that_is_somebody_else_s(hub, folder):
    assert "does not let this token write to somebody/fine" in failure(plan_upload(folder, "somebody/fine"))


def test_a_public_repository_does_not_become_private_by_wishing(hub, plan):
    upload(plan, token=TOKEN)
    hub.requests.clear()
    assert "public" in failure(plan, private=True)
    assert not any("commit" in request for request in hub.requests)


def test_a_card_the_hub_refuses_stops_everything(hub, folder):
    assert "no-such-licence" in failure(plan_upload(folder, "me/fine", CardFacts(license="no-such-licence")))
    assert hub.requests == ["POST /api/repos/create", "POST /api/validate-yaml"]


def test_the_hub_s_own_check_takes_every_card(hub, folder):
    result = EvalResult("image-segmentation", "a/b", "B", "ciou", 0.5)
    for facts in (CardFacts(), CardFacts("mit", ("a/b",), ("c/d",), ("en",), (result,))):
        card = ModelCard(plan_upload(folder, "me/fine", facts).files["README.md"].decode())
        HfApi(token=TOKEN)._validate_yaml(card.content)  # what ModelCard.validate asks; in older releases only of hf.co
    assert hub.requests == ["POST /api/validate-yaml"] * 2


def test_a_file_that_does_not_arrive_leaves_no_commit(hub, plan):
    hub.broken = "/large/"
    assert "404" in failure(plan)
    assert hub.repos["me/fine"].branches["main"] == {} and hub.repos["me/fine"].messages == []


def test_no_connection(plan, monkeypatch):
    with serve_hub() as server:
        nobody = server.url
    point_client_at(monkeypatch, nobody)
    said = failure(plan)
    assert f"The upload to me/fine failed: there is no connection to {nobody}" in said and "Errno" not in said


def test_offline_mode(plan, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is on; unset HF_HUB_OFFLINE" in failure(plan)
    assert hub.requests == []


def test_the_guide_runs(capsys, tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "push.md").read_text()
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], {})
    assert "model.safetensors" in capsys.readouterr().out.split("\n")
    (tmp_path / "card.yaml").write_text(re.search(r"```yaml\n(.*?)```", guide, re.DOTALL)[1])
    assert read_results(tmp_path / "card.yaml")[0].metric_value == 0.827
