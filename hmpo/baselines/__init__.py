"""Baselines written from their papers, independent of the family."""
