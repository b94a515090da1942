"""Rewards: most for what is true, none where a sample does not know; and a training by them."""

import shutil

import numpy as np
import pytest
import sft_helpers as sft
import torch
from helpers import cached_repository, picture
from PIL import Image
from safetensors.torch import load_file, save_file

from perceptio_hf import PerceptioForConditionalGeneration
from perceptio_hf.commands.main import run
from perceptio_hf.commands.train import _trainer
from perceptio_hf.data.encoded import load_mask
from perceptio_hf.data.rows import dataset_of
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.data.world_samples import iter_world_samples
from perceptio_hf.files import find_recipe
from perceptio_hf.modeling.modeling_depth_vqvae import prepare_depth
from perceptio_hf.tokens import depth_span
from perceptio_hf.training.rewards import REWARDS, DepthError, DepthOrder, Form, MaskIoU, as_prompts, make_rewards
from perceptio_hf.training.rewards.catalogue import check_rewards_apply
from perceptio_hf.training.rewards.recipe import read_reward_recipe
from perceptio_hf.training.rewards.texts import right_answer


def turn(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def prompts():
    """Of four samples: a mask, a depth map, a mask and codes, words."""
    return as_prompts(sft.samples(4))


def columns(prompts, *rows: int) -> dict[str, list]:
    names = [name for name in prompts.column_names if name != "images"]
    return {name: [prompts[row][name] for row in rows] for name in names}


def test_prompts_end_before_the_answer(prompts):
    assert prompts["spans"][:] == [0, 1, 1, 0] and prompts["segs"][:] == [1, 0, 1, 0]
    assert prompts["answer"][:3] == ["Here is the red ball.", "the depth map", "Here"]
    row = prompts[1]
    assert [message["role"] for message in row["prompt"]] == ["user"] and row["images"][0].size == (48, 40)
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    assert len(as_prompts(sft.samples(4).to_iterable_dataset(), limit=2)) == 2


def test_an_answer_is_measured_by_what_belongs_to_its_turn():
    """A conversation of RefCOCO's has a mask for each of its turns, and the answer is the last of them."""
    masks = [encode_mask(np.eye(8, dtype=bool)), encode_mask(np.ones((8, 8), dtype=bool))]
    said = ["[SEG] Here.", "[SEG]<DEPTH_START><DEPTH_END>There.", "It is red."]
    chat = [
        {"role": role, "content": text} for words in said for role, text in (("user", "Where?"), ("assistant", words))
    ]
    sample = {"images": [picture(8, 8)], "masks": masks, "depth": [np.eye(8)], "depth_unit": "relative"}
    turns = [as_prompts(dataset_of([sample | {"messages": chat[:end]}]))[0] for end in (4, 6)]
    assert [mask["counts"] for mask in turns[0]["masks"]] == [masks[1]["counts"]] and len(turns[0]["depth"]) == 1
    assert turns[1]["prompt"][3]["content"][0]["text"] == "[SEG]There."  # without the span, whose codes nobody knows
    with pytest.raises(ValueError, match="has no turn of the assistant"):
        as_prompts(dataset_of([sample | {"messages": chat[:1]}]))
    assert turns[1]["masks"] == turns[1]["depth"] == []


def test_a_picture_that_stands_in_a_text_is_one_of_the_prompt():
    """As in LLaVA's files; it is neither shown twice nor read as a word."""
    chat = [{"from": "human", "value": "What is <image>\nhere?"}, {"from": "gpt", "value": "A ball."}]
    (row,) = as_prompts(dataset_of([{"image": picture(), "conversations": chat}]))
    assert row["prompt"][0]["content"] == [
        {"type": "text", "text": "What is "},
        {"type": "image", "text": None},
        {"type": "text", "text": "here?"},
    ]
    with pytest.raises(ValueError, match="Sample 'x' has no turn of the user before the answer"):
        as_prompts(dataset_of([{"id": "x", "messages": [{"role": "assistant", "content": "A ball."}]}]))


def test_right_answers_are_conclusions():
    said = ["A p27 d21 B p03 d09: A", turn("<DEPTH_START><DEPTH_3><DEPTH_END>a."), "B", "either"]
    assert right_answer(said, ["B p03 A p27: A", "A", "A", None]) == [1, 1, 0, None]


def test_form_wants_whole_spans_and_what_was_asked_for():
    good = depth_span(range(4))
    texts = [
        good + "A",
        good,
        "A",
        depth_span(range(3)) + "A",
        "<DEPTH_2>" + good + "A",
        "[SEG]" + good + "A",
        good[:-12],
    ]
    assert Form(4)(texts, [1] * 7, [0] * 7) == [1, 0, 0, 0, 0, 0, 0]
    assert Form(4)([turn("[SEG][SEG] both"), "one [SEG]"], [0, 0], [2, 2]) == [1, 0]


def test_depth_rewards_prefer_the_truth(model):
    """A slope, its own codes, codes of the slope turned round, no span, a sample without depth."""
    codec = model.depth_model
    slope = np.tile(np.linspace(1, 4, 48), (40, 1))
    samples = [sft.sample(1) | {"depth": slope.tolist()}, sft.sample(3)]
    given = columns(as_prompts(dataset_of(samples)), 0, 0, 0, 1)
    side = codec.config.image_size
    inverse = (1 / slope - 1 / 4) / (1 - 1 / 4)
    maps = [
        prepare_depth(torch.from_numpy(np.ascontiguousarray(item)).float(), torch.ones(40, 48).bool(), side)[0]
        for item in (inverse, inverse[:, ::-1])
    ]
    own, turned = (codec.encode(item[0])[0].tolist() for item in maps)
    said = [depth_span(own) + "x", depth_span(turned) + "x", "x", "x"]
    for kind in (DepthError, DepthOrder):
        reward = kind(codec)
        found = reward(completions=said, **given)
        assert found[2:] == [0, None] and 0 <= found[0] <= 1
        decoded = codec.decode(torch.tensor([own]))[0]
        error = float(
            (
                torch.nn.functional.interpolate(decoded[None, None], (40, 48), mode="bilinear")[0, 0]
                - torch.from_numpy(inverse)
            )
            .abs()
            .mean()
        )
        if kind is DepthError:
            assert found[0] == pytest.approx(1 - error, abs=1e-4)
    order = DepthOrder(codec)
    flat = order.compare(inverse.astype("f4"), _map(slope)), order.compare(inverse[:, ::-1].astype("f4"), _map(slope))
    assert flat == (1, 0)


def test_depth_without_a_reading_counts_for_nothing(model):
    """Glitches of a sensor, which `depth_valid` names, neither as pixels nor for the range of the others."""
    codec, valid = model.depth_model, np.ones((40, 48), bool)
    slope = np.tile(np.linspace(1, 4, 48), (40, 1))
    valid[:8, :8] = False
    glitches = [np.where(valid, slope, value).tolist() for value in (0.0, 0.01)]
    more = [{"depth": glitches[0]}, {"depth": glitches[1], "depth_valid": [encode_mask(valid)]}]
    given = columns(as_prompts(dataset_of([sft.sample(1) | each for each in more])), 0, 1)
    assert [bool(item) for item in given["depth_valid"]] == [False, True]
    said = [depth_span(list(range(codec.config.num_tokens))) + "x"] * 2
    for kind in (DepthError, DepthOrder):
        absent, masked = kind(codec)(completions=said, **given)
        assert absent == pytest.approx(masked, abs=1e-6) and 0 < masked < 1


def test_polygons_of_a_picture_of_another_size_are_of_another_size(model, processor, monkeypatch):
    drawn = np.zeros((4, 6), bool)
    drawn[:, :3] = True
    reward = MaskIoU(model, processor)
    monkeypatch.setattr(reward, "_masks", lambda prompts, ids: [[drawn]] * 3)
    polygons = [[0.0, 0.0, 3.0, 0.0, 3.0, 4.0, 0.0, 4.0]]
    masks = [[{"size": size, "polygons": polygons, "counts": None}] for size in ([4, 6], [8, 6], None)]
    given = {"completions": ["[SEG]"] * 3, "prompts": [None] * 3, "completion_ids": [[]] * 3}
    assert reward(**given, masks=masks) == [1.0, 0.0, 1.0]


def test_a_picture_that_cannot_be_opened_is_named_at_the_start(tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    rows = [sft.sample(3), sft.sample(3) | {"images": [str(tmp_path / "bad.jpg")], "id": "the seventh"}]
    with pytest.raises(ValueError, match=r"Sample .the seventh.: .*bad\.jpg"):
        as_prompts(dataset_of(rows))


@pytest.mark.parametrize(("reward", "column"), [("depth_error", "depth"), ("mask_iou", "masks"), ("form", None)])
def test_a_reward_that_no_prompt_gives_is_refused(model, processor, reward, column):
    prompts = as_prompts(dataset_of([sft.sample(3)]))  # words alone
    rewards, _ = make_rewards({"right_answer": 1, reward: 1}, model, processor)
    if column is None:
        return check_rewards_apply(rewards, prompts)
    with pytest.raises(ValueError, match=f"The reward {reward} compares with `{column}`, which none of the 1 prompts"):
        check_rewards_apply(rewards, prompts)


def _map(depth: np.ndarray):
    from perceptio_hf.data.depth_maps import DepthMap

    return DepthMap.from_metric(depth)


def test_mask_iou_is_that_of_the_masks_the_model_makes(model, processor):
    """The masks that a completion becomes, as truth, earn 1; of two that are asked for, one earns half."""
    ids = processor.tokenizer("[SEG] Here", add_special_tokens=False)["input_ids"]
    row = as_prompts(dataset_of([sft.sample(0)]))[0]
    prompt = [
        {"role": "user", "content": [{"type": "image", "image": picture(seed=0)}, row["prompt"][0]["content"][1]]}
    ]
    reward = MaskIoU(model, processor)
    (own,) = reward._masks([prompt], [ids])[0]
    assert own.shape == (40, 48)
    if not own.any():
        own = ~own
        expected = 0.0
    else:
        expected = 1.0
    truth = [encode_mask(own)]
    masks = [truth, truth * 2, [], truth]
    said = ["[SEG] Here", "[SEG] Here", "[SEG] Here", "Here"]
    found = reward(completions=said, prompts=[prompt] * 4, completion_ids=[ids] * 3 + [ids[1:]], masks=masks)
    assert found == [expected, expected / 2, None, 0]
    assert load_mask(truth[0]).shape == (40, 48) and not model.training


def test_masks_of_pictures_of_other_sizes_are_none_of_theirs(model, processor, monkeypatch):
    reward, truths = MaskIoU(model, processor), [np.ones((4, 6), bool), np.ones((6, 4), bool)]
    monkeypatch.setattr(reward, "_masks", lambda prompts, ids: [truths, truths[::-1]])
    given = {"completions": ["[SEG] [SEG]"] * 2, "prompts": [None] * 2, "completion_ids": [[]] * 2}
    assert reward(**given, masks=[[encode_mask(mask) for mask in truths]] * 2) == [1.0, 0.0]


def test_masks_of_several_pictures_come_in_the_order_of_their_seg(model, processor):
    """Though an answer holds them picture by picture."""
    said = "Image-2: [SEG] Image-1: [SEG] Image-2: [SEG]"
    ids = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    shown = [
        {"type": "image", "image": Image.fromarray(np.zeros((*size, 3), np.uint8))} for size in ((40, 48), (48, 40))
    ]
    prompt = [{"role": "user", "content": [*shown, {"type": "text", "text": "Where?"}]}]
    assert [mask.shape for mask in MaskIoU(model, processor)._masks([prompt], [ids])[0]] == [
        (48, 40),
        (40, 48),
        (48, 40),
    ]


def test_fair_questions_of_the_world_are_samples():
    samples = list(iter_world_samples("closest", range(90)))
    assert 45 <= len(samples) <= 45 + 2 + 3 + 4
    for sample in samples:
        letters = sample["messages"][0]["content"].removeprefix("Which is closest to the camera: ").rstrip("?")
        assert sample["messages"][1]["content"][-1] in letters and sample["depth"].shape == (128, 128)


def test_rewards_are_made_by_name(model, processor):
    functions, weights = make_rewards(dict.fromkeys(REWARDS, 2), model, processor)
    assert weights == [2.0] * len(REWARDS) and [item.__name__ for item in functions] == list(REWARDS)
    with pytest.raises(ValueError, match="did you mean right_answer"):
        make_rewards({"right_answers": 1}, model, processor)


RECIPE = """recipe: {kind}
model_name_or_path: {model}
tasks:
  - world: spatial
    scenes: 2
    size: 48
prompts: 4
rewards: {{right_answer: 1.0, form: 0.5, depth_order: 0.5, depth_error: 0.5, mask_iou: 0.5}}
spatial: seg+depth
max_steps: 2
per_device_train_batch_size: 4
num_generations: 2
max_completion_length: 30
{more}
gradient_checkpointing: false
bf16: false
save_strategy: "no"
report_to: none
disable_tqdm: true
"""


@pytest.mark.parametrize(
    ("kind", "more"), [("grpo", "beta: 0.1\nnum_iterations: 2"), ("rloo", "beta: 0.1\nlora_r: 2\nlora_merge: true")]
)
def test_a_recipe_trains_by_rewards(tiny_folder, tmp_path, capsys, kind, more):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(kind=kind, model=tiny_folder, more=more))
    assert run(["train", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "The finished checkpoint is" in said
    assert all(f"rewards/{name}/mean" in said for name in REWARDS)
    merged = tmp_path / "out" / ("merged" if "lora" in more else "checkpoint")
    assert PerceptioForConditionalGeneration.from_pretrained(merged).config.has_spatial_tokens


EVALUATED = """eval_tasks:
  - {world: spatial, scenes: 2, size: 48, first_seed: 50, name: seen}
  - {world: plain, scenes: 2, size: 48, first_seed: 60}
eval_strategy: steps
eval_steps: 1
eval_on_start: true
per_device_eval_batch_size: 4
metric_for_best_model: seen_rewards/form/mean"""


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_rewards_are_measured_on_sets_of_their_own(tiny_folder, tmp_path, kind):
    """Each set by its name; before the first step, and after each."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(kind=kind, model=tiny_folder, more=EVALUATED))
    trainer = _trainer(read_reward_recipe(kind, recipe, ["--output_dir", str(tmp_path / "out")]))
    trainer.train()
    for name in ("eval_seen_rewards/right_answer/mean", "eval_plain_rewards/form/mean", "eval_plain_reward"):
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert len(logged) == 3 and all(value >= 0 for value in logged), name
    forms = [entry[name] for entry in trainer.state.log_history if (name := "eval_seen_rewards/form/mean") in entry]
    assert trainer.state.best_metric == max(forms[1:]) > 0
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("eval_rewards/")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "no"}, "lists eval_tasks, but never evaluates"),
        ({"metric_for_best_model": "seen_rewards/depth/mean"}, "there are seen_reward, plain_reward"),
    ],
)
def test_evaluations_that_cannot_be(tiny_folder, tmp_path, changes, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(kind="grpo", model=tiny_folder, more=EVALUATED))
    options = [f"--{name}={value}" for name, value in changes.items()]
    with pytest.raises(ValueError, match=message):
        _trainer(read_reward_recipe("grpo", recipe, ["--output_dir", str(tmp_path / "out"), *options]))


def test_a_weight_that_is_none_is_named(tiny_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(kind="grpo", model=tiny_folder, more="").replace("form: 0.5", "form: null")
    recipe.write_text(text)
    assert run(["train", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "rewards: form must be" in capsys.readouterr().err


def test_the_shipped_recipe_is_read(tmp_path):
    recipe = read_reward_recipe("grpo", find_recipe("grpo_world"), ["--output_dir", str(tmp_path)])
    assert recipe.arguments.rewards["right_answer"] == 1 and recipe.settings.beta > 0
    answers = recipe.settings.per_device_train_batch_size * recipe.settings.gradient_accumulation_steps
    assert 2 * answers // recipe.settings.num_generations == 16  # questions a step of two processes, as its words say


def test_mistakes_in_a_recipe_are_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for wrong, message in (
        ("rewards: {right: 1.0}", "give weights of right_answer, form"),
        ("num_generation: 2", "did you mean num_generations"),
        ("prompts: many", "prompts must be a whole number"),
        ("figures: [{broken_spans: 4}]", "has figures, but .* list eval_tasks"),
        ("reward_weights: [1.0]", r"reward_weights is \[1.0\]; .* write rewards:"),
        ("push_to_hub: true", "`perceptio push OUT/checkpoint"),
    ):
        recipe.write_text(f"recipe: grpo\nmodel_name_or_path: tiny\ntasks: [{{world: refer, scenes: 2}}]\n{wrong}\n")
        with pytest.raises(ValueError, match=message):
            read_reward_recipe("grpo", recipe, ["--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_reference_is_of_the_revision_that_is_trained(model, processor, tiny_folder, tmp_path, monkeypatch, kind):
    branches = {"main": tiny_folder, "v2": shutil.copytree(tiny_folder, tmp_path / "v2")}
    weights = load_file(branches["v2"] / "model.safetensors")
    changed = next(name for name in weights if "q_proj" in name and "language_model" in name)
    weights[changed] = weights[changed] + 1
    save_file(weights, branches["v2"] / "model.safetensors", metadata={"format": "pt"})
    cache = cached_repository(tmp_path / "cache", "me/two", branches)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(kind=kind, model="me/two", more="model_revision: v2\nbeta: 0.1"))
    trainer = _trainer(read_reward_recipe(kind, recipe, ["--output_dir", str(tmp_path / "out")]))
    trained, reference = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in trained.items())
    original = model.state_dict()
    assert any(not torch.equal(value, original[name]) for name, value in trained.items())
