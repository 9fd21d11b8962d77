"""The page of a suite: one HTML file that needs nothing else and fetches nothing.

Only two scripts may run, plotly.js and ours, named by their hashes in the content security policy.
Everything that a suite, a run or a model wrote is escaped by the template engine.
"""

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from hmpo import __version__
from hmpo.lab.report import TEMPLATES, environment
from hmpo.lab.settings import PLACES, flatten
from hmpo.lab.study.analysis import Contrast, Study
from hmpo.lab.study.controls import KINDS, Control
from hmpo.lab.study.further import sentence
from hmpo.lab.study.interactive import chart_data, plotly_source, script_json
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.samples import last_samples
from hmpo.lab.study.tabular import EMPTY, Column, Item, Table, word

MOST_CELLS = 40
"""Cells whose completions are shown."""
NAMES = {"again": "A/A"}
"""Controls whose role is not what they are called."""
GROUPS = {
    "better": "Better than the baseline",
    "worse": "Worse than the baseline",
    "no difference": "No difference that matters",
    "undecided": "Undecided",
}


def render_page(
    study: Study,
    controls: Sequence[Control],
    tables: Sequence[Table],
    images: Mapping[str, tuple[str, str, bytes, bool]],
    folder: Path,
    out: Path,
) -> str:
    """The page as text; equal for equal outcomes and folders.

    Args:
        study: the analysis.
        controls: what became of them.
        tables: T1 to T7, those that there are.
        images: by file name: title, caption, SVG, and whether it needs the whole width.
        folder: of the suite.
        out: where the page will lie, for its links.
    """
    chart = chart_data(study)
    has_chart = bool(chart["quantities"])
    plotly = plotly_source() if has_chart else ""
    script = (TEMPLATES / "suite.js").read_text(encoding="utf-8")
    scripts = [plotly, script] if has_chart else [script]
    outcomes = sum(len(runs) for runs in study.runs.values())
    return (
        environment()
        .get_template("suite.html")
        .render(
            name=study.plan.name,
            title=study.plan.protocol.get("title") or study.plan.name,
            policy=policy(scripts),
            alarms=[control for control in controls if control.passed is False],
            chips=_chips(study),
            facts=_facts(study, outcomes),
            protocol_hash=study.plan.protocol_hash,
            suite_hash=study.plan.hash,
            control_table=control_table(controls),
            findings=findings(study),
            has_chart=has_chart,
            level=f"{100 * (1 - study.plan.alpha):.0f} %",
            tables=tables,
            figures=[
                {"title": title, "caption": caption, "uri": _uri(svg), "wide": wide}
                for title, caption, svg, wide in images.values()
            ],
            settings=differences(study),
            runs=_runs(study, folder, out),
            samples=_samples(study, folder),
            hypotheses=_hypotheses(study),
            outcomes=outcomes,
            command=f"hmpo experiment report {study.plan.name}",
            version=__version__,
            chart_json=Markup(script_json(chart)),
            plotly=Markup(plotly),
            script=Markup(script),
        )
    )


def policy(scripts: Sequence[str]) -> str:
    """The content security policy under which these scripts, and no others, run."""
    hashes = (hashlib.sha256(text.encode()).digest() for text in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(value).decode()}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _uri(svg: bytes) -> Markup:
    return Markup("data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii"))


def _chips(study: Study) -> list[dict[str, str]]:
    plan = study.plan
    planned = sum(len(cell.seeds) for cell in plan.cells)
    done = sum(len(runs) for runs in study.runs.values())
    failed = sum(run.score.failed for runs in study.runs.values() for run in runs.values())
    missing = f"{planned - done} of {planned} runs missing"
    chips = [{"text": missing, "tone": "bad"} if done < planned else
             {"text": f"all {planned} runs", "tone": "good"}]  # fmt: skip
    if failed:
        chips.append({"text": f"{failed} failed", "tone": "bad"})
    tone = {"confirmatory": "good"}.get(study.standing, "plain" if plan.unchanged else "bad")
    chips.append({"text": study.standing, "tone": tone})
    if plan.registered and not plan.unchanged and study.late_runs:
        chips.append({"text": f"exploratory runs: {study.late_runs}", "tone": "plain"})
    return chips


def _facts(study: Study, outcomes: int) -> list[tuple[str, str]]:
    plan = study.plan
    told = [
        ("endpoint", f"mean of the last {plan.last} evaluations"),
        ("smallest difference that matters", f"{100 * plan.smallest:g} points"),
        ("level of tests", f"{plan.alpha:g}"),
        ("cells", str(len(study.runs))),
        ("runs", str(outcomes)),
    ]
    if plan.protocol.get("date"):
        told.insert(0, ("protocol of", str(plan.protocol["date"])))
    places = Counter(
        _place(run.outcome.environment) for r in study.runs.values() for run in r.values()
    )
    if len(places) > 1:
        told.append(("environments", f"{len(places)} different: see summary.csv"))
    return told


def _place(environment: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(environment.get(name)) for name in ("torch", "python", "machine", "threads"))


def control_table(controls: Sequence[Control]) -> Table:
    """The controls as a table."""
    columns = (
        Column("kind", "control", numeric=False),
        Column("state", "state", numeric=False),
        Column("cell", "cell", numeric=False),
        Column("detail", "found", numeric=False, wraps=True),
        Column("demand", "demanded", numeric=False, wraps=True),
    )
    states = {True: word("passed", "good"), False: word("failed", "bad"), None: word("open")}
    rows = [
        {
            "kind": word(NAMES.get(control.kind, control.kind)),
            "demand": word(KINDS[control.kind]),
            "cell": word(control.cell),
            "state": states[control.passed],
            "detail": word(control.detail),
        }
        for control in controls
    ]
    return Table("controls", "Controls", "", columns, tuple(rows))


def findings(study: Study) -> list[dict[str, Any]]:
    """The sentences of all verdicts, by their word."""
    found = []
    for name, title in GROUPS.items():
        own = [c for c in study.contrasts if c.verdict is not None and c.verdict.word == name]
        if own:
            found.append({"title": title, "sentences": [finding(study, c) for c in own]})
    return found


def finding(study: Study, contrast: Contrast) -> dict[str, str]:
    """`text`, the verdict and what belongs to it, and `late`, how many runs are exploratory."""
    text = sentence(study, contrast)
    if contrast.left_out:
        text += f"; {contrast.left_out} runs without a partner are left out"
    return {"text": text, "late": f"exploratory: {contrast.late} runs" if contrast.late else ""}


def differences(study: Study) -> Table | None:
    """Settings that are not the same in all cells; None where there are none."""
    cells = study.cells()
    tables = {c.name: {k: v for k, v in flatten(c.settings) if k not in PLACES} for c in cells}
    names = dict.fromkeys(name for table in tables.values() for name in table)
    common = {
        name: Counter(t[name] for t in tables.values() if name in t).most_common(1)[0][0]
        for name in names
    }
    names = [n for n in names if len({t.get(n, "") for t in tables.values()}) > 1]
    if not names:
        return None
    columns = (
        Column("cell", "cell", numeric=False),
        *(Column(f"s{i}", name, numeric=False) for i, name in enumerate(names)),
    )
    rows = [
        {
            "cell": word(cell.name),
            **{f"s{i}": _marked(tables[cell.name].get(n), common[n]) for i, n in enumerate(names)},
        }
        for cell in cells
    ]
    return Table("settings", "Settings that differ", "", columns, tuple(rows))


def _marked(value: str | None, common: str) -> Item:
    if value is None:
        return EMPTY
    return word(value, "" if value == common else "odd")


def _runs(study: Study, folder: Path, out: Path) -> list[dict[str, Any]]:
    found = []
    for cell in study.plan.cells:
        runs = study.runs.get(cell.name, {})
        seeds = []
        for seed in cell.seeds:
            run = runs.get(seed)
            told = "not finished"
            if run is not None:
                value = run.score.success
                told = run.outcome.status if run.score.failed else ""
                told = told or ("not measured" if value is None else f"{value:.3f}")
            seeds.append({"seed": seed, "told": told, "link": _link(folder, cell, seed, out)})
        found.append(
            {"cell": cell.name, "done": len(runs), "planned": len(cell.seeds), "seeds": seeds}
        )
    return found


def _link(folder: Path, cell: Cell, seed: int, out: Path) -> str:
    """Relative address of a run's page, or of its folder; "" where it is not there."""
    run = folder / "runs" / cell.name / str(seed)
    if not run.is_dir():
        return ""
    page = run / "report.html"
    target = os.path.relpath(page if page.is_file() else run, out.parent).replace(os.sep, "/")
    return quote(target) + ("" if page.is_file() else "/")


def _samples(study: Study, folder: Path) -> list[dict[str, Any]]:
    """The last completions of one run of each cell."""
    found = []
    for cell in study.cells()[:MOST_CELLS]:
        for seed in list(study.runs[cell.name])[:1]:
            samples = last_samples(folder / "runs" / cell.name / str(seed), 3)
            if samples:
                found.append({"cell": cell.name, "seed": seed, "samples": samples})
    return found


def _hypotheses(study: Study) -> Table | None:
    stated = study.plan.protocol.get("hypotheses")
    rows = [row for row in stated if isinstance(row, Mapping)] if isinstance(stated, list) else []
    if not rows:
        return None
    names = ("id", "claim", "prediction", "suite")
    columns = tuple(Column(name, name, numeric=False, wraps=len(name) > 4) for name in names)
    items = tuple({name: word(str(row.get(name, ""))) for name in names} for row in rows)
    return Table("hypotheses", "Hypotheses", "", columns, items).shown()
