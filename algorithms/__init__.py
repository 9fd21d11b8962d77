"""Stable import paths of the algorithms; the code is in `hmpo.baselines`."""
