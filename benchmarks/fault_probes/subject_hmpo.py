"""hmpo as a subject: its objective, estimators and trainers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hmpo
from benchmarks.fault_probes.hmpo_training import HmpoTraining
from benchmarks.fault_probes.protocol import Loss, Option, Refused, Tokens
from hmpo import members
from hmpo.config import ObjectiveConfig, PowerMeanConfig
from hmpo.errors import HmpoError
from hmpo.objective.estimators import estimate_advantages
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.terms import count_denominators

MEMBERS = {
    "default": lambda: PowerMeanConfig().resolved_objective,
    "grpo": members.grpo,
    "gmpo": members.gmpo,
    "gspo": members.gspo,
    "gspo_default": members.gspo,
}


class Hmpo(HmpoTraining):
    """The library as it is."""

    name = "hmpo"
    reduction = "sequence"

    def versions(self) -> dict[str, str]:
        """Of hmpo and what it computes with."""
        import transformers

        return super().versions() | {
            "hmpo": hmpo.__version__,
            "transformers": transformers.__version__,
        }

    # ------------------------------------------------------------------------------ objective

    def member(self, name: str, low: float | None, high: float | None, beta: float) -> Any:
        """The configuration of a member."""
        config = MEMBERS[name]()
        changes: dict[str, Any] = {"kl_coef": beta} if beta else {}
        changes |= {} if low is None else {"clip_low": low}
        changes |= {} if high is None else {"clip_high": high}
        return dataclasses.replace(config, **changes)

    def part(self, tokens: Tokens, config: ObjectiveConfig, whole: Tokens) -> Tensor:
        """Loss of a micro-batch of `whole`."""
        return power_mean_loss(
            tokens.new,
            tokens.old,
            tokens.mask,
            tokens.advantages,
            config,
            ref_logprobs=tokens.ref,
            weights=tokens.weights,
            denominators=count_denominators(whole.mask),
        )

    def clip_metric(self, parts: Sequence[Tokens], config: ObjectiveConfig, whole: Tokens) -> float:
        """As a trainer measures it: of the minibatch."""
        found = objective_metrics(
            whole.new,
            whole.old,
            whole.mask,
            whole.advantages,
            config,
            ref_logprobs=whole.ref,
        )
        return float(found.get("clip/frac", math.nan))

    def objective(
        self,
        tokens: Tokens,
        *,
        member: str = "default",
        parts: Sequence[Sequence[int]] | None = None,
        low: float | None = None,
        high: float | None = None,
        beta: float = 0.0,
    ) -> Loss:
        """Loss and gradient, summed over micro-batches as a trainer back-propagates them."""
        config = self.member(member, low, high, beta)
        new = tokens.new.clone().requires_grad_(True)
        whole = dataclasses.replace(tokens, new=new)
        split = [list(range(len(new)))] if parts is None else parts
        losses = [self.part(whole.rows(rows), config, whole) for rows in split]
        total = self.total(losses)
        total.backward()
        detached = dataclasses.replace(tokens, new=new.detach())
        frac = self.clip_metric([detached.rows(rows) for rows in split], config, detached)
        assert new.grad is not None
        return Loss(float(total.detach()), new.grad, clip_frac=None if math.isnan(frac) else frac)

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """Of the micro-batches' losses."""
        return torch.stack(list(losses)).sum()

    def options(self) -> list[Option]:
        """Each setting that belongs to another kind of loss, set beside three members."""
        found = []
        for name in ("gmpo", "sapo", "cispo"):
            member = members.BY_NAME[name]()
            for option, value in OTHERS.items():
                try:
                    changed = dataclasses.replace(member, **{option: value})
                    PowerMeanConfig(objective=changed)
                except HmpoError:
                    found.append(Option(f"{name}.{option}", changes=False, told=True))
                    continue
                found.append(Option(f"{name}.{option}", self._changes(member, changed), told=False))
        return found

    def _changes(self, one: ObjectiveConfig, other: ObjectiveConfig) -> bool:
        from benchmarks.fault_probes.of_objective import ragged

        tokens = ragged(0.8)
        losses = [
            power_mean_loss(tokens.new, tokens.old, tokens.mask, tokens.advantages, config)
            for config in (one, other)
        ]
        return not torch.equal(*losses)

    # ----------------------------------------------------------------------------- advantages

    def advantages(self, groups: Sequence[Sequence[float]]) -> list[list[float]]:
        """Of rewards by group; NaN where there is none."""
        number = [k for k, group in enumerate(groups) for _ in group]
        flat = self.grouped_advantages([r for group in groups for r in group], number)
        values, begin = [], 0
        for group in groups:
            values.append(flat[begin : begin + len(group)])
            begin += len(group)
        return values

    def grouped_advantages(self, rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
        """Of rewards whose groups stand in any order."""
        r = torch.tensor(rewards)
        try:
            found = estimate_advantages(r, torch.tensor(groups), "group_std", valid=~r.isnan())
        except HmpoError as error:
            raise Refused(str(error)) from error
        return found.values.tolist()


OTHERS = {"dual_clip": 1.5, "gate_positive": 3.0, "clip_level": "sequence", "p_negative": 2.0}
"""A setting that not every kind of loss reads, with another value than a default's."""
