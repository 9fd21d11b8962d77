"""`hmpo train`, once its settings are known: the run, and what is said of it at the end."""

import shlex
from collections.abc import Callable
from pathlib import Path

import hmpo.run.loop
from hmpo.cli.rehearsal import dry_run as rehearsed
from hmpo.cli.screen import Screen, outcome_table
from hmpo.config import RunConfig
from hmpo.config.places import located
from hmpo.ranks.launched import rank_of_launch
from hmpo.run.consent import resume_command
from hmpo.run.memory import memory_line
from hmpo.run.observer import RunResult


def run_training(
    settings: RunConfig,
    where: Path | None,
    *,
    overwrite: bool,
    allow_changed: bool,
    dry_run: bool,
    report: bool,
    quiet: bool,
) -> int:
    """Train, show it, and write the page; gives the exit code. Of several ranks the first shows.

    Args:
        settings: of the run.
        where: its folder where it is resumed.
        overwrite: whether a run of its name is deleted.
        allow_changed: whether a resume goes on with other inputs.
        dry_run: show how it would begin.
        report: write report.html and plots.
        quiet: show the result alone.
    """
    first = not rank_of_launch()
    line = memory_line(located(settings), where)
    ways = {"resume": where is not None, "overwrite": overwrite, "allow_changed": allow_changed}
    with Screen(quiet=quiet or not first) as screen:
        if first and not quiet:
            screen.say(line)
        if dry_run:
            return rehearsed(settings, screen, overwrite=overwrite)
        result = hmpo.run.loop.train(settings, observer=screen, folder=where, **ways)
    if not first:
        return 0 if result.signal is None else 128 + result.signal
    code = _tell_end(result, settings, screen.say)
    if report and not code:
        write_page([result.folder], say=screen.say)
    return code


def _tell_end(result: RunResult, settings: RunConfig, say: Callable[..., None]) -> int:
    """Say what a run came to and where its policy is; gives the exit code."""
    say(outcome_table(result))
    if result.signal is None:
        say(f"policy: {result.folder / 'policy'}")
        return 0
    say(
        f"stopped by a signal after {result.step} updates; everything is saved. "
        f"Go on with: {resume_command(settings, result.folder)}"
    )
    say(f"its policy so far: hmpo export {shlex.quote(str(result.folder))}")
    return 128 + result.signal


def write_page(
    runs: list[Path], out: Path | None = None, say: Callable[[str], None] = print
) -> None:
    """Write the page of some runs, and say where it is and what took the time."""
    from hmpo.lab.report import write_report
    from hmpo.lab.summary import time_line

    say(f"report: {write_report(runs, out)}")
    for run in runs:
        if line := time_line(run):
            say(line)
