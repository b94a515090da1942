"""Sharing a model on the Hub: its card, the upload, the record of its training. Imports what is below; no command."""
