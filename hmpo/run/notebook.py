"""A run in a notebook: a progress bar, a table and two completions that renew themselves."""

import html
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.run.evaluation import Evaluation
from hmpo.run.observer import Observer
from hmpo.run.shown import ROWS
from hmpo.telemetry.visible import visible
from hmpo.types import Event

REFRESH_S = 0.5
"""Seconds between two pictures."""
SHOWN = 300
"""Characters of a prompt or completion."""
EVENTS = 5
"""Latest events that are shown."""


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel; imports nothing to find out."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class Notebook(Observer):
    """Shows a run below the cell that started it.

    Everything is one HTML picture that is replaced, so that the page does not grow; texts of
    prompts and completions are escaped.
    """

    expendable = True

    def __init__(self) -> None:
        self.handle: Any = None
        self.title, self.doing = "", ""
        self.total = self.done = self.first = 0
        self.record: dict[str, Any] = {}
        self.measured: list[tuple[int, Evaluation]] = []
        self.samples: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.began: float | None = None
        self.drawn = 0.0

    # ------------------------------------------------------------------------ what a run tells

    def on_loading(self, config: RunConfig, what: str) -> None:
        """Say what is being set up."""
        self.doing = f"loading {what}"
        self._draw(at_once=True)

    def on_start(self, config: RunConfig, folder: Path, step: int) -> None:
        """Begin to count."""
        parts = (config.objective.name, config.policy.path, config.task.name, str(folder))
        self.title, self.doing = " | ".join(parts), ""
        self.total, self.done, self.first = config.updates, step, step
        self._draw(at_once=True)

    def on_rollout(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Keep the best and the worst completion to show."""
        self.began = self.began or time.monotonic()
        scored = sorted(
            (s for s in samples if s["reward"] == s["reward"]), key=lambda s: -s["reward"]
        )
        self.samples = [scored[0], scored[-1]] if len(scored) > 1 else scored

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        """Renew the numbers."""
        self.record, self.done = record, record["step"] + 1
        self._draw(at_once=self.done == self.total)

    def on_measuring(self, step: int, name: str, done: int, total: int) -> None:
        """Say how far an evaluation is."""
        self.doing = "" if done >= total else f"measuring {done} of {total} held-out responses"
        self._draw(at_once=done == 0)

    def on_evaluation(self, step: int, name: str, evaluation: Evaluation) -> None:
        """Add a measurement on held-out prompts."""
        self.measured.append((step, evaluation))
        self._draw(at_once=True)

    def on_event(self, event: Event) -> None:
        """Add what was counted."""
        facts = ", ".join(f"{key}: {value}" for key, value in event.data.items())
        self.events.append(f"{event.name} at update {event.step}: {facts}")
        self._draw(at_once=True)

    # ------------------------------------------------------------------------------ the picture

    def _draw(self, *, at_once: bool = False) -> None:
        """Renew the picture, unless it was drawn this moment."""
        now = time.monotonic()
        if not at_once and now - self.drawn < REFRESH_S:
            return
        from IPython.display import HTML, display

        self.drawn, picture = now, HTML(self.page())
        if self.handle is None:
            self.handle = display(picture, display_id=True)
        else:
            self.handle.update(picture)

    def page(self) -> str:
        """The picture as HTML."""
        parts = [f"<div><b>hmpo</b> {_text(self.title)}</div>"]
        if self.total:
            bar = f'<progress value="{self.done}" max="{self.total}"></progress>'
            parts.append(f"<div>{bar} {self.done} of {self.total} updates{self._left()}</div>")
        if self.doing:
            parts.append(f"<div>{_text(self.doing)} ...</div>")
        numbers = [
            (label, form.format(self.record[name]), meaning)
            for label, name, form, meaning in ROWS
            if name in self.record
        ]
        if numbers:
            parts.append(_table(("last update", "", ""), numbers))
        if self.measured:
            rows = [(str(step), str(found.sampled)) for step, found in self.measured]
            parts.append(_table(("updates", "held-out success, sampled"), rows))
        if self.samples:
            rows = [
                (f"{s['reward']:.4g}", str(s["prompt"]), str(s["completion"])) for s in self.samples
            ]
            parts.append(_table(("reward", "prompt", "completion"), rows))
        parts += [f"<div>{_text(line)}</div>" for line in self.events[-EVENTS:]]
        return "\n".join(parts)

    def _left(self) -> str:
        """Time left, where something tells it."""
        made = self.done - self.first
        if self.began is None or made < 1 or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.began) / made * (self.total - self.done)
        return (
            f", about {seconds:.0f} s left" if seconds < 120 else f", {seconds / 60:.0f} min left"
        )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; texts are escaped."""
    style = 'style="text-align:left"'
    first = "".join(f"<th {style}>{_text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td {style}>{_text(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{first}</tr>{body}</table>"


def _text(text: str) -> str:
    """A text of a user's or a model's, to be shown as text: cut, controls made visible, escaped."""
    return html.escape(visible(text[:SHOWN]))


def default_observer() -> Observer:
    """Who watches a run that nobody was named for: a picture in a notebook, else nobody."""
    return Notebook() if in_notebook() else Observer()
