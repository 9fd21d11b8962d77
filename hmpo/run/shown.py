"""What a person is shown of updates, in a terminal or a notebook."""

ROWS = (
    ("reward", "reward/mean", "{:.3f}", "mean over the rollout"),
    ("KL to the start", "kl/ref", "{:.4f}", "nats a token"),
    ("KL old to new", "kl/k3", "{:.5f}", "nats a token, since sampling"),
    ("clipped, advantage > 0", "clip/frac_pos", "{:.4f}", "share of tokens"),
    ("clipped, advantage < 0", "clip/frac_neg", "{:.4f}", "share of tokens"),
    ("entropy", "entropy", "{:.3f}", "nats a token"),
    ("gradient norm", "grad_norm", "{:.3f}", "before clipping"),
    ("largest attention logit", "qk/max_logit", "{:.1f}", "QK-clip acts above its threshold"),
    ("groups without signal", "adv/zero_frac", "{:.2f}", "all rewards equal"),
)
"""Label, telemetry name, format, and how to read it."""


def updates(count: int) -> str:
    """Example: `updates(1)` is "1 update", `updates(2)` is "2 updates"."""
    return f"{count} update" if count == 1 else f"{count} updates"
