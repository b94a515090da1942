"""Figures of merit as plain functions over arrays and texts. Imports nothing of a model but its depth codec."""
