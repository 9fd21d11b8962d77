"""Logs that others wrote, under our names: what they hold, what is estimated, what is missing.

The controllers need the log gap log A - log H of a response's token ratios. A log without it but
with a divergence from the policy that sampled gets twice that divergence, which it is for normal
log ratios; such records say `approx`. A divergence from a frozen reference is something else and
stands for nothing.

Rollouts are counted by records, and `staleness` is 0, as each record stands for a whole rollout.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from hmpo.errors import ConfigError, TelemetryError
from hmpo.telemetry.fields import GAP
from hmpo.telemetry.ingest import Problem, RunLog, read_records, read_run, refuse_malformed
from hmpo.telemetry.lookup import lookup, lookup_trl
from hmpo.telemetry.reading import loads, reason
from hmpo.telemetry.records import eval_record, step_record

Adapter = Literal["hmpo", "hmpo-legacy", "agm-payload", "trl", "verl"]
"""Kinds of logs."""
Record = dict[str, Any]

LOG_A, LOG_H = "ratio/logA", "ratio/logH"

LEGACY = {
    "loss": "loss",
    "mean_reward": "reward/mean",
    "mean_advantage": "adv/mean",
    "mean_importance_ratio": "ratio/m_mean",
    "clipped_fraction": "clip/frac",
    "mean_response_length": "len/mean",
    "power_parameter": "ratio/p",
}
VERL = {
    "training/global_step": "step",
    "critic/score/mean": "reward/mean",
    "critic/advantages/mean": "adv/mean",
    "actor/ppo_kl": "kl/k1",
    "actor/pg_clipfrac": "clip/frac",
    "actor/pg_loss": "pg_loss",
    "actor/grad_norm": "grad_norm",
    "actor/entropy": "entropy",
    "actor/entropy_loss": "entropy",
    "actor/lr": "lr",
    "response_length/mean": "len/mean",
    "response_length/max": "len/max",
    "response_length/clip_ratio": "len/trunc_frac",
}
NOTES = {
    "hmpo": (),
    "hmpo-legacy": ("the log gap is that of batch means, not the mean over responses",),
    "agm-payload": ("the log gap is that of the histories' last elements; TD and Q are not read",),
    "trl": ("no log gap: TRL's kl is against the reference, not the policy that sampled",),
    "verl": ("the log gap is twice actor/ppo_kl",),
}


def read_log(path: Path | str, adapter: str | None = None, strict: bool = False) -> RunLog:
    """Read any known log: our own telemetry, or that of others under our names.

    Args:
        path: .jsonl or .csv, also .gz; of TRL also trainer_state.json.
        adapter: hmpo, hmpo-legacy, agm-payload, trl or verl; None tells by the names in it.
        strict: raise at the first malformed line instead of counting it.

    Raises:
        ConfigError: an unknown adapter.
        TelemetryError: not readable, of no known kind, or more than 1 % malformed lines.
    """
    path = Path(path)
    if adapter is not None and adapter not in get_args(Adapter):
        known = ", ".join(get_args(Adapter))
        raise ConfigError(f"adapter: got {adapter!r}, expected one of {known}")
    if adapter == "hmpo":
        return read_run(path, strict)
    rows, problems, lines = _rows(path)
    if adapter is None and not rows and not problems:
        raise TelemetryError(f"{path}: empty, expected the records of a run")
    if adapter is None:
        adapter = next((kind for _, row in rows[:20] if (kind := _kind(row))), None)
        if adapter is None:
            raise TelemetryError(
                f"{path}: no log of a known kind; name it with --adapter, one of "
                f"{', '.join(get_args(Adapter))}"
            )
    if adapter == "hmpo":
        return read_run(path, strict)
    return _translated(path, adapter, rows, problems, lines, strict)


def _rows(path: Path) -> tuple[list[tuple[int, Record]], list[Problem], int]:
    """Numbered raw records; of trainer_state.json those of its `log_history`."""
    if path.suffix != ".json":
        return read_records(path)
    try:
        state = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TelemetryError(
            f"{path}: cannot be read ({reason(error)}); expected JSON lines, CSV, or a "
            "trainer_state.json with log_history"
        ) from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise TelemetryError(
            f"{path}: log_history is {'missing' if history is None else 'no list'}; expected JSON "
            "lines, CSV, or a trainer_state.json with log_history"
        )
    rows = [(i, row) for i, row in enumerate(history, start=1) if isinstance(row, dict)]
    return rows, [], len(history)


def _kind(row: Record) -> str | None:
    """What kind of log holds such a record; None where it does not tell."""
    names = set(_flat(row))
    if "run_id" in row and "type" in row:
        return "hmpo"
    if names & {"mean_importance_ratio", "power_parameter"}:
        return "hmpo-legacy"
    if any(name.split(".")[-1] in ("arithmetic_history", "td_mean") for name in names):
        return "agm-payload"
    if any(name.startswith(("actor/", "critic/")) for name in names):
        return "verl"
    bare = {name.removeprefix("train/") for name in names}
    return "trl" if bare & {"frac_reward_zero_std", "completions/mean_length"} else None


def _flat(row: Mapping[str, Any], path: str = "") -> Record:
    """Nested mappings by dotted names; verl's `data` is its record."""
    flat: Record = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, "" if name == "data" else f"{path}{name}.")
        elif value is not None:
            flat[path + name] = value
    return flat


def _translated(
    path: Path,
    adapter: str,
    rows: Iterable[tuple[int, Record]],
    problems: list[Problem],
    lines: int,
    strict: bool,
) -> RunLog:
    """The records under our names; a step that comes again counts in its last form."""
    steps: dict[int, Record] = {}
    evals: dict[int, Record] = {}
    highest = -1
    for line, row in rows:
        try:
            metrics = TRANSLATORS[adapter](_flat(row), line)
            step, evaluation = metrics.pop("step"), metrics.pop("eval", None)
            made = [("step", metrics)] if metrics else []
            made += [("eval", evaluation)] if evaluation else []
            built = [_build(kind, path.stem, step, values) for kind, values in made]
        except (KeyError, TypeError, ValueError, ArithmeticError, IndexError) as error:
            text = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(Problem(line=line, kind="malformed", message=text))
            continue
        for record in built:
            table = steps if record["type"] == "step" else evals
            if step in table:
                text = f"a second {record['type']} record of step {step}; the last counts"
                problems.append(Problem(line=line, kind="duplicate", message=text))
            elif step < highest:
                text = f"step {step} after step {highest}"
                problems.append(Problem(line=line, kind="non_monotone", message=text))
            table[step] = record
        highest = max(highest, step)
    problems.sort(key=lambda problem: problem.line)
    if strict and problems:
        raise TelemetryError(f"{path}, line {problems[0].line}: {problems[0].message}")
    refuse_malformed(path, problems, lines)
    ordered = [steps[step] for step in sorted(steps)]
    return RunLog(
        run=None,
        steps=tuple({**record, "rollout": i, "staleness": 0} for i, record in enumerate(ordered)),
        evals=tuple(evals[step] for step in sorted(evals)),
        problems=tuple(problems),
        adapter=adapter,
        notes=NOTES[adapter],
    )


def _build(kind: str, run_id: str, step: int, metrics: Mapping[str, Any]) -> Record:
    if kind == "eval":
        return eval_record(run_id, step, metrics)
    fields = {name: float(metrics[name]) for name in ("loss", "grad_norm") if name in metrics}
    bad = sum(not math.isfinite(value) for value in fields.values())
    return step_record(run_id, {"step": step, "nonfinite": bad, **metrics})


# --- one translator for each kind: a flat record and its line to metrics, `step` among them ---


def _gap(arithmetic: Any, harmonic: Any) -> Record:
    """Log means and their gap, where both means are positive."""
    if not (arithmetic is not None and harmonic is not None and arithmetic > 0 and harmonic > 0):
        return {}
    a, h = math.log(arithmetic), math.log(harmonic)
    return {LOG_A: a, LOG_H: h, GAP: max(0.0, a - h), "approx": True}


def _legacy(row: Record, line: int) -> Record:
    metrics = {ours: row[theirs] for theirs, ours in LEGACY.items() if theirs in row}
    if not metrics:
        raise TelemetryError("no metric of the HMPO trainer in it")
    metrics |= _gap(row.get("agm_arithmetic"), row.get("agm_harmonic"))
    if row.get("agm_geometric", 0) > 0:
        metrics["ratio/logG"] = math.log(row["agm_geometric"])
    return {"step": line - 1, **metrics}


def _payload(row: Record, line: int) -> Record:
    """The normalised payload, nested or flat."""

    def first(*names: str) -> Any:
        return next((row[name] for name in names if name in row), None)

    step = first("step", "global_step")
    if step is None:
        raise KeyError("step")
    histories = [
        first(f"agm.{kind}_history", f"{kind}_history") for kind in ("arithmetic", "harmonic")
    ]
    metrics = _gap(*(history[-1] if history else None for history in histories))
    names = {
        "reward/mean": ("rl.reward.train_mean", "train_reward_mean"),
        "qk/clip_rate": ("muon_clip.clip_rate", "muon_clip_rate"),
    }
    metrics |= {
        ours: value for ours, these in names.items() if (value := first(*these)) is not None
    }
    evaluation = first("rl.reward.eval_mean", "eval_reward")
    return {
        "step": step,
        **metrics,
        "eval": None if evaluation is None else {"eval/mean": evaluation},
    }


def _trl(row: Record, line: int) -> Record:
    bare = {name.removeprefix("train/"): value for name, value in row.items()}
    step = bare.get("global_step", bare.get("step"))
    if step is None:
        raise KeyError("step")
    metrics = {
        ours: value
        for name, value in bare.items()
        if (ours := _from_trl(name)) is not None and isinstance(value, int | float)
    }
    evaluation = bare.get("eval_reward", bare.get("eval/reward"))
    return {
        "step": int(step),
        **metrics,
        "eval": None if evaluation is None else {"eval/mean": evaluation},
    }


def _from_trl(name: str) -> str | None:
    """Our name of a metric in TRL's log; the adapter's own metrics have ours already."""
    row = lookup_trl(name)
    if row is None:
        own = lookup(name)
        return name if own is not None and own.records == ("step",) else None
    if row.records != ("step",):
        return None
    return row.name if row.pattern is None else name.replace("rewards/", "reward/", 1)


def _verl(row: Record, line: int) -> Record:
    metrics = {ours: row[theirs] for theirs, ours in VERL.items() if theirs in row}
    for name, value in row.items():  # the loss of hmpo.adapters.verl logs under our names
        own = lookup(name.removeprefix("actor/"))
        if name.startswith("actor/") and own is not None and own.name not in metrics:
            metrics[own.name] = value
    if "step" not in metrics:
        metrics["step"] = row["step"]
    if GAP not in metrics and "kl/k1" in metrics:
        metrics |= {GAP: max(0.0, 2 * metrics["kl/k1"]), "approx": True}
    scores = [v for k, v in row.items() if k.startswith(("val-core/", "val/")) and "mean" in k]
    evaluation = {"eval/mean": math.fsum(scores) / len(scores)} if scores else None
    return {**metrics, "step": int(metrics["step"]), "eval": evaluation}


TRANSLATORS: dict[str, Callable[[Record, int], Record]] = {
    "hmpo-legacy": _legacy,
    "agm-payload": _payload,
    "trl": _trl,
    "verl": _verl,
}
"""By kind of log."""
