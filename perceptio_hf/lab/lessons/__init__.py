"""The lessons that train the embedded checkpoint from nothing, stage by stage.

Imports all below; only `lab` and commands import it.
"""
