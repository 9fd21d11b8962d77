"""Muon, and QK-clip for any optimizer. Why it is hard: README.md beside this file."""

from hmpo.attention.tracker import LogitTracker, MaxLogits
from hmpo.optim.clip_stats import ClipStats
from hmpo.optim.clipper import MuonClipConfig
from hmpo.optim.masters import with_masters
from hmpo.optim.muon import Muon
from hmpo.optim.muon_clip import (
    MuonClip,
    detach_qk_clip,
    discard_qk_readings,
    qk_clip_stats,
    with_qk_clip,
)
from hmpo.optim.param_groups import MuonWithAdamW, describe_groups, split_param_groups
from hmpo.optim.qk_clip import QKClip

__all__ = [
    "ClipStats",
    "LogitTracker",
    "MaxLogits",
    "Muon",
    "MuonClip",
    "MuonClipConfig",
    "MuonWithAdamW",
    "QKClip",
    "describe_groups",
    "detach_qk_clip",
    "discard_qk_readings",
    "qk_clip_stats",
    "split_param_groups",
    "with_masters",
    "with_qk_clip",
]
