"""Pictures and conversations in, answers out.

Imports `tokens`, `modeling` and itself: its files travel with checkpoints.
"""
