"""Training for users: losses, trainer, collator, recipes, depth codec.

Imports `data`, the model and what is below; never `evaluation`.
"""
