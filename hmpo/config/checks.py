"""Checks that settings share: each refuses a value in one line that names the field."""

import dataclasses

from hmpo.errors import require, require_positive

LARGEST = 1e37
"""Largest magnitude of any number: what float32 holds, with room to be multiplied by ten."""
EXPONENT = 1e6
"""Largest magnitude of an exponent p: M_p is the largest or least ratio long before."""


def at_least(config: object, low: int, *names: str) -> None:
    """Each named field is an integer of at least `low`."""
    for name in names:
        value = getattr(config, name)
        require(isinstance(value, int) and value >= low, name, value, f"an integer >= {low}")


def positive(config: object, *names: str) -> None:
    """Each named field is a number above 0."""
    for name in names:
        require_positive(name, getattr(config, name))


def between(config: object, low: float | int, high: float | int, *names: str) -> None:
    """Each named field is a number strictly between `low` and `high`."""
    for name in names:
        value = getattr(config, name)
        require(low < value < high, name, value, f"a number in ({low:g}, {high:g})")


def within_reason(config: object, **most: float) -> None:
    """Every number of a settings table is finite, and not so large that arithmetic overflows.

    Args:
        config: the dataclass.
        most: largest magnitude of single fields; the others have `LARGEST`.

    Raises:
        ConfigError: one line that names the field.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        limit = most.get(field.name, LARGEST)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                expected = f"a finite number of at most {limit:g} in magnitude"
                require(abs(number) <= limit, field.name, number, expected)
