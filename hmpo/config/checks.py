"""Checks that settings share: each refuses a value in one line that names the field."""

from hmpo.errors import require, require_positive


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
