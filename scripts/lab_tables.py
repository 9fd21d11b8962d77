"""Tables of docs/experiments.md."""

from typing import Any

from results import load, source

Row = dict[str, Any]


def statistics_coverage() -> str:
    """Coverage by method over what it is meant for, then what lies beyond, then wrong words."""
    result = load("statistics_coverage")
    rows = [row for row in result["rows"] if "coverage" in row]
    lines = ["| interval | meant for | n = 10 | n = 20 |", "|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows if row["for"]):
        own = [row for row in rows if row["method"] == method and row["for"]]
        meant = len({row["truth"] for row in own})
        kinds = own[0]["truth"] if meant == 1 else f"{meant} distributions"
        lines.append(f"| {method} | {kinds} | {_range(own, 10)} | {_range(own, 20)} |")
    lines += ["", "| beyond what it is meant for | | n = 10 | n = 20 |", "|---|---|---|---|"]
    beyond = dict.fromkeys((row["method"], row["truth"]) for row in rows if not row["for"])
    for method, truth in beyond:
        own = [row for row in rows if (row["method"], row["truth"]) == (method, truth)]
        lines.append(f"| {method} | {truth} | {_range(own, 10)} | {_range(own, 20)} |")
    lines += [
        "",
        "| words | allowed | n = 10 | n = 20 | skewed differences |",
        "|---|---|---|---|---|",
    ]
    words = [row for row in result["rows"] if "rate" in row]
    for kind in dict.fromkeys(row["words"] for row in words):
        own = [row for row in words if row["words"] == kind]
        worst = [_worst([r for r in own if r["for"] and r["n"] == n]) for n in (10, 20)]
        skewed = _worst([r for r in own if not r["for"]])
        allowed = f"{100 * own[0]['at most']:.0f} %"
        lines.append(f"| {kind} | {allowed} | {worst[0]} | {worst[1]} | {skewed} |")
    return "\n".join([*lines, "", source(result)])


def _range(rows: list[Row], n: int) -> str:
    """Least and most coverage in percent."""
    shares = [100 * row["coverage"] for row in rows if row["n"] == n]
    low, high = (f"{end:.1f}" for end in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _worst(rows: list[Row]) -> str:
    """The largest rate of wrong words in percent."""
    return f"{100 * max(row['rate'] for row in rows):.1f} %" if rows else ""
