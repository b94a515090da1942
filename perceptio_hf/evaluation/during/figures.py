"""Held-out sets that are answered by generation while a model trains.

A recipe lists them (`figures`), each as

    - benchmark: world-closest   # one of `perceptio eval`
      limit: 30                  # its first samples
      cases: 2                   # pictures of the best, the worst and other cases; 0: none
    - benchmark: refcoco
      data: data/refcoco         # and the other options that the benchmark's files need: split, unit,
                                 # pictures, depths, max_depth
      limit: 100
    - broken_spans: 64           # responses that are sampled without the grammar, to the questions of the first
                                 # benchmark with depth spans

Every evaluation of the trainer (`eval_strategy`, `eval_steps`) then has their figures among its metrics, under names
such as eval_world-closest_accuracy and eval_broken_spans, which `metric_for_best_model` may name too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from perceptio_hf.data.keys import check_keys, check_value
from perceptio_hf.evaluation.benchmarks import open_benchmark
from perceptio_hf.evaluation.benchmarks.sample import Benchmark
from perceptio_hf.evaluation.report.case_sheet import choose_cases, draw_cases
from perceptio_hf.evaluation.run.answering import answer_questions, encode_questions, token_budget
from perceptio_hf.evaluation.run.scoring import Record, score_answer, total_scores
from perceptio_hf.files import expanded

from .broken_spans import sample_spans

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

BROKEN = "broken_spans"
_TEXTS = ("benchmark", "data", "split", "unit", "pictures", "depths")
_OPTIONS = dict.fromkeys(_TEXTS, str) | {"max_depth": float}
_NUMBERS = {"limit": int, "cases": int}
_DEFAULT_CASES = 2
_COUNTS = ("samples", "without_depth")  # of a score: how many, not how good


@dataclass(frozen=True, eq=False)
class _Set:
    benchmark: Benchmark
    cases: int


class HeldOutFigures:
    """Measures a model on the sets that a recipe lists.

    Args:
        sets: as the recipe has them.
        data_folder: in which their files lie, unless `data` is absolute.
        batch_size: questions that go through the model together.

    Raises:
        ValueError: for unknown keys and benchmarks, files that are missing, and spans without a benchmark to ask by.
    """

    def __init__(self, sets: Sequence[Mapping[str, Any]], data_folder: str | None = None, *, batch_size: int = 8):
        self.batch_size, self.spans = batch_size, 0
        self.sets: dict[str, _Set] = {}
        for number, entry in enumerate(sets, 1):
            self._read(entry, f"figures, entry {number}", data_folder)
        if self.spans and self._with_spans() is None:
            raise ValueError(f"figures have {BROKEN}, but no benchmark that asks for depth; add one, e.g. world-depth.")

    def _read(self, entry: Any, place: str, data_folder: str | None) -> None:
        if isinstance(entry, Mapping) and set(entry) == {BROKEN}:
            check_value(f"{place}: {BROKEN}", entry[BROKEN], int)
            if entry[BROKEN] < 1:
                raise ValueError(f"{place}: {BROKEN} is {entry[BROKEN]}; sample one response or more, or leave it out.")
            self.spans = entry[BROKEN]
            return
        if not isinstance(entry, Mapping) or "benchmark" not in entry:
            raise ValueError(f"{place} is {entry!r}; expected keys with benchmark among them, or {BROKEN} alone.")
        kinds = _OPTIONS | _NUMBERS
        check_keys(entry, kinds, place)
        for key, value in entry.items():
            check_value(f"{place}: {key}", value, kinds[key])
        if entry.get("cases", 0) < 0:
            raise ValueError(f"{place}: cases is {entry['cases']}; draw some, or none by 0.")
        options = {key: value for key, value in entry.items() if key not in ("benchmark", "data", "cases")}
        data = entry.get("data")
        data = None if data is None else expanded(data_folder or ".") / expanded(data)
        name = entry["benchmark"]
        if name in self.sets:
            raise ValueError(f"{place}: {name} is there twice.")
        self.sets[name] = _Set(open_benchmark(name, data, **options), entry.get("cases", _DEFAULT_CASES))

    @property
    def prefixes(self) -> list[str]:
        """How the names of all figures begin."""
        return [*(f"{name}_" for name in self.sets), *([BROKEN] if self.spans else [])]

    @property
    def questions(self) -> int:
        """How many one measurement answers."""
        return self.spans + sum(len(item.benchmark.samples) for item in self.sets.values())

    def _with_spans(self) -> Benchmark | None:
        return next((item.benchmark for item in self.sets.values() if "depth" in item.benchmark.spatial), None)

    @torch.no_grad()
    def measure(
        self, model: "PerceptioForConditionalGeneration", processor: "PerceptioProcessor"
    ) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """The figures by name, BENCHMARK_METRIC, and pictures of cases by benchmark; the model stays in its mode."""
        was_training = model.training
        model.eval()
        try:
            return self._measured(model, processor)
        finally:
            model.train(was_training)

    def _measured(self, model, processor) -> tuple[dict[str, float], dict[str, Image.Image]]:
        figures: dict[str, float] = {}
        pictures: dict[str, Image.Image] = {}
        for name, item in self.sets.items():
            records = self._answered(model, processor, item.benchmark)
            scores = total_scores(item.benchmark.task, records)
            figures |= {f"{name}_{metric}": value for metric, value in scores.items() if _is_figure(metric, value)}
            if item.cases:
                samples = {sample.id: sample for sample in item.benchmark.samples}
                cases = choose_cases(records, item.cases)
                pictures[name] = draw_cases(item.benchmark.task, cases, samples, model.depth_model)
        if self.spans:
            rates = sample_spans(model, self._questions(model, processor, self._with_spans()))
            figures |= {BROKEN: rates["malformed_rate"], f"{BROKEN}_count_mae": rates["count_mae"]}
        return figures, pictures

    def _answered(self, model, processor, benchmark: Benchmark) -> list[Record]:
        records: list[Record] = []
        for start in range(0, len(benchmark.samples), self.batch_size):
            samples = benchmark.samples[start : start + self.batch_size]
            responses = answer_questions(
                model,
                processor,
                [sample.picture.open() for sample in samples],
                [sample.question for sample in samples],
                spatial=benchmark.spatial,
                max_new_tokens=token_budget(model),
                masks=benchmark.task == "referring_segmentation",
            )
            for sample, response in zip(samples, responses, strict=True):
                scored = score_answer(benchmark.task, sample, response.answer)
                records.append({"id": sample.id, "question": sample.question, "target": sample.target} | scored)
        return records

    def _questions(self, model, processor, benchmark: Benchmark):
        """Inputs of `generate`, `spans` questions in all."""
        asked = [benchmark.samples[number % len(benchmark.samples)] for number in range(self.spans)]
        for start in range(0, self.spans, self.batch_size):
            samples = asked[start : start + self.batch_size]
            pictures = [sample.picture.open() for sample in samples]
            yield encode_questions(processor, pictures, [sample.question for sample in samples]).to(model.device)


def _is_figure(name: str, value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and name not in _COUNTS
