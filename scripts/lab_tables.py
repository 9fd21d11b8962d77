"""Tables of docs/experiments.md."""

from itertools import pairwise
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


SPACES = {"within": "within a response", "log-probs": "log-probs", "weights": "weights"}
BOUND = 0.02
"""What the protocol's prediction allows."""
CAUSES = {
    "spread": ("own", "formula", "sigma differs between responses"),
    "short": ("normal", "own", "responses are short: normal log ratios miss the formula as well"),
    "tails": ("within", "normal", "log ratios are not normal"),
    "rows": ("log-probs", "within", "responses weigh by advantage, length and size of the mean"),
    "tokens": ("one in weights", "within", "tokens have gradients of different sizes"),
    "sum": ("weights", "one in weights", "responses with large gradients weigh most"),
}


def probe_prediction() -> str:
    """Where the formula holds, by sigma and space."""
    result = load("probe_prediction")
    ends = (0.0, 0.1, 0.3, float("inf"))
    lines = [
        "| | sigma | batches | p = -1, -.5, .5, 1: held | furthest off | p = -2, 2: held "
        "| furthest off |",
        "|---|---|---|---|---|---|---|",
    ]
    for normal in (True, False):
        rows = [row for row in result["rows"] if (row["case"] == "normal") == normal]
        rows = [row for row in rows if not normal or row["length"] >= 100]
        for low, high in pairwise(ends):
            some = [row for row in rows if low <= row["sigma"] < high]
            for space, words in SPACES.items():
                if normal and space != "within":
                    continue
                cells = [_held(_parts(some, space, "formula", large)) for large in (False, True)]
                bounds = f"{low:g} to {high:g}" if high < ends[-1] else f"{low:g} and more"
                what = "normal, 130 and 1000 tokens" if normal else f"runs: {words}"
                lines.append(f"| {what} | {bounds} | {len(some)} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, "", source(result)])


def probe_causes() -> str:
    """What takes measured cosines off the formula, where sigma < 0.3."""
    result = load("probe_prediction")
    rows = [row for row in result["rows"] if row["case"] != "normal" and row["sigma"] < 0.3]
    lines = [
        "| cause | measured less expected: p = -1, 1: mean | largest | p = -2, 2: mean "
        "| largest | its figure, over batches |",
        "|---|---|---|---|---|---|",
    ]
    figures = {
        "rows": ("share of responses that carry p = 0", lambda row: _carry(row, "log-probs")),
        "sum": ("the same in weights", lambda row: _carry(row, "weights")),
        "spread": ("sigma of responses, 95th over 5th percentile", _spread_ratio),
        "tails": ("excess kurtosis", lambda row: row["excess kurtosis"]),
        "short": ("tokens in a response", lambda row: row["tokens"] / row["rows"]),
    }
    for name, (to, base, words) in CAUSES.items():
        cells = [_sizes(_parts(rows, to, base, large, half=False)) for large in (False, True)]
        figure = ""
        if name in figures:
            title, of = figures[name]
            values = sorted(v for row in rows if (v := of(row)) is not None)
            figure = f"{title}: {values[0]:.2g} to {values[-1]:.3g}"
        lines.append(f"| {name}: {words} | {cells[0]} | {cells[1]} | {figure} |")
    left = sorted(row["left"] for row in rows if row["left"] is not None)
    note = (
        f"{len(rows)} batches of runs with sigma < 0.3. The squared norm of a minibatch's gradient "
        "in weights (p = 0) over the sum of those of its responses, which is 0 where they cancel "
        f"and 1 where they are at right angles: {left[0]:.2f} to {left[-1]:.2f}."
    )
    return "\n".join([*lines, "", note])


def _carry(row: Row, space: str) -> float | None:
    """Effective number of responses in the gradient of p = 0, over those that there are."""
    number = row[f"carry {space}"][len(row["p"]) // 2]
    return None if number is None else number / row["rows"]


def _spread_ratio(row: Row) -> float | None:
    low, _, high = row["row sigma"]
    return high / low if low > 0 else None


def _parts(rows: list[Row], to: str, base: str, large: bool, half: bool = True) -> list[float]:
    """Differences of two figures, for |p| = 2 or those of up to 1; where both are known."""
    return [
        a - b
        for row in rows
        if to in row
        for p, a, b in zip(row["p"], row[to], row[base], strict=True)
        if a is not None and b is not None
        if (abs(p) == 2) == large and (half or abs(p) >= 1)
    ]


def _held(values: list[float]) -> str:
    inside = sum(abs(v) <= BOUND for v in values)
    return f"{inside} of {len(values)} | {max(values, key=abs):+.3f}" if values else "- | -"


def _sizes(values: list[float]) -> str:
    return f"{sum(values) / len(values):+.4f} | {max(values, key=abs):+.3f}"


def _range(rows: list[Row], n: int) -> str:
    """Least and most coverage in percent."""
    shares = [100 * row["coverage"] for row in rows if row["n"] == n]
    low, high = (f"{end:.1f}" for end in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _worst(rows: list[Row]) -> str:
    """The largest rate of wrong words in percent."""
    return f"{100 * max(row['rate'] for row in rows):.1f} %" if rows else ""
