"""Masks that live: the start of the [SEG] projector, learning rates of their own, and a watch over all of it.

Imports the model and `losses`; the trainer and lessons import this.
"""
