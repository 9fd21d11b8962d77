"""Cost of every member's objective, forward and backward, against verl's `vanilla` policy loss.

python benchmarks/objective.py            (in the environment that `make peers` makes)

One run, one thread, the same tensors on both sides, medians of alternating CPU times. Peak memory
is what the forward and backward pass allocate at once beyond their inputs, the gradient included,
in units of one (B, T) float32 tensor. The demo's share is the time of one objective, with its
metrics, on a minibatch of the demo's shape as a part of one of its updates.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import alternate, one_thread, save

from hmpo.cli.demo import demo_config
from hmpo.config import EvalConfig
from hmpo.config.members import BY_NAME
from hmpo.config.objective import ObjectiveConfig
from hmpo.objective.loss import power_mean_loss, power_mean_objective
from hmpo.run.loop import train

SEQUENCES = 64
SIGMA = 0.1
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch(sequences: int, length: int) -> Data:
    """Log-probs with a gradient, old ones, mask and advantages; responses of L/2 to L tokens."""
    torch.manual_seed(0)
    old = -torch.rand(sequences, length)
    logprobs = (old + SIGMA * torch.randn(sequences, length)).requires_grad_()
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (sequences, 1))
    return logprobs, old, mask, torch.randn(sequences)


def vanilla(data: Data, config) -> None:
    """Verl's PPO loss with its own metrics, as its workers call it."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    logprobs, old, mask, advantages = data
    logprobs.grad = None
    spread = advantages[:, None].expand_as(old)
    loss, _ = get_policy_loss_fn("vanilla")(
        old, logprobs, spread, mask, loss_agg_mode="token-mean", config=config
    )
    loss.backward()


def member(data: Data, config: ObjectiveConfig) -> None:
    """One member's loss and gradient."""
    data[0].grad = None
    power_mean_loss(*data, config).backward()


def with_metrics(data: Data, config: ObjectiveConfig) -> None:
    """One member's loss and gradient, and all its metrics."""
    data[0].grad = None
    power_mean_objective(*data, config).loss.backward()


def peak_tensors(run, logprobs: torch.Tensor) -> float:
    """Most memory that `run` holds at once, in float32 tensors of the shape of `logprobs`."""
    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / (4 * logprobs.numel())


def members(lengths: list[int], repeats: int) -> list[dict]:
    """Every member at every length, as ratios to verl."""
    from verl.workers.config import ActorConfig

    peer = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
    )
    rows = []
    for length in lengths:
        data = batch(SEQUENCES, length)
        sides = {"verl vanilla": partial(vanilla, data, peer)}
        sides |= {name: partial(member, data, make()) for name, make in BY_NAME.items()}
        seconds = alternate(sides, repeats=repeats)
        for name, value in seconds.items():
            ratio = value / seconds["verl vanilla"]
            row = {"tokens": length, "side": name, "cpu_ms": 1e3 * value, "ratio": ratio}
            row["peak_tensors"] = peak_tensors(sides[name], data[0])
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def demo_share(repeats: int) -> dict:
    """The objective's part, metrics included, of an update of the demo."""
    with tempfile.TemporaryDirectory() as out:
        config = demo_config(updates=12, out=Path(out), name="demo")
        config = replace(config, threads=1, eval=EvalConfig(prompts=2, final_prompts=2))
        folder = train(config).folder
        lines = (folder / "timing.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    update = statistics.median(r["time/step_s"] for r in steps if "time/step_s" in r)
    rows = config.prompts_per_rollout * config.trainer.group_size // config.trainer.minibatches
    data = batch(rows, config.trainer.max_length)
    seconds = alternate({"demo": partial(with_metrics, data, config.objective)}, repeats=repeats)
    return {
        "tokens": config.trainer.max_length,
        "side": "demo: objective and metrics of an update",
        "cpu_ms": round(1e3 * seconds["demo"], 3),
        "update_ms": round(1e3 * update, 1),
        "share": round(seconds["demo"] / update, 5),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--repeats", type=int, default=61)
    arguments = parser.parse_args()
    one_thread()
    rows = members(arguments.lengths, arguments.repeats)
    save("objective", "python benchmarks/objective.py", [*rows, demo_share(arguments.repeats)])


if __name__ == "__main__":
    main()
