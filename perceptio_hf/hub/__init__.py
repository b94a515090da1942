"""Sharing a model on the Hub: its card, and the upload."""
