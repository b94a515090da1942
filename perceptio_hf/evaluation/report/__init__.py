"""Runs beside one another and beside published figures, as text and pictures.

Imports the summaries that `run` writes.
"""
