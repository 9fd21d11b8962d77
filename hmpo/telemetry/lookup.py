"""Rows of the table by our names and by TRL's."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from hmpo.telemetry.field import Field
from hmpo.telemetry.fields import FIELDS

_BY_NAME = {item.name: item for item in FIELDS if item.pattern is None}
_FAMILIES = tuple((item.pattern, item) for item in FIELDS if item.pattern is not None)
_TRL_NAMES = {item.trl: item for item in FIELDS if item.trl and "<" not in item.trl}
_TRL_FAMILIES = re.compile(r"rewards/(.+)/(mean|std)")


@functools.lru_cache(maxsize=4096)
def lookup(name: str) -> Field | None:
    """The row of a metric, by its own name or a member of a family; None if there is none."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    for pattern, item in _FAMILIES:
        if pattern.fullmatch(name):
            return item
    return None


@functools.lru_cache(maxsize=4096)
def lookup_trl(name: str) -> Field | None:
    """The row whose TRL name this is; None if there is none."""
    if name in _TRL_NAMES:
        return _TRL_NAMES[name]
    match = _TRL_FAMILIES.fullmatch(name)
    return lookup(f"reward/{match[1]}/{match[2]}") if match else None


def trl_name(name: str) -> str | None:
    """TRL's name of one of our metrics, or None."""
    item = lookup(name)
    if item is None or item.trl is None:
        return None
    if item.pattern is None:
        return item.trl
    match = item.pattern.fullmatch(name)
    return item.trl if match is None else item.trl.replace("<function>", match[1])


def with_trl_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record plus TRL's spelling of every metric that has one; ours stay as they are."""
    pairs = ((trl_name(name), value) for name, value in record.items())
    return {alias: value for alias, value in pairs if alias is not None} | dict(record)
