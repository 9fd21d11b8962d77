"""Muon, the attention-logit tracker, QK-clip, and MuonClip."""
