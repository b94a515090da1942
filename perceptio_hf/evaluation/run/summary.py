"""What a run came to: one document with the scores, and all that they depend on."""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from perceptio_hf.evaluation.benchmarks import BENCHMARKS
from perceptio_hf.evaluation.benchmarks.sample import Benchmark
from perceptio_hf.evaluation.metrics.intervals import paired_interval, wilson_interval
from perceptio_hf.evaluation.replacement.token_replacement import REPLACEMENTS
from perceptio_hf.evaluation.report.published import PUBLISHED_REPLACEMENTS, REPLACEMENT_SOURCE

from .runner import Run
from .scoring import Record, baselines, headline, total_scores

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration

FORMAT = 1


@dataclass(frozen=True)
class ModelFacts:
    """Which model was run: what the user called it, the digest of its weights, its size, type of numbers and device."""

    name: str
    weights_sha256: str
    parameters: int
    dtype: str
    device: str

    @classmethod
    def of(cls, model: "PerceptioForConditionalGeneration", name: str) -> "ModelFacts":
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(name, digest_weights(model), model.num_parameters(), dtype, model.device.type)


def digest_weights(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights, wherever they were loaded from.

    It reads every weight once: about a second for each gigabyte.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_summary(
    benchmark: Benchmark,
    model: ModelFacts,
    run: Run,
    *,
    path: str | None = None,
    limit: int | None = None,
    max_depth: float | None = None,
) -> dict[str, Any]:
    """The summary of a run, of types that JSON has.

    Two runs with the same model, data and settings give the same summary but for "time", stopped in between or not.

    Args:
        path, limit, max_depth: where the data came from, how many were asked for, and beyond how many metres depth does
            not count; for people to read.

    Raises:
        ValueError: if no sample was answered.
    """
    if not run.records:
        raise ValueError(f"{benchmark.name}: every sample was left out, the first because {run.left_out[0]}")
    scores = total_scores(benchmark.task, run.records)
    name = headline(benchmark.task, scores)
    return {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "task": benchmark.task,
        "split": benchmark.split,
        "samples": len(run.records),
        "headline": {"metric": name, "value": scores[name]},
        "scores": _plain(scores),
        "baselines": baselines(benchmark.task, run.records),
        "replacement": _replacement(benchmark, run) if run.replaced else None,
        "model": vars(model),
        "data": {"path": path, "sha256": benchmark.data_hash, "limit": limit}
        | ({} if max_depth is None else {"max_depth": max_depth}),
        "left_out": [*run.left_out, *benchmark.notes],
        "prompt": BENCHMARKS[benchmark.name].prompt._asdict(),
        "generation": {
            "spatial": run.settings.spatial,
            "max_new_tokens": run.settings.max_new_tokens,
            "decoding": "greedy",
            "batch_size": run.settings.batch_size,
        },
        "versions": versions(),
        "time": {
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(run.seconds, 2),
            "answered": run.answered,
            "samples_per_second": round(run.answered / run.seconds, 3) if run.answered else None,
        },
    }


def versions() -> dict[str, str]:
    """Of what computed the answers."""
    import transformers

    import perceptio_hf

    return {
        "perceptio_hf": perceptio_hf.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def summarise_replacements(task: str, records: Sequence[Record], replaced: Sequence[Record]) -> dict[str, Any]:
    """How much of the accuracy rests on what the spans say.

    Args:
        records: own answers, with targets.
        replaced: of those with a span (see `runner.Run`).

    Returns:
        "samples", "without_span": how many answers have a span, and how many have none and are not counted here.
        "own": accuracy of the own answers. For each replacement under "replacements": "accuracy"; "changed", the share
        of answers that read otherwise than with identity; "points", percentage points above identity, and
        "points_interval", their 95 % interval (`paired_interval`).
        "chance": of these samples. "content_points": identity minus random, and "content_share": that as a share of
        what identity has above chance, None where identity is not clearly above it (its 95 % Wilson interval reaches
        chance); both None without random.
    """
    by_id = {record["id"]: record for record in records}
    own = [by_id[record["id"]] for record in replaced]
    names = [name for name in REPLACEMENTS if name in replaced[0]]
    right = {name: np.array([record[name]["score"] for record in replaced]) for name in names}
    chance = baselines(task, own)["chance"]["accuracy"]
    content = right["identity"].mean() - right["random"].mean() if "random" in right else None
    above = right["identity"].mean() - chance
    clear = wilson_interval(int(right["identity"].sum()), len(replaced))[0] > chance
    return {
        "samples": len(replaced),
        "without_span": len(records) - len(replaced),
        "own": float(np.mean([record["score"] for record in own])),
        "chance": chance,
        "replacements": {name: _compared(name, right, replaced) for name in names},
        "content_points": None if content is None else round(100 * float(content), 4),
        "content_share": None if content is None or not clear else round(float(content / above), 4),
    }


def _replacement(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    found = summarise_replacements(benchmark.task, run.records, run.replaced)
    if benchmark.task == "relative_depth":
        found["published"] = {"source": REPLACEMENT_SOURCE, "accuracy_percent": PUBLISHED_REPLACEMENTS}
    return found


def _compared(name: str, right: dict[str, np.ndarray], replaced: Sequence[Record]) -> dict[str, Any]:
    gained = int(((right[name] > 0) & (right["identity"] == 0)).sum())
    lost = int(((right[name] == 0) & (right["identity"] > 0)).sum())
    itself = name == "identity"
    low, high = (0.0, 0.0) if itself else paired_interval(gained, lost, len(replaced))
    changed = [record[name]["read"] != record["identity"]["read"] for record in replaced]
    return {
        "definition": REPLACEMENTS[name],
        "accuracy": float(right[name].mean()),
        "changed": float(np.mean(changed)),
        "points": round(100 * (gained - lost) / len(replaced), 4),
        "points_interval": [round(100 * low, 4), round(100 * high, 4)],
    }


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
