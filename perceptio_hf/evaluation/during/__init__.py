"""Figures while a model trains: held-out sets answered by generation, spans without the grammar, pictures of cases.

`figures` measures, `broken_spans` samples spans, `trackers` shows pictures where the trainer reports to. Imports the
benchmarks, their scoring and what is below.
"""
