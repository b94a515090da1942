"""Questions about many pictures, without a truth: the lines that `perceptio predict` writes for a folder or a list.

The folder of the results holds results.jsonl, one line for each picture; depth/, 16-bit pictures; and failures.jsonl,
what could not be answered: of pictures that are files or addresses, in the form of a list that `predict` reads.
"""

import copy
import io
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perceptio_hf.bulk.engines import Engine, Result, fill_journal
from perceptio_hf.bulk.item import Item, file_sizes
from perceptio_hf.bulk.journal import Journal, claim_path
from perceptio_hf.bulk.order import cut, digest, order_by_size, read_order, write_order
from perceptio_hf.data.depth_maps import depth_picture
from perceptio_hf.files import replacing

from .answering import describe, encode_questions

if TYPE_CHECKING:
    from transformers import BatchFeature

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor, SpatialAnswer

RESULTS_FILE, FAILURES_FILE, ORDER_FILE, DEPTH_FOLDER = "results.jsonl", "failures.jsonl", "order.json", "depth"
SPATIAL = ("auto", "none", "seg", "depth", "seg+depth")
_OURS = (  # what lines say; a list's or table's own keys of these names come back under the last
    *("id", "index", "picture", "question", "spatial", "width", "height", "text", "masks", "phrases", "mask_scores"),
    *("depth_codes", "well_formed", "depth", "error", "extra"),
)
_DEPTH_NAME = re.compile(r"\d{6,}\.png")
_HEADERS = 8  # threads that read the sizes of pictures
Load = Callable[[], "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]"]


@dataclass(frozen=True)
class Prepared:
    """A batch, ready for the model.

    Args:
        usable: the items that are in `inputs`, in order.
        inputs: of `model.generate`, on the CPU; None where no item is usable.
        errors: {item's index: why it is not}.
    """

    usable: "list[Item]"
    inputs: "BatchFeature | None"
    errors: dict[int, str]


class Predictor:
    """A worker that answers questions about items. `read` may run in several threads."""

    def __init__(self, model, processor, max_new_tokens: int | None):
        self.model, self.processor = model, processor
        self.limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        self._of_thread = threading.local()

    def read(self, batch: Sequence[Item]) -> Prepared:
        pictures, errors = {}, {}
        for item in batch:
            try:
                pictures[item.index] = item.open()
            except (ValueError, MemoryError) as error:
                errors[item.index] = str(error) or "not enough memory to open it; scale it down first."
        usable = [item for item in batch if item.index in pictures]
        inputs = None
        while usable and inputs is None:
            try:
                inputs = self._encode(usable, pictures)
            except ValueError:
                broken = self._broken(usable, pictures)
                if not broken:
                    raise
                errors |= broken
                usable = [item for item in usable if item.index not in broken]
        return Prepared(usable, inputs, errors)

    def _encode(self, items: Sequence[Item], pictures: dict) -> "BatchFeature":
        # Fast tokenizers change their padding while they encode, so that every thread needs one of its own.
        if not hasattr(self._of_thread, "processor"):
            self._of_thread.processor = copy.deepcopy(self.processor)
        opened = [pictures[item.index] for item in items]
        return encode_questions(self._of_thread.processor, opened, [item.question for item in items])

    def _broken(self, items: Sequence[Item], pictures: dict) -> dict[int, str]:
        """Which items the processor refuses, and why."""
        broken = {}
        for item in items:
            try:
                self._encode([item], pictures)
            except ValueError as error:
                broken[item.index] = str(error)
        return broken

    def work(self, batch: Sequence[Item], read: Prepared) -> list[Result]:
        answers, errors = {}, dict(read.errors)
        if read.inputs is not None:
            found = self._answers(read.inputs, read.usable[0].spatial)
            if found is None and len(read.usable) == 1:
                errors[read.usable[0].index] = "not enough memory for this picture; scale it down first."
            elif found is None:  # half of them at a time may fit
                half = len(batch) // 2
                return [result for part in (batch[:half], batch[half:]) for result in self.work(part, self.read(part))]
            else:
                answers = {item.index: answer for item, answer in zip(read.usable, found, strict=True)}
        return [
            _failed(item, errors[item.index]) if item.index in errors else _answered(item, answers[item.index])
            for item in batch
        ]

    def _answers(self, inputs: "BatchFeature", spatial: str) -> "list[SpatialAnswer] | None":
        """None where the memory does not suffice."""
        try:
            outputs = self.model.generate(
                **inputs.to(self.model.device),
                spatial=spatial,
                do_sample=False,
                num_return_sequences=1,
                return_dict_in_generate=True,
                **self.limit,
            )
            return self.processor.post_process_spatial(outputs)
        except (torch.OutOfMemoryError, MemoryError):
            return None


def open_predictor(load: Load, max_new_tokens: int | None) -> Predictor:
    return Predictor(*load(), max_new_tokens)


def _line(item: Item, said: dict[str, Any]) -> dict[str, Any]:
    """What the item says itself, what was asked, and what is said about it."""
    apart = {key: value for key, value in item.extra.items() if key in _OURS}
    own = {key: value for key, value in item.extra.items() if key not in _OURS}
    head = {"id": item.id, "index": item.index, "picture": item.picture, "question": item.question}
    return {**own, **head, **said, **({"extra": apart} if apart else {})}


def _failed(item: Item, why: str) -> Result:
    return Result(_line(item, {"error": why}))


def _answered(item: Item, answer: "SpatialAnswer") -> Result:
    height, width = answer.masks.shape[1:]
    record = _line(item, {"spatial": item.spatial, "width": width, "height": height, **describe(answer), "depth": None})
    if answer.depth is None:
        return Result(record)
    name, content = f"{DEPTH_FOLDER}/{item.index:06d}.png", io.BytesIO()
    depth_picture(answer.depth).save(content, format="PNG")
    return Result(record | {"depth": name}, {name: content.getvalue()})


def ask_of_all(items: Sequence[Item], question: str | None, spatial: str) -> list[Item]:
    """Items with what they do not say themselves; where that is no question or an unknown `spatial`, with an error."""
    return [_asked(item, question, spatial) for item in items]


def _asked(item: Item, question: str | None, spatial: str) -> Item:
    said = {
        "question": (question or "") if item.question in ("", None) else item.question,
        "spatial": spatial if item.spatial in ("", None) else item.spatial,
    }
    asked = replace(item, **said)
    for key, value in said.items():
        if item.error is None and not isinstance(value, str):
            return replace(asked, error=f"`{key}` is {value!r:.60}; it must be a text.")
    if item.error is None and not asked.question.strip():
        return replace(asked, error="the question is empty; ask something about the picture.")
    if item.error is None and asked.spatial not in SPATIAL:
        return replace(asked, error=f"`spatial` is {asked.spatial!r:.40}; it must be one of {', '.join(SPATIAL)}.")
    return asked


@dataclass
class Tally:
    """How many pictures were answered and failed, earlier runs included, and how many this run did itself."""

    answered: int = 0
    failed: int = 0
    fresh: int = 0


def predict_items(
    items: Sequence[Item],
    folder: Path,
    engine: Engine,
    load: Load,
    processor: "PerceptioProcessor",
    *,
    claim: dict[str, Any],
    batch_size: int,
    max_new_tokens: int | None = None,
    overwrite: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Tally:
    """Answer what the folder has no line of yet, and pictures whose files are no longer as large as they were.

    Pictures that InternVL cuts into as many tiles share a batch, so that little of it is padding; lines come in that
    order, never far from the order of the items, whose place is the line's "index".

    Args:
        items: as `ask_of_all` returns them.
        load: gives model and processor; called by each worker.
        processor: for the plan.
        claim: what the results depend on besides the items and the longest answer: the model and its settings.
        watch: told how many of how many are done.

    Raises:
        ValueError: results of other items or another claim, or a `depth` folder that no run wrote; an answer longer
            than `max_new_tokens` is forced.
    """
    what = digest([item.id, item.picture, item.question, item.spatial, item.extra] for item in items)
    groups = [item.spatial for item in items]
    claim = {**claim, "set_of_pictures_and_questions": what, "max_new_tokens": max_new_tokens}
    order, old_sizes = read_order(folder / ORDER_FILE, what)
    order, sizes = order or _order(items, groups, processor), file_sizes(items)
    changed = {place for place, pair in enumerate(zip(old_sizes, sizes, strict=False)) if len({*pair}) > 1}
    if (folder / DEPTH_FOLDER).exists() and not claim_path(folder / RESULTS_FILE).exists():
        raise ValueError(f"{folder / DEPTH_FOLDER} is there, and results would replace it; name another --out.")
    ids = [item.id for item in items]
    journal = Journal(
        folder / RESULTS_FILE,
        claim,
        ids,
        order=order,
        outdated=lambda record: record["index"] in changed,
        overwrite=overwrite,
        keep=False,
    )
    if not journal.done:
        _remove_results(folder)
    if not journal.done or sizes != old_sizes:
        write_order(folder / ORDER_FILE, what, order, sizes)  # after the journal, which may refuse these items
    batches = [[items[place] for place in batch] for batch in cut(journal.order, groups, batch_size)]
    fresh = fill_journal(
        journal,
        engine,
        partial(open_predictor, load, max_new_tokens),
        batches,
        None if watch is None else lambda _: watch(journal.done, len(items)),
    )
    failed = _list_failures(folder, items)
    return Tally(len(items) - failed, failed, fresh)


def _order(items: Sequence[Item], groups: Sequence[str], processor: "PerceptioProcessor") -> list[int]:
    if not processor.crop_to_patches:
        return order_by_size([1] * len(items), groups)
    with ThreadPoolExecutor(_HEADERS) as pool:
        sizes = list(pool.map(Item.size, items))
    return order_by_size([1 if size is None else _tiles(processor, size) for size in sizes], groups)


def _tiles(processor: "PerceptioProcessor", size: tuple[int, int]) -> int:
    return processor._get_num_multimodal_tokens([size[::-1]]).num_image_patches[0]


def _remove_results(folder: Path) -> None:
    """What an earlier run left beside lines that are written anew."""
    (folder / FAILURES_FILE).unlink(missing_ok=True)
    depth = folder / DEPTH_FOLDER
    for path in depth.iterdir() if depth.is_dir() else ():
        if _DEPTH_NAME.fullmatch(path.name):
            path.unlink()


def _list_failures(folder: Path, items: Sequence[Item]) -> int:
    """Write what failed as lines with absolute paths, which `predict` takes again unless they name a place in a larger
    file; how many."""
    count, path = 0, folder / FAILURES_FILE
    with (
        replacing(path) as temporary,
        open(folder / RESULTS_FILE, encoding="utf-8") as lines,
        open(temporary, "w", encoding="utf-8") as failures,
    ):
        for record in map(json.loads, lines):
            if "error" in record:
                count += 1
                failure = _failure(items[record["index"]], record["error"])
                failures.write(json.dumps(failure, ensure_ascii=False) + "\n")
    if not count:
        path.unlink()
    return count


def _failure(item: Item, why: str) -> dict[str, Any]:
    """What the item's line said, and why it failed."""
    picture = item.source if isinstance(item.source, str) else item.picture
    asked = {"id": item.id, "picture": picture, "question": item.question, "spatial": item.spatial}
    return {**item.extra, **asked, "error": why}
