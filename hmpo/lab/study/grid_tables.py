"""T4 and T7: the exponent against staleness, and our losses against other people's."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.errors import TelemetryError
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.main_table import (
    COMPARISON,
    average,
    compared,
    identity,
    identity_columns,
    rows_in_order,
)
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.tabular import (
    EMPTY,
    Column,
    Item,
    Table,
    estimate,
    plain,
    rows_of,
    share,
    whole,
    word,
)
from hmpo.telemetry.reading import loads, reason

_MOST_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Place:
    """Where a cell lies in the plane of exponent and staleness."""

    p: float
    stale: str
    """Level of the factor that staleness comes from, or the lag and updates of a rollout."""


def places(study: Study) -> dict[str, Place]:
    """Cells that have one exponent, by name; {} unless there are two p and two lags."""
    found = {}
    for cell in study.compared:
        p = exponent(cell)
        if p is not None:
            found[cell.name] = Place(p, staleness(cell))
    if len({place.p for place in found.values()}) < 2:
        return {}
    return found if len({place.stale for place in found.values()}) > 1 else {}


def setting(cell: Cell, *keys: str) -> Any:
    """A nested setting of a cell: what it resolved to, else what the suite set, else None."""
    for table in (cell.resolved, cell.settings):
        value: Any = table
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def exponent(cell: Cell) -> float | None:
    """The p that a cell's runs have throughout; None for those without one.

    That are gates that take no mean (CISPO, REINFORCE), the arithmetic-harmonic mean, an exponent
    of each sign, and schedules and learned exponents.
    """
    p = setting(cell, "objective", "p")
    signed = [setting(cell, "objective", name) for name in ("p_positive", "p_negative")]
    other = (
        setting(cell, "objective", "mean") not in (None, "power")
        or setting(cell, "objective", "gate") in ("detached", "unweighted")
        or setting(cell, "objective", "exponent", "kind") not in (None, "fixed")
        or any(own is not None and own != p for own in signed)
    )
    fine = isinstance(p, int | float) and not isinstance(p, bool) and math.isfinite(p)
    return float(p) if fine and not other else None


def staleness(cell: Cell) -> str:
    """The level of `regime`, `lag` or `staleness`; else lag and updates per rollout."""
    for factor in ("regime", "lag", "staleness"):
        if factor in cell.levels:
            return cell.levels[factor]
    lag = setting(cell, "rollout", "lag") or 0
    parts = [setting(cell, "trainer", name) or 1 for name in ("minibatches", "epochs")]
    return f"lag {lag}, {parts[0]} x {parts[1]}"


def staleness_table(study: Study) -> Table | None:
    """T4; None unless the suite varies both."""
    found = places(study)
    if not found:
        return None
    columns = (
        *identity_columns(study),
        Column("p", "p"),
        Column("stale", "staleness", numeric=False),
        *COMPARISON,
        Column("sigma_sqrt_l", "sigma sqrt L"),
    )
    rows = []
    for cell in rows_in_order(study):
        if cell.name not in found:
            continue
        values = study.successes(cell.name)
        sigma = [
            run.outcome.metrics["sigma_sqrt_l"]
            for run in study.runs[cell.name].values()
            if run.outcome.metrics.get("sigma_sqrt_l") is not None
        ]
        contrast = next((c for c in study.contrasts if c.cell == cell.name), None)
        told = compared(contrast)
        row: dict[str, Item] = {
            **identity(study, cell),
            "p": plain(found[cell.name].p),
            "stale": word(found[cell.name].stale),
            "seeds": whole(len(study.runs[cell.name])),
            "success": estimate(average(values, study), share) if values else EMPTY,
            "sigma_sqrt_l": estimate(average([s for s in sigma if s is not None], study))
            if sigma
            else EMPTY,
        }
        row |= {key: told[key] for key in ("against", "difference", "verdict", "detectable")
                if key in told}  # fmt: skip
        rows.append(row)
    note = "An exponent can matter only where tokens' ratios differ: see sigma sqrt L beside it."
    return Table("T4", "Exponent and staleness", note, columns, rows_of(columns, rows)).shown()


def peers_table(folder: Path | None) -> Table | None:
    """T7, from the files `equivalence-*.json` of a folder; None where there are none.

    Raises:
        TelemetryError: such a file cannot be read.
    """
    files = sorted(folder.glob("equivalence-*.json")) if folder is not None else []
    columns = (
        Column("member", "member", numeric=False),
        Column("peer", "peer", numeric=False),
        Column("version", "version", numeric=False),
        Column("setting", "setting of the peer", numeric=False),
        Column("loss", "loss", title="largest absolute difference"),
        Column("gradient", "gradient", title="largest absolute difference"),
        Column("within", "within tolerance", numeric=False),
    )
    rows = [row for path in files for row in _peer(path)]
    if not rows:
        return None
    note = (
        "Largest absolute differences of loss and gradient on the same batches in float64, as "
        "measured by scripts/make_equivalence.py; exact figures of fixed batches, so that no "
        "interval belongs to them."
    )
    return Table("T7", "Equality with peers", note, columns, rows_of(columns, rows))


def _peer(path: Path) -> list[dict[str, Item]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES // 2**20} MiB")
        facts = loads(path.read_bytes())
        return [
            {
                "member": word(str(row["member"])),
                "peer": word(str(facts["peer"])),
                "version": word(str(facts["version"])),
                "setting": word(re.sub("`", "", str(row["setting"]))),
                "loss": plain(float(row["loss"]), "{:.0e}"),
                "gradient": plain(float(row["gradient"]), "{:.0e}"),
                "within": _within(row),
            }
            for row in facts["comparisons"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TelemetryError(f"{path}: no result of a comparison: {reason(error)}") from None


def _within(row: Mapping[str, Any]) -> Item:
    fine = row["loss"] <= row["loss_tolerance"] and row["gradient"] <= row["gradient_tolerance"]
    return word("yes" if fine else "no", "good" if fine else "bad")
