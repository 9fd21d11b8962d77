"""`hmpo eval`: success of a run or a model on held-out prompts."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hmpo.config import RunConfig
from hmpo.config.overrides import overridden
from hmpo.config.reading import load_run_config, run_config
from hmpo.errors import ConfigError
from hmpo.models import load_policy, stop_token_ids
from hmpo.models.tokens import pad_token_id
from hmpo.run.build import load_trained, make_rewards, trainer_config, use_machine
from hmpo.run.evaluation import Evaluation, Evaluator
from hmpo.tasks import make_task

READ_TABLES = ("policy", "task", "rewards")
READ = (
    "seed",
    "threads",
    "device",
    "eval.batch_size",
    "eval.success",
    *(f"trainer.{name}" for name in ("max_length", "temperature", "decoder", "autocast")),
    "trainer.on_reward_error",
    "trainer.reward_timeout",
)
"""Settings that a measurement reads: tables, and single ones of other tables."""
INSTEAD = {
    "eval.prompts": "--prompts",
    "eval.final_prompts": "--prompts",
    "eval.pass_at": "--pass-at",
}


def evaluate_target(
    target: Path, *, task: str | None, settings: Sequence[str], prompts: int, pass_at: int
) -> int:
    """Measure and print a table; returns the exit code.

    Raises:
        HmpoError: no such model, run or task.
    """
    given = overridden(settings)
    if task is not None:
        if "task.name" in given:
            raise ConfigError(f"--task: got {task!r} beside --set task.name; give one of the two")
        settings = [f'task.name="{task}"', *settings]
    if (target / "telemetry.jsonl").exists():
        config = load_run_config(target / "config.json", settings)
        run: Path | None = target
    elif task is None:
        raise ConfigError(f"{target}: is a model, not a run; say what to measure with --task NAME")
    else:
        config, run = run_config({"policy": {"path": str(target)}}, settings), None
    _refuse_unread(given, run)
    if run is None and "trainer.max_length" not in given:
        longest = make_task(config.task, config.seed).max_new_tokens
        trainer = dataclasses.replace(config.trainer, max_length=longest)
        config = dataclasses.replace(config, trainer=trainer)
    evaluation = measure(config, run, prompts=prompts, pass_at=pass_at)
    scored = evaluation.sampled.trials
    table = Table(title=f"{target} on {config.task.name}, {scored} held-out prompts")
    for column in ("decoding", "success", "95 % interval"):
        table.add_column(column)
    rates = {
        f"sampled (temperature {config.trainer.temperature:g})": evaluation.sampled,
        "greedy": evaluation.greedy,
        f"pass@{evaluation.k}": evaluation.pass_at,
    }
    for name, rate in rates.items():
        if rate is not None:
            low, high = rate.interval
            table.add_row(name, f"{rate.value:.3f}", f"{low:.3f} to {high:.3f}")
    table.caption = (
        f"mean reward {evaluation.mean_reward:.3f}; success from {config.eval.success:g}"
    )
    if evaluation.dropped:
        table.caption += f"; {evaluation.dropped} responses without a reward left out"
    Console().print(table)
    return 0


def _refuse_unread(given: Iterable[str], run: Path | None) -> None:
    """Refuse settings that a measurement does not read.

    Raises:
        ConfigError: one line that names the setting.
    """
    for key in sorted(given):
        if key in INSTEAD:
            raise ConfigError(f"--set {key}: hmpo eval does not read it; give {INSTEAD[key]}")
        if key == "policy.path" and run is None:
            raise ConfigError("--set policy.path: the model is the argument; give it alone")
        read = key in READ or key.partition(".")[0] in READ_TABLES
        if not read or key == "policy.start":
            raise ConfigError(f"--set {key}: hmpo eval does not read it; leave it out")


def measure(config: RunConfig, run: Path | None, *, prompts: int, pass_at: int) -> Evaluation:
    """Success of the run's trained policy, or of the configuration's own where `run` is None."""
    device = use_machine(config)
    task = make_task(config.task, config.seed)
    if run is None:
        loaded = load_policy(config.policy, device=device)
    else:
        loaded = load_trained(run, config, device)
    settings = trainer_config(
        config,
        eos_token=stop_token_ids(loaded.tokenizer, task.stop, loaded.model),
        pad_token=pad_token_id(loaded.tokenizer, loaded.model),
    )
    evaluator = Evaluator(
        policy=loaded.model,
        tokenizer=loaded.tokenizer,
        task=task,
        rewards=make_rewards(config, task),
        config=settings,
        batch_size=config.eval.batch_size,
        seed=config.seed,
        success=config.eval.success,
    )
    return evaluator.evaluate(prompts, pass_at=pass_at)
