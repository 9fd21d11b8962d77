"""From a suite's folder to `summary.csv`, tables, figures, a page and Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hmpo.checkpoint import write_atomic
from hmpo.errors import ConfigError
from hmpo.lab.study import estimate_figures as estimates
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.controls import Control, controls
from hmpo.lab.study.decision_figure import decision_figure
from hmpo.lab.study.figures import Picture, curve_figure, draw, signal_figure
from hmpo.lab.study.further import sentence
from hmpo.lab.study.further_tables import foretold_table, further_table
from hmpo.lab.study.grid_tables import peers_table, staleness_table
from hmpo.lab.study.main_table import main_table
from hmpo.lab.study.markdown import render_markdown
from hmpo.lab.study.outcomes import collect, save_outcomes
from hmpo.lab.study.overall_table import overall_table
from hmpo.lab.study.page import render_page
from hmpo.lab.study.plan import read_plan
from hmpo.lab.study.side_tables import controller_table, cost_table, risk_table, stability_table
from hmpo.lab.study.tabular import Table
from hmpo.telemetry.csvlog import table_csv
from hmpo.telemetry.visible import writable

PICTURES = (
    Picture("success", "Success", "Held-out success by updates: seeds, mean, interval of the mean.",
            curve_figure("success")),
    Picture("reward", "Reward", "Mean reward in training, smoothed over 64 stretches.",
            curve_figure("reward")),
    Picture("signals", "Gap, KL and clipping",
            "Log gap, KL from the old policy and clipped shares by sign, first three blocks.",
            signal_figure),
    Picture("forest", "Differences",
            "Paired differences with intervals. Green: better, orange: worse, blue: no difference, "
            "grey: undecided; hollow: exploratory.", estimates.forest),
    Picture("profile", "Performance profile", "Share of runs above each success, over all blocks.",
            estimates.profile),
    Picture("times", "Time to target", "Share of runs that reached the block's target.",
            estimates.times),
    Picture("heatmap", "Exponent and staleness", "Mean success in percent, half width of its "
            "interval below.", estimates.heat_map),
    Picture("weights", "Token weights", "How evenly the tokens of a response weigh, by cell.",
            estimates.weights),
    Picture("sigma", "Spread of the log ratios", "Where sigma sqrt L is small, no exponent can "
            "matter.", estimates.sigma),
    Picture("envelope", "Learning rates", "Left: the tuning grid. Right: the best of k tried "
            "rates, chosen on other seeds than it is scored on.", estimates.envelope),
    Picture("decisions", "Decisions of controllers",
            "Regime (above) and phase (below) of each run. Triangles: emergencies, rollbacks and "
            "stops that were applied; crosses: stops that were decided.", decision_figure),
    Picture("qk", "Attention logits", "Largest scaled logit by updates, and QK-clip's threshold.",
            curve_figure("max_qk")),
)  # fmt: skip
"""Every figure that there may be."""
OF_THE_CHART = ("reward", "signals", "qk")
"""Figures whose curves the page's chart shows anyway."""
WIDE = ("success", "times", "weights", "sigma", "decisions")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a report came to.

    Example: `report_suite(Path("experiments/headline")).page`.
    """

    page: Path
    markdown: Path
    summary: Path
    tables: tuple[Path, ...]
    plots: tuple[Path, ...]
    outcomes: int
    controls: tuple[Control, ...]
    """A control that failed has `passed` False; say it above everything else."""
    sentences: tuple[str, ...]
    """The verdicts, ready to print."""

    def text(self) -> str:
        """What a terminal shows of it, failed controls first."""
        failed = [control for control in self.controls if control.passed is False]
        lines = [f"CONTROL FAILED: {c.kind} ({c.cell}): {c.detail}" for c in failed]
        lines += [f"{c.kind}: {c.detail}" for c in self.controls if c.passed is not False]
        lines += [*self.sentences, f"{self.outcomes} runs: {self.page}"]
        return writable("\n".join(lines))


def report_suite(
    folder: Path,
    out: Path | None = None,
    *,
    committed: Path | None = None,
    save: Path | None = None,
    equivalence: Path | None = None,
) -> Written:
    """Write everything about a suite that a reader wants.

    Args:
        folder: of the suite, with `suite.json` and `runs/`.
        out: folder of what is written; None takes the suite's.
        committed: file of outcomes that stand for runs which are not there.
        save: write all outcomes into this .jsonl or .jsonl.gz too.
        equivalence: folder with `equivalence-*.json`, of which T7 is made.

    Raises:
        RunFolderError: no suite there.
        TelemetryError: a plan, an outcome, a log or a result cannot be read.
        ConfigError: no run of the suite has ended.
        MissingDependencyError: scipy or plotly is missing.
        StorageError: something cannot be written.
    """
    folder, plan = Path(folder), read_plan(folder)
    outcomes = collect(folder, committed)
    if not outcomes:
        raise ConfigError(f"{folder}: no run of this suite has ended, expected one at least")
    if save is not None:
        save_outcomes(save, outcomes)
    out = folder if out is None else Path(out)
    study = Study.of(plan, outcomes)
    checked = controls(study)
    tables = make_tables(study, equivalence)
    write_atomic(out / "summary.csv", summary(study), make_folder=True)
    written = [out / "tables" / f"{table.name}.csv" for table in tables]
    for path, table in zip(written, tables):
        write_atomic(path, table.csv(), make_folder=True)
    images, plots = _draw_all(study, out / "plots")
    shown = {
        name: (*image, name in WIDE) for name, image in images.items() if name not in OF_THE_CHART
    }
    page, text = out / "report.html", out / "report.md"
    write_atomic(page, render_page(study, checked, tables, shown, folder, page))
    captions = {f"plots/{name}.svg": image[:2] for name, image in images.items()}
    write_atomic(text, render_markdown(study, checked, tables, captions))
    return Written(
        page=page,
        markdown=text,
        summary=out / "summary.csv",
        tables=tuple(written),
        plots=tuple(plots),
        outcomes=len(outcomes),
        controls=tuple(checked),
        sentences=tuple(sentence(study, c) for c in study.contrasts if c.verdict is not None),
    )


def _draw_all(study: Study, folder: Path) -> tuple[dict[str, tuple[str, str, bytes]], list[Path]]:
    """Every figure that there is data for: title, caption and SVG by name, and the files."""
    images, plots = {}, []
    for picture in PICTURES:
        drawn = draw(picture, study)
        for form, data in drawn.items():
            plots.append(folder / f"{picture.name}.{form}")
            write_atomic(plots[-1], data, make_folder=True)
        if drawn:
            images[picture.name] = (picture.title, picture.caption, drawn["svg"])
    return images, plots


def make_tables(study: Study, equivalence: Path | None = None) -> list[Table]:
    """T1 to T7, those for which there is data; columns without any are left out."""
    made: Sequence[Table | None] = [
        main_table(study),
        overall_table(study),
        further_table(study),
        foretold_table(study),
        risk_table(study),
        stability_table(study),
        staleness_table(study),
        controller_table(study),
        cost_table(study),
        peers_table(equivalence),
    ]
    return [table.shown() for table in made if table is not None]


def summary(study: Study) -> str:
    """One row for each run: what it is, its scores, its metrics, its cost."""
    runs = [run for found in study.runs.values() for run in found.values()]
    factors = sorted({factor for run in runs for factor in run.outcome.levels})
    metrics = list(dict.fromkeys(name for run in runs for name in run.outcome.metrics))
    cost, places = ("cpu_s", "wall_s", "tokens_per_s"), ("torch", "python", "machine", "threads")
    header = ["suite", "cell", "role", *factors, "seed", "status", "exploratory", "config_hash"]
    header += ["updates", "tokens", "success", "auc", "best", "start", "failed", "diverged"]
    header += ["collapsed"]
    rows = []
    for run in runs:
        o, s = run.outcome, run.score
        late = not study.plan.confirmatory(o.cell, [o.seed])
        row = [o.suite or study.plan.name, o.cell, o.role, *(o.levels.get(f, "") for f in factors)]
        row += [o.seed, o.status, int(late), o.config_hash, o.updates, o.tokens]
        row += [s.success, s.auc, s.best, s.start, int(s.failed), int(s.diverged)]
        row += [int(s.collapsed)]
        row += [o.metrics.get(name) for name in metrics] + [o.cost.get(name) for name in cost]
        rows.append([*row, *(o.environment.get(name) for name in places)])
    return table_csv([*header, *metrics, *cost, *places], rows)
