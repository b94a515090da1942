"""Results in the form of the Hub's model cards, in a file that `perceptio push --eval-results` merges into a card."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from perceptio_hf.files import write_text

_TASK_TYPES = {  # names of the Hub's list of tasks
    "referring_segmentation": "image-segmentation",
    "relative_depth": "visual-question-answering",
    "multiple_choice": "visual-question-answering",
    "depth": "depth-estimation",
}
_DATASETS = {  # benchmark -> (the Hub's id or ours, name)
    "refcoco": ("lmms-lab/RefCOCO", "RefCOCO"),
    "refcoco+": ("lmms-lab/RefCOCOplus", "RefCOCO+"),
    "refcocog": ("lmms-lab/RefCOCOg", "RefCOCOg"),
    "grefcoco": ("grefcoco", "gRefCOCO"),
    "hardblink": ("hardblink", "HardBLINK"),
    "blink-depth": ("BLINK-Benchmark/BLINK", "BLINK, relative depth"),
    "mmbench": ("mmbench", "MMBench"),
    "scienceqa": ("scienceqa", "ScienceQA"),
    "ai2d": ("ai2d", "AI2D"),
    "depth": ("depth-pairs", "Pictures with depth maps"),
    "world-refer": ("perceptio-world", "Rendered scenes, referring expressions"),
    "world-closest": ("perceptio-world", "Rendered scenes, closest of marked points"),
    "world-plain": ("perceptio-world", "Rendered scenes, counts and attributes"),
    "world-depth": ("perceptio-world", "Rendered scenes, depth"),
}
METRIC_NAMES = {
    "ciou": "cIoU",
    "giou": "gIoU",
    "no_target_accuracy": "accuracy without target",
    "accuracy": "accuracy",
    "accuracy_3": "accuracy, 3 points",
    "accuracy_4": "accuracy, 4 points",
    "accuracy_5": "accuracy, 5 points",
    "circular_accuracy": "circular accuracy",
    "absrel": "AbsRel",
    "delta1": "delta < 1.25",
    "rmse": "RMSE in metres",
    "relative_mae": "mean error of relative depth",
}


def card_results(summary: dict[str, Any]) -> list[EvalResult]:
    """The scores of a run that belong on a card; shares are 0 to 1, as in the summary."""
    kind, name = _DATASETS[summary["benchmark"]]
    count = summary["samples"]
    return [
        EvalResult(
            task_type=_TASK_TYPES[summary["task"]],
            dataset_type=kind,
            dataset_name=name,
            dataset_config=summary["benchmark"],
            dataset_split=summary["split"],
            dataset_args={"samples": count, "spatial": summary["generation"]["spatial"]},
            metric_type=metric,
            metric_name=label,
            metric_value=round(summary["scores"][metric], 4),
        )
        for metric, label in METRIC_NAMES.items()
        if summary["scores"].get(metric) is not None
    ]


def write_card(path: Path, summary: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write the results of a run to a YAML file, beside those of other benchmarks that it has.

    Args:
        overwrite: begin anew where the file has results of another model.

    Raises:
        ValueError: for a file that holds something else, or results of another model.
    """
    name = Path(summary["model"]["name"]).name
    results = card_results(summary)
    old = [] if overwrite and not _is_of(path, name) else _read_old(path, name)
    new = {_measured(item) for item in results}
    kept = [item for item in old if _measured(item) not in new]
    index = eval_results_to_model_index(name, [*kept, *results])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True))


def _measured(result: EvalResult) -> tuple[str | None, ...]:
    return result.dataset_config, result.dataset_split, result.metric_type


def check_card(path: Path, model: str, *, overwrite: bool = False) -> None:
    """Raise before long work what `write_card` would raise after it."""
    if not overwrite:
        _read_old(path, Path(model).name)


def _read_old(path: Path, name: str) -> list[EvalResult]:
    if not path.exists():
        return []
    found, results = _parse(path)
    if found != name:
        raise ValueError(f"{path} has results of the model {found}, not {name}; name another file, or --overwrite.")
    return results


def _is_of(path: Path, name: str) -> bool:
    try:
        return path.exists() and _parse(path)[0] == name
    except ValueError:
        return False


def _parse(path: Path) -> tuple[str, list[EvalResult]]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return model_index_to_eval_results(document["model-index"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is there and is no card of results; name another file, or --overwrite.") from None
