"""The trainer: what it adds up, what it trains, what it logs, and what it says when something is wrong."""

import json
import logging
import math
from contextlib import nullcontext

import numpy as np
import pytest
import sft_helpers as sft
import torch
from datasets import Dataset
from helpers import cached_repository, random_model
from PIL import Image
from transformers import Trainer, TrainingArguments

from perceptio_hf import PerceptioDataCollator, PerceptioSFTConfig, PerceptioSFTTrainer
from perceptio_hf.training.lora import lora_config
from perceptio_hf.training.losses import PARTS, composite_loss
from perceptio_hf.training.losses.labels import loss_counts
from perceptio_hf.training.rewards.recipe import KINDS as REWARDED_KINDS


@pytest.fixture(scope="module")
def processor():
    return sft.processor()


@pytest.fixture
def train(processor, tmp_path):
    """Train and return the trainer; keywords are those of `sft_helpers.trainer`."""

    def run(**changes) -> PerceptioSFTTrainer:
        trainer = sft.trainer(tmp_path / "out", processor=processor, **changes)
        trainer.train()
        return trainer

    return run


def weights(trainer: PerceptioSFTTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def largest_difference(one: dict, other: dict) -> float:
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def logged_parts(trainer: PerceptioSFTTrainer, entry: int = 0) -> dict[str, float]:
    return {name: value for name, value in trainer.state.log_history[entry].items() if name in (*PARTS, "loss")}


def test_an_older_checkpoint_learns_which_tokens_marks_have(processor, tmp_path):
    model = random_model(processor)
    model.config.picture_mark_token_ids = None
    trainer = sft.trainer(tmp_path / "out", processor=processor, model=model)
    assert trainer.model.config.picture_mark_token_ids == processor.picture_mark_token_ids()
    assert trainer._vocabulary.mark_pieces


@pytest.mark.parametrize(("batch", "steps"), [(1, 8), (2, 4), (4, 2)])
def test_micro_batches_give_the_step_of_the_whole_batch(train, batch, steps):
    whole = train(per_device_train_batch_size=8)
    divided = train(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    assert largest_difference(weights(whole), weights(divided)) < 1e-6
    for entry in (0, 1):
        assert logged_parts(divided, entry) == pytest.approx(logged_parts(whole, entry), rel=1e-5)


def test_ragged_micro_batches_give_the_step_of_the_whole_batch(train):
    """Seven samples, the last micro batch holds one; a step with a micro batch less than the others."""
    rows = sft.samples(7)
    whole = train(train=rows, per_device_train_batch_size=7, max_steps=1)
    ragged = train(train=rows, per_device_train_batch_size=3, gradient_accumulation_steps=4, max_steps=1)
    assert largest_difference(weights(whole), weights(ragged)) < 1e-6
    assert logged_parts(ragged) == pytest.approx(logged_parts(whole), rel=1e-5)


def reference_parts(trainer, samples, model) -> tuple[float, dict[str, float]]:
    """The composite loss of all samples as one batch, computed without the trainer's loss."""
    batch = trainer.fill_spans(trainer.data_collator([samples[index] for index in range(len(samples))]))
    names = ("labels", "mask_targets", "depth_targets", "depth_valid", "depth_given_as_codes")
    targets = {name: batch.pop(name) for name in names}
    with torch.no_grad():
        outputs = model(**batch, use_cache=False)
        loss, parts = composite_loss(
            outputs.last_hidden_state,
            model.lm_head,
            targets["labels"],
            model.spatial_vocabulary(),
            codec=model.depth_model,
            depth=targets["depth_targets"],
            depth_valid=targets["depth_valid"],
            mask_logits=outputs.mask_logits,
            mask_targets=targets["mask_targets"],
            mask_scores=outputs.mask_scores,
            weights=trainer.args.loss_weights(),
        )
    return float(loss), {name: float(part) for name, part in parts.items()}


def test_logs_are_means_over_items_in_training_and_evaluation(train, processor):
    """Evaluation in batches of 3, 3 and 1 gives the same as one batch of 7; so does training over several steps."""
    rows = sft.samples(7)
    trainer = train(
        train=rows,
        evaluation=rows,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        max_steps=3,
        logging_steps=3,
        learning_rate=1e-12,
    )
    loss, parts = reference_parts(trainer, rows, random_model(processor))
    assert set(parts) == set(PARTS)
    metrics = trainer.evaluate()
    assert {name: metrics[f"eval_{name}"] for name in PARTS} == pytest.approx(parts, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert {name: trainer.state.log_history[0][name] for name in PARTS} == pytest.approx(parts, rel=1e-5)
    entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert entry["eval_token"] == metrics["eval_token"]


def test_several_evaluation_sets_are_logged_apart(train):
    sets = {"balls": sft.samples(4), "others": sft.samples(4, first=50)}
    trainer = train(evaluation=sets, eval_strategy="steps", eval_steps=2)
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_balls_token", "eval_others_token", "eval_balls_loss"} <= logged


def test_a_step_moves_what_is_trained_and_nothing_else(train, processor):
    before = random_model(processor).state_dict()
    trainer = train(max_steps=1)
    after = weights(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    frozen = ("mask_model.vision_encoder", "depth_model", "model.vision_tower", "mask_model.prompt_encoder")
    assert not [name for name in moved if name.startswith(frozen)]
    for part in ("model.language_model.layers.1", "model.multi_modal_projector", "seg_projector", "lm_head"):
        assert any(name.startswith(part) for name in moved), part
    # Three of SAM2's four mask tokens are not asked for; everything else that is trained has moved.
    still = {name for name in trained - moved if ".output_hypernetworks_mlps." not in name}
    assert not {name for name in still if trainer.model.get_parameter(name).abs().sum() > 0}


@pytest.mark.parametrize(
    ("option", "part", "moves"),
    [
        ({"freeze_vision_tower": False}, "model.vision_tower", True),
        ({"freeze_mask_decoder": True}, "mask_model.mask_decoder", False),
        ({"freeze_projector": True}, "model.multi_modal_projector", False),
        ({"freeze_language_model": True}, "model.language_model", False),
    ],
)
def test_freezing(train, processor, option, part, moves):
    before = random_model(processor).state_dict()
    after = weights(train(max_steps=1, **option))
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part)) == moves


def test_spans_are_filled_with_the_codec(processor, tmp_path):
    trainer = sft.trainer(tmp_path, processor=processor)
    batch = trainer.data_collator([sft.sample(number) for number in (1, 2, 3, 5)])
    filled, codec = trainer.fill_spans(batch), trainer.model.depth_model
    words = trainer.model.spatial_vocabulary()
    is_code = torch.isin(filled["labels"], torch.tensor(words.codes))
    codes = filled["labels"][is_code].view(3, -1) - words.codes[0]
    given = batch["depth_given_as_codes"]
    assert given.tolist() == [False, True, False]
    assert torch.equal(codes[~given], codec.encode(batch["depth_targets"][~given], batch["depth_valid"][~given]))
    assert codes[1].tolist() == sft.sample(2)["depth_codes"]
    assert torch.allclose(filled["depth_targets"][given], codec.decode(codes[given]))
    assert filled["depth_valid"][given].all() and not batch["depth_valid"][given].any()
    assert torch.equal(filled["input_ids"][is_code], filled["labels"][is_code])
    assert loss_counts(batch["labels"], words).codes == loss_counts(filled["labels"], words).codes


def test_gradient_checkpointing_changes_nothing(train):
    plain, checkpointed = train(), train(gradient_checkpointing=True)
    assert largest_difference(weights(plain), weights(checkpointed)) < 1e-6
    assert logged_parts(checkpointed, 1) == pytest.approx(logged_parts(plain, 1), rel=1e-5)


def test_mixed_precision_is_close(train):
    plain, mixed = train(max_steps=1), train(max_steps=1, bf16=True)
    assert logged_parts(mixed) == pytest.approx(logged_parts(plain), rel=0.03)
    assert logged_parts(mixed) != pytest.approx(logged_parts(plain), rel=1e-5)  # it was mixed
    assert all(parameter.dtype == torch.float32 for parameter in mixed.model.parameters())


def knows_bfloat16(monkeypatch, known: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": known})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.mark.parametrize("known", [True, False])
def test_bfloat16_is_the_default_where_the_processor_has_it(tmp_path, monkeypatch, known):
    knows_bfloat16(monkeypatch, known)
    for settings in (PerceptioSFTConfig, *(kind for kind, _ in REWARDED_KINDS.values())):
        options = {"report_to": "none", "use_cpu": True}
        assert settings(str(tmp_path), **options).bf16 is known
        assert settings(str(tmp_path), bf16=not known, **options).bf16 is not known  # what is said counts
        assert not settings(str(tmp_path), fp16=True, **options).bf16


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("launched", ["bf16", "fp16", "no"])
def test_what_a_recipe_says_of_precision_counts_whatever_launched_it(tmp_path, monkeypatch, known, launched):
    knows_bfloat16(monkeypatch, known)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    for kind in (PerceptioSFTConfig, *(kind for kind, _ in REWARDED_KINDS.values())):
        options = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
        silent, full, half = kind(**options), kind(**options, bf16=False), kind(**options, bf16=True)
        assert silent.mixed_precision == (launched if launched != "no" else "bf16" if known else "no")
        assert (silent.bf16, silent.fp16) == (silent.mixed_precision == "bf16", silent.mixed_precision == "fp16")
        assert (full.mixed_precision, full.bf16, half.mixed_precision, half.bf16) == ("no", False, "bf16", True)


@pytest.mark.parametrize(("known", "asked", "said"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_bfloat16_that_is_asked_for_and_slow_is_spoken_of(processor, tmp_path, monkeypatch, caplog, known, asked, said):
    knows_bfloat16(monkeypatch, known)
    trainer = sft.trainer(tmp_path / "out", processor=processor, bf16=asked)
    assert trainer.args.bf16 is asked
    assert sum("does not multiply bfloat16" in record.getMessage() for record in caplog.records) == said


def test_a_batch_without_pictures_masks_or_depth_trains(train):
    rows = [sft.sample(3) | {"images": [], "depth": None, "masks": []} for _ in range(2)]
    columns = sft.samples(4).features
    few = Dataset.from_list(rows, features=columns)
    trainer = train(train=few, per_device_train_batch_size=2, max_steps=1, freeze_vision_tower=False)
    assert set(logged_parts(trainer)) == {"loss", "text", "count"}
    learning = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    for by_deepspeed in (False, True):  # ZeRO-1 and ZeRO-2 leave each process all weights, as DDP does
        trainer.is_deepspeed_enabled = by_deepspeed
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)).backward()
        assert not [name for name, value in learning.items() if value.grad is None]  # each of them is waited for


def test_what_a_stream_has_left_at_its_end_is_no_part_of_the_next_step(train):
    """Of five samples the last one is half a step; a stream that holds less than a step trains nothing."""
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    five, four = (train(train=sft.samples(count).to_iterable_dataset(), **half) for count in (5, 4))
    assert five.state.global_step == 3 and largest_difference(weights(five), weights(four)) == 0
    with pytest.raises(ValueError, match="fewer samples than one step takes"):
        train(train=sft.samples(2).to_iterable_dataset(), **half)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("seg_projector.linear_in", ("mask_bce", "mask_dice")),
        ("depth_model.depth_decoder", ("reconstruction",)),
        ("model.language_model.layers.0", ("text", "token", "mask_bce")),
    ],
)
def test_nan_stops_before_the_step_and_names_it(processor, tmp_path, broken, named):
    model = random_model(processor)
    parameters = [p for name, p in model.named_parameters() if name.startswith(broken)]
    with torch.no_grad():
        parameters[0].view(-1)[0] = math.nan
    trainer = sft.trainer(tmp_path, processor=processor, model=model, gradient_accumulation_steps=2)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"Step 1: the loss is nan") as error:
        trainer.train()
    wrong = str(error.value).partition("(finite")[0]
    assert all(f"{name} is nan" in wrong for name in named)
    assert ("text is nan" in wrong) == ("text" in named)
    after = weights(trainer)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


@pytest.mark.parametrize(
    ("clip", "factor", "norm"), [(1.0, math.inf, "(nan|inf)"), (0.0, math.nan, "nan")], ids=["clipped", "not clipped"]
)
def test_a_gradient_that_is_not_finite_stops_before_the_step(processor, tmp_path, clip, factor, norm):
    trainer = sft.trainer(tmp_path, processor=processor, max_grad_norm=clip)
    before = weights(trainer)
    trainer.model.seg_projector.linear_out.weight.register_hook(lambda gradient: gradient * factor)
    with pytest.raises(ValueError, match=rf"Step 1: the loss is finite, but the norm of its gradient is {norm}"):
        trainer.train()
    assert largest_difference(before, weights(trainer)) == 0


def test_labels_of_metrics_hold_the_codes(processor, tmp_path):
    """Of a sample with a depth map the collator's labels only tell where its codes will stand."""
    seen = []
    trainer = PerceptioSFTTrainer(
        random_model(processor),
        sft.settings(tmp_path, per_device_eval_batch_size=4),
        train_dataset=sft.samples(4),
        eval_dataset=sft.samples(4),
        processing_class=processor,
        compute_metrics=lambda prediction: seen.append(prediction.label_ids) or {},
    )
    trainer.evaluate()
    filled = trainer.fill_spans(trainer.data_collator([sft.sample(number) for number in range(4)]))["labels"]
    assert torch.equal(torch.from_numpy(seen[0]), filled)
    assert torch.equal(torch.from_numpy(trainer.predict(sft.samples(4)).label_ids), filled)


def test_columns_of_a_sample_are_used(processor, tmp_path):
    """`remove_unused_columns` may be set; TRL's own idea of what is used has no masks and no depth."""
    trainer = sft.trainer(tmp_path, processor=processor, remove_unused_columns=True, max_steps=1)
    trainer.train()
    assert {"token", "mask_dice"} <= set(trainer.state.log_history[0])


def test_other_trainers_do_not_learn_placeholders(processor, tmp_path):
    model, collator = random_model(processor), PerceptioDataCollator(processor, depth_image_size=32)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, remove_unused_columns=False, use_cpu=True, report_to="none"
    )
    with pytest.raises(ValueError, match="train it with PerceptioSFTTrainer"):
        Trainer(model, arguments, data_collator=collator, train_dataset=sft.samples(8)).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_mask_decoder": True}, "freeze_mask_decoder is true, but with these adapters the mask decoder learns"),
        ({"freeze_vision_tower": False}, "freeze_vision_tower is false, but .* the vision tower does not learn"),
        ({"freeze_language_model": True}, "freeze_language_model is true, but .* the language model learns"),
        ({"freeze_vision_tower": True, "freeze_projector": True}, None),
    ],
)
def test_adapters_and_freezes_say_the_same(processor, tmp_path, changes, message):
    model = random_model(processor)
    values = {"train_dataset": sft.samples(4), "processing_class": processor, "peft_config": lora_config(model, r=2)}
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        PerceptioSFTTrainer(model, sft.settings(tmp_path, **changes), **values)


def test_skipped_samples_are_counted(train, tmp_path, caplog):
    picture = tmp_path / "broken.png"
    picture.write_bytes(b"no picture")
    rows = [sft.sample(number) for number in range(8)]
    bad = [sft.sample(0) | {"masks": []}, sft.sample(3) | {"images": [str(picture)]}]
    rows = [row | {"images": [_saved(row["images"][0], tmp_path / f"{n}.png")]} for n, row in enumerate(rows)] + [
        row if isinstance(row["images"][0], str) else row | {"images": [_saved(row["images"][0], tmp_path / "x.png")]}
        for row in bad
    ]
    trainer = train(train=Dataset.from_list(rows), per_device_train_batch_size=5, on_error="skip")
    assert trainer.skipped_samples == {"masks": 1, "picture": 1}
    assert "2 samples could not be used" in caplog.text


def test_a_run_that_learnt_from_nothing_has_not_finished(processor, tmp_path):
    bad = Dataset.from_list([row | {"masks": []} for row in map(sft.sample, (0, 4, 8, 12))])
    trainer = sft.trainer(tmp_path, processor=processor, train=bad, on_error="skip", per_device_train_batch_size=2)
    with pytest.raises(
        ValueError, match=r"Every sample was left out \(\d+ because of their masks\), so nothing was learnt"
    ):
        trainer.train()
    trainer = sft.trainer(tmp_path, processor=processor, evaluation=bad, on_error="skip", per_device_eval_batch_size=2)
    with pytest.raises(ValueError, match="Every sample of the evaluation set was left out"):
        trainer.evaluate()


def test_a_damaged_depth_file_is_one_sample_s_error(processor, tmp_path, train):
    """Bits that turn, and a header that claims more than there is."""
    files, rows = [tmp_path / f"{number}.npz" for number in range(5)], []
    for number, file in enumerate(files):
        np.savez_compressed(file, np.random.default_rng(number).random((40, 48)) + 1)
        rows.append(sft.sample(1) | {"id": file.name, "depth": str(file)})
    for file, place in zip(files, (30, 3000, 8000), strict=False):
        data = bytearray(file.read_bytes())
        data[place] ^= 8
        file.write_bytes(data)
    files[3] = tmp_path / "3.npy"
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + "\n"
    files[3].write_bytes(b"\x93NUMPY\x01\x00v\x00" + header.encode() + bytes(8000))
    rows[3]["depth"] = str(files[3])
    rows = [row | {"images": [_saved(row["images"][0], tmp_path / f"{row['id']}.png")]} for row in rows]
    trainer = train(train=Dataset.from_list(rows), per_device_train_batch_size=5, on_error="skip")
    assert trainer.skipped_samples["depth"] % 4 == 0 and set(trainer.skipped_samples) == {"depth"}


def _saved(picture: Image.Image, path) -> str:
    picture.save(path)
    return str(path)


def test_a_bad_sample_stops_by_default_and_is_named(processor, tmp_path):
    rows = Dataset.from_list([sft.sample(number) for number in range(7)] + [sft.sample(8) | {"masks": []}])
    with pytest.raises(ValueError, match=r"Sample '8'.*\[SEG\]"):
        sft.trainer(tmp_path, processor=processor, train=rows).train()


def test_losses_are_drawn(train, tmp_path):
    train(evaluation=sft.samples(4), eval_strategy="steps", eval_steps=1, plot_losses=True)
    with Image.open(tmp_path / "out" / "losses.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_losses_are_not_drawn_on_request(train, tmp_path):
    train(plot_losses=False, max_steps=1)
    assert not (tmp_path / "out" / "losses.png").exists()


def test_model_and_processor_from_a_path(tmp_path, processor):
    folder = tmp_path / "model"
    random_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    args = sft.settings(tmp_path / "out", max_steps=1, model_init_kwargs={"dtype": "float32"})
    trainer = PerceptioSFTTrainer(str(folder), args, train_dataset=sft.samples(8))
    trainer.train()
    assert args.model_init_kwargs == {"dtype": "float32"}
    assert trainer.processing_class.num_depth_tokens == processor.num_depth_tokens


def test_the_processor_is_of_the_revision_that_the_model_is_of(tmp_path, processor):
    """On the Hub `main` holds nothing but a start."""
    random_model(processor).save_pretrained(tmp_path / "model")
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    processor.save_pretrained(tmp_path / "model")
    cache = cached_repository(tmp_path / "cache", "me/two", {"main": tmp_path / "main", "v2": tmp_path / "model"})
    place = {"revision": "v2", "cache_dir": str(cache)}
    args = sft.settings(tmp_path / "out", model_init_kwargs=place)
    trainer = PerceptioSFTTrainer("me/two", args, train_dataset=sft.samples(4))
    assert trainer.processing_class.num_depth_tokens == processor.num_depth_tokens


@pytest.mark.parametrize("tie", [True, False])
def test_peft_adapters_train(processor, tmp_path, tie):
    """Language layers by LoRA, the rows of the spatial tokens, and whole copies of projector and mask decoder."""
    from peft import LoraConfig

    model = random_model(processor, tie=tie)
    words = model.spatial_vocabulary()
    rows = [words.seg, words.depth_start, words.depth_end, *words.codes]
    adapter = LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj",
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows},
        modules_to_save=["seg_projector", "mask_decoder"],
    )
    args = sft.settings(tmp_path, max_steps=1, gradient_checkpointing=True)
    trainer = PerceptioSFTTrainer(
        model, args, train_dataset=sft.samples(8), processing_class=processor, peft_config=adapter
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    for part in ("lora_A", "lora_B", "trainable_tokens", "seg_projector.modules_to_save", "mask_decoder.modules_to"):
        assert any(part in name for name in moved), part
    assert all("lora" in name or "trainable_tokens" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_weight": -1.0}, "text_weight is -1.0"),
        ({"gradient_weight": math.inf}, "gradient_weight is inf"),
        ({"merge_temperature": 0.0}, "merge_temperature"),
        ({f"{part}_weight": 0.0 for part in PARTS}, "all weights of the loss are 0"),
        ({"max_steps": 0}, "trains nothing: max_steps is 0"),
        ({"max_steps": -1, "num_train_epochs": 0}, "trains nothing"),
        ({"on_error": "ignore"}, "choose one of raise, skip"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant, which loses gradients"),
        ({"packing": True}, "packing is True, which is not for this trainer"),
        ({"loss_type": "dft"}, "loss_type is 'dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"push_to_hub": True}, r"uploads nothing.*`perceptio push OUT/checkpoint"),
        ({"push_to_hub": True, "hub_strategy": "end"}, "perceptio push OUT/checkpoint"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sft.settings(tmp_path, **changes)


def test_settings_survive_a_round_trip(tmp_path):
    args = sft.settings(tmp_path, count_weight=0.25)
    again = type(args)(**{key: value for key, value in args.to_dict().items() if key in {"output_dir", "count_weight"}})
    assert again.loss_weights().count == 0.25 == args.loss_weights().count
    assert json.loads(args.to_json_string())["count_weight"] == 0.25


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"text": "a"}], "needs `messages`"),
    ],
)
def test_data_sets_without_what_is_needed(processor, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        sft.trainer(tmp_path, processor=processor, train=Dataset.from_list(rows))


def test_a_list_is_no_data_set(processor, tmp_path):
    with pytest.raises(ValueError, match="training set is a list"):
        sft.trainer(tmp_path, processor=processor, train=[sft.sample(0)])


def test_nothing_to_train(processor, tmp_path):
    from peft import LoraConfig, get_peft_model

    frozen = get_peft_model(random_model(processor), LoraConfig(target_modules=["q_proj"])).requires_grad_(False)
    with pytest.raises(ValueError, match="trains nothing"):
        sft.trainer(tmp_path, processor=processor, model=frozen)


def test_other_settings_are_refused(processor, tmp_path):
    from trl import SFTConfig

    with pytest.raises(ValueError, match="expected PerceptioSFTConfig"):
        PerceptioSFTTrainer(
            random_model(processor), SFTConfig(str(tmp_path), use_cpu=True), train_dataset=sft.samples(4)
        )


@pytest.mark.parametrize(("variable", "sent"), [(None, 0), ("1", 0), ("0", 1), ("false", 1)])
def test_a_training_tells_nobody_unless_the_user_says_so(tmp_path, monkeypatch, processor, variable, sent):
    """TRL sends telemetry when a trainer is made, the Hub's client asks for a list of agents on the way."""
    told = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: told.append(what))
    monkeypatch.delenv("CI", raising=False)
    if variable is None:
        monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    else:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", variable)
    sft.trainer(tmp_path, processor=processor)
    assert len(told) == sent


def test_bitsandbytes_is_silent_about_a_kernel_that_nobody_asked_for(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("Something else: %s.", "x")
    assert [record.message for record in caplog.records] == ["Something else: x."]


def test_disturbed_spans_keep_their_targets_and_their_form(tmp_path, monkeypatch):
    run = sft.trainer(tmp_path, span_noise=0.25)
    batch = run.fill_spans(run.data_collator([sft.sample(1), sft.sample(2)] * 40))
    kept = batch["input_ids"].clone()
    torch.manual_seed(0)
    disturbed = run.disturb_spans(batch["input_ids"], batch["labels"])
    words = run._vocabulary
    is_code = torch.isin(batch["labels"], torch.tensor(words.codes))
    assert torch.equal(batch["input_ids"], kept) and torch.equal(disturbed[~is_code], kept[~is_code])
    before, after = (ids[is_code].view(-1, words.num_depth_tokens) for ids in (kept, disturbed))
    assert all(set(new) <= set(old) for new, old in zip(after.tolist(), before.tolist(), strict=True))
    shares = (before != after).float().mean(1)
    assert 0.15 < shares.mean() <= 0.25 and shares.max() <= 0.75 and shares.min() < 0.1  # some draw the code they had
    torch.manual_seed(0)
    assert torch.equal(run.disturb_spans(batch["input_ids"], batch["labels"]), disturbed)
    monkeypatch.setattr(type(run.accelerator), "process_index", 1)
    torch.manual_seed(0)  # as all processes are seeded
    assert not torch.equal(run.disturb_spans(batch["input_ids"], batch["labels"]), disturbed)


def test_spans_are_disturbed_in_training_only(tmp_path):
    plain, noisy = (sft.trainer(tmp_path / str(noise), span_noise=noise) for noise in (0.0, 0.5))
    noisy.model.load_state_dict(plain.model.state_dict())
    batch = [sft.sample(number) for number in (1, 2, 5, 6)]
    losses = {}
    for name, run in (("plain", plain), ("noisy", noisy)):
        for mode in (True, False):
            run.model.train(mode)
            losses[name, mode] = run.compute_loss(run.model, run.data_collator(batch)).item()
    assert losses["noisy", False] == pytest.approx(losses["plain", False])
    assert losses["noisy", True] != pytest.approx(losses["plain", True])
    with pytest.raises(ValueError, match=r"span_noise is 0\.7"):
        sft.settings(tmp_path, span_noise=0.7)
