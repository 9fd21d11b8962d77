"""Stable import path of MuonClip; the code is in `hmpo.optim`."""

from hmpo.optim import MuonClip, MuonClipConfig

__all__ = ["MuonClip", "MuonClipConfig"]
