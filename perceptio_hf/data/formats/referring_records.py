"""The referring records of RefCOCO, RefCOCO+, RefCOCOg (pickles) and gRefCOCO (JSON), as they are published."""

from pathlib import Path

from .coco_annotations import PICTURE_FOLDERS, Annotations, first_existing, read_annotations, read_json
from .plain_pickle import read_plain_pickle

GOOGLE = "refs(google).p"
FILES = {  # which file each data set has; RefCOCO(g) also exists as divided by Google
    "refcoco": ("refs(unc).p", GOOGLE),
    "refcoco+": ("refs(unc).p", GOOGLE),
    "refcocog": ("refs(umd).p", GOOGLE),
    "grefcoco": ("grefs(unc).json", "grefs(unc).p"),
}
_RECORD = ("ref_id", "ann_id", "image_id", "split", "sentences")


def record_places(path: Path, name: str) -> list[Path]:
    """Where the records of a data set may lie; the path may name their file, to choose another than the first."""
    if path.is_file():
        return [path] if path.suffix in (".p", ".json") else []
    return [folder / file for folder in (path, path / name) for file in FILES[name]]


def read_records(file: Path) -> list[dict]:
    """All records of a file, checked for what is used of them.

    Raises:
        ValueError: for another file, or records that lack something.
    """
    records = read_json(file) if file.suffix == ".json" else read_plain_pickle(file)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file} holds no list of referring records.")
    for number, record in enumerate(records):
        missing = [key for key in _RECORD if not isinstance(record, dict) or key not in record]
        if missing or not isinstance(record["sentences"], list) or not isinstance(record["image_id"], int):
            raise ValueError(f"{file}: record {number} lacks {', '.join(missing) or 'sentences, or its picture'}.")
    return records


def records_of_split(records: list[dict], split: str | None, file: Path) -> list[dict]:
    """Those of one split.

    Raises:
        ValueError: where there are none, with the splits there are.
    """
    chosen = [record for record in records if record["split"] == split]
    if not chosen:
        known = ", ".join(sorted({str(record["split"]) for record in records}))
        raise ValueError(f"{file} has no expressions of the split {split!r}; it has {known}.")
    return chosen


def picture_places(refs: Path, path: Path, pictures: Path | None = None) -> list[Path]:
    """Where the pictures of records may lie; arguments as `annotations_of`."""
    base, beside = path if path.is_dir() else path.parent, refs.parent
    usual = [place / name for place in dict.fromkeys((base, beside, beside.parent)) for name in PICTURE_FOLDERS]
    return usual if pictures is None else [pictures]


def annotations_of(refs: Path, path: Path, pictures: Path | None = None) -> Annotations:
    """The annotations that records speak of, beside them or in the data set's folder.

    Args:
        refs: the file of the records.
        path: the data set's folder, or the file in it that was named.
        pictures: the folder of the pictures, where it is not at one of its usual places.

    Raises:
        ValueError: as `read_annotations`, or for a place that is not there.
    """
    base, beside = path if path.is_dir() else path.parent, refs.parent
    file = first_existing([beside / "instances.json", base / "instances.json"], "instances.json")
    return read_annotations(file, picture_places(refs, path, pictures))


def wanted_objects(record: dict) -> list[int]:
    """The annotations that a record means; none where gRefCOCO says so by a list of -1 alone.

    Raises:
        ValueError: for something else than numbers.
    """
    wanted = record["ann_id"] if isinstance(record["ann_id"], list) else [record["ann_id"]]
    if not wanted or not all(isinstance(item, int) for item in wanted):
        raise ValueError(f"its ann_id is {record['ann_id']!r:.60}; expected numbers of annotations.")
    return [] if record["ann_id"] == [-1] else wanted


def sentences_of(record: dict) -> list[tuple[int, str]]:
    """(number, words) of each sentence.

    Raises:
        ValueError: for a sentence without them.
    """
    found = []
    for sentence in record["sentences"]:
        if not isinstance(sentence, dict) or not {"sent", "sent_id"} <= set(sentence):
            raise ValueError("a sentence lacks `sent` or `sent_id`.")
        found.append((sentence["sent_id"], str(sentence["sent"]).strip()))
    return found
