"""Results in the form of the Hub's model cards, in a file that `perceptio push --eval-results` merges into a card."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from perceptio_hf.evaluation.benchmarks import BENCHMARKS
from perceptio_hf.evaluation.run.scoring import SCORINGS
from perceptio_hf.files import in_use, write_text

_WEIGHTS = "weights_sha256"  # beside the index: what tells models of one name apart


def card_results(summary: dict[str, Any]) -> list[EvalResult]:
    """The scores of a run that belong on a card; shares are 0 to 1, as in the summary."""
    (kind, name), scoring = BENCHMARKS[summary["benchmark"]].hub, SCORINGS[summary["task"]]
    how = {"samples": summary["samples"], "spatial": summary["generation"]["spatial"]}
    how |= {name: summary["data"][name] for name in ("max_depth",) if name in summary["data"]}
    return [
        EvalResult(
            task_type=scoring.hub_task,
            dataset_type=kind,
            dataset_name=name,
            dataset_config=summary["benchmark"],
            dataset_split=summary["split"],
            dataset_args=how,
            metric_type=metric,
            metric_name=label,
            metric_value=round(summary["scores"][metric], 4),
        )
        for metric, label in scoring.metrics.items()
        if summary["scores"].get(metric) is not None
    ]


def write_card(path: Path, summary: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write the results of a run to a YAML file, beside those of other benchmarks that it has; what it has of this one
    goes, all metrics of it.

    Args:
        overwrite: begin anew where the file has results of another model.

    Raises:
        ValueError: for a file that holds something else, or results of another model, which its name and its weights
            tell.
    """
    name, weights = Path(summary["model"]["name"]).name, summary["model"]["weights_sha256"]
    results = card_results(summary)
    new = {_measured(item) for item in results}
    with in_use(path.with_suffix(""), "writing a card of results", patience=60):  # of two that read, one would be lost
        kept = [item for item in _read_old(path, name, weights, overwrite) if _measured(item) not in new]
        index = eval_results_to_model_index(name, [*kept, *results])
        document = {"model-index": index, _WEIGHTS: weights}
        write_text(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _measured(result: EvalResult) -> tuple[str | None, ...]:
    return result.dataset_config, result.dataset_split


def check_card(path: Path, model: str, weights: str | None = None, *, overwrite: bool = False) -> None:
    """Raise before long work what `write_card` would raise after it, so far as name and weights are known."""
    _read_old(path, Path(model).name, weights, overwrite)


def _read_old(path: Path, name: str, weights: str | None, overwrite: bool) -> list[EvalResult]:
    """The results that stay. Those of another model only `overwrite` replaces, what is no card nothing."""
    if not path.exists():
        return []
    found, results, its_weights = _parse(path)
    same = its_weights is None or weights is None or its_weights == weights
    if found == name and same:
        return results
    if overwrite:
        return []
    other = f"the model {found}, not {name}" if found != name else f"another {name}, with other weights"
    raise ValueError(f"{path} has results of {other}; name another file, or --overwrite.")


def _parse(path: Path) -> tuple[str, list[EvalResult], str | None]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return *model_index_to_eval_results(document["model-index"]), document.get(_WEIGHTS)
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no card of results, so it is not replaced; name another file.") from None
