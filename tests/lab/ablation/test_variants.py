"""The ablation: variants differ in what they say, runs go on, and table and plot say what was measured."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig, PerceptioForConditionalGeneration
from perceptio_hf.commands.main import run
from perceptio_hf.lab.ablation.figures import METRICS
from perceptio_hf.lab.ablation.report import write_report
from perceptio_hf.lab.ablation.variants import VARIANTS, AblationRecipe, run_variant, summarise, train_base
from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer
from perceptio_hf.lab.lessons.stages import fresh_model
from perceptio_hf.world import text_corpus

RECIPE = AblationRecipe(words_steps=1, spans_steps=1, steps=2, batch=1, closest=5, replaced=5, scenes=6, malformed=4)
ASKED = ("answers_only", "spans_ce", "composite", "full", "full_no_seg", "seg_only")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    torch.manual_seed(0)
    codec = DepthVQVAE(DepthVQVAEConfig(image_size=64, downsample=8, num_codes=16, code_dim=8, base_channels=4)).eval()
    processor = tiny_processor(tiny_tokenizer(text_corpus(50)), codec.config)
    folder = tmp_path_factory.mktemp("ablation") / "start"
    model = fresh_model(processor, codec)
    model.generation_config.max_new_tokens = 72  # a span and a few words: an untrained model never ends by itself
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_variants_have_the_names_asked_for():
    assert set(ASKED) <= set(VARIANTS)
    assert not VARIANTS["answers_only"].form.depth and not VARIANTS["answers_only"].form.masks
    assert VARIANTS["composite"] == replace(VARIANTS["full"], weights=VARIANTS["composite"].weights)
    assert VARIANTS["composite"].weights.reconstruction == 0 < VARIANTS["full"].weights.reconstruction
    full = VARIANTS["full"]
    assert full.weights.token_over == "codes" and full.span_noise == 0
    assert VARIANTS["full_vocabulary"].weights == replace(full.weights, token_over="vocabulary")
    assert VARIANTS["full_noise"] == replace(full, span_noise=0.5)


@pytest.mark.slow
def test_a_run_scores_what_its_form_allows_and_is_not_repeated(start, tmp_path):
    full = run_variant("full", 0, RECIPE, start, tmp_path)
    assert set(full) == set(METRICS)
    again = run_variant("full", 0, RECIPE, start, tmp_path)
    assert again == full
    masks = run_variant("seg_only", 0, RECIPE, start, tmp_path)
    assert set(masks) == {"ciou", "giou"}
    words = run_variant("answers_only", 0, RECIPE, start, tmp_path)
    assert {"closest_3", "plain_accuracy"} <= set(words) and not {"absrel", "count_mae"} & set(words)
    with pytest.raises(ValueError, match="another recipe"):
        run_variant("full", 0, replace(RECIPE, steps=3), start, tmp_path)


@pytest.mark.slow
def test_the_base_is_trained_once_and_leaves_sight_and_codec_alone(start, tmp_path):
    before = PerceptioForConditionalGeneration.from_pretrained(start).state_dict()
    base = train_base(RECIPE, start, tmp_path)
    after = PerceptioForConditionalGeneration.from_pretrained(base).state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed)
    assert any(name.startswith("mask_model.mask_decoder") for name in changed), "its masks are to live"
    frozen = ("mask_model.vision_encoder", "depth_model", "model.vision_tower")
    assert not any(name.startswith(frozen) for name in changed)
    written = (base / "model.safetensors").stat().st_mtime_ns
    assert train_base(replace(RECIPE, steps=7, closest=9), start, tmp_path) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="another recipe"):
        train_base(replace(RECIPE, words_steps=2), start, tmp_path)


@pytest.mark.slow
def test_the_base_may_see_with_another_checkpoint(start, tmp_path):
    other = PerceptioForConditionalGeneration.from_pretrained(start)
    torch.nn.init.normal_(other.model.vision_tower.embeddings.patch_embeddings.projection.weight)
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(start, tmp_path / "other", dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*"))
    base = train_base(RECIPE, start, tmp_path, sight=tmp_path / "other")
    found = PerceptioForConditionalGeneration.from_pretrained(base).model.vision_tower.state_dict()
    wanted = other.model.vision_tower.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="another start"):
        train_base(RECIPE, start, tmp_path)
    with torch.no_grad():
        other.depth_model.depth_codebook.vectors += 1.0
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another depth codec"):
        train_base(RECIPE, start, tmp_path / "again", sight=tmp_path / "other")


def test_unknown_variants_are_named(start, tmp_path, capsys):
    with pytest.raises(ValueError, match="fuller"):
        run_variant("fuller", 0, RECIPE, start, tmp_path)
    assert run(["ablate", "--start", str(start), "--variants", "fuller"]) == 2
    assert "fuller" in capsys.readouterr().err
    assert run(["ablate", "--start", str(start), "--sight", str(tmp_path)]) == 2
    assert "--sight" in capsys.readouterr().err
    assert run(["ablate", "--start", str(start), "--out", str(tmp_path / "out"), "--device", "nowhere"]) == 2
    assert "--device nowhere cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(["ablate", "--start", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_summary_and_report(tmp_path):
    scores = {
        "full": [{"closest": 0.5, "ciou": 0.4, "trt_oracle": 0.9, "trt_random": 0.3}, {"closest": 0.7, "ciou": 0.4}],
        "answers_only": [{"closest": 0.25}],
        "seg_only": [{"ciou": 0.3}],
    }
    table = summarise(scores)
    assert table["full"]["closest"] == pytest.approx({"mean": 0.6, "std": 0.1414, "n": 2}, abs=1e-4)
    assert table["answers_only"]["closest"] == {"mean": 0.25, "std": 0.0, "n": 1}
    write_report(table, tmp_path / "results", command="perceptio ablate")
    assert json.loads((tmp_path / "results" / "ablation.json").read_text()) == table
    text = (tmp_path / "results" / "ablation.md").read_text()
    assert "0.600 ± 0.141" in text and "+35.0 points" in text and "+60.0 points" in text
    assert "| answers_only: answers only |  |  |  | 0.250 |" in text, "the spread of one seed is not zero"
    assert (tmp_path / "results" / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps: 1", "unknown key 'stps'; did you mean steps"),
        ("- 1", "keys and values"),
        ("steps: 0", "steps is 0; it must be above 0"),
        ("steps: 1.5", "steps must be a whole number, got 1.5"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("replaced: 4", "replaced is 4; it must be 5 or more"),
    ],
)
def test_recipes_with_mistakes(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        AblationRecipe.read(tmp_path / "recipe.yaml")


def test_a_rate_may_be_written_as_yaml_reads_no_number(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-4")
    assert AblationRecipe.read(tmp_path / "recipe.yaml").learning_rate == 1e-4


def test_a_training_that_diverges_names_its_run(start, tmp_path):
    recipe = replace(RECIPE, learning_rate=1e12)
    base = train_base(recipe, start, tmp_path)
    with pytest.raises(ValueError, match=r"seg_only 0, step \d+: the loss is (nan|inf); lower the learning rate"):
        run_variant("seg_only", 0, recipe, base, tmp_path)


def test_the_published_recipe_is_read():
    from pathlib import Path

    path = Path(__file__).parents[3] / "recipes" / "ablation.yaml"
    recipe = AblationRecipe.read(path)
    assert recipe.closest >= 500 and yaml.safe_load(path.read_text())["steps"] == recipe.steps
