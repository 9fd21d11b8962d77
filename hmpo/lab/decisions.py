"""What a series of decisions says, in few numbers: how often, how long, first and last."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hmpo.agm.stopping import GO_ON
from hmpo.lab.replay import differing
from hmpo.telemetry.ingest import Record

STATES = ("regime", "phase", "immediate", "tactical", "strategic")
NUMBERS = ("lr_mult", "eps_mult", "batch_mult", "p", "level", "uncertainty_total")


def values_of(decisions: Sequence[Record], name: str) -> list[tuple[int, Any]]:
    """Step and value of `decision/<name>`, where it was decided."""
    key = f"decision/{name}"
    return [(record["step"], record[key]) for record in decisions if record.get(key) is not None]


def summarize_decisions(decisions: Sequence[Record]) -> list[tuple[str, str]]:
    """Rows of a table: what was decided, how often, and how long it lasted."""
    rows = [("decisions", str(len(decisions)))]
    rows.append(("applied", str(sum(record["applied"] is True for record in decisions))))
    missing = Counter(
        name
        for record in decisions
        for name in str(record.get("decision/insufficient_data") or "").split(",")
        if name
    )
    if missing:
        shown = ", ".join(f"{name} ({count})" for name, count in missing.most_common(8))
        rows.append(("missing fields", shown))
    actions = Counter(value for _, value in values_of(decisions, "action"))
    rows.append(("actions", _counts(actions)))
    rows += [row for name in STATES if (row := _state(decisions, name))]
    rows += [row for name in NUMBERS if (row := _number(decisions, name))]
    stops = [(step, why) for step, why in values_of(decisions, "stop") if why != GO_ON]
    if stops:
        rows.append(("stop", f"{stops[0][1]} at step {stops[0][0]}, last at {stops[-1][0]}"))
    else:
        rows.append(("stop", "never"))
    return rows


def _counts(counter: Mapping[Any, int]) -> str:
    ordered = sorted(counter.items(), key=lambda item: (-item[1], str(item[0])))
    return ", ".join(f"{name} {count}" for name, count in ordered) or "none"


def _state(decisions: Sequence[Record], name: str) -> tuple[str, str] | None:
    """Counts of a named state, and how many records in a row it lasted on average."""
    values = [value for _, value in values_of(decisions, name)]
    if not values:
        return None
    runs = [len(list(group)) for _, group in itertools.groupby(values)]
    mean = sum(runs) / len(runs)
    return name, f"{_counts(Counter(values))}; {mean:.1f} records in a row, at most {max(runs)}"


def _number(decisions: Sequence[Record], name: str) -> tuple[str, str] | None:
    found = [value for _, value in values_of(decisions, name)]
    values = [float(v) for v in found if not isinstance(v, str) and math.isfinite(v)]
    texts = [f"no number: {_counts(odd)}"] if (odd := Counter(map(repr, _texts(found)))) else []
    if values:
        mean = math.fsum(value / len(values) for value in values)
        low, high, last = min(values), max(values), values[-1]
        texts.insert(0, f"min {low:.4g}, mean {mean:.4g}, max {high:.4g}, last {last:.4g}")
    return (name, "; ".join(texts)) if texts else None


def _texts(values: Sequence[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def compare_decisions(
    left: Sequence[Record], right: Sequence[Record]
) -> tuple[list[str], dict[str, int]]:
    """Where two series differ: a line for each decision that does, and counts by field."""
    lines: list[str] = []
    fields: Counter[str] = Counter()
    pairs = _paired(left), _paired(right)
    for key in sorted({*pairs[0], *pairs[1]}):
        first, second = (series.get(key) for series in pairs)
        if first is None or second is None:
            lines.append(f"step {key[0]}: only in the {'second' if first is None else 'first'}")
            continue
        differences = differing(first, second)
        if differences:
            lines.append(f"step {key[0]}: {'; '.join(differences)}")
            fields.update(text.split(" ", 1)[0] for text in differences)
    return lines, dict(fields)


def _paired(decisions: Sequence[Record]) -> dict[tuple[int, int], Record]:
    """By step, and by order within the step."""
    counts: Counter[int] = Counter()
    by_place = {}
    for record in decisions:
        step = record["step"]
        by_place[step, counts[step]] = record
        counts[step] += 1
    return by_place


def sweep_row(decisions: Sequence[Record]) -> dict[str, Any]:
    """One line of a sweep: what these settings would have said."""
    actions = Counter(value for _, value in values_of(decisions, "action"))
    regimes = Counter(value for _, value in values_of(decisions, "regime"))
    stops = [step for step, why in values_of(decisions, "stop") if why != GO_ON]
    factors = [float(v) for _, v in values_of(decisions, "lr_mult") if not isinstance(v, str)]
    return {
        "unstable": regimes["unstable"],
        "emergency": actions["emergency"],
        "rollback": actions["rollback"],
        "learning_rate": actions["learning_rate"],
        "curriculum": actions["curriculum"],
        "least lr_mult": min(factors, default=math.nan),
        "first stop": stops[0] if stops else None,
    }
