"""Asking a model all questions of a benchmark: batches, journal, scores, summary.

Imports metrics, benchmarks and replacement.
"""
