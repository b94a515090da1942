"""One Perceptio out of stock parts: their joining, new token rows, the check of the result.

Imports `conversion` and what is below it.
"""
