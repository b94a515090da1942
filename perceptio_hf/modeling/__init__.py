"""Configurations and models: Perceptio, the depth codec, and the grammar of their spatial tokens."""
