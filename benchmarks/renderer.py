"""Scenes per second of the rendered world on one thread: `python benchmarks/renderer.py`."""

import argparse
import os
import time
from collections.abc import Callable

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402 - it reads the number of threads when imported

from perceptio_hf.world import ask, render_scene  # noqa: E402


def per_second(work: Callable[[int], object], scenes: int, repeats: int) -> tuple[float, float]:
    """Scenes per second, (median, best) of the repeats; every repeat draws other scenes."""
    rates = []
    for repeat in range(repeats):
        start = time.perf_counter()
        for seed in range(repeat * scenes, (repeat + 1) * scenes):
            work(seed)
        rates.append(scenes / (time.perf_counter() - start))
    return float(np.median(rates)), max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture's side")
    parser.add_argument("--scenes", type=int, default=300, help="scenes of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    jobs = {
        "render": lambda seed: render_scene(seed, options.size),
        "render + ask": lambda seed: ask(render_scene(seed, options.size), rng),
    }
    for name, work in jobs.items():
        work(0)  # builds what is built once
        median, best = per_second(work, options.scenes, options.repeats)
        print(f"{name:13} {options.size} px: {median:.0f} scenes/s (median of {options.repeats}, best {best:.0f})")


if __name__ == "__main__":
    main()
