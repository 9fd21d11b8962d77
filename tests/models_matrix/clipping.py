"""Whether QK-clip keeps its word in a family: read right, then down to tau or named and left alone.

The truth is what the model hands to its softmax, seen by an oracle of its own; a family whose
softmax cannot be seen that way is asked for the clip alone.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hmpo.attention.sites import ClipTarget
from hmpo.attention.tracker import LogitTracker
from hmpo.optim.clipper import MuonClipConfig
from hmpo.optim.muon_clip import qk_clip_stats, with_qk_clip

IDS = ((5, 9, 3, 17, 30, 7, 21, 5, 9, 44, 31, 2), (8, 4, 33, 6, 8, 50, 4, 12, 3, 3, 27, 58))
STEPS = 8
"""Forward passes and clips: a layer's clip changes what the next one reads."""
CLOSE = 1e-3
"""Relative: readings are float32."""
OVER = 1.03
"""Of tau after the last clip: what it read came from the weights before."""
BIASED = ("DogeAttention", "InklingAttention")
"""Classes that add to their logits what no mask is: a reading is of the logit before that."""


def qk_clip_cell(model: nn.Module) -> dict[str, Any]:
    """Attention layers whose logits are read, which of them can be scaled, and whether it holds."""
    tracker = LogitTracker(model)
    sites = tracker.sites
    tracker.close()
    targets = [site.target("trained") for site in sites]
    reasons = sorted(
        {target for target in targets if not isinstance(target, ClipTarget)}
        | {line.partition(": ")[2] for line in tracker.unread}
    )
    scaled = sum(isinstance(target, ClipTarget) for target in targets)
    layers = len(sites) + len(tracker.unread)
    if not layers:
        return {"status": "none", "why": "no softmax attention"}
    cell = {"status": "refused", "why": "; ".join(reasons), "scaled": scaled, "layers": layers}
    if not sites:
        return cell
    model.eval()
    off, compared = reading_error(model)
    cell |= {"reading off": off, "compared": compared}
    if off > CLOSE:
        return cell | {"status": "wrong", "why": "a logit is read wrongly"}
    broken, named = clipped(model)
    model.train()
    if broken:
        return cell | {"status": "wrong", "why": "; ".join(broken)}
    reasons = sorted({*reasons, *named})
    whole = scaled == layers and not named
    return cell | {"status": "exact" if whole else "refused", "why": "; ".join(reasons)}


def reading_error(model: nn.Module) -> tuple[float, int]:
    """Largest relative error of a head's reading, and how many layers were compared.

    An upper bound is no error, unless it is below the truth.
    """
    with seen_scores(model) as truth:
        forward(model)
    with LogitTracker(model, source="exact") as tracker:
        forward(model)
        readings = tracker.consume()
    worst, compared = 0.0, 0
    for site in tracker.sites:
        module, reading = site.module(), readings[site.name]
        want = truth.get(id(module))
        if type(module).__name__ in BIASED or site.name in tracker.unseen:
            continue
        if want is None or len(want) != len(reading.value) or not want.isfinite().all():
            continue  # not seen, or not run: eager attention is NaN where a row sees nothing
        compared += 1
        off = (reading.value - want.cpu()) / want.abs().cpu().clamp(min=1e-2)
        off = torch.where(reading.exact, off.abs(), (-off).clamp(min=0))
        worst = max(worst, float(off.nan_to_num(float("inf")).max()))
    return worst, compared


@contextlib.contextmanager
def seen_scores(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Largest visible score of each head that a module's own softmax is given, by module's id."""
    found: dict[int, Tensor] = {}
    running: list[nn.Module] = []
    real = torch.nn.functional.softmax

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        length = len(IDS[0])
        # a softmax with a sink is given one more column, and less the row's maximum
        fits = scores.ndim == 4 and scores.shape[0] == len(IDS) and scores.shape[2] == length
        # passes without gradients are none that train: HRM makes some of its own
        if running and fits and scores.shape[3] == length and torch.is_grad_enabled():
            above = torch.ones(length, length, dtype=torch.bool).triu(1)
            rows = scores.detach().float().masked_fill(above, -torch.inf).amax(3)
            maxima = rows.amax((0, 2))
            if not bool(rows.any()):  # each row less its own maximum
                return real(scores, *args, **kwargs)
            key = id(running[-1])
            old = found.get(key)
            found[key] = maxima if old is None else torch.maximum(old, maxima)
        return real(scores, *args, **kwargs)

    handles = []
    attention = {id(site.module()) for site in LogitTracker(model).sites}
    for module in model.modules():
        if id(module) in attention:
            handles.append(module.register_forward_pre_hook(lambda m, _: running.append(m)))
            handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    names = [getattr(c, "_attn_implementation", None) for c in [model.config]]
    try:
        with contextlib.suppress(Exception):
            model.set_attn_implementation("eager")
        with mock.patch.object(torch.nn.functional, "softmax", softmax):
            yield found
    finally:
        for handle in handles:
            handle.remove()
        if names[0]:
            with contextlib.suppress(Exception):
                model.set_attn_implementation(names[0])


def clipped(model: nn.Module) -> tuple[list[str], list[str]]:
    """Layers that break the promise, and reasons of those that are named.

    Half of the largest logit is the threshold; nothing else changes the weights.
    """
    tracker = LogitTracker(model, source="exact")
    forward(model)
    largest = max(float(r.value.max()) for r in tracker.consume().values())
    tracker.close()
    if not 0 < largest < torch.inf:
        return [], ["no logit above 0"]
    tau = largest / 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=tau))
    named: dict[str, str] = {}
    for _ in range(STEPS):
        forward(model)
        optimizer.step()
        stats = qk_clip_stats(optimizer)
        for line in stats.unclippable:
            name, _, why = line.partition(": ")
            named[name] = why
    left = {n: v for n, v in stats.max_by_layer.items() if v > OVER * tau and n not in named}
    broken = [f"{n}: reads {v / tau:.2f} tau after {STEPS} clips" for n, v in left.items()]
    before = [p.detach().clone() for p in model.parameters()]
    if not stats.clipped_heads:  # all is down or named: nothing may move any more
        forward(model)
        optimizer.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if moved and not qk_clip_stats(optimizer).clipped_heads:
            broken.append("weights moved without a clip")
    return broken, sorted(set(named.values()))


def forward(model: nn.Module) -> None:
    """The rows once, gradients enabled, so that listeners hear it."""
    model(input_ids=torch.tensor(IDS), use_cache=False)
