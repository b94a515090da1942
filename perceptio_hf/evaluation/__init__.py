"""Figures of merit: depth."""
