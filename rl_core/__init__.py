"""Stable import paths of the shared core; the code is in `hmpo.sampling` and `hmpo.logprobs`."""
