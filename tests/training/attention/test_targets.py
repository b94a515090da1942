"""Teaching any model where to look: the places are the right ones, and the trainer learns from them."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import random_model
from sft_helpers import processor as make_processor
from sft_helpers import samples, settings, trainer
from trl import SFTConfig

from perceptio_hf.training.attention.loss import SEGMENT, WRITE
from perceptio_hf.training.attention.targets import places_to_look
from perceptio_hf.training.collator import PerceptioDataCollator


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def batch(processor):
    return PerceptioDataCollator(processor, depth_image_size=32)(list(samples(4)))


def looks_of(batch, processor):
    words = random_model(processor).spatial_vocabulary()
    length = processor.image_seq_length
    return words, places_to_look(
        batch["input_ids"], batch["labels"], words, batch["mask_targets"], image_seq_length=length
    )


def test_codes_look_at_their_place_and_seg_at_its_object(batch, processor):
    words, looks = looks_of(batch, processor)
    side = int(processor.image_seq_length**0.5)
    grid = int(words.num_depth_tokens**0.5)
    mask = 0
    for ids, told in zip(batch["input_ids"].tolist(), looks, strict=True):
        first = ids.index(words.image)
        for place, token in enumerate(ids):
            seen = told[place, first : first + side * side].view(side, side)
            assert told[place].sum() == seen.sum()  # nobody is told to look outside of the picture
            if token == words.seg:
                expected = batch["mask_targets"][mask].numpy()
                rows, columns = np.nonzero(seen.numpy())
                scale = expected.shape[0] / side
                centers = expected[((rows + 0.5) * scale).astype(int), ((columns + 0.5) * scale).astype(int)]
                assert set(seen.unique().tolist()) == {0, SEGMENT} and centers.mean() > 0.5
                mask += 1
            elif words.depth_start in ids and 0 <= place - ids.index(words.depth_start) < grid * grid:
                row, column = divmod(place - ids.index(words.depth_start), grid)
                rows, columns = np.nonzero(seen.numpy())
                assert set(seen.unique().tolist()) == {0, WRITE}
                # Every place is within the cell, whose corners are row / grid and (row + 1) / grid.
                assert rows.min() / side <= row / grid < (rows.min() + 1) / side
                assert columns.max() / side < (column + 1) / grid <= (columns.max() + 1) / side + 1e-9
            else:
                assert not seen.any()
    assert mask == len(batch["mask_targets"]) > 0


def test_what_is_not_learnt_is_left_alone(batch, processor):
    silent = dict(batch, labels=torch.full_like(batch["labels"], -100), mask_targets=batch["mask_targets"][:0])
    assert not looks_of(silent, processor)[1].any()


def test_the_trainer_learns_where_to_look_and_logs_it(tmp_path, processor):
    def parts(look_weight: float) -> dict[str, float]:
        torch.manual_seed(0)
        model = random_model(processor)
        model.set_attn_implementation("eager")
        run = trainer(
            tmp_path, processor=processor, model=model, look_weight=look_weight, max_steps=6, learning_rate=0.3
        )
        run.train()
        return [log for log in run.state.log_history if "look_write" in log or "text" in log]

    taught = parts(1.0)
    assert taught[-1]["look_write"] < taught[0]["look_write"]
    assert taught[-1]["look_segment"] < taught[0]["look_segment"]
    assert "look_write" not in parts(0.0)[0]


def test_evaluation_counts_what_training_counts(tmp_path, processor):
    model = random_model(processor)
    model.set_attn_implementation("eager")
    run = trainer(tmp_path, processor=processor, model=model, look_weight=2.0, evaluation=samples(4), text_weight=1.5)
    metrics = run.evaluate()
    weights = vars(run.args.loss_weights()) | {"look_write": 2.0, "look_segment": 2.0}
    parts = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    expected = sum(weight * parts[name] for name, weight in weights.items() if name in parts)
    assert metrics["eval_loss"] == pytest.approx(expected) and metrics["eval_look_write"] > 0


def test_micro_batches_weigh_as_one(tmp_path, processor):
    weights = []
    for size, accumulated in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = random_model(processor)
        model.set_attn_implementation("eager")
        run = trainer(
            tmp_path / str(size),
            processor=processor,
            model=model,
            look_weight=1.0,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        )
        run.train()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"look_weight": -1.0}, "look_weight is -1.0"),
        ({"look_weight": 1.0, "look_heads": 0}, "look_heads is 0"),
        ({"look_weight": 1.0, "gradient_checkpointing": True}, "gradient_checkpointing: false"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    "name", sorted({"gradient_checkpointing", "activation_checkpointing"} & {field.name for field in fields(SFTConfig)})
)
def test_checkpointing_by_either_of_its_names(tmp_path, name):
    both_off = {"look_weight": 1.0, "gradient_checkpointing": False, name: False}
    assert not settings(tmp_path, **both_off).gradient_checkpointing
    with pytest.raises(ValueError, match="gradient_checkpointing: false"):
        settings(tmp_path, **both_off | {name: True})


def test_models_that_cannot_be_taught(tmp_path, processor):
    model = random_model(processor)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        trainer(tmp_path, processor=processor, model=model, look_weight=1.0)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="look_layer is 9"):
        trainer(tmp_path, processor=processor, model=model, look_weight=1.0, look_layer=9)
