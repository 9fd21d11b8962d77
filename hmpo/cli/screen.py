"""A run in the terminal: a live view where there is one, plain lines where there is not."""

import contextlib
import errno
import logging
import os
import time
from collections import deque
from pathlib import Path
from signal import Signals
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hmpo.cli.samples import own_part, printable
from hmpo.config import RunConfig
from hmpo.rewards.messages import as_text
from hmpo.run.evaluation import Evaluation, Rate
from hmpo.run.observer import Observer, RunResult
from hmpo.run.shown import ROWS
from hmpo.types import Event

ASCII_BARS = " .:-=+*#"
BLOCK_BARS = "".join(chr(0x2581 + i) for i in range(8))
LINES = 3
"""Lines of a terminal that a completion may take."""
WARNED = ("nonfinite",)
"""Events that a warning of the library's log tells in more words."""


def spark(values: deque[float], bars: str) -> str:
    """A row of bars, from the lowest to the highest of a short history of values."""
    known = [value for value in values if value == value]
    if len(known) < 2 or max(known) == min(known):
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(bars) - 1
    return "".join(bars[round((v - low) / span * top)] if v == v else "?" for v in values)


REFRESH_S = 0.25
"""Seconds between two pictures of the live view."""


def _no_event(record: logging.LogRecord) -> bool:
    """Whether a message is about something that is no event of the run."""
    return not hasattr(record, "event")


class _Console(Console):
    """A console that lets its owner know of a reader who has gone, and does not end the process."""

    def on_broken_pipe(self) -> None:
        """Go on raising."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Screen(Observer):
    """Shows a run as it goes; use as a context manager. A run goes on without it where it fails."""

    expendable = True

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or _Console()
        self.quiet = quiet
        self.bars = BLOCK_BARS if self.console.encoding.startswith("utf") else ASCII_BARS
        self.live: Live | None = None
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("updates, time left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar = self.progress.add_task("training", total=None)
        self.record: dict[str, Any] = {}
        self.history: dict[str, deque[float]] = {}
        self.samples: list[dict[str, Any]] = []
        self.prompts: deque[str] = deque(maxlen=256)
        """Of the last rollouts, to find what tells them apart."""
        self.success = 1.0
        self.measured: list[tuple[int, Evaluation]] = []
        self.tokens_per_s = float("nan")
        self.filtered: list[logging.Handler] = []
        self.title = ""
        self.measuring = ""
        self.drawn = 0.0
        self.every = 1
        self.began: float | None = None
        self.first_step = 0

    def __enter__(self) -> "Screen":
        if not self.quiet:  # what is shown as an event is not logged beside it
            self.filtered = list(logging.getLogger().handlers)
            for handler in self.filtered:
                handler.addFilter(_no_event)
        return self

    def __exit__(self, *error: object) -> None:
        for handler in self.filtered:
            handler.removeFilter(_no_event)
        live, self.live = self.live, None
        if live is not None:
            with contextlib.suppress(Exception):  # the terminal may be gone
                live.stop()

    def say(self, shown: RenderableType | str) -> None:
        """Print a line or a table, unless nobody can read it any more."""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(shown, str):
                self.console.print(shown, markup=False, highlight=False, soft_wrap=True)
            else:
                self.console.print(shown)
            self.console.file.flush()

    # ------------------------------------------------------------------------ what a run tells

    def on_loading(self, config: RunConfig, what: str) -> None:
        """Say what is being set up."""
        if not self.quiet:
            text = f"hmpo: loading {printable(what, 200)} ..."
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        """Open the live view."""
        objective = config.objective
        p = f"p = {objective.p:g}" if config.algorithm == "power_mean" else "baseline"
        level = f" level {config.task.level}" if config.task.level is not None else ""
        self.title = (
            f"{objective.name} ({p}) | {config.policy.path} | {config.task.name}{level} | {folder}"
        )
        self.progress.update(self.bar, total=config.updates, completed=step)
        self.every = max(1, config.updates // 20)
        self.success = config.eval.success
        if self.quiet:
            return
        if self.console.is_terminal:
            # Drawn by the run alone: a thread that draws cannot be let go of when it fails.
            self.live = Live(self._view(), console=self.console, auto_refresh=False)
            self.live.start(refresh=True)
        else:
            self.console.print(f"hmpo: {self.title}", markup=False, highlight=False, soft_wrap=True)

    def on_rollout(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Keep a right and a wrong completion to show."""
        if self.began is None:
            self.began, self.first_step = time.monotonic(), step
        ordered = sorted(samples, key=lambda s: -s["reward"] if s["reward"] == s["reward"] else 9)
        self.samples = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
        self.prompts.extend(str(as_text(sample["prompt"])) for sample in samples)

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        """Refresh the numbers."""
        self.record = record
        for _, name, _, _ in ROWS:
            if name in record:
                self.history.setdefault(name, deque(maxlen=24)).append(float(record[name]))
        rate = timing["tokens_per_s"]
        known = self.tokens_per_s == self.tokens_per_s
        self.tokens_per_s = 0.8 * self.tokens_per_s + 0.2 * rate if known else rate
        self.progress.update(self.bar, completed=record["step"] + 1)
        if self.live is not None:
            self._draw()
        elif not self.quiet and (record["step"] + 1) % self.every == 0:
            self._line()

    def on_measuring(self, step: int, name: str, done: int, total: int) -> None:
        """Say how far an evaluation is."""
        self.measuring = "" if done >= total else f"measuring {done} of {total} held-out responses"
        if self.live is not None:
            self._draw(at_once=done == 0)
        elif not self.quiet and done == 0:
            text = f"hmpo: measuring {total} held-out responses after {step} updates ..."
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_evaluation(self, step: int, name: str, evaluation: Evaluation) -> None:
        """Note a measurement on held-out prompts."""
        self.measured.append((step, evaluation))
        if self.live is not None:
            self._draw(at_once=True)
        elif not self.quiet:
            text = f"held-out after {step:4d} updates: sampled {evaluation.sampled}"
            if evaluation.greedy is not None:
                text += f", greedy {evaluation.greedy}"
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_event(self, event: Event) -> None:
        """Say what was counted, unless the library's own warning has said it."""
        if event.name in WARNED:
            return
        facts = ", ".join(f"{key}: {value}" for key, value in event.data.items())
        text = printable(f"{event.name} at update {event.step}: {facts}", 200)
        if not self.quiet:
            self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def on_stop(self, signal: int) -> None:
        """Answer a signal: straight to the terminal, as it may come while something is printed."""
        if not self.quiet:
            name = Signals(signal).name
            text = (
                f"\nhmpo: {name}: finishing the update in hand and saving; once more to leave at "
                "once, without\n"
            )
            with contextlib.suppress(OSError, ValueError):
                os.write(self.console.file.fileno(), text.encode())

    # ------------------------------------------------------------------------------ the picture

    def _draw(self, *, at_once: bool = False) -> None:
        """Renew the live view, unless it was drawn this moment."""
        now = time.monotonic()
        if self.live is not None and (at_once or now - self.drawn >= REFRESH_S):
            self.live.update(self._view(), refresh=True)
            self.drawn = now

    def _line(self) -> None:
        """One line of progress where there is no terminal."""
        record, done = self.record, self.record["step"] + 1
        total = int(self.progress.tasks[0].total or 0)
        spent = time.monotonic() - (self.began or time.monotonic())
        left = spent / max(1, done - self.first_step) * (total - done)
        parts = [f"update {done:4d}/{total}", f"reward {record['reward/mean']:.3f}"]
        for label, name, form, _ in ROWS[1:6]:
            if name in record:
                parts.append(f"{label} {form.format(record[name])}")
        parts += [f"{self.tokens_per_s:.0f} token/s", f"{left:.0f} s left"]
        self.console.print(", ".join(parts), markup=False, highlight=False, soft_wrap=True)

    def _view(self) -> RenderableType:
        numbers = Table.grid(padding=(0, 2))
        for label, name, form, meaning in ROWS:
            if name in self.record:
                numbers.add_row(
                    label,
                    Text(form.format(self.record[name]), style="bold"),
                    Text(spark(self.history[name], self.bars), style="cyan"),
                    Text(meaning, style="dim"),
                )
        if self.record:
            speed = Text(f"{self.tokens_per_s:.0f}", style="bold")
            numbers.add_row("tokens a second", speed, "", Text("sampling and training", "dim"))
        if self.measured:
            step, last = self.measured[-1]
            held = Text(f"{last.sampled.value:.3f}", style="bold green")
            low, high = last.sampled.interval
            note = f"[{low:.3f}, {high:.3f}] of {last.sampled.trials} prompts at update {step}"
            numbers.add_row("held-out success", held, "", Text(note, style="dim"))
        if self.measuring:
            numbers.add_row("now", Text(self.measuring, style="bold"), "", "")
        parts: list[RenderableType] = [Panel(numbers, title=Text(self.title), title_align="left")]
        if self.samples:
            parts.append(self._sample_table())
        parts.append(self.progress)
        return Group(*parts)

    def _sample_table(self) -> Table:
        """Prompt and completion of each sample below each other, as wide as the terminal."""
        table = Table.grid(padding=(0, 1))
        width = max(20, self.console.width - 15)
        for sample in self.samples:
            good = sample["reward"] >= self.success
            told = Text(f"reward {sample['reward']:.4g}", style="green" if good else "red")
            prompt = own_part(str(as_text(sample["prompt"])), self.prompts, width)
            table.add_row(told, Text(prompt, style="dim"))
            completion = str(as_text(sample["completion"]))
            table.add_row("", Text(printable(completion, LINES * width)))
        return table


def outcome_table(result: RunResult) -> Table:
    """Success before and after a run, with intervals; the mean of rewards that are graded."""
    table = Table(title="Success on held-out prompts", title_justify="left")
    for column in ("", "before", "after", "prompts"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    before, after = result.before, result.after
    if before is None:
        return table
    rows: list[tuple[str, Rate | None, Rate | None]] = [
        ("sampled", before.sampled, after.sampled if after else None),
        ("greedy", before.greedy, after.greedy if after else None),
        (f"pass@{before.k}", before.pass_at, after.pass_at if after else None),
    ]
    for label, first, last in rows:
        if first is not None:
            table.add_row(label, _rate(first), _rate(last), str(first.trials))
    measured = [one for one in (before, after) if one is not None]
    if any(abs(one.mean_reward - one.sampled.value) > 1e-9 for one in measured):  # not just 0 and 1
        rewards = [one.mean_reward for one in measured]
        means = ["-" if value != value else f"{value:.3f}" for value in rewards] + ["-"]
        table.add_row("mean reward", *means[:2], str(before.sampled.trials))
    return table


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "-"
    low, high = rate.interval
    return f"{rate.value:.3f} [{low:.3f}, {high:.3f}]"
