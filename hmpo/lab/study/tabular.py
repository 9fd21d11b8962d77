"""A table as data: what a page, Markdown and CSV are all made from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hmpo.lab.statistics.intervals import Estimate
from hmpo.telemetry.csvlog import table_csv

Value = float | int | str | None


@dataclass(frozen=True)
class Item:
    """One cell of a table."""

    text: str
    """As it is shown; "" for what was not measured."""
    sort: Value = None
    """What it is sorted by; None goes last."""
    raw: Mapping[str, Value] = field(default_factory=dict)
    """Numbers for CSV by the suffix of their column, such as `_low`; "" is the column itself."""
    range: str = ""
    """Its interval, shown behind the text."""
    tone: str = ""
    """good, bad or "" ."""


@dataclass(frozen=True)
class Column:
    """Head of a column."""

    key: str
    """Name in CSV."""
    label: str
    numeric: bool = True
    title: str = ""
    """What it is, where the label is too short to tell."""
    minor: bool = False
    """Left out on a phone: another column tells it too."""
    wraps: bool = False
    """Holds sentences."""


@dataclass(frozen=True)
class Table:
    """A table with a name and a note.

    Example: `Table("T1", "Main table", "...", columns, rows).csv()`.
    """

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Item], ...]

    def csv(self) -> str:
        """Comma-separated text with plain numbers, a column for each end of an interval."""
        names: list[tuple[str, str]] = []
        for column in self.columns:
            found = [suffix for row in self.rows for suffix in row[column.key].raw]
            names += [(column.key, suffix) for suffix in dict.fromkeys(found) or [""]]
        rows = [[row[key].raw.get(suffix) for key, suffix in names] for row in self.rows]
        return table_csv([key + suffix for key, suffix in names], rows)

    def shown(self) -> "Table":
        """Without columns that hold nothing."""
        used = tuple(c for c in self.columns if any(row[c.key].text for row in self.rows))
        return Table(self.name, self.title, self.note, used, self.rows)


EMPTY = Item("", None, {"": None})


def word(text: str, tone: str = "") -> Item:
    """A text."""
    return Item(text, text, {"": text}, tone=tone)


def whole(count: int | None) -> Item:
    """A number of things."""
    return EMPTY if count is None else Item(str(count), count, {"": count})


def plain(value: float | int | None, form: str = "{:.3g}") -> Item:
    """A number that no interval belongs to, such as a maximum or a p value."""
    return EMPTY if value is None else Item(form.format(value), value, {"": value})


def estimate(
    found: Estimate | None, form: Callable[[float], str] | None = None, unit: float = 1.0
) -> Item:
    """A number with its interval; without one it is said that there is none.

    Args:
        found: None for what was not measured.
        form: number to text; None takes three digits.
        unit: factor of what is shown, 100 for points; CSV keeps the number itself.
    """
    if found is None:
        return EMPTY
    form = form or digits
    raw: dict[str, Value] = {"": found.value, "_low": found.low, "_high": found.high, "_n": found.n}
    ends = "no interval"
    if found.low is not None:
        above = "open" if found.high is None else form(unit * found.high)
        ends = f"{form(unit * found.low)}, {above}"
    return Item(form(unit * found.value), found.value, raw, ends)


def digits(value: float | int) -> str:
    """Three significant digits, without an exponent where that is short."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        size = f"{value:.3g}"
        return f"{value:.0f}" if "e" in size else size
    return f"{value:.2e}"


def share(value: float) -> str:
    """A share with three decimals."""
    return f"{value:.3f}"


def signed(value: float) -> str:
    """Points with sign and one decimal."""
    return f"{value:+.1f}"


def rows_of(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Rows with an empty item for each column that they lack."""
    return tuple({c.key: row.get(c.key, EMPTY) for c in columns} for row in rows)
