"""QK-clip: after a step, scale down the query and key weights of heads whose logits are too large.

Source: Kimi K2 (arXiv 2507.20534), algorithm 1: gamma = min(1, tau / S) for each head, then
W_q *= gamma^alpha and W_k *= gamma^(1 - alpha). Deviations: biases are scaled with their
weights (else the logits are not), and where several query heads share a key head the factors are
chosen so that every head of the group gets exactly its own gamma (`head_factors`).
"""

import dataclasses
import functools
import logging
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.attention.hooks import UNSEEN
from hmpo.attention.inputs import KeptInput
from hmpo.attention.sites import AttentionSite, ClipTarget, HeadRows, Scope, hidden_sites
from hmpo.attention.tracker import LogitTracker, MaxLogits, smallest_of_ranks
from hmpo.attention.weight_norm_bound import weight_norm_bound
from hmpo.errors import require
from hmpo.optim.adapter_clip import (
    LORA_RULES,
    AdapterClip,
    adapter_target,
    clip_adapter,
    left_alone,
)
from hmpo.optim.clip_stats import ClipStats, stats_of
from hmpo.optim.obedience import DISOBEYS, ObedienceCheck

logger = logging.getLogger(__name__)

INPUTS_KEPT_ABOVE = 0.5
"""Part of tau above which a layer's inputs are kept: below, it would have to double in one step."""
CHECKED_ABOVE = 0.5
"""Part of tau above which a layer is asked whether it obeys, before it has to;
after each clip it is asked again."""
GQA_RULES = ("balanced", "query", "group")
Masters = Callable[[Tensor], Tensor | None]
"""Gives the float32 copy that an optimizer keeps of a parameter, of the same shape, or None."""


def head_factors(
    gamma: Float[Tensor, " H"], kv_heads: int, alpha: float, gqa: str
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """Factors for each query head and key head; their product is gamma for each query head.

    "query" leaves the keys alone. "group" gives every head of a group the smallest gamma of the
    group, as gamma^alpha and gamma^(1 - alpha).

    "balanced" moves both sides by the least weighted sum of squared log changes, weight 1 - alpha
    on queries and alpha on keys: with g = log gamma and n query heads on a key head,
    log c_k = (1 - alpha) sum(g) / (n (1 - alpha) + alpha), and c_q = gamma / c_k. For n = 1 that
    is K2's gamma^alpha, gamma^(1 - alpha); for alpha = 1/2 it is c_k = prod(gamma)^(1 / (n + 1)).
    Heads under tau in such a group keep their logits, through c_q > 1. A group with gamma = 1
    throughout gets exactly 1.

    Args:
        gamma: wanted factor of each head's logits, in (0, 1], float64.
        kv_heads: key heads G; H is a multiple of it.
        alpha: share of the queries, in [0, 1].
        gqa: the rule, one of `GQA_RULES`. Under "group" the product is the group's smallest gamma.
    """
    if gqa == "query":
        return gamma, gamma.new_ones(kv_heads)
    groups = gamma.view(kv_heads, -1)
    if gqa == "group":
        least = groups.min(1).values
        return (least**alpha).repeat_interleave(groups.shape[1]), least ** (1 - alpha)
    logs = groups.log()
    weight = (1 - alpha) / (logs.shape[1] * (1 - alpha) + alpha)
    key = (weight * logs.sum(1)).exp()
    return gamma / key.repeat_interleave(logs.shape[1]), key


class QKClip:
    """Scales the heads whose largest logit, as read by a tracker, exceeds `tau`, down to `tau`.

    Args:
        tracker: where the readings come from. Its own tau may not be larger than `tau`:
            a bound certifies only up to the tracker's.
        tau: largest logit allowed, natural units (softmax input).
        alpha: share of the queries in a scaling, in [0, 1].
        gqa: rule for query heads that share a key head, see `head_factors`.
        scale_frozen: also scale weights that are not trained: the base under LoRA, norm gains.
            They have to be saved with the adapter then.
        lora: what to do with LoRA over a frozen base. "adapter" shrinks the adapter alone, by the
            least that brings the head to tau, where the base allows it; for that the tracker
            keeps the inputs of such layers from one step to the next. "report" leaves it alone.
        fallback: clip layers whose logits cannot be read by an upper bound from their weights,
            see `weight_norm_bound`. It shrinks healthy layers too; each use is counted.
        masters: finds the float32 copies that an optimizer keeps, which are scaled as well;
            without them the next step would undo the clip.

    Raises:
        ConfigError: a setting is out of range.

    The readings belong to the weights before the optimizer step (K2), so the next batch can
    exceed tau a little. Momentum and all other weights are left alone. Nothing of a key head's
    group changes, bit for bit, while all of its heads are at or under tau.
    """

    def __init__(
        self,
        tracker: LogitTracker,
        tau: float = 100.0,
        alpha: float = 0.5,
        gqa: str = "balanced",
        *,
        scale_frozen: bool = False,
        lora: str = "adapter",
        fallback: bool = False,
        masters: Masters | None = None,
    ) -> None:
        require(
            tracker.tau <= tau < math.inf,
            "tau",
            tau,
            f"a finite number >= the tracker's tau ({tracker.tau}), which its bounds certify",
        )
        require(0 <= alpha <= 1, "alpha", alpha, "a number in [0, 1]")
        require(gqa in GQA_RULES, "gqa", gqa, " or ".join(map(repr, GQA_RULES)))
        require(lora in LORA_RULES, "lora", lora, " or ".join(map(repr, LORA_RULES)))
        self.tracker, self.tau, self.alpha, self.gqa = tracker, float(tau), alpha, gqa
        self.scope: Scope = "all" if scale_frozen else "trained"
        self.lora = lora
        self.fallback, self.masters = fallback, masters
        self._warned: set[str] = set()
        self.obedient: dict[str, bool] = {}
        """Layers that came near tau, and whether their logits follow their weights."""
        self._checks: dict[str, ObedienceCheck] = {}
        self._adapters(self._targets())

    def apply(self) -> ClipStats:
        """Consume the readings, scale, and report what was done. One wait for the device."""
        start = time.perf_counter()
        targets, inputs = self._targets(), self.tracker.inputs.take()
        self._settle_checks()
        targets |= dict.fromkeys(self.tracker.unseen, UNSEEN)
        targets |= dict.fromkeys([n for n, obeys in self.obedient.items() if not obeys], DISOBEYS)
        self._warn("QK-clip cannot act", [f"{name}: {UNSEEN}" for name in self.tracker.unseen])
        adapters = self._adapters(targets)
        readings = self.tracker.consume()
        clippable = [
            (site, readings[site.name].value.double(), target)
            for site in self.tracker.sites
            if isinstance(target := targets[site.name], ClipTarget)
        ]
        bounded = self._bounded() if self.fallback else []
        adapted = self._adapted(adapters, readings, inputs)
        self._scale([*clippable, *bounded])
        known = self.obedient
        least = {site.name: 1.0 if site.name in known else CHECKED_ABOVE for site, *_ in clippable}
        self.ask(s.name for s, value, _ in clippable if self._is_over(value, least[s.name]))
        for name, clip in adapted.items():
            for rows, factors in clip.rows(adapters[name]):
                self._multiply(rows, factors)
        reasons = {name: t for name, t in targets.items() if isinstance(t, str)}
        reasons = {name: why for name, why in reasons.items() if name not in adapters}
        stats = stats_of(readings, reasons, adapted, self.tracker.unread, self.tau)
        if stats.missed_heads:
            self._warn("a logit exceeds tau but QK-clip cannot act", stats.unclippable)
        used = tuple(site.name for site, bound, _ in bounded if bool((bound > self.tau).any()))
        self._warn("clipped by a bound from its weights, nobody can read its logits", used)
        seconds = time.perf_counter() - start + self.tracker.seconds
        tiers = dict(self.tracker.tiers)
        return dataclasses.replace(stats, tiers=tiers, fallbacks=used, seconds=seconds)

    def ask(self, names: Iterable[str]) -> None:
        """Check at their next forward pass whether these layers obey."""
        sites = {site.name: site for site in self.tracker.sites if site.tap != "multihead"}
        for name in names:
            if name in sites and name not in self._checks:
                check = ObedienceCheck(sites[name], self.scope, self._halve)
                self._checks[name] = check
                weakref.finalize(self, check.remove)

    @property
    def asked(self) -> list[str]:
        """Layers whose check is still to come."""
        return [*self._checks]

    def stop(self) -> None:
        """Ask no layer any more."""
        for check in self._checks.values():
            check.remove()
        self._checks.clear()

    def _is_over(self, value: Tensor, part: float) -> bool:
        return bool((value.isfinite() & (value > self.tau * part)).any())

    def _halve(self, site: AttentionSite, target: ClipTarget) -> Iterator[tuple[HeadRows, Tensor]]:
        return self._factors(site, target, torch.full((site.heads,), 0.5, dtype=torch.float64))

    def _settle_checks(self) -> None:
        """Take the answers in; ranks agree: one that saw a layer disobey decides."""
        if not self._checks:
            return
        answers = [check.obeys for check in self._checks.values()]
        marks = torch.tensor([2.0 if answer is None else float(answer) for answer in answers])
        marks = smallest_of_ranks(marks, self.tracker.group)
        for name, mark in zip([*self._checks], marks.tolist(), strict=True):
            if mark < 2:
                self._checks.pop(name).remove()
                self.obedient[name] = mark == 1
        lines = [f"{name}: {DISOBEYS}" for name, obeys in self.obedient.items() if not obeys]
        self._warn("QK-clip cannot act", lines)

    def _bounded(self) -> list[tuple[AttentionSite, Tensor, ClipTarget]]:
        """Layers that nobody can read, with the bound of their logits where there is one."""
        model = self.tracker.model
        layers = []
        for site in () if model is None else hidden_sites(model):
            target = site.target(self.scope)
            bound = None if model is None else weight_norm_bound(model, site)
            if isinstance(target, ClipTarget) and isinstance(bound, Tensor):
                at_tau = bound.cpu() <= self.tau * (1 + 1e-5)  # where an earlier clip put it
                layers.append((site, bound.cpu().masked_fill(at_tau, 0.0), target))
        return layers

    def _scale(self, clippable: list[tuple[AttentionSite, Tensor, ClipTarget]]) -> None:
        """Apply every site's factors; a parameter shared between sites is scaled once."""
        joint: dict[tuple, Tensor] = {}
        for _, value, target in clippable:
            key, gamma = _identity(target), gammas(value, self.tau)
            joint[key] = torch.minimum(joint.get(key, gamma), gamma)
        planned: dict[tuple, tuple[HeadRows, Tensor]] = {}
        for site, _, target in clippable:
            gamma = joint[_identity(target)]
            if bool((gamma == 1).all()):
                continue
            for rows, factors in self._factors(site, target, gamma):
                _, other = planned.get(rows.key, (rows, factors))
                planned[rows.key] = rows, torch.minimum(other, factors)
        for rows, factors in planned.values():
            self._multiply(rows, factors)

    def _multiply(self, rows: HeadRows, factors: Tensor) -> None:
        rows.scale(factors)
        master = None if self.masters is None else self.masters(rows.parameter)
        if master is not None:
            rows.scale(factors, like=master)
            rows.parameter.detach().copy_(
                master
            )  # rounded once, so that both stay the same weights

    def _targets(self) -> dict[str, ClipTarget | str]:
        return {site.name: site.target(self.scope) for site in self.tracker.sites}

    def _adapters(self, targets: dict[str, ClipTarget | str]) -> dict[str, ClipTarget]:
        """Layers of which the adapter alone can be scaled; their inputs are kept from now on."""
        adapters = {}
        for site in self.tracker.sites if self.lora == "adapter" else ():
            target = adapter_target(site, self.gqa) if isinstance(targets[site.name], str) else ""
            if isinstance(target, ClipTarget):
                self.tracker.watch_inputs(site)
                adapters[site.name] = target
        return adapters

    def _adapted(
        self,
        adapters: dict[str, ClipTarget],
        readings: dict[str, MaxLogits],
        inputs: tuple[dict[str, list[KeptInput]], dict[str, str]],
    ) -> dict[str, AdapterClip]:
        """What to do in each layer with LoRA that has a head above tau."""
        agree = functools.partial(smallest_of_ranks, group=self.tracker.group)
        uses = Counter(rows.key for target in adapters.values() for rows in target.rows)
        clips, (calls, lost) = {}, inputs
        for site in self.tracker.sites:
            if site.name not in adapters:
                continue
            value, target = readings[site.name].value, adapters[site.name]
            over = value.isfinite() & (value > self.tau)
            if bool(over.any()) and any(uses[rows.key] > 1 for rows in target.rows):
                clips[site.name] = left_alone(site, "its adapter serves other layers too")
            elif bool(over.any()):
                kept = lost.get(site.name, calls.get(site.name, []))
                clips[site.name] = clip_adapter(
                    site, target, over, kept, tau=self.tau, gqa=self.gqa, agree=agree
                )
            if bool((value > -torch.inf).any()):
                low = value <= self.tau * INPUTS_KEPT_ABOVE
                self.tracker.inputs.arm([site.name], not bool(low.all()))
        return clips

    def _factors(
        self, site: AttentionSite, target: ClipTarget, gamma: Tensor
    ) -> Iterator[tuple[HeadRows, Tensor]]:
        kv_heads = site.kv_heads if target.per_head else 1
        if not target.per_head:
            gamma = gamma.min().view(1)
        gqa = self.gqa if target.key else "query"
        query, key = head_factors(gamma, kv_heads, self.alpha, gqa)
        both = query * key.repeat_interleave(len(query) // kv_heads)
        for pieces, factors in ((target.query, query), (target.key, key), (target.both, both)):
            yield from ((rows, factors) for rows in pieces)

    def _warn(self, what: str, lines: Iterable[str]) -> None:
        for line in set(lines) - self._warned:
            logger.warning("%s: %s", what, line)
            self._warned.add(line)


def gammas(value: Float[Tensor, " H"], tau: float) -> Float[Tensor, " H"]:
    """Wanted factor of each head: tau / value above tau, else 1; 1 for NaN and infinities."""
    over = value.isfinite() & (value > tau)
    # exactly 1 elsewhere: torch divides a number by a tensor as a product with its reciprocal
    return torch.where(over, tau / value.masked_fill(~over, tau), 1.0)


def _identity(target: ClipTarget) -> tuple:
    return tuple(rows.key for rows in target.rows)
