"""Write docs/metrics.md from the table of fields; with --check only say whether it is current."""

import argparse
import sys
from pathlib import Path

from hmpo.telemetry.field import RANGE_TOLERANCE, Field
from hmpo.telemetry.fields import GROUPS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"

HEAD = f"""# Metrics

Everything a run logs, one row for each name. This page is made from `hmpo/telemetry/fields.py` by
`python scripts/make_metrics_page.py`; the validator and the JSON Schema come from the same table,
so a metric without a row cannot be logged.

`telemetry.jsonl` holds one JSON object per line: a `run` record first, then `step` (one per
optimizer update), `eval`, `decision` and `event` records, and an `end` record last; a log without
`end` belongs to a run that crashed or is still going. It depends on configuration and seed alone:
two equal runs on one machine write equal bytes, stopped and resumed or not. Whatever depends on
the clock or the process is in `timing.jsonl` (`segment` and `time` records).

NaN and infinities are written as the texts `"nan"`, `"inf"` and `"-inf"`. A name that TRL has, too,
is written under both names in `step` records, so that dashboards carry over. Bounds of
non-integers allow {RANGE_TOLERANCE:g} of rounding. "Token mean" is a sum over all valid response
tokens divided by their number; "response mean" is a mean over responses. d is the token log ratio,
new log-prob minus the log-prob at sampling; M_p is the power mean of a response's token ratios.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for title, rows in GROUPS.items():
        parts.append(f"\n## {title}\n")
        parts.append("| name | type | unit | range | record | definition | TRL | written by |")
        parts.append("|---|---|---|---|---|---|---|---|")
        parts.extend(_row(row) for row in rows)
    return "\n".join(parts) + "\n"


def _row(row: Field) -> str:
    low = "" if row.low is None else f"{row.low:g}"
    high = "" if row.high is None else f"{row.high:g}"
    bounds = f"[{low}, {high}]" if low and high else (f">= {low}" if low else "")
    trl = f"`{row.trl}`" if row.trl else ""
    unit = "" if row.unit == "1" else row.unit
    where = ", ".join(row.records)
    definition = row.definition.replace("|", "\\|")
    producer = f"`{row.producer}`"
    cells = (f"`{row.name}`", row.kind, unit, bounds, where, definition, trl, producer)
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    if parser.parse_args().check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print("docs/metrics.md is current" if current else "docs/metrics.md is out of date")
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
