"""LoRA: what is adapted, what moves, and that an adapter survives saving, resuming, merging and a fresh base."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sft_helpers as sft
import torch
import transformers
from datasets import Dataset
from helpers import assert_alike, assert_trained_alike, chat, encode, picture, random_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BitsAndBytesConfig
from trl import GRPOConfig

from perceptio_hf import (
    PerceptioForConditionalGeneration,
    PerceptioProcessor,
    PerceptioSFTTrainer,
    tiny_checkpoint,
)
from perceptio_hf.commands import checkpoints
from perceptio_hf.commands.train import _fine_tune
from perceptio_hf.training import fsdp
from perceptio_hf.training.lora import MODULES_TO_SAVE, block_layers, check_goes_on, load_merged, lora_config
from perceptio_hf.training.recipe import read_recipe, training_set
from perceptio_hf.training.reinforcement import PerceptioGRPOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNUSED = (".pred_obj_score_head.", ".output_hypernetworks_mlps.")  # of the mask decoder: videos, and further masks


def load(folder: Path) -> PerceptioForConditionalGeneration:
    return PerceptioForConditionalGeneration.from_pretrained(folder)


def trainer_of(base: Path, out: Path, processor, **changes) -> PerceptioSFTTrainer:
    model = load(base)
    values = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    values["adam_epsilon"] = 1e-3  # see `assert_trained_alike`
    return PerceptioSFTTrainer(
        model,
        sft.settings(out, **(values | changes)),
        train_dataset=sft.samples(16),
        processing_class=processor,
        peft_config=lora_config(model, r=4, dropout=0.1),
    )


@dataclass
class Trained:
    """A finished training: the base it began with, its checkpoints and adapter, and parameters before and after."""

    base: Path
    out: Path
    model: PeftModel
    before: dict[str, torch.Tensor]

    @property
    def adapter(self) -> Path:
        return self.out / "checkpoint"

    @property
    def after(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def fresh(self) -> PeftModel:
        """The adapter on a fresh base, by PEFT's own call."""
        return PeftModel.from_pretrained(load(self.base), self.adapter)


@pytest.fixture(scope="module")
def processor():
    return sft.processor()


@pytest.fixture(scope="module", params=["tied", "untied"])
def trained(request, processor, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    base, out = folder / "base", folder / "out"
    random_model(processor, tie=request.param == "tied").save_pretrained(base)
    processor.save_pretrained(base)
    trainer = trainer_of(base, out, processor, save_strategy="steps", save_steps=2)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_finished(out / "checkpoint")
    return Trained(base, out, trainer.model, before)


@torch.no_grad()
def outputs(model, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt followed by [SEG], and its mask."""
    inputs = encode(processor, chat(picture(seed=1)))
    ids = torch.cat([inputs["input_ids"], torch.tensor([[model.spatial_vocabulary().seg]])], dim=1)
    pixels = {name: inputs[name] for name in ("pixel_values", "mask_pixel_values")}
    result = model.eval()(input_ids=ids, **pixels)
    return result.logits, result.mask_logits


def assert_same(model, other, processor) -> None:
    for one, two in zip(outputs(model, processor), outputs(other, processor), strict=True):
        assert one.numel()
        assert_alike(one, two, depth=30)


def new_rows(model) -> list[int]:
    words = model.spatial_vocabulary()
    return sorted({words.seg, words.depth_start, words.depth_end, *words.codes})


def old_rows(model) -> list[int]:
    return sorted(set(range(model.config.text_config.vocab_size)) - set(new_rows(model)))


def is_learnt(name: str) -> bool:
    return any(part in name for part in ("lora_", "trainable_tokens_delta", "modules_to_save.default"))


def test_adapters_are_in_every_layer_of_the_language_model_and_nowhere_else(trained):
    adapted = {name.partition(".lora_A")[0] for name in trained.after if "lora_A" in name}
    prefix = "base_model.model.model.language_model.layers."
    expected = {f"{prefix}{n}.self_attn.{name}" for n in (0, 1) for name in LINEAR[:4]}
    expected |= {f"{prefix}{n}.mlp.{name}" for n in (0, 1) for name in LINEAR[4:]}
    assert adapted == expected
    assert any("vision_tower" in name and "q_proj" in name for name in trained.after)  # which has none
    assert any("mask_decoder" in name and "q_proj" in name for name in trained.after)


def test_what_is_learnt_moves_and_nothing_else_does(trained):
    after = trained.after
    assert {name for name in after if after[name].requires_grad} == {name for name in after if is_learnt(name)}
    moved = {name for name in after if not torch.equal(after[name], trained.before[name])}
    assert not {name for name in moved if not is_learnt(name)}
    still = {name for name in after if is_learnt(name) and name not in moved}
    assert all(any(part in name for part in UNUSED) for name in still)


def test_the_adapter_holds_only_what_was_learnt(trained):
    saved = load_file(trained.adapter / "adapter_model.safetensors")
    tied = trained.model.config.text_config.tie_word_embeddings
    rows = [value.shape[0] for name, value in saved.items() if "trainable_tokens_delta" in name]
    assert rows == [len(new_rows(trained.model))] * (1 if tied else 2)
    prefix = "base_model.model."
    assert {f"{prefix}seg_projector.linear_in.weight", f"{prefix}mask_model.mask_decoder.conv_s0.weight"} <= set(saved)
    parts = ("lora_", "trainable_tokens_delta", *MODULES_TO_SAVE)
    assert all(any(part in name for part in parts) for name in saved)
    assert (trained.adapter / "processor_config.json").is_file()


def test_resuming_changes_nothing(trained, processor, tmp_path):
    resumed = trainer_of(trained.base, tmp_path, processor)
    resumed.train(resume_from_checkpoint=str(trained.out / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_trained_alike(resumed.model.state_dict(), trained.model.state_dict(), tolerance=2e-4)  # 0.01 a step


def test_a_fresh_base_takes_the_adapter_by_pefts_own_call(trained, processor):
    base, fresh = load(trained.base), trained.fresh()
    weights = trained.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in fresh.state_dict().items())
    assert not torch.allclose(outputs(base, processor)[0], outputs(trained.model, processor)[0], atol=0.1)
    assert_same(fresh, trained.model, processor)
    with fresh.disable_adapter():
        assert_same(fresh, base, processor)


def test_the_folder_of_an_adapter_is_loaded_as_a_model_is(trained, processor):
    for kind in (AutoModel, PerceptioForConditionalGeneration):
        loaded = by_transformers(kind, trained.adapter)
        assert type(loaded) is PerceptioForConditionalGeneration
        assert_same(loaded, trained.model, processor)


def by_transformers(kind, folder: Path):
    if transformers.__version__.startswith("5.17."):
        with pytest.raises(ValueError, match=r"The adapter does not fit its base.*give base and folder to peft"):
            kind.from_pretrained(folder)
        pytest.skip("transformers 5.17 reads neither modules_to_save nor rows of tokens")
    try:
        return kind.from_pretrained(folder)
    except (ValueError, ImportError) as error:
        if "version of PEFT" in str(error):
            pytest.skip(f"this transformers takes no PEFT that is released: {error}")
        raise


def test_the_commands_load_the_folder_of_an_adapter_merged(trained, processor):
    assert checkpoints.resolve(str(trained.adapter)) == str(trained.adapter)
    merged, own = checkpoints.load(str(trained.adapter), "cpu")
    assert not any(is_learnt(name) for name, _ in merged.named_parameters()) and not merged.training
    assert_same(merged, trained.model, processor)
    assert own.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_an_adapter_of_another_base_is_another_checkpoint(trained, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(trained.adapter, folder)
    assert checkpoints.fingerprint(folder) == checkpoints.fingerprint(trained.adapter)
    base = tmp_path / "base"
    shutil.copytree(trained.base, base)
    point_to(folder, base)
    before = checkpoints.fingerprint(folder)
    model = load(base)
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(base)
    assert checkpoints.fingerprint(folder) != before


def point_to(folder: Path, base: Path | str | None) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base and str(base)}))


def test_what_is_wrong_with_an_adapter_is_said(trained, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(trained.adapter, folder)
    with pytest.raises(ValueError, match=r"--load-in takes whole checkpoints.*merge it first"):
        checkpoints.load(str(folder), "cpu", load_in="4bit")
    for base, says in (
        (tmp_path / "gone", r"is an adapter of .*gone, and there is no such folder.*adapter_config\.json"),
        (None, "does not say in base_model_name_or_path which checkpoint it adapts"),
        ("../gone", r"is an adapter of \.\./gone, and there is no such folder"),
        (another_kind(tmp_path), "it adapts .*other, a 'bert' model"),
        (trained.adapter, "is an adapter of .*, which is one itself; merge that"),
        (folder, "is an adapter of .*, which is one itself; merge that"),
    ):
        point_to(folder, base)
        with pytest.raises(ValueError, match=says):
            checkpoints.load(str(folder), "cpu")
    with pytest.raises(ValueError, match="holds no adapter"):
        load_merged(trained.base)


def damaged(trained, folder: Path, how: str) -> None:
    """What is left of an adapter, or of its base, in `folder`."""
    weights = folder / "adapter_model.safetensors"
    held = load_file(weights)
    if how == "no weights":
        weights.unlink()
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "settings":
        (folder / "adapter_config.json").write_text("{broken")
    elif how == "tensors lost":
        save_file({name: value for name, value in held.items() if "lora_" not in name}, weights)
    elif how == "fewer layers":
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"target_modules": "model.language_model.layers.0.self_attn.q_proj"}))
    else:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no weights", r"adapter_model\.safetensors is missing"),
        ("cut off", r"adapter_model\.safetensors is damaged"),
        ("settings", r"adapter_config\.json is damaged"),
        (
            "tensors lost",
            r"does not fit .*: \d+ tensors are missing and 0 have no place, the first is .*lora_A",
        ),
        ("fewer layers", r"does not fit its base .*: 0 tensors are missing and \d+ have no place"),
        ("rank", "does not fit its base .*: size mismatch"),
    ],
)
def test_what_is_left_of_an_adapter_is_not_answered_with(trained, tmp_path, how, says):
    shutil.copytree(trained.adapter, tmp_path / "adapter")
    damaged(trained, tmp_path / "adapter", how)
    with pytest.raises(ValueError, match=says) as caught:
        checkpoints.load(str(tmp_path / "adapter"), "cpu")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


def test_an_adapter_without_its_processor_takes_the_base_s(trained, processor, tmp_path):
    trained.fresh().save_pretrained(tmp_path)
    merged, own = checkpoints.load(str(tmp_path), "cpu")
    assert_same(merged, trained.model, processor)
    assert own.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("as_path", [True, False])
def test_a_trainer_does_not_take_an_adapter_for_its_base(trained, processor, tmp_path, as_path):
    model = str(trained.adapter) if as_path else by_transformers(AutoModel, trained.adapter)
    options = {"train_dataset": sft.samples(4), "processing_class": processor}
    with pytest.raises(ValueError, match=r"has an adapter inside.*load_merged\(folder\)"):
        PerceptioSFTTrainer(model, sft.settings(tmp_path), **options)
    with pytest.raises(ValueError, match="has an adapter inside"):
        PerceptioGRPOTrainer(model, lambda **kwargs: [0.0])


@pytest.mark.parametrize(("held", "wanted"), [(None, 4), (2, None), (2, 4)])
def test_adapters_do_not_go_on_from_other_ones(tmp_path, held, wanted):
    if held is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": held}))
    check_goes_on(tmp_path, held)
    with pytest.raises(ValueError, match=r"is of a training of .*, and the recipe trains .*; name another --out"):
        check_goes_on(tmp_path, wanted)


def another_kind(folder: Path) -> Path:
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    return folder / "other"


def test_a_training_does_not_begin_with_an_adapter(trained, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {trained.adapter}\ntasks: [{{world: refer, scenes: 4}}]\nmax_steps: 1\n")
    with pytest.raises(ValueError, match=f"{trained.adapter} is an adapter of {trained.base}.*lora_merge"):
        _fine_tune(recipe, tmp_path / "out", (), "sft")


def test_a_weight_that_is_missing_is_still_missed(trained, tmp_path):
    """What an adapter shares with another tensor is not: see `_without_shared`."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained.adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_A" in name)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"The adapter does not fit its base.* 1 missing keys.*lora_A"):
        by_transformers(AutoModel, folder)


def test_merged_and_saved_it_is_a_plain_perceptio(trained, processor, tmp_path):
    merged = trained.fresh().merge_and_unload()
    assert type(merged) is PerceptioForConditionalGeneration
    assert_same(merged, trained.model, processor)
    merged.save_pretrained(tmp_path)
    reloaded, base = load(tmp_path), load(trained.base)
    assert_same(reloaded, trained.model, processor)
    assert reloaded.state_dict().keys() == base.state_dict().keys()
    embedding, head = reloaded.model.language_model.embed_tokens.weight, reloaded.lm_head.weight
    assert (embedding is head) == base.config.text_config.tie_word_embeddings
    new, old = new_rows(base), old_rows(base)
    for now, before in ((embedding, base.model.language_model.embed_tokens.weight), (head, base.lm_head.weight)):
        assert torch.equal(now[old], before[old])
        assert (now[new] != before[new]).any(1).all()


def test_it_generates_and_decodes_as_the_merged_model_does(trained, processor):
    inputs = encode(processor, chat(picture(seed=2)), chat(picture(seed=3), text="Segment the red ball."))
    options = {"max_new_tokens": 40, "spatial": "seg+depth", "do_sample": False, "return_dict_in_generate": True}
    model = trained.fresh().eval()
    out = model.generate(**inputs, **options)
    answers = processor.post_process_spatial(out)
    again = processor.post_process_spatial(model.decode_spatial(out.sequences, **inputs))
    merged_out = model.merge_and_unload().generate(**inputs, **options)
    assert torch.equal(merged_out.sequences, out.sequences)
    for answer, same, merged in zip(answers, again, processor.post_process_spatial(merged_out), strict=True):
        assert answer.well_formed and len(answer.masks) and answer.depth is not None
        for other in (same, merged):
            assert np.mean(answer.masks != other.masks) < 0.01
            np.testing.assert_allclose(answer.depth, other.depth, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(trained, processor, tmp_path):
    """Nor does what was drawn before: adapters and their dropout begin with the seed of the settings."""
    states = []
    for checkpointing in (False, True):
        trainer = trainer_of(trained.base, tmp_path, processor, max_steps=2, gradient_checkpointing=checkpointing)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert_trained_alike(*states, tolerance=1e-4)


def test_a_base_in_bfloat16_trains(trained, processor, tmp_path):
    model = PerceptioForConditionalGeneration.from_pretrained(trained.base, dtype=torch.bfloat16)
    settings = sft.settings(tmp_path, optim="adamw_torch", learning_rate=1e-2)
    arguments = {"train_dataset": sft.samples(8), "processing_class": processor, "peft_config": lora_config(model, r=2)}
    trainer = PerceptioSFTTrainer(model, settings, **arguments)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if "lora_" in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(value.dtype == torch.float32 and not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_beside_a_quantised_model_projector_and_mask_decoder_stay_float32(tmp_path, wrapped):
    """TRL rounds all that such a model trains to bfloat16, which most steps of these parts are too small for."""
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = PerceptioForConditionalGeneration.from_pretrained(
        tiny_checkpoint(), quantization_config=quantised, dtype=torch.bfloat16
    )
    config, kept = lora_config(model, r=2), {}
    if wrapped:  # by the user, and trained before
        model, config = get_peft_model(model, config), None
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "modules_to_save" in name:
                    kept[name] = value.add_(1e-4).clone()
    trainer = PerceptioSFTTrainer(
        model,
        sft.settings(tmp_path),
        train_dataset=sft.samples(4),
        processing_class=PerceptioProcessor.from_pretrained(tiny_checkpoint()),
        peft_config=config,
    )
    found = dict(trainer.model.named_parameters())
    copies = [name for name in found if "modules_to_save" in name]
    assert any("seg_projector" in name for name in copies) and any("mask_decoder" in name for name in copies)
    for name in copies:
        original = found[name.replace("modules_to_save.default", "original_module")]
        assert found[name].dtype == torch.float32 and found[name].data_ptr() != original.data_ptr()
        assert torch.equal(found[name], kept[name] if wrapped else original)
    assert any("lora_A" in name and value.dtype == torch.bfloat16 for name, value in found.items())


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_where_processes_share_the_model_adapters_are_refused(trained, processor, tmp_path, monkeypatch, kind):
    """PEFT reads the embedding whose rows it trains while DeepSpeed has not gathered it."""
    monkeypatch.setattr(fsdp, "zero3", SimpleNamespace(is_on=lambda settings: True))
    with pytest.raises(ValueError, match=r"whose rows PEFT trains one by one .*ddp_8gpu"):
        if kind == "sft":
            trainer_of(trained.base, tmp_path, processor)
        else:
            model = load(trained.base)
            PerceptioGRPOTrainer(
                model,
                reward_funcs=lambda completions, **columns: [0.0] * len(completions),
                args=GRPOConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True),
                train_dataset=Dataset.from_list([{"prompt": "Where?"}] * 8),
                processing_class=processor,
                peft_config=lora_config(model, r=2),
            )


def test_the_choice_of_layers_parts_and_rows(processor):
    model = random_model(processor)
    assert block_layers(model) == LINEAR
    config = lora_config(
        model, r=4, target_layers=["v_proj"], modules_to_save=["multi_modal_projector"], extra_token_ids=[5, 3]
    )
    assert config.lora_alpha == 8 and config.modules_to_save == ["multi_modal_projector"]
    assert config.trainable_token_indices["embed_tokens"] == [3, 5, *new_rows(model)]
    adapted = {name for name, _ in PeftModel(model, config).named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 2 and all(name.endswith("self_attn.v_proj.lora_A") for name in adapted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"rank r is 0"),
        ({"r": 1.5}, r"rank r is 1\.5"),
        ({"alpha": -1.0}, r"alpha is -1"),
        ({"dropout": 1.0}, r"dropout is 1"),
        ({"target_layers": ["query"]}, r"target_layers has 'query'; .* q_proj, k_proj"),
        ({"target_layers": []}, r"target_layers has no name"),
        ({"modules_to_save": ["sam"]}, r"modules_to_save has 'sam'.*mask_decoder"),
        ({"extra_token_ids": [-1]}, r"extra_token_ids has \[-1\]; the embedding has the rows 0 to"),
    ],
)
def test_what_cannot_be_adapted_is_said(processor, options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(random_model(processor), **options)


def test_only_a_perceptio_without_adapters_is_adapted(processor):
    model = random_model(processor)
    with pytest.raises(ValueError, match=r"is a Linear; expected a PerceptioForConditionalGeneration"):
        lora_config(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has adapters already"):
        lora_config(PeftModel(model, lora_config(model)))


@pytest.fixture
def rooms(tmp_path) -> Path:
    """A folder of ten pictures with depth in millimetres, some of it missing."""
    folder = tmp_path / "rooms"
    folder.mkdir()
    for number in range(10):
        picture(seed=number).save(folder / f"{number}.color.jpg")
        depth = np.random.default_rng(number).integers(500, 4000, (40, 48)).astype(np.uint16)
        depth[:8] = 0
        np.save(folder / f"{number}.depth.npy", depth)
    return folder


def recipe_of(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    tasks = "tasks:\n  - {depth_folder: ., unit: mm, depths: '*.depth.npy', leave_out_every: 5, name: depth}\n"
    settings = "report_to: none\nbf16: false\nmax_steps: 2\nplot_losses: false\n"
    file.write_text(f"model_name_or_path: {folder / 'base'}\n{settings}{tasks}{text}")
    return file


def test_a_recipe_trains_adapters_and_merges_them(processor, rooms, tmp_path):
    random_model(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    file = recipe_of(tmp_path, "lora_r: 2\nlora_layers: [q_proj, v_proj]\n")
    options = ["--data_folder", str(rooms), "--lora_alpha", "8"]
    _fine_tune(file, tmp_path / "out", options, "sft")
    assert not (tmp_path / "out" / "merged").exists()
    options += ["--lora_merge", "true"]  # of a run that is finished
    _fine_tune(file, tmp_path / "out", options, "sft")
    adapter = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out" / "checkpoint")
    config = adapter.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 8)
    assert {name.split(".")[-3] for name in load_file(tmp_path / "out/checkpoint/adapter_model.safetensors")} >= {
        "q_proj",
        "v_proj",
    }
    assert_same(load(tmp_path / "out" / "merged"), adapter, processor)
    shutil.rmtree(tmp_path / "out" / "merged")  # as if the run had been stopped before it was written
    _fine_tune(file, tmp_path / "out", options, "sft")
    assert_same(load(tmp_path / "out" / "merged"), adapter, processor)
    onward = [*options, "--resume_from_checkpoint", "false", "--model_name_or_path", str(tmp_path / "out" / "merged")]
    with pytest.raises(ValueError, match="merged is to be read; name another folder"):
        _fine_tune(file, tmp_path / "out", onward, "sft")


def test_a_recipe_leaves_every_fifth_sample_out(rooms, tmp_path):
    recipe = read_recipe(recipe_of(tmp_path, "lora_r: 2\n"), ["--output_dir", "x", "--data_folder", str(rooms)])
    assert sorted(training_set(recipe.arguments)["id"]) == list("01235678")


def test_lora_settings_without_a_rank_are_a_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"has lora_alpha, lora_layers, but no lora_r"):
        read_recipe(recipe_of(tmp_path, "lora_alpha: 8\nlora_layers: [q_proj]\n"), ["--output_dir", "x"])


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL):
        exec(code, names)
    assert (tmp_path / "runs/lora/checkpoint/adapter_config.json").is_file()
    load(tmp_path / "runs/lora/merged")
