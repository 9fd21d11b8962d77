"""What every controller is: a record in, a decision out, and a state that JSON can hold.

Floats in, decisions out: no torch, no numpy, no clock. README.md beside this file has the rules.
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from hmpo.errors import CheckpointError, TelemetryError

Record = Mapping[str, Any]
"""One flat `step` or `eval` record by the names of `hmpo.telemetry.fields`, with the
`decision/*` values of controllers that were asked before."""
Value = bool | int | float | str
"""What a decision may decide: a number, a text, or true or false."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What one controller makes of one record.

    Example: `Decision(source="regime", step=40, values={"decision/regime": "stable_learning"},
    reason="flat", inputs={"ratio/log_gap_mean": 0.002})`.
    """

    source: str
    """The controller."""
    step: int
    """Step of the record."""
    values: dict[str, Value]
    """What was decided, by `decision/<name>`; finite numbers, texts, flags."""
    reason: str
    """Why, as one word of the controller's list."""
    inputs: dict[str, Any]
    """The values it was taken from, by their names in the record."""
    insufficient_data: str | None = None
    """The field that was missing (of a framework: the fields, comma-separated), or None."""

    def __getitem__(self, name: str) -> Value:
        """`decision["regime"]` for `decision.values["decision/regime"]`."""
        return self.values[f"decision/{name}"]

    def get(self, name: str) -> Value | None:
        """The value, or None where this decision has none of that name."""
        return self.values.get(f"decision/{name}")


def number(record: Record, name: str) -> float | None:
    """The field as a float, NaN and infinities included; None where it is missing.

    Raises:
        TelemetryError: the field holds something else than a number.
    """
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TelemetryError(f"{name}: got {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        digits = int(math.log10(value if value > 0 else -value)) + 1
        raise TelemetryError(f"{name}: got {digits} digits, more than a float can hold") from None


def finite(record: Record, name: str) -> float:
    """A field of which `Controller.update` has made sure that it is there and finite."""
    value = number(record, name)
    assert value is not None and math.isfinite(value), name
    return value


class Controller:
    """What every controller has in common.

    A child names what it reads and keeps, and writes `_decide`. `update` answers for a missing
    field, and counts non-finite ones, before `_decide` sees the record.

    Args:
        config: the settings, a dataclass.
        reads: fields needed of each record type.
    """

    SOURCE: ClassVar[str]
    """Name in decision records."""
    VERSION: ClassVar[int] = 1
    """Version of the state."""
    PLAIN: ClassVar[tuple[str, ...]] = ()
    """Attributes that are JSON values and make up the state."""
    PARTS: ClassVar[tuple[str, ...]] = ()
    """Attributes with a `state_dict` of their own."""

    def __init__(self, config: Any, reads: Mapping[str, tuple[str, ...]]) -> None:
        self.config = config
        self.reads = reads
        """Fields needed of each record type; a record of another type is not read."""
        self.counts: dict[str, int] = {"read": 0, "missing": 0, "nonfinite": 0}
        """Records read, refused for a missing field, and read with a non-finite field."""

    def update(self, record: Record) -> Decision:
        """Take note of one record and decide.

        Args:
            record: a `step` or `eval` record; `decision/*` of other controllers may be merged in.

        Raises:
            TelemetryError: another type of record, no step, or a field that is no number.
        """
        kind, step = record.get("type"), record.get("step")
        if kind not in ("step", "eval"):
            raise TelemetryError(f"type: got {kind!r}, expected step or eval")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise TelemetryError(f"step: got {step!r}, expected an integer >= 0")
        names = self.reads.get(kind)
        if names is None:
            return self._decision(record, {}, "not_read")
        clean = True
        for name in names:
            value = record.get(name)
            if value is None:
                return self._insufficient(record, name)
            if type(value) is float:
                clean = clean and math.isfinite(value)
            elif not name.startswith("decision/"):
                clean = clean and math.isfinite(number(record, name) or 0.0)  # refuses texts
        self.counts["read"] += 1
        self.counts["nonfinite"] += not clean
        return self._decide(record, clean)

    def _insufficient(self, record: Record, missing: str) -> Decision:
        self.counts["missing"] += 1
        names = self.reads[record["type"]]
        return Decision(
            source=self.SOURCE,
            step=record["step"],
            values={"decision/insufficient_data": missing},
            reason="insufficient_data",
            inputs={name: record[name] for name in names if record.get(name) is not None},
            insufficient_data=missing,
        )

    def commit(self, decision: Decision, applied: Mapping[str, Value] | None = None) -> None:
        """Take note that a decision was applied; one that was not is not committed.

        Args:
            decision: what `update` returned for the latest record.
            applied: the values that were really set, by `decision/<name>`; None for those decided.
        """

    def _decide(self, record: Record, clean: bool) -> Decision:
        """Decide on a record with every field that is read; `clean` if all are finite."""
        raise NotImplementedError

    def _decision(self, record: Record, values: Mapping[str, Value], reason: str) -> Decision:
        names = self.reads.get(record["type"], ())
        return Decision(
            source=self.SOURCE,
            step=record["step"],
            values={f"decision/{name}": value for name, value in values.items()},
            reason=reason,
            inputs={name: record[name] for name in names},
        )

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the settings."""
        plain = dataclasses.asdict(self.config) if self.config is not None else None
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs; constant in size, JSON-able."""
        state = {name: getattr(self, name) for name in (*self.PLAIN, "counts")}
        state |= {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {
            "class": type(self).__name__,
            "version": self.VERSION,
            "config_hash": self.config_hash,
            "state": json.loads(json.dumps(state, allow_nan=False)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the state of another class or version, or with other entries.
        """
        own = (type(self).__name__, self.VERSION)
        saved = (state.get("class"), state.get("version"))
        if saved != own:
            raise CheckpointError(
                f"controller state: got {saved[0]} version {saved[1]}, expected {own[0]} "
                f"version {own[1]}; start the controllers anew or load the state they wrote"
            )
        entries, names = state["state"], {*self.PLAIN, *self.PARTS, "counts"}
        if set(entries) != names:
            odd = sorted(set(entries) ^ names)
            raise CheckpointError(f"{own[0]} state: entries {odd} are missing or unknown")
        if state.get("config_hash") != self.config_hash:
            warnings.warn(
                f"{own[0]}: the state was written under other settings and goes on under these",
                stacklevel=2,
            )
        copied = json.loads(json.dumps(entries))
        for name in (*self.PLAIN, "counts"):
            setattr(self, name, copied[name])
        for name in self.PARTS:
            getattr(self, name).load_state_dict(copied[name])
