"""Stable import paths of the optimizers; the code is in `hmpo.optim`."""
