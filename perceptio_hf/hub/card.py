"""Model cards: a new one for a checkpoint, and changes to the metadata of one that somebody has written."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .training_record import TrainingRecord, is_hub_name

if TYPE_CHECKING:
    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration

TAGS = ("perceptio", "internvl", "sam2", "depth-estimation", "referring-segmentation")
UNKNOWN_LICENSE = "unknown"  # an identifier of the Hub's list
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_DEFAULT_CARD = "model card of a 🤗 transformers model that has been pushed on the Hub"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the checkpoint does not know; empty where nobody knows.

    Args:
        license: identifier of the Hub's list, e.g. apache-2.0.
        base_models: Hub names, owner/name.
        datasets: Hub names.
        languages: codes such as en.
        results: evaluation results, see `read_results`.

    Raises:
        ValueError: for a name or licence that the Hub would refuse.
    """

    license: str | None = None
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    results: tuple[EvalResult, ...] = ()

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ValueError(f"The licence {self.license!r} is no identifier of the Hub, such as apache-2.0 or mit.")
        for name in (*self.base_models, *self.datasets):
            check_repo_name(name)
        wrong = [code for code in self.languages if not _LANGUAGE.fullmatch(code)]
        if wrong:
            raise ValueError(f"The language {wrong[0]!r} is no code of two or three letters, such as en.")

    def metadata(self) -> dict:
        """The fields of `ModelCardData` that are known, except results."""
        values = {
            "language": list(self.languages),
            "license": self.license,
            "base_model": list(self.base_models),
            "datasets": list(self.datasets),
        }
        return {name: value for name, value in values.items() if value}


def check_repo_name(name: str) -> None:
    """Raises ValueError for what cannot be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository on the Hub: {error}") from None


def new_card(
    model: "PerceptioForConditionalGeneration",
    repo: str,
    facts: CardFacts | None = None,
    training: TrainingRecord | None = None,
) -> str:
    """The text of a card for `model`, which may be on the meta device.

    Args:
        repo: the Hub name it goes to, owner/name.
        facts: what the caller knows about it.
        training: how it was trained, see `read_training`.
    """
    facts, training = facts or CardFacts(), training or TrainingRecord()
    if training.base_model and not facts.base_models:
        facts = replace(facts, base_models=(training.base_model,))
    name = repo.rpartition("/")[2]
    data = ModelCardData(
        **{"license": UNKNOWN_LICENSE} | facts.metadata(),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
        model_name=name,
        eval_results=list(facts.results) or None,
    )
    if data.eval_results is None:
        data.pop("model_name")  # of the results; without them the Hub has no such field
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=data.to_yaml(),
        name=name,
        repo=repo,
        parts=_parts(model),
        total=_total(model),
        base_models=facts.base_models,
        datasets=facts.datasets,
        training=training,
        results=[_row(result) for result in facts.results],
        grid=model.config.depth_config.grid_size,
        mask_size=model.mask_size,
    )


def _parts(model: "PerceptioForConditionalGeneration") -> list[tuple[str, str, str]]:
    """Rows of the table of parts: part, class, size."""
    config = model.config
    vision, text, masks, depth = config.vision_config, config.text_config, config.mask_config, config.depth_config
    side = masks.prompt_encoder_config.image_size
    return [
        (
            "vision",
            f"InternVL ViT, {vision.image_size[0]} x {vision.image_size[1]} pixels, patches of {vision.patch_size[0]}",
            f"{vision.hidden_size} wide, {vision.num_hidden_layers} layers, {config.image_seq_length} tokens per tile",
        ),
        ("language", text.model_type, f"{text.hidden_size} wide, {text.num_hidden_layers} layers"),
        ("masks", f"SAM2, {side} x {side} pixels", "masks of {} x {}".format(*model.mask_size)),
        ("depth", "`DepthVQVAE`", f"{depth.grid_size} x {depth.grid_size} codes of {depth.num_codes}"),
    ]


def _total(model: "PerceptioForConditionalGeneration") -> str:
    count = model.num_parameters()
    number = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
    return f"{number} parameters; the language part is in {str(model.dtype).removeprefix('torch.')}."


def check_values(results: Iterable[EvalResult], place: str | os.PathLike) -> None:
    """Raise ValueError for a metric that is no number: NaN and infinity are what a failed evaluation leaves."""
    for result in results:
        if not _is_finite(result.metric_value):
            raise ValueError(
                f"{place}: the metric {result.metric_name or result.metric_type} on {result.dataset_name} is "
                f"{result.metric_value!r}; expected a finite number. Measure again, or leave it out."
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):  # of several classes, say
        return bool(value) and all(map(_is_finite, value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, str):  # "0.83", or "0.83 ± 0.02"
        return bool(re.search(r"\d", value)) and not re.search(r"(?i)\b(?:nan|inf|infinity|none|null)\b", value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _row(result: EvalResult) -> tuple[str, str, str]:
    where = " ".join(str(part) for part in (result.dataset_config, result.dataset_split) if part)
    data = f"{result.dataset_name} ({where})" if where else result.dataset_name
    cells = (data, result.metric_name or result.metric_type, str(result.metric_value))
    return tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)


def revised_card(text: str, repo: str, facts: CardFacts) -> str:
    """A card that somebody has written, with what `facts` knows set in its metadata; the rest stays as it is.

    Results join those it has; one of the same metric on the same data takes the place of the older.

    Raises:
        ValueError: if its metadata cannot be read, or a metric in it is no number.
    """
    card = check_card(text)
    check_values(card.data.eval_results or (), "README.md")
    if facts == CardFacts():
        return text
    for name, value in facts.metadata().items():
        card.data[name] = value
    if facts.results:
        fresh = set(map(_measured, facts.results))
        kept = [old for old in card.data.eval_results or [] if _measured(old) not in fresh]
        card.data.eval_results = [*kept, *facts.results]
        card.data.model_name = card.data.model_name or repo.rpartition("/")[2]
    return card.content


def _measured(result: EvalResult) -> tuple[str | None, ...]:
    """What a result is of: not how many samples that took, nor with which settings."""
    data = (result.dataset_type, result.dataset_name, result.dataset_config, result.dataset_split)
    return result.task_type, *data, result.dataset_revision, result.metric_type, result.metric_config


def replace_default_card(card: Path, model: "PerceptioForConditionalGeneration", repo: str) -> None:
    """Put a card of Perceptio in the place of the one that transformers writes by itself; any other one stays."""
    default = card.read_text(encoding="utf-8")
    if _DEFAULT_CARD not in default:
        return
    source = model.config.name_or_path
    has_base = source != repo and is_hub_name(source)
    fresh = check_card(new_card(model, repo, CardFacts(base_models=(source,) if has_base else ())))
    fresh.data.tags = list(dict.fromkeys([*fresh.data.tags, *(check_card(default).data.tags or [])]))
    fresh.save(card)


def check_card(text: str) -> ModelCard:
    """Parse a card.

    Raises:
        ValueError: if its metadata block is no YAML, no mapping, or has evaluation results of another form.
    """
    try:
        return ModelCard(text)
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The metadata of README.md cannot be read: {' '.join(str(error).split())}") from None


def read_results(path: str | os.PathLike) -> tuple[EvalResult, ...]:
    """Evaluation results from a YAML file: a `model-index` as cards have it, or a list of `EvalResult`s' fields.

    Raises:
        ValueError: if the file does not exist or holds neither, or a metric is no number.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no file of evaluation results {path}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        if isinstance(document, dict):
            index = document["model-index"]
            results = model_index_to_eval_results(index)[1] if index else []
        else:
            results = [EvalResult(**item) for item in document]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no evaluation results ({type(error).__name__}: {error}). Expected the key model-index as "
            "model cards have it, or a list of task_type, dataset_type, dataset_name, metric_type and metric_value."
        ) from None
    if not results:
        raise ValueError(f"{path} holds no evaluation results: it is empty.")
    check_values(results, path)
    return tuple(results)
