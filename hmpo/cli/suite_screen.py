"""A suite in the terminal: a live table where there is one, a line for each run where not."""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from signal import Signals
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hmpo.cli.samples import printable
from hmpo.lab.suite.cells import Cell
from hmpo.lab.suite.watch import SuiteResult, Watcher

REFRESH_S = 0.5
"""Seconds between two pictures of the live table."""
AROUND = 7
"""Lines of the terminal that are not rows of the table."""


@dataclass
class Row:
    """What is known of a cell."""

    cell: Cell
    wanted: int = 0
    done: int = 0
    failed: int = 0
    running: dict[int, int] = field(default_factory=dict)
    """Updates done by the seeds that run now."""
    began: dict[int, tuple[float, int]] = field(default_factory=dict)
    """When a seed's run was set up, and the updates it went on from."""
    seconds: list[float] = field(default_factory=list)
    """Of whole runs."""
    success: float | None = None

    @property
    def over(self) -> int:
        """Runs with an outcome."""
        return self.done + self.failed

    def share(self, seed: int) -> float:
        """How far a run is."""
        return min(1.0, self.running[seed] / self.cell.config.updates)

    def expected(self, now: float) -> float | None:
        """Seconds of a run, as far as one can tell; None before there is anything to tell."""
        if self.seconds:
            return sum(self.seconds) / len(self.seconds)
        rates = [
            (now - since) / (self.running[seed] - step) * self.cell.config.updates
            for seed, (since, step) in self.began.items()
            if self.running.get(seed, 0) > step
        ]
        return sum(rates) / len(rates) if rates else None


def duration(seconds: float) -> str:
    """A time as it is read: `40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class SuiteScreen(Watcher):
    """Shows a suite as it goes; use as a context manager."""

    def __init__(self, name: str, console: Console | None = None, *, quiet: bool = False) -> None:
        self.name = name
        self.console = console or Console()
        self.quiet = quiet
        self.rows: dict[str, Row] = {}
        self.jobs = 1
        self.live: Live | None = None
        self.drawn = 0.0
        self.note = ""
        """What is shown in place of the time left."""
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("runs, {task.fields[left]}"),
            console=self.console,
        )
        self.bar = self.progress.add_task("suite", total=None, left="")

    def __enter__(self) -> "SuiteScreen":
        return self

    def __exit__(self, *error: object) -> None:
        live, self.live = self.live, None
        if live is not None:
            self.note = " "
            with contextlib.suppress(Exception):  # the terminal may be gone
                live.update(self._view(), refresh=True)
                live.stop()

    def say(self, text: str) -> None:
        """Print a line, unless nobody can read it any more."""
        with contextlib.suppress(OSError, ValueError):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
            self.console.file.flush()

    # --------------------------------------------------------------------- what a suite tells

    def on_begin(
        self, runs: Sequence[tuple[Cell, int]], done: Mapping[tuple[str, int], str], jobs: int
    ) -> None:
        """Open the table."""
        self.jobs = jobs
        for cell, seed in runs:
            row = self.rows.setdefault(cell.name, Row(cell))
            row.wanted += 1
            status = done.get((cell.name, seed))
            row.failed += status == "failed"
            row.done += status not in (None, "failed")
        self.progress.update(self.bar, total=len(runs), completed=len(done))
        if self.quiet or len(done) == len(runs):
            return
        if self.console.is_terminal:
            self.live = Live(self._view(), console=self.console, auto_refresh=False)
            self.live.start(refresh=True)
        else:
            text = f"{len(self.rows)} cells, {len(runs)} runs, {len(done)} done, {jobs} at once"
            self.say(f"hmpo: suite {self.name}: {text}")

    def on_run(self, cell: str, seed: int, message: Mapping[str, Any]) -> None:
        """Take note of a run; where there is no table, say how it ended."""
        row, event = self.rows[cell], message["event"]
        if event == "start":
            row.running[seed] = message["step"]
            row.began[seed] = (time.monotonic(), message["step"])
        elif event == "update" and seed in row.running:
            row.running[seed] = message["step"]
        elif event == "evaluation":
            row.success = message["sampled"]
        elif event == "died":
            self._forget(row, seed)
            self._tell(f"{cell} seed {seed}: its process died ({message['how']}); it is taken up")
        elif event == "ended":
            self._ended(row, seed, message)

    def on_tick(self) -> None:
        """Refresh the table."""
        now = time.monotonic()
        if self.live is not None and now - self.drawn >= REFRESH_S:
            with contextlib.suppress(OSError, ValueError):
                self.live.update(self._view(), refresh=True)
            self.drawn = now

    def on_stop(self, number: int) -> None:
        """Answer a signal: in the table, or straight away."""
        self.note = f"{Signals(number).name}: stopping; once more to leave at once"
        self.drawn = 0.0
        if not self.quiet and self.live is None:
            text = f"\nhmpo: {self.note}\n"
            with contextlib.suppress(OSError, ValueError):
                os.write(self.console.file.fileno(), text.encode())

    # ------------------------------------------------------------------------------- the picture

    def _forget(self, row: Row, seed: int) -> float | None:
        """A run is over, or starts again; gives the seconds of it if it was seen whole."""
        row.running.pop(seed, None)
        since, step = row.began.pop(seed, (0.0, -1))
        return time.monotonic() - since if step == 0 else None

    def _ended(self, row: Row, seed: int, message: Mapping[str, Any]) -> None:
        lasted = self._forget(row, seed) or message.get("seconds")
        status = message["status"]
        if status in ("interrupted", "impossible"):
            return
        row.failed += status == "failed"
        row.done += status != "failed"
        if status == "finished" and lasted is not None:
            row.seconds.append(lasted)
        self.progress.update(self.bar, advance=1)
        done = sum(each.over for each in self.rows.values())
        parts = [f"{status}"]
        if status == "failed":
            parts = [f"failed ({printable(message['reason'], 160)})"]
        elif message.get("sampled") is not None:
            parts.append(f"success {message['sampled']:.3f}")
        parts += [duration(lasted)] if lasted is not None else []
        parts += [self.time_left()] if self.time_left() else []
        total = sum(each.wanted for each in self.rows.values())
        self._tell(f"{done}/{total} {row.cell.name} seed {seed}: {', '.join(parts)}")

    def _tell(self, text: str) -> None:
        """A line where there is no table."""
        if not self.quiet and self.live is None:
            self.say(f"hmpo: {text}")

    def time_left(self) -> str:
        """Until the last run ends, in words; empty while nothing is known."""
        now = time.monotonic()
        known = {name: row.expected(now) for name, row in self.rows.items()}
        told = [seconds for seconds in known.values() if seconds is not None]
        if not told:
            return ""
        usual, left = sum(told) / len(told), 0.0
        for name, row in self.rows.items():
            started = sum(row.share(seed) for seed in row.running)
            left += (row.wanted - row.over - started) * (known[name] or usual)
        return f"{duration(max(0.0, left) / self.jobs)} left"

    def _view(self) -> RenderableType:
        table = Table(title=Text(f"suite {self.name}"), title_justify="left", expand=True)
        for column in ("cell", "done", "running", "", "success", "failed"):
            right = column in ("done", "success", "failed")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        shown = self._shown()
        for row in shown:
            bars = list(row.running)
            seeds = ", ".join(map(str, bars[:4])) + (" ..." if len(bars) > 4 else "")
            share = sum(row.share(seed) for seed in bars) / len(bars) if bars else 0.0
            success = "" if row.success is None else f"{row.success:.3f}"
            table.add_row(
                Text(row.cell.name, style="bold" if bars else ""),
                f"{row.over}/{row.wanted}",
                Text(f"seed {seeds}" if bars else ""),
                ProgressBar(total=1.0, completed=share, width=16) if bars else "",
                success,
                Text(str(row.failed or ""), style="red"),
            )
        hidden = len(self.rows) - len(shown)
        if hidden:
            table.add_row(Text(f"... and {hidden} more cells", style="dim"))
        self.progress.update(self.bar, left=self.note or self.time_left())
        return Group(table, self.progress, Text(""))  # a terminal echoes ^C on the last line

    def _shown(self) -> list[Row]:
        """The rows that fit: what runs first, then what is left, then what is done."""
        rows = list(self.rows.values())
        most = max(3, self.console.height - AROUND)
        if len(rows) <= most:
            return rows
        rank = sorted(rows, key=lambda row: (not row.running, row.over == row.wanted))
        chosen = rank[: most - 1]
        return [row for row in rows if row in chosen]


def result_lines(result: SuiteResult, suite: str, command: str) -> list[str]:
    """What a suite came to, in lines.

    Args:
        result: of `run_suite`.
        suite: the suite's name.
        command: that goes on with it.
    """
    counts = {
        "finished": result.finished,
        "failed": len(result.failed),
        "committed and not made again": result.committed,
        "left": result.left,
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines = [f"suite {suite}: {told or 'no runs'}; {result.folder}"]
    for cell, seed, why in result.failed[:10]:
        lines.append(f"failed: {cell} seed {seed}: {printable(why, 300)}")
    if len(result.failed) > 10:
        lines.append(f"... and {len(result.failed) - 10} more; each run's outcome.json says why")
    if result.exploratory:
        lines.append(f"{result.exploratory} runs are exploratory: no protocol had decided on them")
    lines += result.compared
    if result.signal is not None:
        lost = "what has ended is saved, the rest begins anew"
        kept = "everything is saved" if result.keeps else lost
        lines.append(f"stopped by a signal; {kept}. Go on with: {command}")
    return lines
