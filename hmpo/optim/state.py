"""An optimizer's state as a checkpoint keeps it, and what its clip did as telemetry names it."""

from collections.abc import Mapping
from typing import Any

import torch

from hmpo.attention.readings import TIERS
from hmpo.optim.muon_clip import STATE_KEY, qk_clip_stats


def split_clip_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state under "optimizer" and QK-clip's under "qk_clip".

    Apart, so that a checkpoint can insist on finite optimizer state: the clip's running maxima
    are -inf where nothing has been read yet.
    """
    state = dict(optimizer.state_dict())
    return {"qk_clip": state.pop(STATE_KEY, None), "optimizer": state}


def join_clip_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `split_clip_state` gave."""
    clip = {} if state["qk_clip"] is None else {STATE_KEY: state["qk_clip"]}
    optimizer.load_state_dict(dict(state["optimizer"]) | clip)


def clip_metrics(optimizer: torch.optim.Optimizer) -> dict[str, float | int]:
    """QK-clip's numbers of the last step by telemetry name; empty where it watches nothing."""
    stats = qk_clip_stats(optimizer)
    if stats is None or stats.heads == 0:
        return {}
    return {
        "qk/max_logit": stats.max_logit,
        "qk/clipped_heads": stats.clipped_heads,
        "qk/clip_rate": stats.clip_rate,
        "qk/min_scale": stats.min_scale,
        "qk/exact_frac": stats.exact_heads / stats.heads,
        "qk/nonfinite": stats.nonfinite,
        "qk/unclippable": stats.missed_heads,
        "qk/unread": stats.unread_heads,
        "qk/fallbacks": len(stats.fallbacks),
        **{f"qk/tier/{name}": stats.tiers.get(name, 0) for name in TIERS},
    }


def clip_lists(optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """Largest finite logit of each layer and of each head at the last step, by telemetry name.

    Layer after layer, and within one head after head; empty where nothing is watched.
    """
    stats = qk_clip_stats(optimizer)
    if stats is None or not stats.max_by_layer:
        return {}
    heads = [value for row in stats.max_by_head.values() for value in row]
    return {"qk/max_by_layer": list(stats.max_by_layer.values()), "qk/max_by_head": heads}
