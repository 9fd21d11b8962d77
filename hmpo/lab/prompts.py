"""What a report says of a run's training prompts and of the tokens that it learned from most."""

from typing import Any

from hmpo.lab.folder import RunData
from hmpo.lab.settings import number


def prompt_rows(run: RunData) -> list[tuple[str, str]]:
    """How many prompts were always right, always wrong, and neither; empty without records."""
    known = [row for row in map(_counts, run.prompts) if row is not None]
    if not known:
        return []
    counts = {
        "always right": sum(k == n for k, n in known),
        "sometimes right": sum(0 < k < n for k, n in known),
        "always wrong": sum(k == 0 for k, _ in known),
    }
    silent = sum(row.get("signal") is False for row in run.prompts)
    rows = {"asked": len(known), **counts, "without a signal when last asked": silent}
    tries = sum(n for _, n in known)
    told = [(name, f"{n}, {100 * n / len(known):.0f} %") for name, n in rows.items()]
    return [*told, ("responses for each", f"{tries / len(known):.1f}")]


def token_groups(run: RunData) -> list[dict[str, Any]]:
    """The heaviest tokens of the first and of the last update that have some."""
    found = [record for record in run.tokens if isinstance(record["heaviest"], list)]
    groups = []
    for record in found[:1] + found[1:][-1:]:
        rows = [row for row in record["heaviest"] if isinstance(row, dict)]
        shown = [
            {
                "before": str(row.get("before", "")),
                "text": str(row.get("text", "")),
                "weight": _number(row.get("weight")),
                "share": _number(row.get("share")),
                "reward": _number(row.get("reward")),
            }
            for row in rows
        ]
        groups.append({"step": record.get("step"), "rows": shown})
    return groups


def _number(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _counts(row: dict[str, Any]) -> tuple[int, int] | None:
    """(successes, tries) of a record that has them."""
    k, n = row.get("successes"), row.get("tries")
    sound = type(k) is int and type(n) is int and 0 <= k <= n and n > 0
    return (k, n) if sound else None
