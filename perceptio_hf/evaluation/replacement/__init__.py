"""The Token Replacement Test: other codes in the span before the answer is written.

Imports the model and benchmarks' samples.
"""
