"""One self-contained HTML page about one run, or several side by side.

Everything that a model, a task or a configuration wrote is untrusted: it is escaped by the
template engine, stripped of credentials, its control characters are made visible, and the page's
content security policy allows neither scripts nor anything from outside.
"""

import base64
import contextlib
import functools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hmpo import __version__
from hmpo.checkpoint import write_atomic
from hmpo.errors import ConfigError
from hmpo.lab.comparison import compare, differing_settings
from hmpo.lab.folder import RunData, load_run
from hmpo.lab.panels import PLOTS
from hmpo.lab.plots import darken, render, render_comparison, write_plots
from hmpo.lab.summary import summarize
from hmpo.telemetry.secrets import mask_credentials
from hmpo.telemetry.visible import visible

TEMPLATES = Path(__file__).parent / "templates"


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run, or the comparison of several, and its plots as PNG files.

    Args:
        runs: run folders, finished or not.
        out: the page; None means report.html in the run's folder, or comparison.html in the
            first run's folder if there are several. Plots go to `plots/` beside a report and to
            `<page>-plots/` beside a comparison.

    Returns:
        Path of the page.

    Raises:
        ConfigError: no run given.
        RunFolderError: a folder is missing or holds no telemetry.
        TelemetryError: a log cannot be read.
        StorageError: the page or a plot cannot be written.
    """
    if not runs:
        raise ConfigError("report: got no run folder, expected at least one")
    data = [load_run(path) for path in runs]
    labels = unique_labels(data)
    if out is None:
        out = Path(runs[0]) / ("report.html" if len(data) == 1 else "comparison.html")
    folder = out.parent / ("plots" if len(data) == 1 else f"{out.stem}-plots")
    page = render_page(data, labels)
    _clear_left(out.parent, [out.name])
    _clear_left(folder, [f"{plot.name}.png" for plot in PLOTS])
    write_atomic(out, page, make_folder=True)
    write_plots(data, folder, labels)
    return out


def _clear_left(folder: Path, names: Sequence[str]) -> None:
    """Remove the half-written files of reports that were killed: their process is gone."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            left = re.fullmatch(r"\.(.+)\.tmp-(\d{1,9})-[0-9a-f]+", path.name)
            if left is None or left[1] not in names:
                continue
            try:
                os.kill(int(left[2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # another user's, and alive


def render_page(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """The page as text; equal for equal runs."""
    views = [summarize(run, label) for run, label in zip(runs, labels)]
    return (
        environment()
        .get_template("report.html")
        .render(
            title=labels[0] if len(runs) == 1 else "Comparison of runs",
            runs=views,
            comparison=compare(views),
            apart=differing_settings(runs),
            figures=_figures(runs, labels),
            command="hmpo report " + " ".join(run.path.name or "." for run in runs),
            version=__version__,
        )
    )


@functools.cache
def environment() -> Environment:
    """The template engine: everything that it prints is made visible and escaped."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def unique_labels(runs: Sequence[RunData]) -> list[str]:
    """The runs' names; runs of one name are told apart by their folders or a number."""
    names = Counter(run.label for run in runs)
    labels = [
        run.label if names[run.label] == 1 else run.path.resolve().name or run.label for run in runs
    ]
    counts: Counter[str] = Counter()
    for i, label in enumerate(labels):
        counts[label] += 1
        if counts[label] > 1:
            labels[i] = f"{label} ({counts[label]})"
    return labels


def _finalize(value: Any) -> Any:
    """What every printed value goes through before it is escaped."""
    if isinstance(value, Markup):
        return value
    return visible(mask_credentials(value)) if isinstance(value, str) else value


def _figures(runs: Sequence[RunData], labels: Sequence[str]) -> list[dict[str, Any]]:
    figures = []
    if len(runs) > 1:
        caption = "All runs in one plot; bars are 95 % Wilson intervals."
        images = [render_comparison(runs, labels, narrow) for narrow in (False, True)]
        figures.append(_figure("Success of all runs", caption, images, wide=True))
    for plot in PLOTS:
        images = [render(plot, runs, labels=labels, narrow=narrow) for narrow in (False, True)]
        figures.append(_figure(plot.title, plot.caption, images, wide=len(runs) > 1))
    return [figure for figure in figures if figure is not None]


def _figure(
    title: str, caption: str, images: Sequence[bytes | None], *, wide: bool
) -> dict[str, Any] | None:
    """A figure for wide and for narrow screens, each on a light and on a dark ground."""
    uris = {}
    for image, size in zip(images, ("", "narrow_")):
        if image is None:
            return None
        uris |= {f"{size}light": _data_uri(image), f"{size}dark": _data_uri(darken(image))}
    return {"title": title, "caption": caption, "wide": wide, **uris}


def _data_uri(svg: bytes) -> Markup:
    text = base64.b64encode(svg).decode("ascii")  # letters, digits, + / = need no escaping
    return Markup("data:image/svg+xml;base64," + text)
