"""What `perceptio predict` costs over many pictures: `python benchmarks/predict_throughput.py --out RESULTS.json`.

Pictures per second in batches against one at a time, alternating, over the same rendered scenes; answers that differ
are counted. Then one run over a folder of many, for as long as `--seconds`: the memory of the process after every 100
pictures, and what it grows by. A busy machine slows a run down, so that the best of the rounds counts.
"""

import argparse
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
from perceptio_hf.bulk.items import Item, list_items
from perceptio_hf.commands import checkpoints
from perceptio_hf.evaluation.run.predictions import RESULTS_FILE, ask_of_all, predict_items
from perceptio_hf.files import write_json
from perceptio_hf.world import HELD_OUT_SEED, render_scene

_QUESTION = "Which object is closest?"
_EVERY = 100  # pictures between two looks at the memory


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
    parser.add_argument("--seconds", type=float, default=300, help="after which that run is stopped")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    loaded = checkpoints.load(checkpoints.resolve(options.model))
    with tempfile.TemporaryDirectory() as folder:
        pictures = render(Path(folder, "pictures"), options.many)
        items = ask_of_all(list_items([str(pictures)]), _QUESTION, options.spatial)
        ask = partial(answer, loaded, Path(folder))
        found = {
            "spatial": options.spatial,
            "speed": compare(ask, items[: options.pictures], options.batch_size, options.rounds),
            "memory": watch_memory(ask, items, options.batch_size, options.seconds),
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
    other = [one["text"] != many["text"] for one, many in zip(found[1], found[batch_size], strict=True)]
    alone, together = max(rates[1]), max(rates[batch_size])
    return {
        "pictures": len(items),
        "batch_size": batch_size,
        "per_second_one_at_a_time": round(alone, 3),
        "per_second_in_batches": round(together, 3),
        "times_faster": round(together / alone, 2),
        "rounds": {f"batches of {size}": [round(rate, 3) for rate in found] for size, found in rates.items()},
        "answers_that_differ": int(np.sum(other)),
    }


def watch_memory(ask, items: list[Item], batch_size: int, seconds: float) -> dict:
    """Megabytes of the process, and how many it grows by over a thousand pictures after the first fifth."""
    seen: list[tuple[int, float]] = []
    begin = time.perf_counter()

    def watch(done: int, total: int) -> None:
        if not seen or done - seen[-1][0] >= _EVERY or done == total:
            seen.append((done, resident()))
        if time.perf_counter() - begin > seconds:
            seen.append((done, resident()))
            raise _Enough

    with suppress(_Enough):
        ask(items, batch_size, watch)
    took = time.perf_counter() - begin
    done, megabytes = np.array(seen).T
    late = done >= done[-1] / 5
    slope = np.polyfit(done[late], megabytes[late], 1)[0] * 1000 if late.sum() > 1 else float("nan")
    return {
        "pictures_listed": len(items),
        "pictures_answered": int(done[-1]),
        "seconds": round(took, 1),
        "megabytes": [[int(count), round(size, 1)] for count, size in seen],
        "megabytes_per_1000_pictures": round(float(slope), 3),
        "extrapolated_growth_over_10000": round(10 * float(slope), 1),
    }


def resident() -> float:
    """Megabytes of this process that are in memory; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
