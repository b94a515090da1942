"""The parts of benchmarks/gpu.py: what is measured, one function each, registered by `@part` (see `tools`)."""
