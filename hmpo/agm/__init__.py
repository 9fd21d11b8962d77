"""Adaptive controllers: floats in, decisions out. Why it is hard: README.md beside this file."""

from hmpo.agm.protocol import Controller, Decision

__all__ = ["Controller", "Decision"]
