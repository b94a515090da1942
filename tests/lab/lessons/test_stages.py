"""The tiny training: its sequences are ordinary conversations, its stages learn, and a stopped run goes on."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModel, DynamicCache

from perceptio_hf import DepthVQVAE, PerceptioForConditionalGeneration
from perceptio_hf.lab.lessons.answers import AnswerForm, Marks, cell_of_object, cells_of_objects
from perceptio_hf.lab.lessons.batches import SceneAsker, collate, instance_of_cells, scene_batches
from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer
from perceptio_hf.lab.lessons.stages import STAGES, TinyRecipe, fresh_model, schedule, train_tiny
from perceptio_hf.modeling.modeling_perceptio import CACHE
from perceptio_hf.training.attention.loss import FIND, FIND_OBJECT
from perceptio_hf.world import render_scene, text_corpus
from perceptio_hf.world.cells import cell_at

CODEC = {"image_size": 64, "downsample": 8, "num_codes": 16, "code_dim": 8, "base_channels": 4}


@pytest.fixture(scope="module")
def codec():
    from perceptio_hf import DepthVQVAEConfig

    return DepthVQVAE(DepthVQVAEConfig(**CODEC)).eval()


@pytest.fixture(scope="module")
def scene_processor(codec):
    return tiny_processor(tiny_tokenizer(text_corpus(50)), codec.config)


@pytest.fixture(scope="module")
def fresh(scene_processor, codec) -> PerceptioForConditionalGeneration:
    torch.manual_seed(0)
    return fresh_model(scene_processor, codec).eval()


def test_a_turn_behind_its_prefix_equals_a_conversation(fresh, scene_processor):
    """Same states as the chat template's text in one row, which is what users will ask."""
    asker = SceneAsker(scene_processor, 128)
    scenes = [asker.scene(seed) for seed in (1, 2)]
    batch = collate(scenes, asker)
    prefix = DynamicCache()
    fresh.model(input_ids=batch.prefix_ids, pixel_values=batch.pixel_values, **{CACHE: prefix})
    turns = batch.turns[1]
    cache = DynamicCache([(layer.keys[turns.rows], layer.values[turns.rows]) for layer in prefix.layers])
    states = fresh.model(input_ids=turns.input_ids, **{CACHE: cache}).last_hidden_state
    number = 0
    for scene in scenes:
        for asked, answer, response in scene.turns:
            if response.depth:
                continue
            question = [
                {"type": "image", "image": scene.image},
                {"type": "text", "text": response.question},
            ]
            text = "[SEG]" * len(response.masks) + response.words
            inputs = scene_processor.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": text}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            count = len(asked) + len(answer)
            assert inputs.input_ids[0, len(asker.prefix) :][:count].tolist() == asked + answer
            with torch.no_grad():
                alone = fresh.model(input_ids=inputs.input_ids, pixel_values=inputs.pixel_values).last_hidden_state
            torch.testing.assert_close(
                states[number, :count], alone[0, len(asker.prefix) :][:count], atol=2e-2, rtol=2e-2
            )
            number += 1
    assert number == len(turns.rows)


def test_the_pixels_are_the_processor_s(scene_processor):
    asker = SceneAsker(scene_processor, 128)
    scene = asker.scene(3)
    batch = collate([scene], asker)
    inputs = scene_processor(images=[scene.image], text="<IMG_CONTEXT>", return_tensors="pt")
    torch.testing.assert_close(batch.pixel_values, inputs.pixel_values, atol=2e-2, rtol=0)
    torch.testing.assert_close(batch.mask_pixel_values, inputs.mask_pixel_values)


def test_targets_belong_to_their_scene(scene_processor):
    batch = next(scene_batches(scene_processor, size=128, batch_size=3, first_seed=5, workers=0))
    targets = batch.mask_targets((48, 48))
    for row, instance, target in zip(batch.mask_rows.tolist(), batch.mask_instances.tolist(), targets, strict=True):
        mask = render_scene(5 + row).instances == instance
        assert abs(target.mean().item() - mask.mean()) < 1e-3
    for turns in batch.turns:
        answered = turns.labels != -100
        assert torch.equal(turns.labels[answered], turns.input_ids[answered])
        assert (turns.labels == scene_processor.seg_token_id).sum() == len(turns.mask_rows)


def test_processes_share_scenes_without_overlap(scene_processor):
    def images(rank: int, processes: int, batch_size: int, steps: int) -> list[torch.Tensor]:
        options = {"rank": rank, "processes": processes, "batch_size": batch_size}
        stream = scene_batches(scene_processor, size=64, first_seed=9, workers=0, **options)
        return [next(stream).instances for _ in range(steps)]

    one = torch.cat(images(0, 1, 4, 2))
    first, second = images(0, 2, 2, 2), images(1, 2, 2, 2)
    assert torch.equal(one, torch.cat([first[0], second[0], first[1], second[1]]))


def test_answers_take_the_form_asked_for(scene_processor):
    forms = {
        "full": AnswerForm(),
        "words": AnswerForm(masks=False, depth=False),
        "answers": AnswerForm(masks=False, depth=False, steps=False),
        "masks": AnswerForm(depth=False, steps=False, words=False),
    }
    for name, form in forms.items():
        asker = SceneAsker(scene_processor, 128, form)
        responses = [turn[2] for seed in range(12) for turn in asker.scene(seed).turns]
        kinds = {response.kind for response in responses}
        assert any(response.depth for response in responses) == form.depth
        assert any(response.masks for response in responses) == form.masks
        assert ({"closest_point", "count", "attribute"} <= kinds) == form.words
        assert any(re.search(r"\bp\d\d\b", response.words) for response in responses) == form.steps
        assert any(" d00" in response.words for response in responses) == form.depth, name


def test_tokens_are_told_to_look_where_their_answer_is(scene_processor):
    asker = SceneAsker(scene_processor, 128, phrases=3)
    scenes = [asker.scene(seed) for seed in range(6)]
    batch = collate(scenes, asker)
    picture, words = asker.prefix.index(scene_processor.image_token_id), scene_processor.tokenizer
    checked = dict.fromkeys(("span", "read", "seen", "found", "object", "seg"), 0)
    for group in batch.turns:
        turns = [(row, turn) for row, scene in enumerate(scenes) for turn in scene.turns]
        turns = [(row, turn) for row, turn in turns if turn[2].depth == bool((group.labels == asker.start_id).any())]
        for ids, looks, (row, (asked, answer, response)) in zip(group.input_ids, group.looks, turns, strict=True):
            sequence, shares = asker.prefix + ids.tolist(), cells_of_objects(render_scene(row), 8)
            for place in range(len(asked), len(asked) + len(answer)):
                keys = looks[place].nonzero()[:, 0].tolist()
                assert all(key <= len(asker.prefix) + place for key in keys)  # nobody looks ahead
                token = ids[place].item()
                if token == asker.seg_id:
                    checked["seg"] += 1
                    instance = response.masks[(ids[len(asked) : place] == asker.seg_id).sum()]
                    assert [key - picture for key in keys] == np.flatnonzero(shares[instance]).tolist()
                elif token in asker.cell_ids and response.depth:
                    checked["read"] += 1
                    start = sequence.index(asker.start_id)
                    assert start + 1 + asker.cell_ids[token] in keys
                elif token in asker.cell_ids and response.objects:
                    checked["seen"] += 1
                    assert picture + asker.cell_ids[token] in keys
                elif response.depth and token == asker.start_id:
                    checked["span"] += 1
                    assert keys == [picture]
            cells = [
                place for place, token in enumerate(ids.tolist()) if token in asker.cell_ids and place >= len(asked)
            ]
            for number, place in enumerate(cells if response.found else []):
                word = words.decode(ids[place])
                assert word == f" p{response.found[number]:02d}"
                # Other reasons of the place before are those of a cell that was written there.
                why = FIND_OBJECT if response.objects else FIND
                keys = (looks[place - 1] == why).nonzero()[:, 0].tolist()
                if response.objects:
                    checked["object"] += 1
                    assert shares[response.objects[number], response.found[number]]
                    assert [key - picture for key in keys] == np.flatnonzero(shares[response.objects[number]]).tolist()
                else:
                    checked["found"] += 1
                    assert keys == [picture + response.found[number]]
    assert all(checked.values()), checked


def test_every_object_has_cells(scene_processor):
    """Even one that fills no cell for the most part, such as a small ball behind another."""
    small = 0
    for seed in range(40):
        scene = render_scene(seed)
        cells, most = cells_of_objects(scene, 8), instance_of_cells(scene, 8)
        assert not cells[0].any()
        for instance in range(1, len(scene.objects) + 1):
            share = (scene.instances == instance).reshape(8, 16, 8, 16).sum((1, 3)).flatten()
            assert cells[instance].tolist() == (share * 2 >= share.max()).tolist()
            assert cells[instance, cell_of_object(scene, instance, cells[instance])]
            small += instance not in most
    assert small > 0


def test_answers_name_the_cells_of_what_they_speak_of(scene_processor):
    asker = SceneAsker(scene_processor, 128)
    said = {"count": 0, "attribute": 0, "closer_object": 0, "none": 0}
    for seed in range(12):
        scene = render_scene(seed)
        for *_, response in asker.scene(seed).turns:
            steps, _, answer = response.words.rpartition(":")
            cells = [int(cell) for cell in re.findall(r"\bp(\d\d)\b", steps)]
            if response.kind not in said:
                continue
            said[response.kind] += 1
            assert cells == list(response.found) and len(cells) == len(response.objects)
            said["none"] += steps == "none"
            if response.kind == "count":
                assert len(cells) == int(answer) and cells == sorted(cells)
            elif response.kind == "closer_object":
                near = response.objects[int(steps.index(answer.strip()) > 0)]
                assert scene.objects[near - 1].depth == min(scene.objects[k - 1].depth for k in response.objects)
                first, second = re.split(r" p\d\d d00 ?", steps)[:2]
                assert first in response.question.lower() and second in response.question.lower()
            else:
                assert steps == "none" or cells
    assert all(said.values()), said


def test_phrases_end_behind_their_mask(scene_processor):
    asker = SceneAsker(scene_processor, 128, phrases=5)
    scenes = [asker.referred(seed) for seed in range(8)]
    turns = [(scene, turn) for scene in scenes for turn in scene.turns]
    assert 30 < len(turns) <= 40 and len({turn[2].question for _, turn in turns}) > 30
    assert all(answer == [asker.seg_id] and len(response.masks) == 1 for _, (_, answer, response) in turns)
    batch = collate(scenes, asker)
    assert len(batch.mask_rows) == len(turns) and not batch.cells[..., -1].any()


def test_no_marked_cell_is_shared(scene_processor):
    asker = SceneAsker(scene_processor, 128)
    marked = 0
    for seed in range(30):
        letters = asker.scene(seed).letters
        marked += bool(letters.any())
        assert not letters.any() or sorted(letters[letters > 0]) == list(range(1, (letters > 0).sum() + 1))
    assert 10 < marked < 30
    assert cell_at((127, 0), (128, 128), 8) == 7 and cell_at((0, 127), (128, 128), 8) == 56


def test_marks_of_half_of_the_pictures_lie_alike_in_their_cells():
    """Else circles are paired with letters by that place, and letters exchanged where it is the same."""
    rng = np.random.default_rng(0)
    for marks_of in (Marks.anywhere, Marks.crowd):
        places = [{(x % 16, y % 16) for x, y in marks_of(128, 8, rng).points} for _ in range(200)]
        alike = [len(one) == 1 for one in places]
        assert 0.35 < np.mean(alike) < 0.65
        shared = set.union(*(one for one, same in zip(places, alike, strict=True) if same))
        assert len(shared) > 40, "anywhere in a cell"


def test_scenes_to_practise_on_come_behind_those_asked_about(scene_processor):
    batches = scene_batches(scene_processor, size=128, batch_size=2, first_seed=7, practised=3, workers=0)
    alone = next(scene_batches(scene_processor, size=128, batch_size=2, first_seed=7, workers=0))
    first, second = next(batches), next(batches)
    assert torch.equal(first.pixel_values[:2], alone.pixel_values) and len(first.pixel_values) == 5
    for turns, same in zip(first.turns, alone.turns, strict=True):
        assert torch.equal(turns.rows, same.rows) and torch.equal(turns.labels, same.labels)
    shown = [*first.pixel_values, *second.pixel_values]
    assert all(not torch.equal(one, other) for k, one in enumerate(shown) for other in shown[:k])


def test_schedule():
    values = [schedule(step, 1000) for step in range(1000)]
    assert max(values) == 1.0 and values[0] == 0.01 and 0.02 <= values[-1] < 0.021
    assert values[100:] == sorted(values[100:], reverse=True)


@pytest.mark.slow
def test_a_training_that_diverges_is_one_line(tmp_path):
    rates = {"masks_lr": 1e30, "masks_batch": 2, "masks_steps": 4, "codec_steps": 10, "checkpoint_every": 2}
    recipe = TinyRecipe(codec=CODEC, codec_scenes=20, corpus_scenes=30, **rates)
    with pytest.raises(ValueError, match=r"\Amasks, step \d: the gradient's norm is nan, .*; lower masks_lr\.\Z"):
        train_tiny(recipe, tmp_path / "run", processes=1, workers=0)


@pytest.mark.slow
def test_all_stages_run_resume_and_load(tmp_path):
    steps = {f"{stage}_steps": 2 for stage in STAGES} | {f"{stage}_batch": 2 for stage in STAGES}
    recipe = TinyRecipe(codec=CODEC, codec_scenes=20, codec_steps=10, corpus_scenes=30, checkpoint_every=2, **steps)
    folder = train_tiny(recipe, tmp_path / "run", processes=2, workers=0)
    model = AutoModel.from_pretrained(folder)
    start = fresh_model_of(recipe, tmp_path / "run")
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    frozen = set(start) - moved
    for part in ("model.vision_tower.encoder.layer.0", "model.language_model.layers.0", "seg_projector", "mask_model"):
        assert any(name.startswith(part) for name in moved), part
    assert all(name.startswith(("depth_model", "mask_model")) for name in frozen)
    assert {name for name in start if name.startswith("depth_model")} <= frozen

    assert (tmp_path / "run" / "losses.png").is_file() and (tmp_path / "run" / "losses_vision.png").is_file()
    before = model.state_dict()
    (tmp_path / "run" / "language.done").unlink()  # as if stopped right after the last checkpoint
    again = AutoModel.from_pretrained(train_tiny(recipe, tmp_path / "run", processes=2, workers=0)).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)
    with pytest.raises(ValueError, match="another recipe"):
        train_tiny(TinyRecipe(seed=1), tmp_path / "run")
    with pytest.raises(ValueError, match="cannot share"):
        train_tiny(recipe, tmp_path / "run", processes=3)


def fresh_model_of(recipe: TinyRecipe, out) -> dict[str, torch.Tensor]:
    codec = DepthVQVAE.from_pretrained(out / "codec")
    processor = tiny_processor(tiny_tokenizer(text_corpus(recipe.corpus_scenes, recipe.seed)), codec.config)
    torch.manual_seed(recipe.seed)
    return fresh_model(processor, codec).state_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", "unknown key 'sed'"),
        ("- 1", "keys and values"),
        ("language_steps: -1", "language_steps is -1; it must be above 0"),
        ("language_steps: many", "language_steps must be a whole number, got 'many'"),
        ("checkpoint_every: 0", "checkpoint_every is 0; it must be above 0"),
        ("masks_lr: fast", "masks_lr must be a number, got 'fast'"),
        ("span_noise: 2", "expected 0 or more, and 0 to 1"),
        ("codec:\n  image_size: 96\n  downsample: 16", r"recipe.yaml: The recipe's codec has 36 codes per depth map"),
        ("codec_options:\n  restart_every: 2.5", "codec_options: restart_every must be a whole number, got 2.5"),
        ("recipe: tiny\nlookup: 3", "unknown key 'lookup'"),
    ],
)
def test_recipes_with_mistakes(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TinyRecipe.read(tmp_path / "recipe.yaml")


def test_a_rate_may_be_written_as_yaml_reads_no_number(tmp_path):
    codec = "\n".join(f"  {name}: {value}" for name, value in CODEC.items())
    (tmp_path / "recipe.yaml").write_text(f"masks_lr: 1e-3\ncodec:\n{codec}\n")
    assert TinyRecipe.read(tmp_path / "recipe.yaml").masks_lr == 1e-3


def test_the_shipped_recipe_is_read():
    from pathlib import Path

    recipe = TinyRecipe.read(Path(__file__).parents[3] / "recipes" / "tiny.yaml")
    assert recipe.codec["image_size"] == 128


@pytest.mark.parametrize("name", ["masks.pt", "language.pt", "codec/model.safetensors"])
def test_a_damaged_stage_is_named_before_the_work(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save({"step": 1}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be used: .* is damaged or incomplete. Delete"):
        train_tiny(TinyRecipe(), tmp_path)
