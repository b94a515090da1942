"""Runs a model over a benchmark, batch by batch, into a folder of results that a killed run goes on in.

The folder holds samples.jsonl, one line for each sample, and with replaced spans replaced.jsonl. Batches begin at the
same samples however often a run was stopped, so that the lines come out the same.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perceptio_hf.bulk.engines import Engine, LocalEngine, Result, fill_journal
from perceptio_hf.bulk.journal import Journal, claim_path
from perceptio_hf.bulk.progress import Watch
from perceptio_hf.evaluation.benchmarks.sample import Benchmark, Sample
from perceptio_hf.evaluation.replacement.oracle import DepthOf, encode_oracle, lacks_depth, open_oracle
from perceptio_hf.evaluation.replacement.token_replacement import (
    answers_with_codes,
    check_replacements,
    lacks_pictures,
    replaced_codes,
)
from perceptio_hf.files import in_use

from .answering import Response, answer_questions, encode_questions, token_budget
from .scoring import SCORINGS, Record, score_answer, score_text

if TYPE_CHECKING:
    from PIL import Image

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

SAMPLES_FILE, REPLACED_FILE, SUMMARY_FILE = "samples.jsonl", "replaced.jsonl", "summary.json"
_OF_THE_PLACE = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")
Load = Callable[[], "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]"]


@dataclass(frozen=True)
class RunSettings:
    """How a benchmark is run.

    Args:
        spatial: as in `model.generate`.
        max_new_tokens: longest answer in tokens, spans included; None leaves it to `answering.token_budget`.
        batch_size: samples that go through the model together.
        skip_broken: leave out samples whose picture or target cannot be read, instead of stopping.
        replacements: names of `replacement.REPLACEMENTS`; with any, identity is among them.
        as_possible: leave out replacements that cannot be had, with a note, instead of stopping: the oracle where no
            true depth is known, another picture where there are too few.
        oracle, oracle_unit: see `oracle.open_oracle`.
        seed: of replacements that are drawn.

    Raises:
        ValueError: for a batch size below 1, an unknown replacement, or replacements without a depth span.
    """

    spatial: str
    max_new_tokens: int | None = None
    batch_size: int = 8
    skip_broken: bool = False
    replacements: tuple[str, ...] = ()
    as_possible: bool = False
    oracle: str | None = None
    oracle_unit: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be 1 or more.")
        if "oracle" not in self.replacements and (self.oracle is not None or self.oracle_unit is not None):
            raise ValueError("--oracle is for the replacement `oracle`; add --replace-depth identity,oracle.")
        if not self.replacements:
            return
        object.__setattr__(self, "replacements", check_replacements(self.replacements))
        if self.spatial not in ("auto", "depth", "seg+depth"):
            raise ValueError(
                f"with spatial={self.spatial!r} there is no depth span to replace; use depth or seg+depth."
            )


@dataclass
class Run:
    """What came out of a run.

    Args:
        settings: that it was run with, `max_new_tokens` resolved.
        records: one for each sample that was answered, with its "target" (see `scoring.score_answer`).
        left_out: samples that could not be used, one line each.
        replaced: one for each record with a span, {"id": ..., replacement: {"answer", "read", "score"}}; None where
            no span was replaced.
        seconds, answered: what this process itself took and answered, replaced spans aside.
    """

    settings: RunSettings
    records: list[Record]
    left_out: list[str]
    replaced: list[Record] | None = None
    seconds: float = 0.0
    answered: int = 0


def run_benchmark(
    model: "PerceptioForConditionalGeneration",
    processor: "PerceptioProcessor",
    benchmark: Benchmark,
    folder: Path,
    settings: RunSettings,
    *,
    weights: str,
    overwrite: bool = False,
    watch: Watch | None = None,
    engine: Engine | None = None,
    load: Load | None = None,
    reopen: Callable[[], Benchmark] | None = None,
) -> Run:
    """Answer every sample that the folder has no result of yet.

    Args:
        model: answers itself, unless `load` is given.
        folder: of the results; it is made.
        weights: what tells the model from others (see `summary.digest_weights`).
        overwrite: replace results of another model, data or setting.
        watch: told after every batch.
        engine: what works on the batches; default: this process.
        load, reopen: how a worker in another process comes by model and processor, and by the benchmark.

    Raises:
        ValueError: a folder with results of another model, data or setting; a sample that cannot be used (named).
    """
    if settings.replacements and not SCORINGS[benchmark.task].choices:
        raise ValueError(f"Replaced spans are scored by answers in words; {benchmark.name} has masks or depth.")
    settings = replace(settings, max_new_tokens=token_budget(model, settings.max_new_tokens))
    claim = _claim(benchmark, settings, weights) | {"settings_of_the_model": digest_settings(model, processor)}
    ids = [sample.id for sample in benchmark.samples]
    oracle = replaced = None
    notes: list[str] = []
    if "oracle" in settings.replacements:  # what it lacks is said before the work
        lacking = settings.oracle is None and lacks_depth(benchmark.samples)
        if lacking and settings.as_possible:
            settings = _without(settings, "oracle", lacking, notes)
        else:
            oracle = open_oracle(settings.oracle, settings.oracle_unit, benchmark.samples, str(model.device))
    with in_use(folder, f"evaluation of {benchmark.name}"):
        journal = Journal(folder / SAMPLES_FILE, claim, ids, overwrite=overwrite)
        if not journal.records:
            _remove_results(folder)
        parts = _Parts(load or (lambda: (model, processor)), reopen or (lambda: benchmark))
        runner = _Runner(parts, benchmark, settings, engine or LocalEngine(), watch or _ignore)
        seconds, answered = runner.answer(journal)
        if settings.replacements:
            oracle_of = None if oracle is None or reopen else lambda *_: oracle
            replaced = runner.replace(journal, folder / REPLACED_FILE, claim, overwrite, oracle_of, notes)
    records = [
        record | {"target": sample.target}
        for record, sample in zip(journal.records, benchmark.samples, strict=True)
        if "left_out" not in record
    ]
    left_out = [f"left out {record['id']}: {record['left_out']}" for record in journal.records if "left_out" in record]
    return Run(runner.settings, records, notes + left_out, replaced, seconds=seconds, answered=answered)


def _without(settings: RunSettings, replacement: str, why: str, notes: list[str]) -> RunSettings:
    notes.append(f"left out the replacement {replacement}: {why}")
    own = {"oracle": None, "oracle_unit": None} if replacement == "oracle" else {}
    return replace(settings, replacements=tuple(name for name in settings.replacements if name != replacement), **own)


def _claim(benchmark: Benchmark, settings: RunSettings, weights: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "model": weights,
        "data": benchmark.data_hash,
        "prompt": benchmark.prompt,
        "spatial": settings.spatial,
        "max_new_tokens": settings.max_new_tokens,
    }


def digest_settings(model: "PerceptioForConditionalGeneration", processor: "PerceptioProcessor") -> str:
    """SHA-256 over what beside the weights decides about answers: the configuration, how it generates, and how the
    processor prepares pictures, words and masks. Where they were loaded from, and by which release, is left out."""
    settings = [model.config.to_dict(), model.generation_config.to_dict(), processor.to_dict(), processor.chat_template]
    return hashlib.sha256(json.dumps(_lasting(settings), sort_keys=True, default=str).encode()).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _lasting(item) for key, item in value.items() if key not in _OF_THE_PLACE}
    return [_lasting(item) for item in value] if isinstance(value, (list, tuple)) else value


def _remove_results(folder: Path) -> None:
    """What an earlier run left beside the lines that are written anew; a summary must not outlive its lines."""
    replaced = folder / REPLACED_FILE
    for path in (folder / SUMMARY_FILE, replaced, claim_path(replaced)):
        path.unlink(missing_ok=True)


def _ignore(*_: object) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class _Parts:
    """How a worker comes by what it works with: functions that give model and processor, and the benchmark."""

    load: Load
    benchmark: Callable[[], Benchmark]


class _Runner:
    """The two passes over a benchmark: own answers, and answers behind replaced spans."""

    def __init__(self, parts: _Parts, benchmark: Benchmark, settings: RunSettings, engine: Engine, watch: Watch):
        self.parts, self.settings, self.engine, self.watch = parts, settings, engine, watch
        self.task, self.samples = benchmark.task, benchmark.samples

    def answer(self, journal: Journal) -> tuple[float, int]:
        """Fill the journal. Returns seconds and samples of this process."""
        begin = time.perf_counter()

        def tell(_: list[Result]) -> None:
            scores = [record["score"] for record in journal.records if "score" in record]
            shown = f"{SCORINGS[self.task].running} {np.mean(scores):.3f}" if scores else ""
            self.watch("answering", journal.done, len(self.samples), shown)

        job = partial(_AnswerWorker, self.parts, self.settings)
        answered = fill_journal(journal, self.engine, job, self._batches(range(len(self.samples))), tell)
        return time.perf_counter() - begin, answered

    def _batches(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.settings.batch_size
        return [items[start : start + size] for start in range(0, len(items), size)]

    def replace(
        self,
        answers: Journal,
        path: Path,
        claim: dict[str, Any],
        overwrite: bool,
        oracle: Callable[..., DepthOf] | None,
        notes: list[str],
    ) -> list[Record]:
        """Answer behind replaced spans, for every sample whose own answer has one."""
        spans = [
            (sample, record)
            for sample, record in zip(self.samples, answers.records, strict=True)
            if record.get("depth_codes")
        ]
        if not spans:
            raise ValueError("no answer has a depth span, so there is nothing to replace; use --spatial depth.")
        pictures = [sample.picture.name for sample, _ in spans]
        lacking = "other-image" in self.settings.replacements and lacks_pictures(pictures)
        if lacking and self.settings.as_possible:
            self.settings = _without(self.settings, "other-image", lacking, notes)
        settings = self.settings
        claim = claim | {
            "set_of_replacements": list(settings.replacements),
            "oracle": settings.oracle,
            "seed": settings.seed,
        }
        if settings.oracle_unit is not None:
            claim["oracle_unit"] = settings.oracle_unit
        journal = Journal(path, claim, [sample.id for sample, _ in spans], overwrite=overwrite)
        own = np.array([record["depth_codes"] for _, record in spans])
        codes = replaced_codes(settings.replacements, own, pictures, seed=settings.seed)
        places = {sample.id: place for place, sample in enumerate(self.samples)}
        items = [
            _Span(places[sample.id], record["before_depth"], {name: table[row] for name, table in codes.items()})
            for row, (sample, record) in enumerate(spans)
        ]

        def tell(_: list[Result]) -> None:
            shown = " ".join(
                f"{name} {np.mean([record[name]['score'] for record in journal.records]):.3f}"
                for name in settings.replacements[:3]
            )
            self.watch("replacing", journal.done, len(spans), shown)

        if settings.oracle is not None and Path(settings.oracle).is_dir():  # workers have other working folders
            settings = replace(settings, oracle=str(Path(settings.oracle).absolute()))
        job = partial(_ReplaceWorker, self.parts, settings, oracle or open_oracle)
        fill_journal(journal, self.engine, job, self._batches(items), tell)
        return journal.records


class _AnswerWorker:
    """Answers samples, given by their places in the benchmark."""

    def __init__(self, parts: _Parts, settings: RunSettings):
        self.model, self.processor = parts.load()
        benchmark = parts.benchmark()
        self.task, self.samples, self.settings = benchmark.task, benchmark.samples, settings

    def read(self, batch: Sequence[int]) -> "list[Image.Image | Record]":
        """Of each sample the picture, or what is recorded where it cannot be read."""
        return [self._picture(self.samples[place]) for place in batch]

    def _picture(self, sample: Sample) -> "Image.Image | Record":
        try:
            return sample.picture.open()
        except ValueError as error:
            return self._broken(sample, error)

    def work(self, batch: Sequence[int], read: "list[Image.Image | Record]") -> list[Result]:
        samples = [self.samples[place] for place in batch]
        records = {sample.id: found for sample, found in zip(samples, read, strict=True) if isinstance(found, dict)}
        usable = [(sample, found) for sample, found in zip(samples, read, strict=True) if sample.id not in records]
        if usable:
            responses = answer_questions(
                self.model,
                self.processor,
                [picture for _, picture in usable],
                [sample.question for sample, _ in usable],
                spatial=self.settings.spatial,
                max_new_tokens=self.settings.max_new_tokens,
                masks=self.task == "referring_segmentation",
            )
            for (sample, _), response in zip(usable, responses, strict=True):
                records[sample.id] = self._record(sample, response)
        return [Result(records[sample.id]) for sample in samples]

    def _record(self, sample: Sample, response: Response) -> Record:
        try:
            scored = score_answer(self.task, sample, response.answer)
        except ValueError as error:
            return self._broken(sample, error)
        head = {"id": sample.id, "picture": sample.picture.name, "question": sample.question}
        return head | scored | {"before_depth": response.before_depth}

    def _broken(self, sample: Sample, error: ValueError) -> Record:
        if not self.settings.skip_broken:
            raise ValueError(f"{error} (sample {sample.id}; --on-error skip leaves such samples out.)") from None
        return {"id": sample.id, "left_out": str(error)}


@dataclass(frozen=True)
class _Span:
    """A depth span of an answer: the sample's place in the benchmark, the ids of the tokens in front of it, and for
    each replacement but the oracle the codes (N,) that take its place."""

    place: int
    before: list[int]
    codes: dict[str, np.ndarray]


class _ReplaceWorker:
    """Answers samples behind replaced spans.

    Args:
        oracle: called as `open_oracle`.
    """

    def __init__(self, parts: _Parts, settings: RunSettings, oracle: Callable[..., DepthOf]):
        self.model, self.processor = parts.load()
        benchmark = parts.benchmark()
        self.task, self.samples, self.settings = benchmark.task, benchmark.samples, settings
        self.depth_of = None
        if "oracle" in settings.replacements:
            self.depth_of = oracle(settings.oracle, settings.oracle_unit, self.samples, str(self.model.device))

    def read(self, batch: Sequence[_Span]) -> "list[Image.Image]":
        return [self.samples[span.place].picture.open() for span in batch]

    def work(self, batch: Sequence[_Span], read: "list[Image.Image]") -> list[Result]:
        samples = [self.samples[span.place] for span in batch]
        codes = {name: np.array([span.codes[name] for span in batch]) for name in batch[0].codes}
        if self.depth_of is not None:
            codes["oracle"] = np.array(
                [encode_oracle(self.model.depth_model, self.depth_of(sample)) for sample in samples]
            )
        inputs = encode_questions(self.processor, read, [sample.question for sample in samples])
        texts = answers_with_codes(
            self.model,
            self.processor,
            inputs.to(self.model.device),
            [span.before for span in batch],
            {name: codes[name] for name in self.settings.replacements},
            spatial=self.settings.spatial,
            max_new_tokens=self.settings.max_new_tokens,
        )
        return [
            Result({"id": sample.id} | {name: _scored(self.task, sample, found[row]) for name, found in texts.items()})
            for row, sample in enumerate(samples)
        ]


def _scored(task: str, sample: Sample, text: str) -> Record:
    return {"answer": text} | score_text(task, sample.target, text)
