"""Samples per second of `perceptio eval`, in batches against one at a time: `python benchmarks/eval_throughput.py`.

Answers that differ between the two are counted: there should be none.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from perceptio_hf.commands import checkpoints
from perceptio_hf.evaluation.benchmarks import Benchmark, open_benchmark
from perceptio_hf.evaluation.run.runner import Run, RunSettings, run_benchmark


def measure(loaded, benchmark: Benchmark, batch_size: int, repeats: int) -> tuple[float, Run]:
    """The best rate of the repeats, and the answers; a busy machine only slows a run down."""
    rates = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            settings = RunSettings(benchmark.spatial, batch_size=batch_size)
            run = run_benchmark(*loaded, benchmark, Path(folder), settings, weights="")
        rates.append(run.answered / run.seconds)
    return max(rates), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or Hub name; default: the embedded tiny checkpoint")
    parser.add_argument("--benchmarks", nargs="+", default=["world-closest", "world-refer", "world-plain"])
    parser.add_argument("--data", type=Path, help="of benchmarks that are not rendered")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    loaded = checkpoints.load(checkpoints.resolve(options.model))
    for name in options.benchmarks:
        benchmark = open_benchmark(name, options.data, limit=options.samples)
        measure(loaded, benchmark, options.batch_size, 1)  # warms up
        alone, single = measure(loaded, benchmark, 1, options.repeats)
        batched, together = measure(loaded, benchmark, options.batch_size, options.repeats)
        other = sum(a["answer"] != b["answer"] for a, b in zip(single.records, together.records, strict=True))
        print(
            f"{name:14} {alone:7.2f} samples/s one at a time, {batched:7.2f} in batches of {options.batch_size}: "
            f"{batched / alone:.2f} x; {other} of {len(single.records)} answers differ"
        )


if __name__ == "__main__":
    main()
