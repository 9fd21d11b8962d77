"""One row of the table of fields, and short ways to write the usual kinds."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["int", "float", "bool", "str", "floats", "object", "any"]

RANGE_TOLERANCE = 1e-6
"""Slack on the bounds of floats: float32 sums may round a fraction to 1 + 1e-7."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One named value of a record.

    Example: `Field(name="clip/frac", kind="float", unit="1", definition="...", low=0, high=1,
    records=("step",), trl="clip_ratio/region_mean")`.
    """

    name: str
    """Name in the log; `<word>` stands for any text, as in `reward/<function>/mean`."""
    kind: Kind
    """Type; `floats` is a list of numbers, `object` any JSON mapping."""
    unit: str
    """Unit, "1" for a pure number, "" for text."""
    definition: str
    """What is measured, over what."""
    low: float | None = None
    """Smallest value allowed (less `RANGE_TOLERANCE`), or None."""
    high: float | None = None
    """Largest value allowed (plus `RANGE_TOLERANCE`), or None."""
    records: tuple[str, ...] = ("step",)
    """Record types that may hold it."""
    trl: str | None = None
    """TRL's name of the same quantity, if it has one."""
    required: bool = False
    """Whether a record of these types must hold it."""
    producer: str = ""
    """Module of hmpo (or room) that writes it, such as `trainer.rollout`."""

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """Matches the names of a family; None for a single name."""
        if "<" not in self.name:
            return None
        parts = re.split(r"<[^>]+>", self.name)
        return re.compile("(.+)".join(re.escape(part) for part in parts))

    @property
    def expected(self) -> str:
        """What the value must be, in words."""
        words = {"int": "an integer", "float": "a number", "bool": "true or false"}
        words |= {
            "str": "a text",
            "floats": "a list of numbers",
            "object": "a mapping",
            "any": "a value",
        }
        bounds = ""
        if self.low is not None and self.high is not None:
            bounds = f" in [{self.low:g}, {self.high:g}]"
        elif self.low is not None:
            bounds = f" >= {self.low:g}"
        return words[self.kind] + bounds


def number(name: str, unit: str, definition: str, low: float | None = None, **more: Any) -> Field:
    """A number."""
    return Field(name=name, kind="float", unit=unit, definition=definition, low=low, **more)


def share(name: str, definition: str, **more: Any) -> Field:
    """A share between 0 and 1."""
    return number(name, "1", definition, 0.0, high=1.0, **more)


def count(name: str, definition: str, **more: Any) -> Field:
    """An integer >= 0."""
    return Field(name=name, kind="int", unit="count", definition=definition, low=0.0, **more)


def text(name: str, definition: str, *records: str, required: bool = True) -> Field:
    """A text, which records of these types must hold."""
    return Field(
        name=name,
        kind="str",
        unit="",
        definition=definition,
        records=records,
        required=required,
    )


def mapping(name: str, definition: str, *records: str) -> Field:
    """A mapping, which records of these types must hold."""
    return Field(
        name=name, kind="object", unit="", definition=definition, records=records, required=True
    )


def flag(
    name: str, definition: str, records: tuple[str, ...] = ("step",), required: bool = False
) -> Field:
    """True or false."""
    return Field(
        name=name, kind="bool", unit="", definition=definition, records=records, required=required
    )


def produced_by(module: str, *rows: Field) -> tuple[Field, ...]:
    """The rows that one module (or room) of hmpo writes."""
    return tuple(dataclasses.replace(row, producer=module) for row in rows)
