"""Data that models learn from: the rendered world, and readers for depth files and pictures."""
