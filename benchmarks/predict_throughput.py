"""What `perceptio predict` costs over many pictures: `python benchmarks/predict_throughput.py --out RESULTS.json`.

Pictures per second in batches against one at a time, alternating, over the same rendered scenes; answers that differ
are counted. Then one run over a folder of many, for as long as `--seconds`, and what memory it takes: of the process,
and, of that, what the allocator has given out. The first goes up and down by tens of megabytes with what glibc keeps of
the memory that was given back; a leak would show in the second, which no such chance moves, and in the highest values
of the first. A busy machine slows a run down, so that the best of the rounds counts.
"""

import argparse
import ctypes
import gc
import json
import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from perceptio_hf.bulk.engines import LocalEngine
from perceptio_hf.bulk.item import Item
from perceptio_hf.bulk.items import list_items
from perceptio_hf.commands import checkpoints
from perceptio_hf.evaluation.run.predictions import RESULTS_FILE, ask_of_all, predict_items
from perceptio_hf.files import out_file, write_json
from perceptio_hf.world import HELD_OUT_SEED, render_scene

_QUESTION = "Which object is closest?"
_EVERY = 200  # pictures between two looks at the memory
_PARTS = 5  # of a run, whose highest values are compared


class _Enough(Exception):
    """The time is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name; default: the embedded tiny checkpoint")
    parser.add_argument("--spatial", default="seg+depth")
    parser.add_argument("--pictures", type=int, default=48, help="of each round of the comparison")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=10_000, help="pictures of the run whose memory is measured")
    parser.add_argument("--seconds", type=float, default=900, help="after which that run is stopped")
    parser.add_argument("--many-spatial", help="of that run; default: as --spatial")
    parser.add_argument("--out", type=out_file, help="JSON file to write")
    options = parser.parse_args()
    loaded = checkpoints.load(checkpoints.resolve(options.model))
    with tempfile.TemporaryDirectory() as folder:
        pictures = render(Path(folder, "pictures"), options.many)
        listed = list_items([str(pictures)])
        ask = partial(answer, loaded, Path(folder))
        items = ask_of_all(listed[: options.pictures], _QUESTION, options.spatial)
        speed = compare(ask, items, options.batch_size, options.rounds)
        spatial = options.many_spatial or options.spatial
        memory = watch_memory(ask, ask_of_all(listed, _QUESTION, spatial), options.batch_size, options.seconds)
    found = {
        "speed": {"spatial": options.spatial, **speed},
        "memory": {"spatial": spatial, **memory},
    }
    print(json.dumps(found, indent=2))
    if options.out:
        write_json(options.out, found)


def render(folder: Path, count: int) -> Path:
    """Scenes that no training saw, 128 pixels wide; a thousand different ones, and links to them."""
    folder.mkdir()
    for index in range(count):
        path = folder / f"{index:06d}.png"
        if index < 1000:
            Image.fromarray(render_scene(HELD_OUT_SEED + index).image).save(path)
        else:
            os.link(folder / f"{index % 1000:06d}.png", path)
    return folder


def answer(loaded: tuple, folder: Path, items: list[Item], batch_size: int, watch=None) -> list[dict]:
    """The lines of a fresh run."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        predict_items(
            items, Path(out), LocalEngine(), lambda: loaded, loaded[1], claim={}, batch_size=batch_size, watch=watch
        )
        with open(Path(out, RESULTS_FILE), encoding="utf-8") as lines:
            return sorted(map(json.loads, lines), key=lambda line: line["index"])


def compare(ask, items: list[Item], batch_size: int, rounds: int) -> dict:
    """Pictures per second, the best of the rounds."""
    rates: dict[int, list[float]] = {1: [], batch_size: []}
    found = {}
    for size in [batch_size] + [1, batch_size] * rounds:  # the first one warms up
        begin = time.perf_counter()
        found[size] = ask(items, size)
        rates[size].append(len(items) / (time.perf_counter() - begin))
    rates[batch_size].pop(0)
    pairs = list(zip(found[1], found[batch_size], strict=True))
    differ = {part: sum(one[part] != many[part] for one, many in pairs) for part in ("text", "depth_codes", "masks")}
    alone, together = max(rates[1]), max(rates[batch_size])
    return {
        "pictures": len(items),
        "batch_size": batch_size,
        "per_second_one_at_a_time": round(alone, 3),
        "per_second_in_batches": round(together, 3),
        "times_faster": round(together / alone, 2),
        "rounds": {f"batches of {size}": [round(rate, 3) for rate in found] for size, found in rates.items()},
        "answers_that_differ": differ,
    }


def watch_memory(ask, items: list[Item], batch_size: int, seconds: float) -> dict:
    """Megabytes while many pictures are answered; what they grow by is measured behind the first fifth."""
    seen: list[tuple[int, float, float, int]] = []
    begin = time.perf_counter()

    def watch(done: int, total: int) -> None:
        late = time.perf_counter() - begin > seconds
        if not seen or done - seen[-1][0] >= _EVERY or done == total or late:
            seen.append((done, resident(), given_out(), len(gc.get_objects())))
        if late:
            raise _Enough

    with suppress(_Enough):
        ask(items, batch_size, watch)
    took = time.perf_counter() - begin
    done, process, used, objects = np.array(seen).T
    parts = np.array_split(process, min(_PARTS, len(process)))
    return {
        "pictures_listed": len(items),
        "pictures_answered": int(done[-1]),
        "seconds": round(took, 1),
        "pictures_megabytes_given_out_objects": [
            [int(count), round(size, 1), round(inside, 1), int(number)] for count, size, inside, number in seen
        ],
        "highest_megabytes_in_each_fifth": [round(float(part.max()), 1) for part in parts],
        "megabytes_per_1000_pictures": per_thousand(done, process),
        "given_out_megabytes_per_1000_pictures": per_thousand(done, used),
        "objects_per_1000_pictures": per_thousand(done, objects),
    }


def per_thousand(done: np.ndarray, values: np.ndarray) -> float | None:
    """The slope behind the first fifth of a run."""
    late = done >= done[-1] / _PARTS
    return round(float(np.polyfit(done[late], values[late], 1)[0]) * 1000, 3) if late.sum() > 1 else None


def resident() -> float:
    """Megabytes of this process that are in memory; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def given_out() -> float:
    """Megabytes that the allocator has given out in this process and not got back; Linux with glibc."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo
    found = ask()
    return (found.uordblks + found.hblkhd) / 1e6


if __name__ == "__main__":
    main()
