"""Whether QK-clip can hold the logits of a policy's attention: tried, and undone."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hmpo.attention.sites import find_sites
from hmpo.attention.tracker import LogitTracker
from hmpo.models.evaluation import evaluating
from hmpo.optim import MuonClipConfig, qk_clip_stats, with_qk_clip
from hmpo.probes.finding import Finding

STEPS = 6
"""Forward passes, each with a clip after it: a layer's clip changes what the next one reads."""
OVER = 1.05
"""Of the threshold, what counts as held."""


def clip_finding(policy: nn.Module, ids: Int[Tensor, "1 S"]) -> Finding:
    """Clip at half of the largest logit, look, and put the weights back.

    A layer that is named as one that QK-clip leaves alone has not failed.

    Args:
        policy: a transformers causal LM.
        ids: one row of tokens.
    """

    def finding(ok: bool | None, line: str) -> Finding:
        status = "not applicable" if ok is None else "ok" if ok else "FAILED"
        return Finding(name="QK-clip", status=status, line=line)

    sites, unread = find_sites(policy)
    if not sites:
        return finding(None, unread[0] if unread else "no attention that QK-clip knows")
    largest = largest_logit(policy, ids)
    if not 0 < largest < torch.inf:
        return finding(None, f"largest logit {largest:.3g} on this row, nothing to clip")
    modules = [module for site in sites if (module := site.module()) is not None]
    kept = [(p, p.detach().clone()) for m in modules for p in m.parameters()]
    try:
        named, left = clipped(policy, ids, largest / 2)
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
    alone = named | reasons(unread)
    line = f"{len(sites)} layers, largest logit {largest:.3g}, threshold {largest / 2:.3g}"
    if alone:
        name, why = next(iter(alone.items()))
        line += f"; {len(alone)} left alone, as {name}: {why}"
    if left:
        name, value = max(left.items(), key=lambda item: item[1])
        return finding(False, f"{line}; {name} still at {value:.3g} after {STEPS - 1} clips")
    return finding(True, line)


def heard(policy: nn.Module, ids: Tensor) -> None:
    """One forward pass that listeners hear."""
    with torch.enable_grad(), evaluating(policy):
        policy(input_ids=ids, use_cache=False)


def largest_logit(policy: nn.Module, ids: Tensor) -> float:
    """Of all heads on this row."""
    with LogitTracker(policy, source="exact") as tracker:
        heard(policy, ids)
        return max((float(r.value.max()) for r in tracker.consume().values()), default=0.0)


def clipped(policy: nn.Module, ids: Tensor, tau: float) -> tuple[dict[str, str], dict[str, float]]:
    """Layers that are left alone with the reason, and the largest logits of others above tau."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    with_qk_clip(optimizer, policy, MuonClipConfig(max_qk_score=tau))
    named: dict[str, str] = {}
    highest: dict[str, float] = {}
    policy.zero_grad(set_to_none=True)
    for _ in range(STEPS):
        heard(policy, ids)
        optimizer.step()
        stats = qk_clip_stats(optimizer)
        assert stats is not None, "it was wrapped above"
        named |= reasons(stats.unclippable)
        highest = dict(stats.max_by_layer)
    return named, {n: v for n, v in highest.items() if v > OVER * tau and n not in named}


def reasons(lines: Iterable[str]) -> dict[str, str]:
    """Lines "layer: why" as layer -> why."""
    parts = (line.partition(": ") for line in lines)
    return {name: why for name, _, why in parts}
