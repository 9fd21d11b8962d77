"""QK-clip of one model: its settings, its tracker, and what of both survives a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hmpo.attention.readings import SOURCES
from hmpo.attention.tracker import LogitTracker
from hmpo.errors import require
from hmpo.optim.adapter_clip import LORA_RULES
from hmpo.optim.clip_stats import ClipStats
from hmpo.optim.qk_clip import GQA_RULES, Masters, QKClip
from hmpo.stopwatch import section


@dataclass(frozen=True, kw_only=True)
class MuonClipConfig:
    """Settings of QK-clip."""

    max_qk_score: float = 100.0
    """Threshold tau on a head's largest attention logit (softmax input, natural units)."""
    alpha: float = 0.5
    """Share of the queries in a scaling, in [0, 1]."""
    gqa: Literal["balanced", "query", "group"] = "balanced"
    """Query heads that share a key head: "balanced" scales both sides and "query" queries only,
    each head by its own factor; "group" scales all heads of a group by the smallest."""
    source: Literal["auto", "lse", "exact", "bound"] = "auto"
    """Where readings come from, see `LogitTracker`."""
    scale_frozen: bool = False
    """Also scale weights that are not trained: the base under LoRA, frozen gains. They have to be
    saved with the adapter then. False: such layers are reported and left alone."""
    lora: Literal["adapter", "report"] = "adapter"
    """LoRA over a frozen base: "adapter" shrinks the adapter alone, as far as the base allows, and
    keeps the inputs of layers near the threshold from one step to the next (tokens x hidden width
    each, 1 GiB at most); "report" leaves the layer alone and keeps nothing."""
    weight_norm_fallback: bool = False
    """Clip layers whose logits cannot be read by an upper bound from their weights. It shrinks
    healthy layers too; each use is counted in `ClipStats.fallbacks` and warned about once."""

    def __post_init__(self) -> None:
        tau = self.max_qk_score
        require(0 < tau < torch.inf, "max_qk_score", tau, "a finite number > 0")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "a number in [0, 1]")
        require(self.gqa in GQA_RULES, "gqa", self.gqa, " or ".join(map(repr, GQA_RULES)))
        require(self.source in SOURCES, "source", self.source, " or ".join(map(repr, SOURCES)))
        require(self.lora in LORA_RULES, "lora", self.lora, " or ".join(map(repr, LORA_RULES)))
        for name in ("scale_frozen", "weight_norm_fallback"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "a bool")


class Clipper:
    """QK-clip of one model with what has to survive a checkpoint."""

    def __init__(
        self, model: nn.Module, config: MuonClipConfig, masters: Masters | None = None
    ) -> None:
        self.config = config
        self.tracker = LogitTracker(model, config.max_qk_score, config.source)
        self.clip = QKClip(
            self.tracker,
            config.max_qk_score,
            config.alpha,
            config.gqa,
            scale_frozen=config.scale_frozen,
            lora=config.lora,
            fallback=config.weight_norm_fallback,
            masters=masters,
        )
        self.stats: ClipStats | None = None
        self.steps = 0

    def apply(self) -> None:
        """Clip by what was read since the last step."""
        with section("qk_clip"):
            self.stats = self.clip.apply()
        self.steps += 1

    def close(self) -> None:
        """Stop reading."""
        self.clip.stop()
        self.tracker.close()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain containers and tensors."""
        stats: dict[str, Any] | None = None
        if self.stats is not None:
            stats = self.stats.state()
        state = {"steps": self.steps, "readings": self.tracker.state_dict(), "stats": stats}
        if self.clip.obedient or self.clip.asked:
            state |= {"obedient": dict(self.clip.obedient), "asked": self.clip.asked}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`; one from before layers were asked has no answers yet."""
        self.tracker.load_state_dict(state["readings"])
        self.clip.stop()
        self.clip.obedient = dict(state.get("obedient", {}))
        self.clip.ask(state.get("asked", ()))
        self.steps = int(state["steps"])
        stats: dict[str, Any] | None = state["stats"]
        self.stats = None if stats is None else ClipStats.from_state(stats)
