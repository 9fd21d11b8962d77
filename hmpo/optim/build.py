"""The optimizer that a run's configuration names, and its state as a checkpoint keeps it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hmpo.config import OptimizerConfig
from hmpo.errors import ModelError
from hmpo.optim.muon_clip import STATE_KEY, qk_clip_stats
from hmpo.optim.param_groups import MuonWithAdamW, runs_fused, split_param_groups
from hmpo.optim.readings import TIERS


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for hidden matrices and AdamW for the rest, over trainable parameters.

    Vectors (norms, biases) are never decayed. QK-clip is not part of it: the trainers wrap it.

    Raises:
        ModelError: the model has no trainable parameter.
    """
    if config.name == "muon":
        groups = split_param_groups(
            model,
            lr=config.lr if config.muon_lr is None else config.muon_lr,
            weight_decay=config.weight_decay,
            adamw_lr=config.lr,
            per_head=config.muon_per_head,
        )
        return MuonWithAdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            momentum=config.muon_momentum,
            ns_coefficients=config.muon_coefficients,
            update_scale=config.muon_update_scale,
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError("policy: got no trainable parameter, expected at least one")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    fused = runs_fused(trainable)
    return torch.optim.AdamW(filled, lr=config.lr, betas=config.betas, fused=fused or None)


def split_clip_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state under "optimizer" and QK-clip's under "qk_clip".

    Apart, so that a checkpoint can insist on finite optimizer state: the clip's running maxima
    are -inf where nothing has been seen yet.
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


def clip_timing(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds that the last step's clip took, by telemetry name; empty without one."""
    stats = qk_clip_stats(optimizer)
    return {} if stats is None else {"time/qk_clip_s": stats.seconds}
