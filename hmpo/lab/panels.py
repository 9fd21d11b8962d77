"""What the report plots: one row for each figure, with its panels and metrics."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Line:
    """One metric in a panel."""

    metric: str
    label: str
    source: Literal["steps", "evals", "times"] = "steps"
    interval: bool = False
    """Draw points with the 95 % interval of `<metric>_low` and `<metric>_high`."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    unit: str
    """Label of the vertical axis, with its unit."""
    lines: tuple[Line, ...]
    share: bool = False
    """Values are shares: the axis starts at 0 and may end at 1."""
    full: bool = False
    """The axis runs from 0 to 1 whatever the values."""
    varies: bool = False
    """Leave the panel out while its values are all the same."""
    threshold: tuple[str, ...] = ()
    """Setting of the configuration that is drawn as a line."""
    stacked: bool = False
    """Lines are parts of a whole, drawn on top of each other; a part that is missing is 0."""


@dataclass(frozen=True)
class Plot:
    """One figure."""

    name: str
    """File name without suffix."""
    title: str
    caption: str
    panels: tuple[Panel, ...]


STEP_PARTS = (
    Line("time/sampling_s", "sampling", "times"),
    Line("time/rewards_s", "rewards", "times"),
    Line("time/logprobs_s", "log-probs", "times"),
    Line("time/objective_s", "objective", "times"),
    Line("time/backward_s", "backward", "times"),
    Line("time/optimizer_s", "optimizer", "times"),
    Line("time/qk_clip_s", "QK-clip", "times"),
    Line("time/telemetry_s", "telemetry", "times"),
)
"""Parts of time/step_s, which never overlap."""

PLOTS: tuple[Plot, ...] = (
    Plot(
        "success",
        "Success on held-out prompts",
        "Bars are 95 % Wilson intervals. Below: mean reward of the training rollouts, and on "
        "held-out prompts.",
        (
            Panel(
                "success rate",
                (
                    Line("eval/sampled", "sampled", "evals", interval=True),
                    Line("eval/greedy", "greedy", "evals", interval=True),
                    Line("eval/pass_at_k", "pass@k", "evals", interval=True),
                ),
                full=True,
            ),
            Panel(
                "mean reward",
                (Line("reward/mean", "train"), Line("eval/mean", "held out", "evals")),
            ),
        ),
    ),
    Plot(
        "kl",
        "KL divergence",
        "Old to new: from the policy that sampled to the one that learns, within a rollout. "
        "To the reference: from the frozen start of the run.",
        (
            Panel("old to new\n(nat/token)", (Line("kl/k3", "k3, old to new"),), share=True),
            Panel("to reference\n(nat/token)", (Line("kl/ref", "k3, reference"),), share=True),
        ),
    ),
    Plot(
        "clip",
        "Clip fraction by advantage sign",
        "Share of tokens (or responses, with a sequence clip) whose clipped branch is active.",
        (
            Panel(
                "share clipped",
                (
                    Line("clip/frac_pos", "advantage > 0, upper bound"),
                    Line("clip/frac_neg", "advantage < 0, lower bound"),
                    Line("clip/frac", "all"),
                ),
                share=True,
            ),
        ),
    ),
    Plot(
        "ratio",
        "Means of the token ratios",
        "Response means of log arithmetic, geometric and harmonic mean; the gap is "
        "arithmetic less harmonic. All are 0 where the policy is the one that sampled.",
        (
            Panel(
                "log mean (nat)",
                (
                    Line("ratio/logA", "arithmetic"),
                    Line("ratio/logG", "geometric"),
                    Line("ratio/logH", "harmonic"),
                ),
            ),
            Panel(
                "log gap (nat)",
                (Line("ratio/log_gap_mean", "mean"), Line("ratio/log_gap_p95", "95th percentile")),
                share=True,
            ),
        ),
    ),
    Plot(
        "spread",
        "Spread of the log ratios",
        "sigma: standard deviation of the token log ratios; times sqrt(mean response length) it is "
        "the width of a whole response's. Below: how old the policy is that sampled.",
        (
            Panel(
                "nat",
                (
                    Line("ratio/sigma", "sigma"),
                    Line("ratio/sigma_sqrt_l", "sigma sqrt(length)"),
                ),
                share=True,
            ),
            Panel("staleness\n(updates)", (Line("staleness", "updates"),), varies=True),
        ),
    ),
    Plot(
        "exponent",
        "Effective sample size",
        "Share of a response's tokens that carry its weight in the mean; p too, if it changes.",
        (
            Panel("exponent p", (Line("ratio/p", "p"),), varies=True),
            Panel("effective share", (Line("ratio/ess_tok", "tokens"),), full=True),
        ),
    ),
    Plot(
        "entropy",
        "Policy entropy",
        "Token mean. A fall towards 0 means that the policy has stopped exploring.",
        (Panel("entropy (nat/token)", (Line("entropy", "entropy"),), share=True),),
    ),
    Plot(
        "signal",
        "Groups without a signal",
        "Prompts whose responses all got the same reward: they teach nothing.",
        (Panel("share of groups", (Line("adv/zero_frac", "all rewards equal"),), full=True),),
    ),
    Plot(
        "gradient",
        "Gradient norm and learning rate",
        "Global L2 norm before and after clipping.",
        (
            Panel(
                "gradient norm",
                (Line("grad_norm", "before clipping"), Line("grad_norm_clipped", "after")),
                share=True,
            ),
            Panel("learning rate", (Line("lr", "learning rate"),), share=True),
        ),
    ),
    Plot(
        "length",
        "Response length",
        "Truncated: the response hit the limit without an end token.",
        (
            Panel("tokens", (Line("len/mean", "mean"), Line("len/max", "longest")), share=True),
            Panel("share truncated", (Line("len/trunc_frac", "truncated"),), share=True),
        ),
    ),
    Plot(
        "logits",
        "Largest attention logit",
        "Over heads and layers. QK-clip rescales heads above the threshold.",
        (
            Panel(
                "logit", (Line("qk/max_logit", "largest"),), threshold=("trainer", "max_qk_score")
            ),
        ),
    ),
    Plot(
        "speed",
        "Speed",
        "Response tokens by the time of the whole update; from timing.jsonl.",
        (Panel("tokens/s", (Line("tokens_per_s", "tokens/s", "times"),), share=True),),
    ),
    Plot(
        "breakdown",
        "Where the time of an update goes",
        "Wall time of each part on the host, averaged over whole rollouts; from timing.jsonl.",
        (Panel("seconds an update", STEP_PARTS, share=True, stacked=True),),
    ),
)
