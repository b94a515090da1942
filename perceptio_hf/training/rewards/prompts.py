"""Samples as prompts: what was said up to the answer, and what the answer is measured by."""

from typing import TYPE_CHECKING, Any

from PIL import Image

from perceptio_hf.data.encoded import open_encoded
from perceptio_hf.data.form import name_of, split_at_pictures
from perceptio_hf.data.lines import SCHEMES
from perceptio_hf.data.rows import as_rows, import_datasets, sample_features
from perceptio_hf.processing.picture_sources import find_picture
from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN, SEG_TOKEN

from .texts import without_spatial

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def as_prompts(samples: "Dataset | IterableDataset", limit: int | None = None) -> "Dataset":
    """The data set that TRL's GRPO and RLOO read, one prompt for each sample (see `perceptio_hf.data.samples.Sample`).

    Columns: `prompt` (the turns before the assistant's last), `images`, and for rewards `answer` (the words of its last
    turn), `spans` and `segs` (how many depth spans and [SEG] that turn holds), `masks`, `depth` and `depth_valid` (of
    that turn), `depth_unit`, `task`.

    Args:
        limit: how many samples are taken, of a stream the first ones; None: all.

    Raises:
        ValueError: where there is no sample, one asks nothing or has a picture that cannot be opened, or the set has no
            samples' columns.
    """
    datasets = import_datasets()
    features = sample_features()
    number = datasets.Value("int32")
    columns = datasets.Features(
        {"prompt": features["messages"], "answer": features["task"], "spans": number, "segs": number}
        | {name: features[name] for name in ("images", "masks", "depth", "depth_valid", "depth_unit", "task")}
    )
    samples = as_rows(samples, "The set of prompts")
    taken = samples if limit is None else samples.take(limit)
    rows = [_prompt(row) for row in taken]
    if not rows:
        raise ValueError("There is no sample to make prompts of.")
    prompts = datasets.Dataset.from_list(rows, features=columns)
    return prompts.cast_column("images", datasets.List(datasets.Image()))


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"Sample {name_of(row)} has no turn of the assistant, so there is nothing to measure by.")
    answer = "".join(part.get("text") or "" for part in messages[last]["content"])
    turns = [{"role": message["role"], "content": _parts(message)} for message in messages[:last]]
    user = next((turn for turn in turns if turn["role"] == "user"), None)
    if user is None:
        raise ValueError(f"Sample {name_of(row)} has no turn of the user before the answer, so it asks nothing.")
    images = row["images"] or []
    for image in images:  # in the middle of a training nobody would say of which sample it is
        _check_opens(image, row)
    if not any(part["type"] == "image" for turn in turns for part in turn["content"]):
        user["content"][:0] = [{"type": "image", "text": None}] * len(images)
    spans = answer.count(DEPTH_START_TOKEN + DEPTH_END_TOKEN)
    return {
        "prompt": turns,
        "images": images,
        "answer": without_spatial(answer) or None,
        "spans": answer.count(DEPTH_START_TOKEN),
        "segs": answer.count(SEG_TOKEN),
        "masks": _last(row["masks"], answer.count(SEG_TOKEN)),
        **{name: _last(row[name], spans) for name in ("depth", "depth_valid")},
        **{name: row[name] for name in ("depth_unit", "task")},
    }


def _check_opens(image: dict[str, Any], row: dict[str, Any]) -> None:
    """ValueError unless it is a picture, by its header; an address is left to those who fetch it."""
    try:
        source = open_encoded(image)
        if isinstance(source, str) and not SCHEMES.match(source):
            with Image.open(find_picture(source)[0]):
                pass
    except Exception as error:  # Pillow's readers raise many kinds
        raise ValueError(f"Sample {name_of(row)}: {error}; mend the picture, or leave the sample out.") from None


def _last(items: list[Any] | None, count: int) -> list[Any]:
    """What belongs to the last turn; those before it have theirs in front."""
    items = items or []
    return items[len(items) - count :] if 0 < count <= len(items) else []


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message; those that the assistant has not said are cut where a picture stands in a text. Spans of
    earlier answers are left out: samples name only their place, and a span without codes is none."""
    if message["role"] == "assistant":
        span = DEPTH_START_TOKEN + DEPTH_END_TOKEN
        return [part | {"text": part["text"] and part["text"].replace(span, "")} for part in message["content"]]
    pieces = (split_at_pictures(part["text"]) if part["type"] == "text" else [part] for part in message["content"])
    return [{"text": None, **piece} for pieces_of_part in pieces for piece in pieces_of_part]
