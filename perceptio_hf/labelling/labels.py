"""Labels of many pictures: the order of the work, its journal, and the data set that comes of it (docs/label.md)."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceptio_hf import __version__
from perceptio_hf.bulk.engines import Engine, Result, fill_journal
from perceptio_hf.bulk.item import Item
from perceptio_hf.bulk.journal import Journal
from perceptio_hf.bulk.order import cut, digest, order_by_size, read_order, write_order
from perceptio_hf.data.published.labels import FORMAT, VERSION, read_label_metadata
from perceptio_hf.data.rows import import_datasets
from perceptio_hf.files import replacing, write_json

from .again import FetchedPictures, Outdated
from .shards import label_features, write_dataset
from .worker import DEPTH_FOLDER, FETCHED_FOLDER, Load, open_labeller

if TYPE_CHECKING:
    from datasets import Dataset

ABOUT_FILE, ROWS_FOLDER, FAILURES_FILE, JOURNAL_FOLDER = "labels.json", "labels", "failures.jsonl", "journal"
QUESTIONS_FOLDER, REPORT_FILE = "questions", "questions.json"
_LINES_FILE, _ORDER_FILE = "labels.jsonl", "order.json"
_HEADERS = 8  # threads that read the sizes of pictures
_SHAPES = 20  # widths to heights that are told apart when pictures are sorted, for each doubling


@dataclass
class Tally:
    """How many pictures were labelled and failed, earlier runs included, and how many this run did itself."""

    labelled: int = 0
    failed: int = 0
    fresh: int = 0


def label_items(
    items: Sequence[Item],
    folder: Path,
    engine: Engine,
    load: Load,
    about: dict[str, Any],
    *,
    batch_size: int,
    overwrite: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Tally:
    """Label what the folder has no line of yet, and write all rows as a data set.

    Pictures of about the same shape share a batch; rows come in the order of the items. Pictures that failed, and
    files that are no longer as large as they were, are done once more.

    Args:
        load: gives teacher and codec; called by each worker.
        about: of labels.json: "teacher", "codec", "maps"; what the rows depend on besides the items.
        watch: told how many of how many are done.

    Raises:
        ValueError: results of other items, another teacher or codec; no picture could be labelled.
        OSError: where it cannot be written.
    """
    what = digest([item.id, item.picture, _said(item)] for item in items)
    order = read_order(folder / JOURNAL_FOLDER / _ORDER_FILE, what)[0] or _order(items)
    # Fingerprints tell teachers and codecs apart; a folder that was moved holds the same one.
    parts = {part: {key: value for key, value in about[part].items() if key != "name"} for part in ("teacher", "codec")}
    claim = {**about, **parts, "set_of_pictures": what}
    _check_own(folder)
    fetched = FetchedPictures(folder, folder / ROWS_FOLDER)
    outdated = Outdated(items, fetched)
    journal = Journal(
        folder / JOURNAL_FOLDER / _LINES_FILE,
        claim,
        [item.id for item in items],
        order=order,
        outdated=outdated,
        overwrite=overwrite,
        keep=False,
    )
    batches = [[items[place] for place in batch] for batch in cut(journal.order, [None] * len(items), batch_size)]
    if not journal.done:
        _remove_results(folder)
        write_order(folder / JOURNAL_FOLDER / _ORDER_FILE, what, order)
    was_complete = is_complete(folder)
    if not (was_complete and journal.done == len(items)):
        write_json(folder / ABOUT_FILE, _document(about, complete=False))
    changed = outdated.lost or not was_complete

    def told(results: list[Result]) -> None:
        nonlocal changed
        changed |= any("error" not in result.record for result in results)
        if watch is not None:
            watch(journal.done, len(items))

    fresh = fill_journal(journal, engine, partial(open_labeller, load, about["maps"]), batches, told, folder)
    if changed:  # the rows that questions are about
        _remove_questions(folder)
    if not is_complete(folder):
        _write_rows(items, folder, about, fetched)
    shutil.rmtree(folder / FETCHED_FOLDER, ignore_errors=True)  # it is in the rows
    document = read_label_metadata(folder)
    if not document["rows"]:
        raise ValueError(f"no picture could be labelled; {folder / FAILURES_FILE} says why of each.")
    return Tally(document["rows"], document["failures"], fresh)


def is_complete(folder: Path) -> bool:
    """Whether all rows are written."""
    try:
        return bool(read_label_metadata(folder)["complete"])
    except ValueError:
        return False


def read_rows(folder: Path) -> "Dataset":
    """The rows of a folder of labels, with pictures that stay encoded.

    Raises:
        ValueError: for a folder without labels, or whose labelling was not finished.
    """
    datasets = import_datasets()
    read_label_metadata(folder)
    rows = datasets.load_from_disk(str(folder / ROWS_FOLDER))
    return rows.cast_column("image", datasets.Image(decode=False))


def _order(items: Sequence[Item]) -> list[int]:
    """Pictures of one shape next to each other."""
    with ThreadPoolExecutor(_HEADERS) as pool:
        sizes = list(pool.map(Item.size, items))
    return order_by_size([0 if size is None else _shape(*size) for size in sizes], [None] * len(items))


def _shape(width: int, height: int) -> int:
    """Wide pictures have large numbers; teachers scale pictures of one shape to one size."""
    return round(_SHAPES * math.log2(max(width, 1) / max(height, 1)))


def _document(about: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **more, **about, "perceptio_hf": __version__}


def _write_rows(items: Sequence[Item], folder: Path, about: dict[str, Any], fetched: FetchedPictures) -> None:
    """The journal as a data set; last of all labels.json says that it is complete."""
    failures: list[dict[str, Any]] = []
    rows = _rows(items, folder, failures, fetched)
    count = write_dataset(folder / ROWS_FOLDER, rows, label_features(), _document(about))
    path = folder / FAILURES_FILE
    if failures:
        with replacing(path) as temporary:
            lines = (json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
            temporary.write_text("".join(lines), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
    counts = {"complete": True, "rows": count, "failures": len(failures)}
    write_json(folder / ABOUT_FILE, _document(about, **counts))


def _rows(
    items: Sequence[Item], folder: Path, failures: list[dict[str, Any]], fetched: FetchedPictures
) -> Iterator[dict[str, Any]]:
    for record in _in_order(folder / JOURNAL_FOLDER / _LINES_FILE):
        item = items[record["index"]]
        if "error" in record:
            place = item.source if isinstance(item.source, str) else item.picture
            failures.append({"id": item.id, "picture": place, "error": record["error"]})
            continue
        said = _said(item)
        yield {
            "id": item.id,
            "image": item.encoded() | ({"bytes": fetched.read(record)} if "fetched" in record else {}),
            **{key: record[key] for key in ("width", "height", "codes", "depth")},
            "extra": json.dumps(said, ensure_ascii=False) if said else None,
        }


def _said(item: Item) -> dict[str, Any]:
    """What a list or table says about a picture; nobody asks its question here."""
    asked = {"question": item.question, "spatial": item.spatial}
    return {key: value for key, value in asked.items() if value not in ("", None)} | item.extra


def _in_order(lines: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal by their "index"; of those that came too early the places in the file are kept."""
    early: dict[int, int] = {}
    following = 0
    with open(lines, "rb") as file, open(lines, "rb") as behind:
        while line := file.readline():
            early[json.loads(line)["index"]] = file.tell() - len(line)
            while following in early:
                behind.seek(early.pop(following))
                yield json.loads(behind.readline())
                following += 1
    assert not early, "every item has one line"


def _check_own(folder: Path) -> None:
    """Raises ValueError where the folder holds somebody else's files under our names: they would be removed."""
    ours = (folder / ABOUT_FILE).exists() or (folder / JOURNAL_FOLDER / _LINES_FILE).with_suffix(".claim.json").exists()
    found = [name for name in (ROWS_FOLDER, DEPTH_FOLDER, QUESTIONS_FOLDER) if (folder / name).exists()]
    if found and not ours:
        raise ValueError(f"{folder / found[0]} is there already, and no {ABOUT_FILE} beside it; name another --out.")


def _remove_results(folder: Path) -> None:
    """What an earlier run left beside lines that are written anew."""
    for name in (ROWS_FOLDER, DEPTH_FOLDER, FETCHED_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (ABOUT_FILE, FAILURES_FILE):
        (folder / name).unlink(missing_ok=True)
    _remove_questions(folder)


def _remove_questions(folder: Path) -> None:
    """Questions about rows that are there no longer."""
    shutil.rmtree(folder / QUESTIONS_FOLDER, ignore_errors=True)
    (folder / REPORT_FILE).unlink(missing_ok=True)
