"""Benchmarks as they are published, read into samples that all look alike.

`open_benchmark("hardblink", folder)` lists one; `BENCHMARKS` says which there are, `PROMPTS` how each is asked.
"""

from .registration import BENCHMARKS, BenchmarkInfo, Prompt, Scoring, benchmark
from .registry import open_benchmark
from .sample import Benchmark, DepthSource, PictureSource, Sample

PROMPTS = {name: info.prompt for name, info in BENCHMARKS.items()}

__all__ = [
    "BENCHMARKS",
    "PROMPTS",
    "Benchmark",
    "BenchmarkInfo",
    "DepthSource",
    "PictureSource",
    "Prompt",
    "Sample",
    "Scoring",
    "benchmark",
    "open_benchmark",
]
