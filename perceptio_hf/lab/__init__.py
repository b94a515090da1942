"""The laboratory: how the embedded checkpoint is trained, and the ablation.

May import all below; only commands import it.
"""
