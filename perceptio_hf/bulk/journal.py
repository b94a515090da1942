"""Results line by line, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perceptio_hf.files import named, replacing, write_json


class Journal:
    """A file of JSON lines, one for each item of a run; a batch of them reaches the disk before the next.

    Beside NAME.jsonl lies NAME.claim.json: what the lines are results of. A last line that was cut off is dropped.

    Args:
        path: the file; its folder is made.
        claim: what the results depend on; they are never mixed with those of another claim.
        ids: of the items.
        order: in which lines are to come, places of items; each line then says its item's as "index". As `order` the
            journal has the order there is: what has a line, as the lines come, and then the rest. None: as they are.
        outdated: of what is given again: lines for which it is true are dropped, and their items done once more.
        overwrite: start anew over the results of another claim, or over lines that cannot be used.
        keep: whether the records stay in memory, as `records`; without it only their number does, as `done`.

    Raises:
        ValueError: for results of another claim, or lines that are damaged or about other items.
    """

    def __init__(
        self,
        path: Path,
        claim: dict[str, Any],
        ids: Sequence[str],
        *,
        order: Sequence[int] | None = None,
        outdated: Callable[[dict[str, Any]], bool] | None = None,
        overwrite: bool = False,
        keep: bool = True,
    ):
        self.path, self.ids, self.keep = path, ids, keep
        self.by_index, self.outdated = order is not None, outdated
        self.order = list(range(len(ids)) if order is None else order)
        self.records: list[dict[str, Any]] = []
        self.done = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not claim_path(path).exists():  # the claim is written first
            raise ValueError(
                f"{path} is there without {claim_path(path).name}, so no run wrote it, and it is not replaced; name "
                "another --out."
            )
        try:
            if path.exists() and path.stat().st_size:  # a run that began and has no result hinders no other
                self._check_claim(claim_path(path), claim)
            self._read()
        except ValueError:
            if not overwrite:
                raise
            path.unlink(missing_ok=True)
            self.records, self.done = [], 0
        write_json(claim_path(path), claim)

    def append(self, record: dict[str, Any]) -> None:
        """Add the next item's result."""
        self.extend([record])

    def extend(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the next items' results; they are on the disk when this returns."""
        lines = [self._line(record, place) for place, record in enumerate(records, start=self.done)]
        with named(self.path), open(self.path, "ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            self._count(record)

    def _line(self, record: dict[str, Any], place: int) -> bytes:
        assert record["id"] == self.ids[self.order[place]], "results come in the order of the items"
        try:
            return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError as error:
            place = max(0, error.start - 30)
            text = error.object[place : error.end + 30].encode("utf-8", "backslashreplace").decode()
            name = record["id"].encode("utf-8", "backslashreplace").decode()
            raise ValueError(
                f"The result of {name} holds text that is not UTF-8: ...{text}... Rename or mend what it comes from."
            ) from None
        except ValueError:
            raise ValueError(
                f"The result of {record['id']} holds a number that is not finite: {_short(repr(record))} Look at this "
                "sample's picture and truth."
            ) from None

    def _count(self, record: dict[str, Any]) -> None:
        self.done += 1
        if self.keep:
            self.records.append(record)

    def _check_claim(self, path: Path, claim: dict[str, Any]) -> None:
        if not path.exists():
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError):
            old = None
        if not isinstance(old, dict):
            raise ValueError(f"{path} is damaged; {_WAY_OUT}")
        changed = [key for key in {**claim, **old} if old.get(key) != claim.get(key)]
        if changed:
            key = changed[0]
            there, now, within = _first_difference(old.get(key), claim.get(key))
            raise ValueError(
                f"{self.path} holds results of another {key.replace('_', ' ')}: {within}{_short(there)} there, "
                f"{within}{_short(now)} now; {_WAY_OUT}"
            )

    def _read(self) -> None:
        if not self.path.exists():
            return
        whole, dropped = 0, False  # bytes of lines that are complete
        done: dict[int, None] = {}  # the places of items that have a line, in the lines' order
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):  # the last line was being written
                    break
                record = self._parse(line, number, done)
                whole += len(line)
                if self.outdated is not None and self.outdated(record):
                    dropped = True
                    continue
                done[record["index"] if self.by_index else number - 1] = None
                self._count(record)
        self.order = [*done, *(place for place in self.order if place not in done)]
        if dropped:
            self._drop(whole)
        elif whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def _drop(self, whole: int) -> None:
        """Write the journal anew without its outdated lines; of the old one `whole` bytes are lines."""
        with replacing(self.path) as temporary, open(self.path, "rb") as old, open(temporary, "wb") as new:
            while old.tell() < whole:
                line = old.readline()
                if not self.outdated(json.loads(line)):
                    new.write(line)

    def _parse(self, line: bytes, number: int, done: dict[int, None]) -> dict[str, Any]:
        """A line that is the result of an item without one."""
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        place = record.get("index") if self.by_index and isinstance(record, dict) else number - 1
        known = isinstance(place, int) and 0 <= place < len(self.ids) and place not in done
        if not isinstance(record, dict) or not known or record.get("id") != self.ids[place]:
            expected = self.ids[self.order[number - 1]] if number <= len(self.order) else None
            raise ValueError(f"{self.path}, line {number} is not the result of {expected}; {_WAY_OUT}")
        return record


def claim_path(path: Path) -> Path:
    """Where the claim of a journal lies."""
    return path.with_suffix(".claim.json")


_WAY_OUT = "name another --out, or give --overwrite to start anew."


def _first_difference(there: Any, now: Any) -> tuple[Any, Any, str]:
    """Of two objects the entry in which they differ first, with its name; anything else as it is."""
    if isinstance(there, dict) and isinstance(now, dict):
        key = next(key for key in {**now, **there} if there.get(key) != now.get(key))
        return there.get(key), now.get(key), f"{key.replace('_', ' ')} "
    return there, now, ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
