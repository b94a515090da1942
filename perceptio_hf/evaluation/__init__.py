"""Measuring: metrics, benchmarks, runs, reports. Imports `data`, the model and what is below it."""
