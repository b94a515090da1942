"""Questions that labelled depth answers, as samples that training reads, and a report that they have no shortcuts."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceptio_hf.bulk.engines import readers
from perceptio_hf.data.depth_maps import read_depth
from perceptio_hf.data.encoded import open_encoded
from perceptio_hf.data.published.labels import read_label_metadata
from perceptio_hf.data.rows import sample_features, to_row
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.files import write_json
from perceptio_hf.processing.pictures import load_picture
from perceptio_hf.tokens import DEPTH_END_TOKEN, DEPTH_START_TOKEN, SEG_TOKEN
from perceptio_hf.world import draw_points
from perceptio_hf.world.questions import CLOSER_QUESTIONS, POINT_QUESTIONS

from . import fair_points, objects
from .fair_points import PointQuestion, draw_questions, read_cells
from .labels import QUESTIONS_FOLDER, REPORT_FILE, read_rows
from .objects import Annotations, PairQuestion, balanced, mask_of_thing, pairs_of
from .shards import write_dataset

KINDS = ("closest", "order", "objects")
ORDER_QUESTIONS = (
    "Order the circled points from nearest to farthest.",
    "Several points are circled and labeled by letters. List them by their distance to the camera, the nearest first.",
    "Sort the points {list} by how near they are, beginning with the nearest.",
    "In which order do the points {list} lie, from the closest to the camera to the farthest?",
)
_SPAN = DEPTH_START_TOKEN + DEPTH_END_TOKEN
_TOGETHER = 2048  # pictures among which fair sets are looked for
_SMALLEST = 64  # pixels of a side on which marks can be told apart
Watch = Callable[[int, int], None]


def check_kinds(given: str | None, annotations: Path | None) -> tuple[str, ...]:
    """What `--questions` asks for.

    Raises:
        ValueError: for unknown kinds, or annotations that are missing or for nothing.
    """
    kinds = tuple(dict.fromkeys(part.strip() for part in (given or "").split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or (given is not None and not kinds):
        raise ValueError(f"--questions {given}: choose from {', '.join(KINDS)}, with commas between.")
    if "objects" in kinds and annotations is None:
        raise ValueError("--questions objects needs --annotations: a .json file of instances in COCO's form.")
    if annotations is not None and "objects" not in kinds:
        raise ValueError("--annotations is for --questions objects; add it, or leave the annotations out.")
    if annotations is not None and not annotations.is_file():
        raise ValueError(f"--annotations: there is no file {annotations}.")
    return kinds


def write_questions(
    folder: Path, kinds: Sequence[str], annotations: Annotations | None = None, *, watch: Watch | None = None
) -> dict[str, Any]:
    """Write questions about the pictures of a folder of labels, in the place of those that are there.

    Returns:
        The report that also stands in questions.json.

    Raises:
        ValueError: for labels that are not complete or have no maps; annotations of none of these pictures.
    """
    about = read_label_metadata(folder)
    if not about["maps"]:
        raise ValueError(f"{folder} has no maps, which questions are made from; label with --maps.")
    asker = _Asker(folder, kinds, annotations, watch)
    write_dataset(folder / QUESTIONS_FOLDER, asker.samples(), sample_features(), {"labels": about})
    report = asker.report()
    write_json(folder / REPORT_FILE, report)
    return report


class _Asker:
    def __init__(self, folder: Path, kinds: Sequence[str], annotations: Annotations | None, watch: Watch | None):
        self.folder, self.kinds, self.annotations, self.watch = folder, kinds, annotations, watch
        self.rows = read_rows(folder)
        self.asked: dict[str, list[Any]] = {kind: [] for kind in kinds}

    def samples(self) -> Iterator[dict[str, Any]]:
        """The rows of all questions; few pictures at a time are in memory."""
        point_kinds = [kind for kind in ("closest", "order") if kind in self.kinds]
        pairs: list[PairQuestion] = []
        with ThreadPoolExecutor(readers()) as pool:
            for start in range(0, len(self.rows), _TOGETHER):
                numbers = range(start, min(start + _TOGETHER, len(self.rows)))
                readings = []
                for done, (reading, found) in enumerate(pool.map(self._read, numbers), start=1):
                    readings.append(reading)
                    pairs += found
                    if self.watch is not None:
                        self.watch(start + done, len(self.rows))
                for kind in point_kinds:
                    rng = np.random.default_rng([start, KINDS.index(kind)])
                    drawn = list(draw_questions(np.stack(readings), kind, rng))
                    self.asked[kind] += drawn
                    places = [(start + question.picture, question) for question in drawn]
                    yield from _mapped(pool, self._point_sample, sorted(places, key=lambda place: place[0]))
            if self.annotations is not None:
                self.annotations.check([row["id"], row["image"]["path"] or ""] for row in self.rows)
                chosen = balanced(pairs, np.random.default_rng(KINDS.index("objects")))
                self.asked["objects"] = chosen
                yield from _mapped(pool, self._pair_sample, [(pair.picture, pair) for pair in chosen])

    def _read(self, number: int) -> tuple[np.ndarray, list[PairQuestion]]:
        """What is taken from a map: depth at all cells, and pairs of objects."""
        row = self.rows[number]
        relative = read_depth(self.folder / row["depth"], "relative").relative
        reading = read_cells(relative)
        size = (row["width"], row["height"])
        if min(size) < _SMALLEST:
            reading[:] = np.nan
        if self.annotations is None:
            return reading, []
        names = [row["id"], row["image"]["path"] or ""]
        return reading, pairs_of(number, self.annotations.of(names, size), relative, size)

    def _point_sample(self, place: tuple[int, PointQuestion]) -> dict[str, Any]:
        number, question = place
        row = self.rows[number]
        picture = load_picture(open_encoded(row["image"]))
        marked = draw_points(np.asarray(picture), question.points(*picture.size), question.letters)
        letters = question.letters
        texts = POINT_QUESTIONS if question.kind == "closest" else ORDER_QUESTIONS
        joined = " or ".join if question.kind == "closest" else " and ".join
        asked = _any_of(texts, number).format(list=joined([", ".join(letters[:-1]), letters[-1]]))
        return self._sample(row, question.kind, _jpeg(marked), asked, _SPAN + ", ".join(question.answer))

    def _pair_sample(self, place: tuple[int, PairQuestion]) -> dict[str, Any]:
        number, pair = place
        row = self.rows[number]
        things = (pair.first, pair.second)
        asked = _any_of(CLOSER_QUESTIONS, number).format(x=f"the {pair.first.name}", y=f"the {pair.second.name}")
        masks = [encode_mask(mask_of_thing(thing, (row["width"], row["height"]))) for thing in things]
        said = SEG_TOKEN * 2 + _SPAN + f"The {things[pair.answer].name}."
        return self._sample(row, "objects", row["image"], asked[:1].upper() + asked[1:], said, masks=masks)

    def _sample(
        self, row: dict[str, Any], kind: str, image: dict[str, Any], asked: str, said: str, **more: Any
    ) -> dict[str, Any]:
        sample = {
            "id": f"{row['id']} {kind}",
            "images": [image],
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
            "depth_codes": [row["codes"]],
            "task": kind,
        }
        return to_row(sample | more)

    def report(self) -> dict[str, Any]:
        """How many questions there are of each kind, and how often rules without depth answer them."""
        found: dict[str, Any] = {"pictures": len(self.rows), "kinds": {}}
        for kind, questions in self.asked.items():
            shares = objects.rule_shares if kind == "objects" else fair_points.rule_shares
            chance, rules = shares(questions) if questions else (None, {})
            rounded = {name: round(share, 4) for name, share in rules.items()}
            found["kinds"][kind] = {"questions": len(questions), "chance": chance, "rules": rounded}
        return found | ({} if self.annotations is None else {"annotations": self.annotations.report()})


def _mapped(pool: ThreadPoolExecutor, work: Callable[[Any], Any], places: Sequence[Any]) -> Iterator[Any]:
    """In order, some of them worked on ahead."""
    for start in range(0, len(places), 64):
        yield from pool.map(work, places[start : start + 64])


def _any_of(texts: Sequence[str], number: int) -> str:
    """One of the ways to ask, which says nothing about the answer."""
    return texts[int(np.random.default_rng([number, len(texts)]).integers(len(texts)))]


def _jpeg(picture: np.ndarray) -> dict[str, Any]:
    """As `datasets` keeps pictures; without loss of colour, since the marks are red."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="JPEG", quality=95, subsampling=0)
    return {"bytes": content.getvalue(), "path": None}
