"""The JSON Schema (2020-12) of hmpo.telemetry/1, made from the table of fields."""

import re
from typing import Any

from hmpo.telemetry.field import RANGE_TOLERANCE, Field
from hmpo.telemetry.fields import FIELDS


def schema_json() -> dict[str, Any]:
    """JSON Schema of one line of telemetry.jsonl or timing.jsonl.

    Unknown keys are allowed, as a reader must ignore them; null means missing.
    """
    kinds = list(dict.fromkeys(kind for row in FIELDS for kind in row.records))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hmpo.telemetry/1",
        "oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in kinds],
        "$defs": {kind: _record(kind) for kind in kinds},
    }


def _record(kind: str) -> dict[str, Any]:
    rows = [row for row in FIELDS if kind in row.records and row.name != "type"]
    families = [row for row in rows if row.pattern is not None]
    single = [row for row in rows if row.pattern is None]
    properties = {row.name: _value(row) for row in single}
    properties |= {row.trl: _value(row) for row in single if row.trl}
    if "schema" in properties:
        properties["schema"] = {"const": "hmpo.telemetry/1"}
    patterns = {}
    for row in families:
        for name in filter(None, (row.name, row.trl)):
            pieces = (re.escape(piece) for piece in re.split("<[^>]+>", name))
            patterns["^" + "(.+)".join(pieces) + "$"] = _value(row)
    needed = [row.name for row in single if row.required]
    result: dict[str, Any] = {
        "type": "object",
        "properties": {"type": {"const": kind}, **properties},
        "required": ["type", *needed],
    }
    if patterns:
        result["patternProperties"] = patterns
    return result


def _value(row: Field) -> dict[str, Any]:
    about = {"description": row.definition + (f" Unit: {row.unit}." if row.unit else "")}
    if row.kind == "any":
        return {**about, "type": ["number", "string", "boolean", "null"]}
    if row.kind == "float":
        return {**about, "anyOf": [_number(row), _NON_FINITE, {"type": "null"}]}
    if row.kind == "floats":
        item = {"anyOf": [{"type": "number"}, _NON_FINITE]}
        return {**about, "type": ["array", "null"], "items": item}
    if row.kind == "int":
        return {**about, **_number(row), "type": ["integer", "null"]}
    names = {"bool": "boolean", "str": "string", "object": "object"}
    more = {"minLength": 1} if row.kind == "str" else {}
    return {**about, **more, "type": [names[row.kind], "null"]}


_NON_FINITE = {"enum": ["nan", "inf", "-inf"]}


def _number(row: Field) -> dict[str, Any]:
    slack = 0 if row.kind == "int" else RANGE_TOLERANCE
    result: dict[str, Any] = {"type": "number"}
    if row.low is not None:
        result["minimum"] = row.low - slack
    if row.high is not None:
        result["maximum"] = row.high + slack
    return result
