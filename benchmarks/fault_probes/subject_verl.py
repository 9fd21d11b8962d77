"""verl as a subject: its registered losses and advantages, with its own configuration classes.

Its engines and rollouts, which ask for a GPU unless they are told otherwise, are not run here.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.fault_probes.common import Messages
from benchmarks.fault_probes.protocol import Loss, Option, Subject, Tokens

SEQUENCE = "seq-mean-token-mean"
MODES = {
    "default": ("vanilla", None),
    "grpo": ("vanilla", None),
    "gmpo": ("geo_mean", None),
    "gspo": ("gspo", SEQUENCE),
    "gspo_default": ("gspo", None),
}
"""Member -> (loss_mode, loss_agg_mode); None is verl's default."""


class Verl(Subject):
    """The installed verl."""

    name = "verl"
    reduction = "token"

    def versions(self) -> dict[str, str]:
        """Of verl and torch."""
        from importlib.metadata import version

        return super().versions() | {"verl": version("verl")}

    def why_not(self, faculty: str) -> str:
        """Everything but losses and advantages."""
        return "not run: of verl only losses and advantages were asked"

    def actor(self, rows: int, low: float | None, high: float | None, **options: Any) -> Any:
        """Verl's settings of the actor, else default."""
        from verl.workers.config import ActorConfig

        given: dict[str, Any] = {} if low is None else {"clip_ratio_low": low}
        given |= {} if high is None else {"clip_ratio_high": high}
        return ActorConfig(
            strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=rows, **(given | options)
        )

    def objective(
        self,
        tokens: Tokens,
        *,
        member: str = "default",
        parts: Sequence[Sequence[int]] | None = None,
        low: float | None = None,
        high: float | None = None,
        beta: float = 0.0,
        **options: Any,
    ) -> Loss:
        """Loss and gradient as `verl.workers.utils.losses.ppo_loss` puts them together."""
        from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
        from verl.utils.metric import AggregationType, Metric

        mode, aggregation = MODES.get(member, (member, None))
        split = [list(range(len(tokens.new)))] if parts is None else parts
        actor = self.actor(max(map(len, split)), low, high, **options)
        aggregation = aggregation or actor.loss_agg_mode
        actor.global_batch_info.update(
            dp_size=1,
            batch_num_tokens=int(tokens.mask.sum()),
            global_batch_size=len(tokens.new),
            loss_scale_factor=actor.loss_scale_factor,
        )
        new = tokens.new.clone().requires_grad_(True)
        messages = Messages()
        logging.getLogger().addHandler(messages)
        value, clipped = 0.0, Metric(aggregation=AggregationType.MEAN)
        for rows in split:
            part = tokens.rows(rows)
            loss, metrics = get_policy_loss_fn(mode)(
                old_log_prob=part.old,
                log_prob=new[rows],
                advantages=part.advantages.unsqueeze(1).expand(part.new.shape),
                response_mask=part.mask,
                loss_agg_mode=aggregation,
                config=actor,
                rollout_is_weights=part.weights,
            )
            if beta:
                kl = kl_penalty(new[rows], part.ref, actor.kl_loss_type)
                info = actor.global_batch_info
                loss = loss + beta * agg_loss(kl, part.mask, aggregation, **info)
            loss.backward()
            value += float(loss.detach())
            clipped.append(float(metrics.get("actor/pg_clipfrac", math.nan)))
        logging.getLogger().removeHandler(messages)
        frac = float(clipped.aggregate())
        assert new.grad is not None
        return Loss(value, new.grad, None if math.isnan(frac) else frac, messages.lines)

    def options(self) -> list[Option]:
        """`loss_agg_mode` beside each of its losses."""
        from benchmarks.fault_probes.of_objective import ragged

        tokens, found = ragged(0.8), []
        for mode in ("vanilla", "gspo", "sapo", "cispo", "geo_mean", "dppo_tv", "gpg"):
            member = "gspo_default" if mode == "gspo" else mode
            one = self.objective(tokens, member=member)
            other = self.objective(tokens, member=member, loss_agg_mode="seq-mean-token-sum")
            told = bool(other.told)
            found.append(Option(f"{mode} loss_agg_mode", one.value != other.value, told))
        return found

    def advantages(self, groups: Sequence[Sequence[float]]) -> list[list[float]]:
        """GRPO's, of rewards by group."""
        number = [k for k, group in enumerate(groups) for _ in group]
        flat = iter(self.grouped_advantages([r for group in groups for r in group], number))
        return [[next(flat) for _ in group] for group in groups]

    def grouped_advantages(self, rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
        """By verl's index of prompts."""
        from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

        scores: Tensor = torch.tensor(rewards)[:, None]
        index = np.array([str(g) for g in groups])
        mask = torch.ones_like(scores)
        found, _ = compute_grpo_outcome_advantage(scores.clone(), mask, index)
        return found[:, 0].tolist()
