"""The lessons of the tiny training: spans and steps hold true codes, attention is taught, losses are ours."""

import re

import pytest
import torch

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.lab.lessons.batches import scene_batches
from perceptio_hf.lab.lessons.conversation_lesson import LanguageLesson, nearness_of_codes
from perceptio_hf.lab.lessons.lookup_lesson import LookupAsker
from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer
from perceptio_hf.lab.lessons.stages import fresh_model
from perceptio_hf.training.attention.loss import alignment_loss
from perceptio_hf.training.losses import LossWeights
from perceptio_hf.world import text_corpus
from perceptio_hf.world.cells import NEARNESS_LEVELS, cell_words, nearness_words


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    codec = DepthVQVAE(DepthVQVAEConfig(image_size=64, downsample=8, num_codes=16, code_dim=8, base_channels=4)).eval()
    processor = tiny_processor(tiny_tokenizer(text_corpus(50)), codec.config)
    return fresh_model(processor, codec).eval(), processor


@pytest.fixture(scope="module")
def nearness():
    return torch.arange(16) * 2


def test_alignment_against_a_loop():
    torch.manual_seed(1)
    attention = torch.rand(2, 3, 5, 7).softmax(-1).requires_grad_()
    looks = torch.rand(2, 5, 7) > 0.7
    looks[0, 2] = False
    values = [
        -attention[b, h, t][looks[b, t]].sum().log()
        for b in range(2)
        for t in range(5)
        if looks[b, t].any()
        for h in range(3)
    ]
    expected = torch.stack(values).mean()
    torch.testing.assert_close(alignment_loss(attention, looks), expected)
    ours, theirs = (
        torch.autograd.grad(f, attention, retain_graph=True)[0] for f in (alignment_loss(attention, looks), expected)
    )
    torch.testing.assert_close(ours, theirs)
    everything = torch.ones(2, 5, 7, dtype=torch.bool)
    assert alignment_loss(attention, everything).abs() < 1e-6
    nothing = alignment_loss(attention, torch.zeros(2, 5, 7, dtype=torch.bool))
    assert nothing == 0 and nothing.requires_grad
    with pytest.raises(ValueError, match="expected"):
        alignment_loss(attention, looks[:, :4])


def test_levels_of_codes_hold_equally_many_cells(parts):
    levels = nearness_of_codes(parts[0].depth_model)
    assert levels.shape == (16,) and levels.min() >= 0 and levels.max() < NEARNESS_LEVELS


def test_lookups_are_true(parts, nearness):
    model, processor = parts
    asker = LookupAsker(processor, nearness)
    codes = torch.randint(16, (3, 64), generator=torch.Generator().manual_seed(2))
    batch = asker.batch(codes, torch.Generator().manual_seed(3))
    words, concluded = processor.tokenizer, 0
    first_cell = words.convert_tokens_to_ids(cell_words(8)[0])
    first_level = words.convert_tokens_to_ids(nearness_words()[0])
    for row, ids, labels, looks in zip(batch.rows.tolist(), batch.input_ids, batch.labels, batch.looks, strict=True):
        for place, token in enumerate(ids.tolist()):
            if first_cell <= token < first_cell + 64:
                cell = token - first_cell
                level = nearness[codes[row, cell]]
                assert ids[place + 1] == labels[place + 1] == first_level + level
                key = looks[place].nonzero().item()
                assert batch.prefix_ids[row, key] == model.config.depth_token_ids[codes[row, cell]]
        text = words.decode(ids, skip_special_tokens=True)
        if ":" in text:
            concluded += 1
            steps = text.split(":")[0].split()
            near = {letter: int(level[1:]) for letter, level in zip(steps[::3], steps[2::3], strict=True)}
            assert text.split(":")[1].strip() == max(near, key=near.get)
    assert concluded > 5


def test_comparisons_are_true(parts, nearness):
    model, processor = parts
    words, to_id = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids
    asker = LookupAsker(processor, nearness)
    codes = torch.randint(16, (40, 64), generator=torch.Generator().manual_seed(2))
    batch = asker.comparisons(codes, torch.Generator().manual_seed(3))
    first_cell, masked, second = to_id(cell_words(8)[0]), 0, 0
    for row, ids, labels, looks in zip(codes, batch.input_ids.tolist(), batch.labels, batch.looks, strict=True):
        question, answer = words.decode(ids).split("<|im_start|>assistant\n")
        masked += answer.startswith("[SEG][SEG]<DEPTH_START>")
        steps, nearer = answer.split("<DEPTH_END>")[1].split("<|im_end|>")[0].split(": ")
        found = re.fullmatch(r"(.+) p(\d\d) d(\d\d) (.+) p(\d\d) d(\d\d)", steps)
        one, other = (found[1], int(found[2]), int(found[3])), (found[4], int(found[5]), int(found[6]))
        assert all(name.lower() in question.lower() for name in (one[0], other[0]))
        assert all(nearness[row[cell]] == level for _, cell, level in (one, other))
        assert nearer == max(one, other, key=lambda thing: thing[2])[0] and one[2] != other[2]
        second += other[2] > one[2]

        learnt = [token for token in labels.tolist() if token != -100]
        assert words.decode(learnt) == f"{one[0]} d{one[2]:02d} {other[0]} d{other[2]:02d}: {nearer}<|im_end|>"
        start = ids.index(model.config.depth_start_token_id)
        assert ids[start + 1 : start + 65] == [model.config.depth_token_ids[code] for code in row]
        for place, key in looks.nonzero().tolist():
            assert key == start + 1 + ids[place] - first_cell
        assert looks.sum() == 2
    assert 10 < masked < 30 and 10 < second < 30


def test_a_lesson_compares_names(parts, nearness):
    model, processor = parts
    scenes = next(scene_batches(processor, size=128, batch_size=2, first_seed=5, workers=0))
    torch.manual_seed(0)
    plain = LanguageLesson(model, processor, nearness).read(scenes)
    torch.manual_seed(0)
    both = LanguageLesson(model, processor, nearness, compare=1).read(scenes)
    assert both.loss > plain.loss and set(both.parts) - set(plain.parts) == {"compared"}


def test_lesson_fills_spans_and_steps(parts, nearness):
    model, processor = parts
    lesson = LanguageLesson(model, processor, nearness)
    scenes = next(scene_batches(processor, size=128, batch_size=2, first_seed=5, workers=0))
    codes = model.depth_model.encode(scenes.inverse_depth)
    turns = scenes.turns[0]
    filled = lesson._fill(turns.input_ids, codes[turns.rows])
    for ids, row in zip(filled.tolist(), turns.rows.tolist(), strict=True):
        start = ids.index(model.config.depth_start_token_id)
        span = [model.config.depth_token_ids.index(token) for token in ids[start + 1 : start + 65]]
        assert span == codes[row].tolist()
        for place, token in enumerate(ids[1:], 1):
            if lesson.first_level <= token < lesson.first_level + NEARNESS_LEVELS:
                cell = ids[place - 1] - lesson.first_cell
                assert token - lesson.first_level == nearness[codes[row, cell]]


def test_noise_spares_the_codes_that_an_answer_speaks_of(parts, nearness):
    model, processor = parts
    scenes = next(scene_batches(processor, size=128, batch_size=4, first_seed=5, workers=0))
    turns = scenes.turns[0]
    codes = torch.randint(16, (4, 64), generator=torch.Generator().manual_seed(0))[turns.rows]
    torch.manual_seed(2)
    lesson = LanguageLesson(model, processor, nearness, span_noise=0.5)
    filled = lesson._fill(turns.input_ids, codes)
    noisy, lost = lesson._disturbed(turns, filled), []
    for before, after in zip(filled.tolist(), noisy.tolist(), strict=True):
        start = before.index(model.config.depth_start_token_id)
        span = range(start + 1, start + 65)
        spoken = {token - lesson.first_cell for token in before if 0 <= token - lesson.first_cell < 64}
        changed = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        assert set(changed) <= set(span) and not spoken & {place - start - 1 for place in changed}
        assert {after[place] for place in span} <= {before[place] for place in span}
        lost.append(len(changed) / 64)
    assert 0.2 < sum(lost) / len(lost) < 0.6 and min(lost) < 0.3 < max(lost)
    assert LanguageLesson(model, processor, nearness)._disturbed(turns, filled) is filled


@pytest.mark.parametrize("plain", [False, True])
def test_lesson_gives_the_parts_it_names(parts, nearness, plain):
    model, processor = parts
    scenes = next(scene_batches(processor, size=128, batch_size=2, first_seed=5, workers=0))
    weights = LossWeights(reconstruction=0.5)
    read = LanguageLesson(model, processor, nearness, weights=weights, plain=plain, alignment=0.3).read(scenes)
    looking = {name: part for name, part in read.parts.items() if name.startswith("look_")}
    assert {"look_write", "look_find", "look_read", "look_segment"} <= set(looking)
    words = {name: part for name, part in read.parts.items() if name not in looking}
    assert set(words) == ({"cross_entropy"} if plain else {"text", "marker", "token", "count", "reconstruction"})
    expected = sum({"reconstruction": 0.5}.get(name, 1.0) * part for name, part in words.items())
    torch.testing.assert_close(read.loss, expected + 0.3 * torch.stack(list(looking.values())).mean())
    assert len(read.seg_states) == len(scenes.mask_rows) > 0


def test_two_groups_of_turns_weigh_as_one_batch(parts, nearness):
    """Turns with and without spans are padded apart; their losses must be those of all turns together."""
    model, processor = parts
    scenes = next(scene_batches(processor, size=128, batch_size=2, first_seed=8, workers=0))
    lesson = LanguageLesson(model, processor, nearness, plain=True, alignment=0.0)
    read, sums, count = lesson.read(scenes), 0.0, 0
    for turns in scenes.turns:
        alone = type(scenes)(**(vars(scenes) | {"turns": [turns]}))
        learnt = int((turns.labels[:, 1:] != -100).sum())
        sums, count = sums + lesson.read(alone).loss * learnt, count + learnt
    torch.testing.assert_close(read.loss, sums / count)
