"""Perceptio as a guest in other people's programs."""
