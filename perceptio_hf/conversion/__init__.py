"""Formats of others, read and written: InternVL, SAM2, Sa2VA, AURORA. Imports the model and what is below it."""
