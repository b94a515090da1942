"""The model: configurations, depth codec, generation and its grammar.

Imports only `tokens` and itself: its files travel with checkpoints.
"""
