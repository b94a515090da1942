"""Benchmarks as they are published, read into samples that all look alike.

`open_benchmark("hardblink", folder)` lists one; `BENCHMARKS` says which there are, `PROMPTS` how each is asked.
"""

from .prompts import PROMPTS
from .registry import BENCHMARKS, BenchmarkInfo, open_benchmark
from .sample import Benchmark, DepthSource, PictureSource, Sample

__all__ = [
    "BENCHMARKS",
    "PROMPTS",
    "Benchmark",
    "BenchmarkInfo",
    "DepthSource",
    "PictureSource",
    "Sample",
    "open_benchmark",
]
