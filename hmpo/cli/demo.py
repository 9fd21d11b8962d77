"""`hmpo demo`: the embedded default, a whole run that anyone can watch.

The bundled tiny policy (0.8M parameters, fitted to sort ten digits less than half of the time)
is post-trained by HMPO against exact match until it sorts them at least four times in five.
"""

from pathlib import Path

from hmpo.cli.screen import Screen, outcome_table
from hmpo.config import (
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)
from hmpo.config.members import hmpo as hmpo_member
from hmpo.run.loop import train

GOAL = 0.80
"""Sampled success on held-out prompts that the demo is to reach."""

UPDATES = 130
"""Optimizer updates: two for each of 65 rollouts."""


def demo_config(
    *,
    seed: int = 0,
    updates: int | None = None,
    out: Path,
    name: str,
    rollout: RolloutConfig | None = None,
) -> RunConfig:
    """The demo's configuration."""
    return RunConfig(
        name=name,
        out=str(out),
        seed=seed,
        updates=UPDATES if updates is None else updates,
        prompts_per_rollout=48,
        reference="start",
        policy=PolicyConfig(path="tiny-sort"),
        task=TaskConfig(name="sort"),
        objective=hmpo_member(),
        rollout=rollout or RolloutConfig(),
        trainer=TrainerConfig(
            group_size=8, max_length=12, minibatches=2, lr_schedule="linear", warmup_updates=2
        ),
        optimizer=OptimizerConfig(lr=2e-4),
        eval=EvalConfig(every=26, prompts=128, final_prompts=512, batch_size=256),
    )


def free_name(out: Path) -> str:
    """`demo`, or the first of `demo-2`, `demo-3`, ... that is not taken."""
    names = (f"demo-{i}" if i > 1 else "demo" for i in range(1, 10_000))
    return next(name for name in names if not (out / name).exists())


def run_demo(
    *,
    seed: int = 0,
    updates: int | None = None,
    out: Path = Path("runs"),
    quiet: bool = False,
    rollout: RolloutConfig | None = None,
) -> int:
    """Train, show, report; returns the exit code."""
    config = demo_config(seed=seed, updates=updates, out=out, name=free_name(out), rollout=rollout)
    with Screen(quiet=quiet) as screen:
        result = train(config, observer=screen)
    from hmpo.lab.report import write_report  # plots are slow to import, and not needed before

    screen.say(outcome_table(result))
    if result.after is None:
        screen.say(f"stopped after {result.step} updates; everything is saved")
        return 128 + (result.signal or 0)
    low, high = result.after.sampled.interval
    reached = "reached" if result.after.sampled.value >= GOAL else "not reached"
    screen.say(
        f"goal {GOAL:.2f} sampled success on {result.after.sampled.trials} held-out prompts: "
        f"{reached} ({result.after.sampled.value:.3f}, 95 % interval {low:.3f} to {high:.3f})"
    )
    for name, path in (
        ("report", write_report([result.folder])),
        ("trained policy", result.folder / "policy"),
    ):
        screen.say(f"{name}: {path}")
    return 0
