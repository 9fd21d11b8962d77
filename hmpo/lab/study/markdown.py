"""A suite's report as Markdown, for the docs and for a terminal."""

import re
from collections.abc import Mapping, Sequence

from hmpo.lab.study.analysis import Study
from hmpo.lab.study.controls import Control
from hmpo.lab.study.page import control_table, findings
from hmpo.lab.study.tabular import Item, Table
from hmpo.telemetry.visible import visible


def render_markdown(
    study: Study,
    controls: Sequence[Control],
    tables: Sequence[Table],
    figures: Mapping[str, tuple[str, str]],
) -> str:
    """The report: failed controls, what was found, tables, figures.

    Args:
        study: the analysis.
        controls: what became of them.
        tables: T1 to T7, those that there are.
        figures: title and caption by the path of a picture, relative to the page.
    """
    plan = study.plan
    lines = [f"# {escape(str(plan.protocol.get('title') or plan.name))}", ""]
    failed = [control for control in controls if control.passed is False]
    if failed:
        lines += [
            f"**{len(failed)} of this suite's controls failed: read nothing else first.**",
            "",
        ]
        lines += [f"* {c.kind} (`{c.cell}`): {escape(c.detail)}" for c in failed] + [""]
    runs = sum(len(found) for found in study.runs.values())
    kind = study.standing[0].upper() + study.standing[1:]
    lines += [
        f"Suite `{escape(plan.name)}`. {kind}. {runs} runs of {len(study.runs)} cells. "
        f"Protocol `{plan.protocol_hash or 'none'}`, suite `{plan.hash or 'unknown'}`. "
        f"Endpoint: mean of the last {plan.last} evaluations; a difference below "
        f"{100 * plan.smallest:g} points does not matter; level {plan.alpha:g}.",
        "",
        "## Controls",
        "",
        *_table(control_table(controls)),
        "",
    ]
    groups = findings(study)
    if groups:
        lines += ["## What was found", ""]
    for group in groups:
        lines += [f"{group['title']}:", ""]
        lines += [
            f"* {escape(s['text'])}{' (' + s['late'] + ')' if s['late'] else ''}"
            for s in group["sentences"]
        ]
        lines.append("")
    for table in tables:
        lines += [f"## {table.name}: {escape(table.title)}", "", *_table(table), ""]
        lines += [escape(table.note), ""] if table.note else []
    if figures:
        lines += ["## Figures", ""]
    for path, (title, caption) in figures.items():
        lines += [f"![{escape(title)}]({path})", "", f"{escape(title)}: {escape(caption)}", ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    table = table.shown()
    heads = [escape(column.label) for column in table.columns]
    marks = ["---:" if column.numeric else "---" for column in table.columns]
    rows = [[_cell(row[column.key]) for column in table.columns] for row in table.rows]
    return [f"| {' | '.join(row)} |" for row in (heads, marks, *rows)]


def _cell(item: Item) -> str:
    text = escape(item.text)
    return f"{text} [{escape(item.range)}]" if item.range else text


def escape(text: str) -> str:
    """A text as Markdown that shows it: one line, without markup of its own."""
    line = re.sub(r"\s+", " ", visible(text))
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", line)
