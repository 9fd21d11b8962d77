"""Records of schema hmpo.telemetry/1: builders, validation, and their JSON form.

telemetry.jsonl is a function of configuration and seed: equal runs on one machine, stopped and
resumed or not, write equal bytes. So it holds `run`, `step`, `eval`, `decision`, `event` and
`end` records and nothing of the clock or the process; those go to timing.jsonl as `segment` and
`time` records.
"""

import functools
import hashlib
import json
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

from hmpo.errors import TelemetryError
from hmpo.telemetry.field import RANGE_TOLERANCE, Field
from hmpo.telemetry.fields import FIELDS
from hmpo.telemetry.lookup import lookup, lookup_trl, with_trl_names
from hmpo.telemetry.reading import loads
from hmpo.telemetry.schema import schema_json as schema_json
from hmpo.telemetry.secrets import mask_secrets

SCHEMA = "hmpo.telemetry/1"
RECORD_TYPES = ("run", "step", "eval", "decision", "event", "end", "segment", "time")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,16}\b")
_COUNTS = ("success/", "eval/sampled_", "eval/greedy_", "eval/pass_at_k_")
"""Names that end in `k` for successes and `n` for trials."""
_EVENT_NAME = re.compile(r"[a-z][a-z0-9_./-]{0,63}")


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a resolved configuration, secrets masked, without what names folders."""
    kept = {
        key: value for key, value in config.items() if key not in ("out", "relative_to", "tracker")
    }
    return hashlib.sha256(encode(mask_secrets(kept)).encode()).hexdigest()


def make_run_id(name: str, hash_: str) -> str:
    """The run's name and the first 12 digits of its config hash: equal for equal runs."""
    return f"{name}-{hash_[:12]}"


def run_record(
    *,
    name: str,
    config: Mapping[str, Any],
    algo: str,
    seed: int,
    code_version: str,
    group_size: int,
    world_size: int = 1,
    base: Mapping[str, float | int],
    objective: str | None = None,
) -> dict[str, Any]:
    """First record of telemetry.jsonl.

    Args:
        name: the run's name.
        config: the resolved configuration as plain values; its hash enters `run_id`.
        algo: power_mean or gspo.
        seed: the run's seed.
        code_version: version of hmpo, with the commit where known.
        group_size: responses per prompt.
        world_size: processes that train together.
        base: lr, eps (clip half-width), batch (responses per update) and p.
        objective: the member, where no config.json beside the log tells.
    """
    hash_ = config_hash(config)
    told = {} if objective is None else {"objective": objective}
    return _checked(
        {
            "type": "run",
            "schema": SCHEMA,
            "run_id": make_run_id(name, hash_),
            "segment": 0,
            "config_hash": hash_,
            "algo": algo,
            "seed": seed,
            "code_version": code_version,
            "group_size": group_size,
            "world_size": world_size,
            "base": {key: _plain(value) for key, value in base.items()},
            **told,
        }
    )


def step_record(run_id: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Record of one optimizer update, with TRL's names beside ours.

    Args:
        run_id: from the `run` record.
        metrics: by telemetry name, `step` among them; NaN and infinities are allowed, None is
            left out; integral floats become int where the table says int.

    Raises:
        TelemetryError: a name that has no row in the table, a wrong type, or out of range.
    """
    return _measured("step", run_id, metrics)


def eval_record(run_id: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Record of one evaluation after `step` updates; `metrics` are `eval/*` names."""
    return _measured("eval", run_id, {"step": step, **metrics})


def event_record(run_id: str, step: int, name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Record of something that happened; secrets in `data` are masked.

    Keep clock times, paths of this machine and process ids out of `data`: see the module's head.
    """
    plain = without_addresses(mask_secrets(_plain(data)))
    return _checked({"type": "event", "run_id": run_id, "step": step, "name": name, "data": plain})


def without_addresses(value: Any) -> Any:
    """The value with memory addresses in its texts, which differ from run to run, as 0x..."""
    if isinstance(value, str):
        return _ADDRESS.sub("0x...", value)
    if isinstance(value, Mapping):
        return {key: without_addresses(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_addresses(item) for item in value]
    return value


def decision_record(
    run_id: str,
    step: int,
    values: Mapping[str, Any],
    *,
    source: str,
    mode: str,
    applied: bool,
    reason: str,
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Record of a controller's decision; `values` are `decision/*` names."""
    record = {"type": "decision", "run_id": run_id, "step": step, "source": source, "mode": mode}
    record |= {"applied": applied, "reason": reason, "inputs": _plain(inputs)}
    return _checked({**record, **_plain(values)})


def end_record(
    run_id: str, step: int, status: str, *, reason: str = "", warning: str = "", batch: str = ""
) -> dict[str, Any]:
    """Last record of a run.

    Args:
        run_id: from the `run` record.
        step: updates done.
        status: completed, early_stop, interrupted or failed.
        reason: why it failed; secrets in it are masked.
        warning: what it lacked to learn from.
        batch: what dynamic sampling drew and kept.
    """
    record = {"type": "end", "run_id": run_id, "step": step, "status": status}
    told = mask_secrets({"reason": reason, "warning": warning, "batch": batch})
    return _checked(record | {name: without_addresses(text) for name, text in told.items() if text})


def segment_record(
    run_id: str,
    segment: int,
    *,
    started_s: float | int,
    pid: int,
    resumed_from_step: int | None = None,
    launcher: int | None = None,
) -> dict[str, Any]:
    """Record of timing.jsonl: a process started; `started_s` is Unix time in seconds."""
    record = {"type": "segment", "schema": SCHEMA, "run_id": run_id, "segment": segment}
    record |= {"started_s": started_s, "pid": pid, "resumed_from_step": resumed_from_step}
    record |= {"launcher": launcher}
    return _checked({key: value for key, value in record.items() if value is not None})


def time_record(run_id: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Record of timing.jsonl: seconds and speed of one update."""
    return _measured("time", run_id, {"step": step, **metrics})


def split_timing(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics for the `step` record, and those that belong in the `time` record."""
    clock = {name for name in metrics if (row := lookup(name)) and row.records == ("time",)}
    return (
        {name: value for name, value in metrics.items() if name not in clock},
        {name: value for name, value in metrics.items() if name in clock},
    )


def _measured(kind: str, run_id: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    record = {"type": kind, "run_id": run_id}
    for name, value in metrics.items():
        if value is not None:
            record[name] = _coerce(lookup(name), _plain(value))
    return with_trl_names(_checked(record))


def _plain(value: Any) -> Any:
    """Numbers of any library as int or float, tuples as lists; other values as they are."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _coerce(row: Field | None, value: Any) -> Any:
    """3.0 as 3 and 1.0 as true where the table says so; anything doubtful stays as it is."""
    if row is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if row.kind == "float":
        return float(value)
    if row.kind == "int" and float(value).is_integer():
        return int(value)
    if row.kind == "bool" and value in (0, 1):
        return bool(value)
    return value


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    validate(record)
    return record


def validate(record: Mapping[str, Any], strict: bool = True) -> None:
    """Check one record against the table.

    Args:
        record: as built here or read from a log; None counts as missing.
        strict: also refuse names that have no row in the table.

    Raises:
        TelemetryError: one line with record type, field, value received and what is expected.
    """
    kind = record.get("type")
    if kind not in RECORD_TYPES:
        raise TelemetryError(f"type: got {kind!r}, expected one of {', '.join(RECORD_TYPES)}")
    for name in required_names(kind):
        if record.get(name) is None:
            raise TelemetryError(f"{kind} record: {name}: missing, expected {_expected(name)}")
    if "schema" in record:
        check_schema(record["schema"])
    for name, value in record.items():
        if value is None:
            continue
        row = lookup(name) or lookup_trl(name)
        if row is None or kind not in row.records:
            if strict:
                where = "a name of telemetry/fields.py" if row is None else _home(row)
                raise TelemetryError(f"{kind} record: {name}: not allowed here, expected {where}")
            continue
        if not fits(row, value):
            more = " below 2^64" if isinstance(value, int) and abs(value) >= 2**64 else ""
            wanted = f"expected {row.expected}{more}"
            raise TelemetryError(f"{kind} record: {name}: got {_short(value)}, {wanted}")
    _check_counts(record, kind)
    if kind == "event" and not _EVENT_NAME.fullmatch(record["name"]):
        expected = "a lower-case word such as checkpoint_saved"
        raise TelemetryError(f"event record: name: got {record['name']!r}, expected {expected}")


def _check_counts(record: Mapping[str, Any], kind: str) -> None:
    """Refuse more successes than trials."""
    for name in _COUNTS:
        k, n = record.get(f"{name}k"), record.get(f"{name}n")
        if isinstance(k, int | float) and isinstance(n, int | float) and k > n:
            raise TelemetryError(f"{kind} record: {name}k: got {k}, expected at most {name}n = {n}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _home(row: Field) -> str:
    return f"{row.name} in {' or '.join(row.records)} records"


def _expected(name: str) -> str:
    row = lookup(name)
    return row.expected if row else "a value"


@functools.lru_cache(maxsize=64)
def required_names(kind: str) -> tuple[str, ...]:
    """Names that a record of this type must hold."""
    return tuple(row.name for row in FIELDS if kind in row.records and row.required)


def check_schema(schema: Any) -> None:
    """Refuse a log of another schema or major version."""
    if not isinstance(schema, str) or not re.fullmatch(re.escape(SCHEMA) + r"(\.\d+)?", schema):
        raise TelemetryError(f"schema: got {schema!r}, expected {SCHEMA}")


def fits(row: Field, value: Any) -> bool:
    """Whether the value has the row's type and range; NaN is in every range of a float."""
    if row.kind == "any":
        return isinstance(value, bool | int | float | str)
    if row.kind == "bool":
        return isinstance(value, bool)
    if row.kind == "str":
        return isinstance(value, str) and value != ""
    if row.kind == "object":
        return isinstance(value, Mapping)
    if row.kind == "floats":
        return isinstance(value, list | tuple) and all(_is_number(item) for item in value)
    if not _is_number(value) or (row.kind == "int" and not isinstance(value, int)):
        return False
    if isinstance(value, int) and abs(value) >= (2**64 if row.kind == "int" else 10**308):
        return False
    slack = 0.0 if row.kind == "int" else RANGE_TOLERANCE
    below = row.low is not None and value < row.low - slack
    above = row.high is not None and value > row.high + slack
    return not below and not above


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def encode(record: Mapping[str, Any]) -> str:
    """One line of strict JSON in ASCII, keys sorted, NaN and infinities as texts; no newline.

    Raises:
        TelemetryError: the record holds something JSON has no form for.
    """
    try:
        return json.dumps(_finite(record), sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise TelemetryError(f"record cannot be written as JSON: {error}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def decode(line: str | bytes, non_finite: bool = True) -> dict[str, Any]:
    """The record of one line.

    Args:
        line: one JSON object.
        non_finite: turn "nan", "inf" and "-inf" into floats, except in fields that the table
            calls text; False leaves every text alone.

    Raises:
        TelemetryError: not a JSON object.
    """
    try:
        record = loads(line)
    except ValueError as error:
        raise TelemetryError(f"not a JSON record: {error}") from None
    if not isinstance(record, dict):
        raise TelemetryError(f"not a JSON record: got {type(record).__name__}, expected an object")
    if not non_finite:
        return record
    return {key: value if _is_text(key) else _infinite(value) for key, value in record.items()}


def _is_text(key: str) -> bool:
    row = lookup(key)
    return row is not None and row.kind == "str"


def _infinite(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _infinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_infinite(item) for item in value]
    return value
