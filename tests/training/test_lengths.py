"""Batches by length: little padding, an order that follows from seed and epoch, and a training that goes on in it."""

import pytest
import sft_helpers as sft
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from helpers import assert_trained_alike, picture
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer

from perceptio_hf.data.rows import dataset_of
from perceptio_hf.training.lengths import LengthSampler, sample_lengths

BY_LENGTH = {"train_sampling_strategy": "group_by_length"}


@pytest.fixture(scope="module")
def processor():
    return sft.processor()


def padding(order: list[int], lengths: list[int], batch: int) -> float:
    groups = [[lengths[index] for index in order[start : start + batch]] for start in range(0, len(order), batch)]
    return 1 - sum(map(sum, groups)) / sum(max(group) * len(group) for group in groups)


def test_an_epoch_holds_every_sample_once_and_little_padding():
    lengths = torch.randint(20, 2000, (5003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthSampler(lengths, 8, processes=2, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(5003)) and len(sampler) == 5003
    assert padding(order, lengths, 8) < 0.02 < 0.4 < padding(list(range(5003)), lengths, 8)
    groups = [order[start : start + 16] for start in range(0, 5000, 16)]
    means = torch.tensor([sum(lengths[index] for index in group) / 16 for group in groups[:-1]])
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(len(means)) * 1.0]))[0, 1]) < 0.2  # long ones not first


def test_the_order_follows_from_seed_and_epoch():
    sampler, again = (LengthSampler(list(range(100)), 4, seed=1) for _ in range(2))
    first = list(sampler)
    torch.manual_seed(5)
    assert list(again) == first != list(LengthSampler(list(range(100)), 4, seed=2))
    again.set_epoch(1)
    assert list(again) != first
    again.set_epoch(0)
    assert list(again) == first


def test_lengths_follow_the_tokens_of_the_collator(processor):
    """Words, spans (given as codes in the text, or to be filled in) and tiles; no picture is decoded for it."""
    span = "<DEPTH_START><DEPTH_END>"
    codes = "<DEPTH_START>" + "".join(f"<DEPTH_{code}>" for code in range(sft.GRID)) + "<DEPTH_END>"
    answers = [("Here " * 40, []), (span, [list(range(sft.GRID))]), (codes, []), ("Here", [])]
    chats = [
        {
            "images": [picture(*size)],
            "messages": [{"role": "user", "content": "<image>\nWhere?"}, {"role": "assistant", "content": answer}],
            "depth_codes": given,
        }
        for (answer, given), size in zip(answers, [(40, 40), (40, 40), (40, 40), (300, 100)], strict=True)
    ]
    rows = dataset_of(chats)
    long, filled, written, wide = sample_lengths(rows, processor, {"crop_to_patches": True, "max_patches": 4})
    assert abs(filled - written) <= 2 and filled - (wide - 4 * processor.image_seq_length - 2) >= sft.GRID
    assert wide > long > filled > sft.GRID
    one_tile = sample_lengths(rows, processor, {"crop_to_patches": False})
    assert one_tile[3] < written and one_tile[:3] == sample_lengths(rows, processor, {"crop_to_patches": False})[:3]


def test_a_training_goes_on_in_the_middle_of_an_epoch(processor, tmp_path):
    options = {**BY_LENGTH, "per_device_train_batch_size": 4, "max_steps": 7, "save_strategy": "steps", "save_steps": 6}
    whole = sft.trainer(tmp_path / "whole", processor=processor, **options)
    seen = []
    collate = whole.data_collator
    whole.data_collator = lambda rows: (seen.append([row["id"] for row in rows]), collate(rows))[1]
    whole.data_collator.processor, whole.data_collator.image_options = collate.processor, collate.image_options
    whole.train()
    epoch = [name for batch in seen[:4] for name in batch]
    assert sorted(epoch) == sorted(map(str, range(16))) and seen[:3] != seen[4:7]
    resumed = sft.trainer(tmp_path / "resumed", processor=processor, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_trained_alike(resumed.model.state_dict(), whole.model.state_dict())


def test_a_picture_of_several_samples_is_opened_once(processor, tmp_path, monkeypatch):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, ((40, 40), (300, 100)), strict=True):
        picture(*size).save(path)
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here"}]
    rows = dataset_of([{"images": [path], "messages": chat} for path in (*paths, *paths)])
    opened = []
    monkeypatch.setattr(Image, "open", lambda source, real=Image.open: opened.append(source) or real(source))
    narrow, wide, *again = sample_lengths(rows, processor, {"crop_to_patches": True, "max_patches": 4})
    assert again == [narrow, wide] and wide > narrow and opened == [str(path) for path in paths]


def test_an_evaluation_needs_no_lengths(processor, tmp_path):
    few = sft.samples(4, first=100)
    trainers = [sft.trainer(tmp_path, processor=processor, evaluation=few, **more) for more in (BY_LENGTH, {})]
    assert trainers[0].evaluate()["eval_loss"] == pytest.approx(trainers[1].evaluate()["eval_loss"])


def test_several_processes_go_on_in_the_middle_of_a_later_epoch(processor, tmp_path, monkeypatch):
    """What accelerate and transformers do to the loader of one of two processes, without the training."""
    seen = []

    def _run_epoch(self, model, epoch, train_dataloader):
        train_dataloader.set_epoch(epoch)
        seen.append(list(train_dataloader))

    monkeypatch.setattr(Trainer, "_run_epoch", _run_epoch)
    for skipped in (0, 2):
        trainer = sft.trainer(tmp_path, processor=processor, **BY_LENGTH, per_device_train_batch_size=2)
        trainer.state.max_steps = 8
        rows = DataLoader(range(16), 2, sampler=trainer._get_train_sampler(), collate_fn=list)
        loader = prepare_data_loader(rows, num_processes=2, process_index=1, put_on_device=False)
        trainer._run_epoch(None, 1, train_dataloader=skip_first_batches(loader, skipped) if skipped else loader)
    assert len(seen[0]) == 4 and seen[1] == seen[0][2:]


def test_a_stream_cannot_be_sorted(processor, tmp_path):
    with pytest.raises(ValueError, match="group_by_length, but a task of the training set is a stream"):
        sft.trainer(tmp_path, processor=processor, train=sft.samples(4).to_iterable_dataset(), **BY_LENGTH)
