"""Cost of the power-mean objective, forward and backward, against PPO's token loss.

python benchmarks/bench_aggregation.py
"""

from functools import partial

import torch
from common import alternate, one_thread, save

from hmpo.config import ObjectiveConfig
from hmpo.objective import power_mean_loss


def ppo_tokens(
    logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor
) -> None:
    """PPO's clipped loss, mean over tokens, then over sequences."""
    ratio = (logprobs - old).exp()
    advantage = advantages[:, None]
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()


def member(
    config: ObjectiveConfig,
    logprobs: torch.Tensor,
    old: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
) -> None:
    """One member's loss and gradient."""
    power_mean_loss(logprobs, old, mask, advantages, config).backward()


def main() -> None:
    """Measure at 64 sequences and three lengths."""
    one_thread()
    rows = []
    for length in (128, 1024, 8192):
        torch.manual_seed(0)
        old = -torch.rand(64, length)
        logprobs = (old + 0.05 * torch.randn(64, length)).requires_grad_()
        mask = torch.arange(length) < torch.randint(length // 2, length + 1, (64, 1))
        advantages = torch.randn(64)
        data = (logprobs, old, mask, advantages)
        sides = {"ppo": partial(ppo_tokens, *data)}
        for p in (-1.0, 0.0, 1.0):
            sides[f"p={p:g}"] = partial(member, ObjectiveConfig(p=p), *data)
        seconds = alternate(sides, repeats=15)
        rows += [
            {
                "sequences": 64,
                "tokens": length,
                "side": name,
                "cpu_ms": round(1e3 * value, 3),
                "ratio_to_ppo": round(value / seconds["ppo"], 2),
            }
            for name, value in seconds.items()
        ]
    save("aggregation", "python benchmarks/bench_aggregation.py", rows)


if __name__ == "__main__":
    main()
