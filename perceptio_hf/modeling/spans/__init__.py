"""How spans come to be: the loop that owns them, its grammar as state, what is kept, and what is read from it.

Imports `tokens`, the grammar and the configuration beside it; `generation_perceptio` uses it. Its files travel with
checkpoints.
"""
