"""A model over a benchmark: the same lines whatever the batches and however often it was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import benchmark_helpers
import numpy as np
import pytest
import torch
from helpers import random_model

from perceptio_hf.bulk.engines import LocalEngine
from perceptio_hf.bulk.journal import Journal
from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.evaluation.benchmarks import PictureSource
from perceptio_hf.evaluation.run.runner import REPLACED_FILE, SAMPLES_FILE, RunSettings, run_benchmark
from perceptio_hf.evaluation.run.summary import ModelFacts, build_summary

ALL = ("identity", "oracle", "random", "random-matched", "other-image", "first-repeat", "constant")
BUDGET = 28


@pytest.fixture(scope="module")
def wordy(processor):
    """A random model that is content with one [SEG], so that words follow its spans."""
    return random_model(processor, seed=1)


@pytest.fixture(scope="module")
def run(wordy, processor):
    """Runs a benchmark into a folder with few new tokens."""

    def _run(benchmark, folder, weights="w", overwrite=False, watch=None, **settings):
        settings = RunSettings(**{"spatial": benchmark.spatial, "max_new_tokens": BUDGET, **settings})
        return run_benchmark(
            wordy, processor, benchmark, folder, settings, weights=weights, overwrite=overwrite, watch=watch
        )

    return _run


def lines(folder: Path, name: str = SAMPLES_FILE) -> list[bytes]:
    return (folder / name).read_bytes().splitlines()


@pytest.mark.parametrize("spatial", ["depth", "seg+depth", "auto", "none"])
def test_answers_do_not_depend_on_the_batch_size(run, tmp_path, spatial):
    benchmark = benchmark_helpers.points()
    alone, together = (
        run(benchmark, tmp_path / str(size), batch_size=size, spatial=spatial).records for size in (1, 7)
    )
    assert alone == together
    assert len({record["answer"] for record in alone}) > 1


@pytest.mark.parametrize("kind", ["masks", "depths", "choices"])
def test_all_kinds_of_benchmarks_run_in_any_batches(run, tmp_path, kind):
    benchmark = getattr(benchmark_helpers, kind)()
    alone, together = (run(benchmark, tmp_path / str(size), batch_size=size).records for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert one["answer"] == other["answer"] and one["depth_codes"] == other["depth_codes"]
        assert one["score"] == pytest.approx(other["score"], abs=0.02)
        if kind == "masks":  # a mask's edge is a threshold: a pixel on it may fall either way
            assert (decode_mask(one["mask"]) != decode_mask(other["mask"])).mean() < 0.01


def test_logits_of_a_padded_row_are_those_of_the_row_alone(model, processor):
    """What batches cost in rounding: the reason answers may be expected to be equal."""
    from perceptio_hf.evaluation.run.answering import encode_questions

    samples = benchmark_helpers.points().samples
    pictures = [sample.picture.open() for sample in samples]
    questions = [sample.question for sample in samples]

    def last_logits(rows):
        inputs = encode_questions(processor, [pictures[i] for i in rows], [questions[i] for i in rows])
        position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pixel_values=inputs["pixel_values"],
                position_ids=position_ids,
            )
        assert (inputs["attention_mask"][:, -1] == 1).all(), "padding stands on the left"
        return out.logits[:, -1]

    together = last_logits(range(len(samples)))
    alone = torch.cat([last_logits([row]) for row in range(len(samples))])
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(run, tmp_path, wordy):
    benchmark = benchmark_helpers.points()
    options = {"batch_size": 3, "replacements": ("random", "oracle")}
    whole = run(benchmark, tmp_path / "whole", **options)
    facts = ModelFacts.of(wordy, "m")
    expected = build_summary(benchmark, facts, whole)
    content = {name: (tmp_path / "whole" / name).read_bytes() for name in (SAMPLES_FILE, REPLACED_FILE)}
    for number, (name, cut) in enumerate(
        [(SAMPLES_FILE, 0.0), (SAMPLES_FILE, 0.31), (SAMPLES_FILE, 0.999), (REPLACED_FILE, 0.0), (REPLACED_FILE, 0.6)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in (tmp_path / "whole").iterdir():
            if not (name == SAMPLES_FILE and path.name.startswith("replaced")):
                (folder / path.name).write_bytes(path.read_bytes())
        os.truncate(folder / name, int(len(content[name]) * cut))
        again = run(benchmark, folder, **options)
        for file, expected_bytes in content.items():
            assert (folder / file).read_bytes() == expected_bytes, f"{name} cut at {cut}"
        summary = build_summary(benchmark, facts, again)
        del summary["time"]
        assert summary == {key: value for key, value in expected.items() if key != "time"}


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import benchmark_helpers
from pathlib import Path
from perceptio_hf.commands.checkpoints import load
from perceptio_hf.evaluation.run.runner import RunSettings, run_benchmark
settings = RunSettings("depth", 28, batch_size=2)
run_benchmark(*load({model!r}, "cpu"), benchmark_helpers.points(400), Path({out!r}), settings, weights="w")
"""


def test_sigkill_leaves_whole_lines_to_go_on_from(run, tmp_path, wordy, processor):
    tests, folder = Path(__file__).parents[2], tmp_path / "model"
    for part in (wordy, processor):
        part.save_pretrained(folder)
    script = KILLED.format(tests=str(tests), model=str(folder), out=str(tmp_path / "killed"))
    environment = os.environ | {"PYTHONPATH": str(tests.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    journal, patience = tmp_path / "killed" / SAMPLES_FILE, time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n")
    assert 5 <= done < 400
    # The same run over fewer samples, never stopped, begins with the same lines.
    run(benchmark_helpers.points(done), tmp_path / "calm", batch_size=2)
    assert lines(tmp_path / "killed")[:done] == lines(tmp_path / "calm")


def test_results_of_another_model_data_or_setting_are_never_mixed(run, tmp_path):
    benchmark = benchmark_helpers.points(3)
    run(benchmark, tmp_path)
    before = (tmp_path / SAMPLES_FILE).read_bytes()
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"another model: w there, v now.*--overwrite"):
        run(benchmark, tmp_path, weights="v")
    with pytest.raises(ValueError, match="another data"):
        run(benchmark_helpers.points(4), tmp_path)
    with pytest.raises(ValueError, match="another spatial: depth there, none now"):
        run(benchmark, tmp_path, spatial="none")
    assert (tmp_path / SAMPLES_FILE).read_bytes() == before
    run(benchmark, tmp_path, spatial="none", overwrite=True)
    assert json.loads(lines(tmp_path)[0])["depth_codes"] is None
    assert not (tmp_path / "summary.json").exists(), "a summary of other lines must not stay"
    (tmp_path / SAMPLES_FILE).write_bytes(b"no json\n")
    with pytest.raises(ValueError, match="line 1 is not the result of points 0"):
        run(benchmark, tmp_path, spatial="none")


def test_settings_of_the_model_count_and_its_place_does_not(run, tmp_path, wordy, processor, monkeypatch):
    benchmark = benchmark_helpers.points(2)
    run(benchmark, tmp_path)
    monkeypatch.setattr(wordy.config, "_name_or_path", "elsewhere")
    run(benchmark, tmp_path)
    for thing, name, value in (
        (processor, "mask_threshold", 5.0),
        (processor, "chat_template", processor.chat_template + " "),
        (processor.image_processor, "max_patches", 3),
        (wordy.config, "image_seq_length", 7),
        (wordy.generation_config, "repetition_penalty", 1.5),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(thing, name, value)
            with pytest.raises(ValueError, match=r"another settings of the model: .*--overwrite"):
                run(benchmark, tmp_path)
    run(benchmark, tmp_path)


def test_a_finished_run_answers_nothing_again(run, tmp_path, wordy):
    benchmark = benchmark_helpers.points(3)
    first = run(benchmark, tmp_path)
    calls = []
    hook = wordy.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        second = run(benchmark, tmp_path)
    finally:
        hook.remove()
    assert second.records == first.records and (second.answered, calls) == (0, [])


def broken(benchmark, index: int):
    bad = PictureSource("torn.png", b"\x89PNG torn")
    samples = [replace(sample, picture=bad) if i == index else sample for i, sample in enumerate(benchmark.samples)]
    return replace(benchmark, samples=samples)


def test_a_broken_picture_stops_the_run_or_is_left_out(run, tmp_path):
    benchmark = broken(benchmark_helpers.points(4), 2)
    with pytest.raises(ValueError, match=r"torn.png.*points 2.*--on-error skip"):
        run(benchmark, tmp_path / "stopped", batch_size=2)
    assert len(lines(tmp_path / "stopped")) == 2
    found = run(benchmark, tmp_path / "stopped", batch_size=2, skip_broken=True)
    assert [record["id"] for record in found.records] == ["points 0", "points 1", "points 3"]
    assert len(found.left_out) == 1 and "points 2" in found.left_out[0]
    assert run(benchmark, tmp_path / "stopped", batch_size=2).records == found.records
    alone = replace(benchmark, samples=benchmark.samples[2:3])
    with pytest.raises(ValueError, match="every sample was left out"):
        build_summary(alone, None, run(alone, tmp_path / "alone", skip_broken=True))


def test_a_target_of_another_size_is_named(run, tmp_path):
    benchmark = benchmark_helpers.masks(2)
    sample = benchmark.samples[1]
    target = sample.target | {"masks": [], "size": [4, 4]}
    benchmark = replace(benchmark, samples=[benchmark.samples[0], replace(sample, target=target)])
    with pytest.raises(ValueError, match=r"masks 1.*4 x 4"):
        run(benchmark, tmp_path)


@pytest.mark.parametrize("spatial", ["depth", "seg+depth"])
def test_identity_gives_the_own_answers_and_pictures_are_encoded_once(run, tmp_path, wordy, spatial):
    """Rows that write several [SEG] begin their spans at other places than the rest of their batch."""
    benchmark = benchmark_helpers.points()
    calls = []
    hook = wordy.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = run(benchmark, tmp_path, batch_size=3, spatial=spatial, replacements=ALL)
    finally:
        hook.remove()
    assert len(calls) == 2 * 3, "three batches: once for own answers, once for all seven replacements"
    assert [record["id"] for record in found.replaced] == [record["id"] for record in found.records]
    for own, other in zip(found.records, found.replaced, strict=True):
        assert set(other) == {"id", *ALL}
        assert other["identity"]["answer"] == own["answer"] and other["identity"]["score"] == own["score"]
    changed = [record["random"]["answer"] != record["identity"]["answer"] for record in found.replaced]
    assert any(changed), "a random model's words follow its codes"


def test_replacement_reads_the_same_tokens_as_a_full_pass(run, tmp_path, model, processor):
    """Words behind replaced codes against the plainest computation: argmax after a whole forward pass, row by row."""
    from perceptio_hf.evaluation.replacement.token_replacement import answers_with_codes
    from perceptio_hf.evaluation.run.answering import encode_questions

    samples = benchmark_helpers.points(3).samples
    pictures, questions = [sample.picture.open() for sample in samples], [sample.question for sample in samples]
    inputs = encode_questions(processor, pictures, questions)
    words = model.spatial_vocabulary()
    codes = np.random.default_rng(0).integers(0, len(words.codes), (3, words.num_depth_tokens))
    starts = [[], [words.seg], [words.seg, words.seg]]
    options = {"spatial": "seg+depth", "max_new_tokens": BUDGET}
    found = answers_with_codes(model, processor, inputs, starts, {"x": codes}, **options)["x"]
    spatial = [words.seg, words.depth_start, words.depth_end, words.image, *words.codes]
    for row in range(3):
        alone = encode_questions(processor, [pictures[row]], [questions[row]])
        span = [words.depth_start, *(words.codes[code] for code in codes[row]), words.depth_end]
        ids = torch.cat([alone["input_ids"], torch.tensor([[*starts[row], *span]])], 1)
        response = []
        while len(response) < BUDGET - len(starts[row]) - len(span):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=alone["pixel_values"]).logits[0, -1]
            logits[spatial] = -torch.inf
            response.append(int(logits.argmax()))
            if response[-1] in words.turn_ends:
                break
            ids = torch.cat([ids, torch.tensor([[response[-1]]])], 1)
        expected = processor.tokenizer.decode(response, skip_special_tokens=True)
        assert found[row].split() == expected.split()


def test_rows_without_a_span_are_counted_not_replaced(run, tmp_path, processor):
    from perceptio_hf.evaluation.run.summary import summarise_replacements

    found = run(benchmark_helpers.points(), tmp_path, spatial="depth", replacements=("random",))
    del found.replaced[2:]
    told = summarise_replacements("relative_depth", found.records, found.replaced)
    assert (told["samples"], told["without_span"]) == (2, 5)
    with pytest.raises(ValueError, match="no answer has a depth span"):  # a random model rarely begins one by itself
        run(benchmark_helpers.points(2), tmp_path / "auto", spatial="auto", max_new_tokens=3, replacements=("random",))


def test_workers_elsewhere_find_the_oracles_folder(wordy, processor, tmp_path, monkeypatch):
    """They have other working folders."""
    jobs = []

    class Elsewhere(LocalEngine):
        def run(self, job, batches):
            jobs.append(job)
            return super().run(job, batches)

    benchmark = benchmark_helpers.points(2)
    monkeypatch.chdir(tmp_path)
    Path("maps").mkdir()
    for sample in benchmark.samples:
        np.save(Path("maps") / f"{Path(sample.picture.name).stem}.npy", np.linspace(1, 2, 64 * 64).reshape(64, 64))
    settings = RunSettings("depth", BUDGET, replacements=("oracle",), oracle="maps", oracle_unit="m")
    run_benchmark(wordy, processor, benchmark, tmp_path / "out", settings, weights="w", engine=Elsewhere())
    assert jobs[-1].args[1].oracle == str(tmp_path / "maps")
    other = replace(settings, oracle_unit="disparity")  # the same numbers, which mean something else
    with pytest.raises(ValueError, match="another oracle unit: m there, disparity now"):
        run_benchmark(wordy, processor, benchmark, tmp_path / "out", other, weights="w")


def test_settings_that_contradict_one_another_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"spatial='none'.*no depth span"):
        RunSettings("none", replacements=("random",))
    with pytest.raises(ValueError, match="no replacement 'noise'"):
        RunSettings("depth", replacements=("noise",))
    with pytest.raises(ValueError, match="--replace-depth"):
        RunSettings("depth", oracle="folder")
    with pytest.raises(ValueError, match="--replace-depth identity,oracle"):
        RunSettings("depth", replacements=("random",), oracle="folder")
    with pytest.raises(ValueError, match="batch_size"):
        RunSettings("depth", batch_size=0)
    with pytest.raises(ValueError, match="answers in words"):
        run(benchmark_helpers.masks(1), tmp_path, spatial="seg+depth", replacements=("random",))
    with pytest.raises(ValueError, match=r"max_new_tokens=|needs .* for its spans"):
        run(benchmark_helpers.points(1), tmp_path, max_new_tokens=5)


def test_another_model_gives_other_answers_in_a_folder_of_its_own(run, tmp_path, processor):
    benchmark = benchmark_helpers.points(3)
    first = run(benchmark, tmp_path / "a").records
    settings = RunSettings("depth", BUDGET)
    other = run_benchmark(random_model(processor, seed=5), processor, benchmark, tmp_path / "b", settings, weights="v")
    assert [record["answer"] for record in first] != [record["answer"] for record in other.records]


def test_a_journal_keeps_what_json_cannot_hold_out(tmp_path):
    journal = Journal(tmp_path / "a.jsonl", {"x": 1}, ["one", "two"])
    with pytest.raises(ValueError):
        journal.append({"id": "one", "score": float("nan")})
    journal.append({"id": "one", "text": "ä\u2028\n\u0085"})
    again = Journal(tmp_path / "a.jsonl", {"x": 1}, ["one", "two"])
    assert again.records == [{"id": "one", "text": "ä\u2028\n\u0085"}]
    (tmp_path / "a.claim.json").unlink()
    for overwrite in (False, True):  # somebody's own samples.jsonl, say
        with pytest.raises(ValueError, match=r"without a.claim.json, so no run wrote it, and it is not replaced"):
            Journal(tmp_path / "a.jsonl", {"x": 1}, ["one", "two"], overwrite=overwrite)
    assert (tmp_path / "a.jsonl").stat().st_size


def test_a_result_that_is_no_number_names_its_sample(tmp_path):
    journal = Journal(tmp_path / "a.jsonl", {"x": 1}, ["one"])
    with pytest.raises(ValueError, match="The result of one holds a number that is not finite"):
        journal.append({"id": "one", "score": float("nan")})
    assert not (tmp_path / "a.jsonl").exists()
