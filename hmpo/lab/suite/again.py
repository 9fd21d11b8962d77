"""Whether runs made again come to the committed numbers."""

from collections.abc import Mapping

from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.suite.folder import Key
from hmpo.lab.suite.job import final_success

SHOWN = 20
"""Runs that differ and are named."""


def comparison(committed: Mapping[Key, Outcome], found: Mapping[Key, Outcome]) -> list[str]:
    """Lines that say which runs came to the same final success, to the bit, and which did not."""
    both = [key for key in found if key in committed]
    if not both:
        return ["nothing to compare: no outcome of these runs is committed"]
    different = [key for key in both if _final(committed[key]) != _final(found[key])]
    lines = [
        f"final success equal to the committed one: {len(both) - len(different)} of {len(both)}"
    ]
    for key in different[:SHOWN]:
        was, now = committed[key], found[key]
        lines.append(f"{key[0]}, seed {key[1]}: {_shown(was)} is committed, now {_shown(now)}")
    if len(different) > SHOWN:
        lines.append(f"... and {len(different) - SHOWN} more")
    places = {str(committed[key].environment) for key in both}
    if different and places != {str(found[key].environment) for key in both}:
        lines.append(f"made elsewhere: {'; '.join(sorted(places))[:500]}")
    return lines


def _final(outcome: Outcome) -> tuple[str, float | None]:
    return outcome.status, final_success(outcome)


def _shown(outcome: Outcome) -> str:
    value = final_success(outcome)
    return outcome.status if outcome.status == "failed" or value is None else repr(value)
