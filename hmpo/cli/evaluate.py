"""`hmpo eval`: success of a run or a model on held-out prompts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hmpo.cli.preflight import refuse_parts
from hmpo.cli.sources import measured_model, measured_run, refuse_unread
from hmpo.config import RunConfig
from hmpo.config.overrides import overridden
from hmpo.config.places import located
from hmpo.errors import ConfigError
from hmpo.run.place import Step, split_place
from hmpo.run.shown import updates
from hmpo.tasks import is_chat, make_task

if TYPE_CHECKING:
    from hmpo.run.evaluation import Evaluation


def evaluate_target(
    target: Path,
    *,
    task: str | None,
    settings: Sequence[str],
    prompts: int,
    pass_at: int,
    allow_code: bool = False,
) -> int:
    """Measure and print a table; returns the exit code.

    Args:
        target: a run's folder, also as RUN@STEP or RUN@best, or a model.
        task: task to measure on; None takes the run's own.
        settings: overrides.
        prompts: held-out prompts, at least 1.
        pass_at: k of pass@k; 0 leaves it out.
        allow_code: run the code that a run's folder names.

    Raises:
        HmpoError: no such model, run or task, or a setting that is wrong or not read.
    """
    for name, value, least in (("prompts", prompts, 1), ("pass-at", pass_at, 0)):
        if value < least:
            raise ConfigError(f"--{name}: got {value}, expected an integer >= {least}")
    place, step = split_place(str(target))
    config = measured_run(place, task, settings, allow_code=allow_code)
    run: Path | None = place
    if config is None:
        if step is not None:
            raise ConfigError(f"{target}: {place} is a model, not a run; leave out @{step}")
        config, run = measured_model(place, task, settings), None
    refuse_unread(settings, run, task)
    refuse_parts(config, fresh=False, run=run)
    chosen = "trainer.max_length" in overridden(settings)
    own_length = run is not None or chosen
    evaluation, done = measure(
        config, run, prompts=prompts, pass_at=pass_at, own_length=own_length, step=step
    )
    scored = evaluation.sampled.trials
    after = "" if done is None else f" after {updates(done)}"
    table = Table(title=f"{target}{after} on {config.task.name}, {scored} held-out prompts")
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
        f"mean reward {evaluation.mean_reward:.3f}, a success from {config.eval.success:g} on"
    )
    if evaluation.dropped:
        table.caption += f"; {evaluation.dropped} responses without a reward left out"
    Console().print(table)
    return 0


def measure(
    config: RunConfig,
    run: Path | None,
    *,
    prompts: int,
    pass_at: int,
    own_length: bool = True,
    step: Step = None,
) -> "tuple[Evaluation, int | None]":
    """Success of the run's trained policy, or of the configuration's own where `run` is None.

    The second value is how many updates the weights have seen; None where that is not known.

    Args:
        config: what to measure, on which task and device.
        run: a run's folder.
        prompts: held-out prompts.
        pass_at: k of pass@k; 0 leaves it out.
        own_length: responses are as long as `trainer.max_length` says, else as the task hints;
            conversations have room for both.
        step: of the run's checkpoint; None is what it has come to.
    """
    from hmpo.models import load_policy, stop_token_ids
    from hmpo.models.tokens import pad_token_id
    from hmpo.run import build
    from hmpo.run.evaluation import make_evaluator

    config = located(config)
    device = build.use_machine(config)
    task = make_task(config.task, config.seed)
    if not own_length:
        length = task.max_new_tokens
        if config.task.talks_with or is_chat(task):  # more is said there than the answer
            length = max(length, config.trainer.max_length)
        trainer = dataclasses.replace(config.trainer, max_length=length)
        config = dataclasses.replace(config, trainer=trainer)
    if run is None:
        loaded, done = load_policy(config.policy, device=device), None
    else:
        loaded, done = build.trained_policy(run, config, device, step=step)
    options = build.ready_prompts(config, loaded, task)
    settings = build.trainer_config(
        config,
        eos_token=stop_token_ids(loaded.tokenizer, task.stop, loaded.model),
        pad_token=pad_token_id(loaded.tokenizer, loaded.model),
    )
    talks = build.make_environments(config, loaded.tokenizer, task)
    rewards = build.make_rewards(config, task, talks)
    evaluator = make_evaluator(config, loaded, task, rewards, settings, options, talks)
    return evaluator.evaluate(prompts, pass_at=pass_at), done
